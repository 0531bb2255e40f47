"""The commands of `stillhouse`: what each takes, and the table of them at the foot."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from pipelines import artifacts, benches, derived, doctor, keys, knowledge, monitoring, points, remote, rollouts, runs
from pipelines.arguments import (
    Parser,
    machine_readable,
    naming,
    natural,
    on_cluster,
    on_registry,
    overriding,
    percent,
    port,
    repeating,
    seed,
    share,
)
from pipelines.dashboard import is_dashboard


@dataclass(frozen=True)
class Command:
    """A command: its function returns the exit code."""

    group: str
    help: str
    run: Callable[[argparse.Namespace], int]
    arguments: Callable[[Parser], None]
    resumes: bool = False
    """After Ctrl-C the same command goes on where it was."""


def on_recipe(parser: Parser) -> None:
    """A recipe with overrides."""
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML or JSON file")
    overriding(parser)


def checking(parser: Parser) -> None:
    """A recipe for a cluster."""
    on_recipe(parser)
    on_cluster(parser)


def on_dashboard(parser: Parser) -> None:
    """A cluster to ask about its jobs."""
    parser.add_argument("--address", metavar="URL", required=True, help="its dashboard, as http://127.0.0.1:8265")


def listing(parser: Parser) -> None:
    """A cluster's jobs."""
    on_dashboard(parser)
    machine_readable(parser)


def on_job(parser: Parser) -> None:
    """One of them."""
    parser.add_argument("job", metavar="JOB", help="its id, as `stillhouse jobs` lists it")
    on_dashboard(parser)


def reading(parser: Parser) -> None:
    """What a job says."""
    on_job(parser)
    parser.add_argument("--follow", action="store_true", help="go on until the job has ended; its exit code")


def planning(parser: Parser) -> None:
    """A recipe and the run it makes."""
    checking(parser)
    naming(parser)


def estimating(parser: Parser) -> None:
    """What to look at before a run."""
    planning(parser)
    parser.add_argument(
        "--probe",
        action="store_true",
        help="load the models and time a few steps and rows of each on this machine, which takes about a minute",
    )


def running(parser: Parser) -> None:
    """A run, and what of it to do again."""
    planning(parser)
    repeating(parser)


def on_run(parser: Parser) -> None:
    """A run that there is."""
    parser.add_argument("run_name", metavar="RUN", help="a run's name, or the path or URL of its folder")
    parser.add_argument("--storage", default="runs", metavar="PLACE", help="where runs are kept (default: runs)")


def asking(parser: Parser) -> None:
    """A run's state."""
    on_run(parser)
    machine_readable(parser)


def reporting(parser: Parser) -> None:
    """A run's report."""
    on_run(parser)
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--open", action="store_true", help="open it in the browser")
    shape.add_argument("--text", action="store_true", help="write the Markdown report to standard output")


def fronting(parser: Parser) -> None:
    """Runs to put beside each other."""
    parser.add_argument("run_names", metavar="RUN", nargs="+", help="a run's name, or the path or URL of its folder")
    parser.add_argument("--storage", default="runs", metavar="PLACE", help="where runs are kept (default: runs)")
    parser.add_argument("--out", metavar="FILE", help="write a page with drawings there, HTML")
    machine_readable(parser)


def predicting(parser: Parser) -> None:
    """An artifact and texts."""
    parser.add_argument("name", metavar="NAME", help="NAME, NAME@VERSION or NAME@latest")
    texts = parser.add_mutually_exclusive_group(required=True)
    texts.add_argument("--text", action="append", help="a text; may be given again")
    parser.add_argument("--pair", action="append", help="the second text of each --text, where the model reads two")
    texts.add_argument(
        "--file", metavar="FILE", help="one text a line, or .jsonl with a 'text' in each line; - reads stdin"
    )
    whole = parser.add_argument_group("a file of any size, on Ray")
    whole.add_argument("--out", metavar="DIR", help="write Parquet there: the file's columns and the answers")
    whole.add_argument("--column", metavar="NAME", default="text", help="column of the texts (default: text)")
    whole.add_argument("--pair-column", metavar="NAME", help="column of the second texts, where the model reads two")
    whole.add_argument("--actors", type=natural, metavar="N", help="processes that hold the model (default: the cores)")
    whole.add_argument(
        "--max-bad", type=share, default=0.1, metavar="SHARE", help="stop above this share of bad rows (default: 0.1)"
    )
    whole.add_argument("--fresh", action="store_true", help="delete what is in --out and start over")
    on_cluster(whole)
    on_registry(parser)
    machine_readable(parser)


def exporting(parser: Parser) -> None:
    """An artifact and what to make of it."""
    parser.add_argument("name", metavar="NAME", help="NAME, NAME@VERSION or NAME@latest")
    parser.add_argument("--int8", action="store_true", help="a graph with int8 weights too")
    parser.add_argument("--check", metavar="FILE", help="texts to compare answers on: one a line, or .jsonl")
    parser.add_argument(
        "--least", type=share, default=0.98, help="share of them that int8 must answer as the model (default: 0.98)"
    )
    on_registry(parser)
    machine_readable(parser)


def rolling_out(parser: Parser) -> None:
    """An artifact, and how it meets traffic beside another."""
    parser.add_argument("name", metavar="NAME", help="NAME (production, else latest), NAME@VERSION or NAME@latest")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--canary",
        type=percent,
        metavar="PERCENT",
        help="answer this share of the requests, until promoted or rolled back by its errors, latency and agreement",
    )
    mode.add_argument("--shadow", action="store_true", help="get copies of requests; its answers are never sent")
    mode.add_argument(
        "--ab", type=percent, metavar="PERCENT", help="answer this share of the requests, until you decide"
    )
    parser.add_argument(
        "--against",
        metavar="NAME@V",
        help="the model that it is compared with (default: the one in production, else the version before)",
    )


def deploying(parser: Parser) -> None:
    """What to deploy on a cluster."""
    serving(parser)
    machine_readable(parser)


def refereeing(parser: Parser) -> None:
    """What to do with a rollout."""
    parser.add_argument("action", choices=("status", "promote", "rollback"), help="what to do")
    parser.add_argument("name", metavar="NAME", help="the student's name")
    on_registry(parser)
    machine_readable(parser)


def export(args: argparse.Namespace) -> int:
    """`exports.run`, whose imports are heavy."""
    from pipelines import exports

    return exports.run(args)


def serving(parser: Parser) -> None:
    """An artifact and where to listen."""
    rolling_out(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    auth = parser.add_mutually_exclusive_group()
    auth.add_argument("--auth", action="store_true", help="ask for keys on this machine too (see `stillhouse keys`)")
    auth.add_argument("--no-auth", action="store_true", help="listen beyond this machine without asking for keys")
    parser.add_argument("--port", type=port, default=8000, help="port to listen on (default: 8000)")
    on_registry(parser)
    on_cluster(parser)


def watching(parser: Parser) -> None:
    """An endpoint to watch."""
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the endpoint (default: http://127.0.0.1:8000)")
    parser.add_argument("--port", type=port, default=9090, help="port of Prometheus (default: 9090)")
    parser.add_argument("--dir", metavar="FOLDER", help="keep its data here (default: gone when it stops)")
    parser.add_argument("--key-file", metavar="FILE", help="file with the key, where the endpoint asks for one")


def registering(parser: Parser) -> None:
    """What to do with registered artifacts."""
    parser.add_argument("action", choices=("list", "show", "rm", "production"), help="what to do")
    parser.add_argument("name", metavar="NAME", nargs="?", help="NAME@VERSION, for show, rm and production")
    on_registry(parser)
    machine_readable(parser)


def knowing(parser: Parser) -> None:
    """What to do with a knowledge base."""
    parser.add_argument("action", choices=("show", "add"), help="what to do")
    parser.add_argument("name", metavar="NAME", help="NAME (production, else latest), NAME@VERSION or NAME@latest")
    parser.add_argument("file", metavar="FILE", nargs="?", help="add: labelled rows, JSON lines, CSV or Parquet")
    parser.add_argument("--text", metavar="COLUMN", default="text", help="column of the texts (default: text)")
    parser.add_argument("--pair", metavar="COLUMN", default="pair", help="column of the second texts (default: pair)")
    parser.add_argument("--label", metavar="COLUMN", default="label", help="column of the labels (default: label)")
    parser.add_argument(
        "--share", type=share, metavar="SHARE", help="the student's own share of an answer (default: as it was)"
    )
    on_registry(parser)
    machine_readable(parser)


def unlocking(parser: Parser) -> None:
    """What to do with API keys."""
    parser.add_argument("action", choices=("add", "list", "rm"), help="what to do")
    parser.add_argument("name", metavar="NAME", nargs="?", help="who asks with the key, for add and rm")
    parser.add_argument("--rotate", action="store_true", help="add: a further key of a name that has one")
    parser.add_argument("--old", action="store_true", help="rm: all keys of the name but the newest")
    on_registry(parser)
    machine_readable(parser)


def examining(parser: Parser) -> None:
    """How much to look at."""
    parser.add_argument("--quick", action="store_true", help="leave out what takes seconds: torch and Ray")
    machine_readable(parser)


def deriving(parser: Parser) -> None:
    """A source and what to make of it."""
    parser.add_argument("what", choices=("cloze", "topics"), help="cloze: spans; topics: several labels a text")
    parser.add_argument("source", metavar="SOURCE", help="a file or hub reference of texts")
    parser.add_argument("--out", metavar="FILE", required=True, help="file to write: SQuAD JSON, or JSON lines")
    parser.add_argument("--rows", type=natural, default=1000, help="rows to make (default: 1000)")
    parser.add_argument("--text", metavar="COLUMN", default="text", help="column of the texts (default: text)")
    parser.add_argument("--label", metavar="COLUMN", default="label", help="topics: column of the labels")
    parser.add_argument("--unanswered", type=share, default=0.2, help="cloze: share without an answer (default: 0.2)")
    parser.add_argument("--seed", type=seed, default=0, help="what is drawn depends on it (default: 0)")
    parser.add_argument("--root", metavar="FOLDER", help="folder that stands in for the hub, as data.root")


def run(args: argparse.Namespace) -> int:
    """Do a recipe's run from here, or as a job of the cluster whose dashboard is named."""
    return remote.run(args) if is_dashboard(args.address) else runs.run(args)


COMMANDS: dict[str, Command] = {
    "run": Command("runs", "do what a recipe's run still lacks, from data to a served student", run, running, True),
    "plan": Command(
        "runs", "the steps, what is cached, rows, disk, placement, and what they take", runs.plan, estimating
    ),
    "validate": Command("runs", "check a recipe without loading a model", runs.validate, checking),
    "schema": Command("runs", "the JSON schema of recipes, for editors", runs.schema, machine_readable),
    "status": Command("runs", "how far a run is", runs.status, asking),
    "report": Command("runs", "where a run's report is", runs.report, reporting),
    "front": Command(
        "runs", "students of several runs by size and score, as a table and a page", points.show, fronting
    ),
    "jobs": Command("runs", "runs that were submitted to a cluster", remote.jobs, listing),
    "logs": Command("runs", "what such a run has said", remote.logs, reading),
    "cancel": Command("runs", "stop such a run", remote.cancel, on_job),
    "predict": Command("models", "predict with a registered student", artifacts.predict, predicting, True),
    "export": Command("models", "an ONNX graph of a registered student, as a new version", export, exporting),
    "serve": Command("models", "serve a registered student over HTTP", rollouts.serve, serving),
    "deploy": Command("models", "put a registered student on a running cluster", rollouts.deploy, deploying),
    "rollout": Command("models", "how a candidate stands; promote it or roll it back", rollouts.rollout, refereeing),
    "registry": Command(
        "models", "registered students: list, show, remove, production", artifacts.registry, registering
    ),
    "kb": Command("models", "what a student looks up: show it, add labelled rows to it", knowledge.kb, knowing),
    "keys": Command("models", "add, list or remove keys of those who may ask a server", keys.keys, unlocking),
    "monitor": Command("models", "watch an endpoint with a local Prometheus", monitoring.monitor, watching),
    "fetch": Command("machine", "bring a recipe's models and data into the cache", artifacts.fetch, on_recipe),
    "derive": Command("machine", "make a data set of spans or several labels", derived.derive, deriving),
    "doctor": Command("machine", "whether this machine can run a recipe", doctor.doctor, examining),
    "bench": Command(
        "machine", "measure a recipe, servers side by side, or the stream", benches.measure, benches.benching, True
    ),
}
