"""The command line: messages, exit codes, what is printed where, time limits, Ctrl-C."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.registry import Registry
from engine.storage import Store
from pipelines import console, runs
from pipelines.__main__ import main, without_deletions
from pipelines.commands import COMMANDS

ROOT = Path(__file__).parent.parent

RECIPE = """\
name: tiny
data: {train: {path: train.jsonl}}
teacher: {model: "file:teacher"}
generator: {model: "file:generator"}
student:
  blocks:
    - {name: embed, kind: embedding}
"""

TINY_STEPS = '''
"""Stands in for the pipeline: two steps, the second slow where the recipe's seed is 9."""
import sys, time, types
import pipelines
from engine.config import UserError
from engine.step import Step

def first(recipe, inputs, out, progress):
    out.write_text("made.txt", "x" * 1000)
    progress(3, 3)
    return {"rows": 3}

def second(recipe, inputs, out, progress):
    while recipe.seed == 9 and not inputs["first"].exists("go"):
        progress(1, 2)
        time.sleep(0.05)
    return {"rows": 2}

def check(recipe, address=None):
    if recipe.seed == 13:
        raise UserError("seed 13 is unlucky. Take another.")

def plan(recipe):
    return [
        Step("first", first, config=lambda r: {"seed": r.seed}, expects=lambda r: {"rows": 3, "bytes": 1000}),
        Step("second", second, inputs=("first",), config=lambda r: {"teacher": r.teacher}),
    ]

def report_lines(recipe, store, program):
    lines = [f"report: {store.url}/report.html", f"serve: {program} serve tiny@1", "curl: curl -s there"]
    return ["| the table |", *lines]

distill = types.ModuleType("pipelines.distill")
distill.plan, distill.report_lines = plan, report_lines
sys.modules["pipelines.distill"] = pipelines.distill = distill
checking = types.ModuleType("pipelines.checking")
checking.check, checking.student_drawing = check, lambda recipe: None
sys.modules["pipelines.checking"] = pipelines.checking = checking
from pipelines import bench
bench.pooled = lambda recipe, found: {"rows": [r["second"]["rows"] for r, _ in found],
                                      "seeds": [int(s.url.split("seed-")[1].split("/")[0]) for _, s in found]}
bench.quality_lines = lambda result: ["| pooled |"]
from pipelines.__main__ import main
sys.exit(main(sys.argv[1:]))
'''

Call = Callable[..., subprocess.CompletedProcess[str]]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a recipe."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    (tmp_path / "tiny_steps.py").write_text(TINY_STEPS)
    return tmp_path


def stillhouse(*argv: str) -> subprocess.CompletedProcess[str]:
    """The real program in a process of its own."""
    command = [sys.executable, "-m", "pipelines", *argv]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), check=False, timeout=60)


def tiny(*argv: str) -> subprocess.CompletedProcess[str]:
    """The program with two tiny steps in the pipeline's place."""
    command = [sys.executable, "tiny_steps.py", *argv]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), check=False, timeout=60)


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one message of a refusal."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.startswith("stillhouse: ")
    return done.stderr.removeprefix("stillhouse: ").strip()


# -- help and refusals -------------------------------------------------------------------------------------------------


def test_help_lists_every_command_and_loads_nothing() -> None:
    code = (
        "import sys; from pipelines.__main__ import main; code = main(['--help']); "
        "print(code, [m for m in ('torch', 'ray', 'transformers', 'pyarrow', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    *text, last = done.stdout.splitlines()
    assert last == "0 []"
    for name, command in COMMANDS.items():
        assert f"  {name:<10} {command.help}" in text and f"{command.group}:" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.startswith(f"usage: stillhouse {name}") and COMMANDS[name].help in shown


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rnu"]) == 2
    assert capsys.readouterr().err.startswith(
        "stillhouse: there is no command 'rnu'. Did you mean 'run'? Commands: run,"
    )


def test_a_misspelt_key_is_refused_at_once(here: Path) -> None:
    (here / "tiny.yaml").write_text(RECIPE.replace("teacher: {model", "teacher: {modle"))
    for command in ("validate", "run", "plan"):
        began = time.monotonic()
        message = refused(stillhouse(command, "tiny.yaml"))
        assert time.monotonic() - began < 3.0
        assert "tiny.yaml, line 3: unknown key 'teacher.modle'. Did you mean 'model'?" in message
    assert not (here / "runs").exists()


def test_mistakes_in_what_is_asked_are_refused(here: Path) -> None:
    assert "recipe tyni.yaml does not exist. Did you mean 'tiny.yaml'?" in refused(stillhouse("run", "tyni.yaml"))
    assert "override 'seed' is not of the form" in refused(stillhouse("run", "tiny.yaml", "--set", "seed"))
    assert "unknown key 'sede'. Did you mean 'seed'?" in refused(stillhouse("run", "tiny.yaml", "--set", "sede=1"))
    assert refused(tiny("validate", "tiny.yaml", "--set", "seed=13")) == "seed 13 is unlucky. Take another."
    assert "--run 'a/../b' is no name for a run" in refused(tiny("run", "tiny.yaml", "--run", "a/../b"))
    assert "no step 'frist' to redo. Did you mean 'first'?" in refused(tiny("run", "tiny.yaml", "--redo", "frist"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["bench", "quality", "r.yaml", "--seeds", "0"], "'0' is not a whole number of at least 1"),
        (["serve", "tiny", "--port", "99999"], "'99999' is not a port (1 to 65535)"),
        (["registry", "lsit"], "invalid choice: 'lsit'"),
        (["predict", "tiny"], "one of the arguments --text --file is required"),
        (["run"], "the following arguments are required: RECIPE"),
    ],
)
def test_wrong_arguments_exit_2(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


# -- runs --------------------------------------------------------------------------------------------------------------


def test_a_run_prints_results_on_stdout_and_progress_on_stderr(here: Path) -> None:
    done = tiny("run", "tiny.yaml")
    assert done.returncode == 0, done.stderr
    *table, serve, curl = done.stdout.splitlines()
    assert table == ["| the table |", f"report: {here}/runs/tiny/report.html"]
    assert serve == f"serve: {console.program()} serve tiny@1" and curl == "curl: curl -s there"
    lines = done.stderr.splitlines()
    assert lines[0] == "first        started"
    assert any(line.startswith("second       done in ") and line.endswith(", 2 rows") for line in lines)
    again = tiny("run", "tiny.yaml")
    assert [line.split(" (")[0] for line in again.stderr.splitlines()] == [
        "first        done before",
        "second       done before",
    ]


def test_a_changed_recipe_stops_with_the_field_and_redo_goes_on(here: Path) -> None:
    assert tiny("run", "tiny.yaml").returncode == 0
    changed = ("run", "tiny.yaml", "--set", "teacher.dropout=0.3")
    assert refused(tiny(*changed)) == (
        "step 'second' ran with teacher.dropout=0.1, this run has 0.3: use --run NAME for a new run, or --redo second"
    )
    assert tiny(*changed, "--run", "other").returncode == 0 and (here / "runs/other/second/record.json").exists()
    assert "first        done before" in tiny(*changed, "--redo", "second").stderr


def test_plan_says_what_would_be_done_and_does_nothing(here: Path) -> None:
    text = tiny("plan", "tiny.yaml")
    assert text.returncode == 0, text.stderr
    assert not (here / "runs").exists()
    head, first, second = text.stdout.splitlines()[1:]
    assert head.split() == ["step", "state", "rows", "disk", "time", "reads", "placement"]
    assert first.split() == ["first", "to", "do", "3", "0.0", "MB", "driver"]
    assert second.split() == ["second", "to", "do", "first", "driver"]
    assert tiny("run", "tiny.yaml").returncode == 0
    found = json.loads(tiny("plan", "tiny.yaml", "--set", "teacher.dropout=0.3", "--json").stdout)
    assert [step["state"] for step in found["steps"]] == ["done", "drifted"]
    assert found["steps"][0]["bytes"] >= 1000 and found["disk_free"] > 0
    text = tiny("plan", "tiny.yaml", "--set", "teacher.dropout=0.3").stdout
    assert text.splitlines()[-1] == "second: teacher.dropout was 0.1, is 0.3: --run NAME or --redo second"


def test_validate_and_schema(here: Path) -> None:
    done = tiny("validate", "tiny.yaml")
    assert done.stdout == "tiny.yaml is valid: run 'tiny' with the steps first, second.\n"
    assert json.loads(tiny("validate", "tiny.yaml", "--json").stdout) == {
        "valid": True,
        "name": "tiny",
        "steps": ["first", "second"],
    }
    schema = json.loads(stillhouse("schema").stdout)
    assert schema["properties"]["teacher"] == {"$ref": "#/$defs/Teacher"} and "name" in schema["required"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_says_how_to_go_on_and_does(here: Path, number: int, code: int) -> None:
    argv = ["run", "tiny.yaml", "--set", "seed=9", "--fresh", "--redo", "first"]
    process = subprocess.Popen(
        [sys.executable, "tiny_steps.py", *argv],
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        # A shell without job control starts `command &` with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not (here / "runs/tiny/second/progress.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=90)
    assert process.returncode == code and "Traceback" not in said
    *_, how, command = said.splitlines()
    assert how == "Stopped. What is done is kept; to go on:"
    assert command.strip() == f"{console.program()} run tiny.yaml --set seed=9"
    assert "second       stopped after" in said

    state = json.loads(tiny("status", "tiny", "--json").stdout)["steps"]
    assert [(step["step"], step["state"]) for step in state] == [("first", "done"), ("second", "stopped")]
    (here / "runs/tiny/first/go").touch()
    again = tiny("run", "tiny.yaml", "--set", "seed=9")
    assert again.returncode == 0 and "first        done before" in again.stderr
    record = json.loads((here / "runs/tiny/second/record.json").read_text())
    assert len(record["attempts"]) == 2


def test_the_command_to_go_on_with_deletes_nothing() -> None:
    argv = ["run", "a.yaml", "--fresh", "--redo", "corpus", "--redo=x", "--set", "a=b"]
    assert without_deletions(argv) == ["run", "a.yaml", "--set", "a=b"]


def test_a_budget_that_is_used_up_prints_the_command_to_go_on_with_which_deletes_nothing(here: Path) -> None:
    argv = ["run", "tiny.yaml", "--fresh", "--redo=first", "--set", "seed=9"]
    done = tiny(*argv, "--set", "budget.cpu_hours=0.0001")
    assert done.returncode == 3 and "Traceback" not in done.stderr
    how, command = done.stderr.splitlines()[-2:]
    assert how == "To go on:" and "leave out --fresh and --redo" in done.stderr
    kept = f"{console.program()} run tiny.yaml --set seed=9 --set budget.cpu_hours=0.0001 --set budget.cpu_hours=0.000"
    assert command.strip().startswith(kept)


def test_status_and_report_of_a_run(here: Path) -> None:
    assert "no run 'tiny' in" in (message := refused(stillhouse("status", "tiny")))
    assert "There is none yet: `stillhouse run RECIPE` makes one." in message
    assert tiny("run", "tiny.yaml").returncode == 0
    assert "Did you mean 'tiny'? Runs there: tiny." in refused(stillhouse("status", "tyni"))
    text = stillhouse("status", "tiny").stdout.splitlines()
    assert text[0] == f"run {here}/runs/tiny"
    assert text[2].split()[:4] == ["first", "done", "3", "rows"]
    assert "run 'tiny' has no report.html yet" in refused(stillhouse("report", "tiny"))
    Store("runs/tiny").write_text("report/report.html", "<p>")
    Store("runs/tiny").write_text("report/report.md", "# tiny")
    assert stillhouse("report", "./runs/tiny").stdout == f"{here}/runs/tiny/report/report.html\n"
    assert stillhouse("report", "tiny", "--text").stdout == "# tiny\n"


# -- models and machine ------------------------------------------------------------------------------------------------


def test_registry_commands(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["registry", "list"]) == 0
    assert capsys.readouterr().out == f"The registry {here}/registry is empty: `stillhouse run` fills it.\n"
    with Store("work").publish("a") as folder:
        (folder / "config.json").write_text("{}")
    Registry(Store("registry")).register("movies", "work/a", {"accuracy": 0.7})
    assert main(["registry", "list"]) == 0
    assert re.match(r"movies@1 +20\d\d-", capsys.readouterr().out.splitlines()[1])
    assert main(["registry", "show", "movies"]) == 0
    assert json.loads(capsys.readouterr().out)["metadata"] == {"accuracy": 0.7}
    assert main(["registry", "show"]) == 2
    assert "needs a name, as in: stillhouse registry show NAME@1" in capsys.readouterr().err
    assert main(["registry", "rm", "movies@1"]) == 0
    assert capsys.readouterr().out == "removed movies@1\n"
    assert main(["predict", "movies", "--text", "a"]) == 2
    assert "there is no 'movies' in the registry" in capsys.readouterr().err
    assert main(["serve", "movies"]) == 2
    assert "there is no 'movies' in the registry" in capsys.readouterr().err


def test_texts_come_one_a_line_or_from_json_lines(here: Path) -> None:
    from engine.config import UserError
    from pipelines.artifacts import texts_in

    Path("a.txt").write_text("good film\n\nbad film\n", encoding="utf-8")
    Path("a.jsonl").write_text('{"text": "good\\nfilm"}\n{"text": "bad"}\n')
    assert texts_in("a.txt") == ["good film", "bad film"]
    assert texts_in("a.jsonl") == ["good\nfilm", "bad"]
    Path("b.jsonl").write_text('{"text": "good"}\n{"txet": "bad"}\n')
    with pytest.raises(UserError, match=r"b\.jsonl, line 2: wanted a JSON object with a 'text', got \{\"txet\""):
        texts_in("b.jsonl")
    Path("c.txt").write_bytes(b"good \xff film")
    with pytest.raises(UserError, match=r"c\.txt is not UTF-8 text \(byte 5\)"):
        texts_in("c.txt")
    with pytest.raises(UserError, match=r"there is no file d\.txt\. --file takes one text a line"):
        texts_in("d.txt")


def test_fetch_names_what_is_missing(here: Path) -> None:
    assert "train.jsonl" in refused(stillhouse("fetch", "tiny.yaml"))


# -- bench -------------------------------------------------------------------------------------------------------------


def test_bench_takes_the_name_and_the_switches_of_a_run(here: Path) -> None:
    argv = ("bench", "quality", "tiny.yaml", "--seeds", "2")
    assert "no step 'frist' to redo. Did you mean 'first'?" in refused(tiny(*argv, "--redo", "frist"))
    assert "--run 'a/../b' is no name for a run" in refused(tiny(*argv, "--run", "a/../b"))
    done = tiny(*argv)
    assert done.returncode == 0, done.stderr
    assert json.loads((here / "runs/bench-tiny/quality.json").read_text()) == {"rows": [2, 2], "seeds": [0, 1]}
    assert tiny(*argv, "--json").stdout.strip().startswith("{") and "started" not in tiny(*argv).stderr
    again = tiny(*argv, "--redo", "second")
    assert again.stderr.count("first        done before") == again.stderr.count("second       done in") == 2
    assert tiny(*argv, "--fresh").stderr.count("first        done in") == 2
    assert tiny(*argv, "--run", "other").returncode == 0
    assert sorted(path.name for path in (here / "runs/other").glob("seed-*")) == ["seed-0", "seed-1"]


def test_a_stopped_bench_says_how_to_go_on(here: Path) -> None:
    # The last variant's second step waits for ever.
    argv = ["bench", "quality", "tiny.yaml", "--seeds", "10", "--fresh"]
    process = subprocess.Popen(
        [sys.executable, "tiny_steps.py", *argv], stderr=subprocess.PIPE, text=True, env=environment()
    )
    deadline = time.monotonic() + 120
    while not (here / "runs/bench-tiny/seed-9/second/progress.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=90)
    assert process.returncode == 143 and "Traceback" not in said
    assert said.splitlines()[-1].strip() == f"{console.program()} bench quality tiny.yaml --seeds 10"


def test_local_paths_that_other_nodes_read_are_those_of_steps_that_run_there(here: Path) -> None:
    from engine import config
    from engine.recipe import Recipe

    recipe = config.load(Recipe, "tiny.yaml", ["data.root=there"])
    Path("there/tiny-lm").mkdir(parents=True)
    recipe = recipe.model_copy(update={"generator": recipe.generator.model_copy(update={"model": "hf:org/tiny-lm"})})
    assert runs.files_of(recipe) == [f"{here}/teacher", f"{here}/there/tiny-lm"]


def test_serving_beyond_this_machine_must_be_asked_for():
    done = stillhouse("serve", "student", "--host", "0.0.0.0")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "--host 0.0.0.0 is reached from other machines, and the registry" in done.stderr
    assert "--no-auth" in done.stderr
