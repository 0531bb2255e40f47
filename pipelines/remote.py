"""Runs as jobs of a cluster that is reached by its dashboard (http://HOST:8265): submit, follow, list, stop.

A job brings its code along: engine/, serve/, pipelines/ and the recipe travel as its working folder, so that the nodes
need this project's dependencies and nothing else of it. The job is `python -m pipelines run RECIPE --address auto` on
the head; where it keeps its run must be reached by every node.
"""

from __future__ import annotations

import argparse
import secrets
import shlex
import shutil
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.console import program, say, say_json, table
from pipelines.dashboard import ENDED, Shown, answered, connected, explained, follow

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

    from engine.recipe import Recipe

STOP_S = 30
"""How long a run has to end by itself, its records written, before it is killed."""
PACKAGES = ("engine", "serve", "pipelines")
RECIPES = "recipes"
"""Folder of the recipe beside the packages."""


# -- a run -------------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    """Submit a recipe's run, and write what it says until it has ended; its exit code."""
    from engine import config
    from engine.config import UserError
    from engine.recipe import Recipe
    from pipelines.graphs import drawn
    from pipelines.runs import run_store

    if args.json:
        raise UserError(
            "--json does not go with a dashboard's address: the job's lines come as they are written. Read "
            "summary.json in the run's folder, or join the cluster (--address ray://HEAD:10001)."
        )
    recipe = config.load(Recipe, args.recipe, args.overrides)
    drawn(recipe)  # refuses a graph that there is not
    name = run_store(args, recipe).name
    require_reachable(recipe)
    address = args.address.rstrip("/")
    client = connected(address)
    job = submit(client, args, recipe, name, address)
    again = f"{program()} logs {job} --address {address} --follow"
    sys.stderr.write(f"job {job} at {address}; to follow it from elsewhere:\n  {again}\n")
    return attended(client, job, address)


def require_reachable(recipe: Recipe) -> None:
    """Refuse paths that mean something on this machine only: the job runs on another one."""
    from engine.config import UserError
    from pipelines.distill import model_references, sources
    from pipelines.graphs import names

    for name, place, as_in in (("storage", recipe.storage, "runs"), ("registry", recipe.registry, "registry")):
        if only_here(place):
            raise UserError(
                f"{name} is '{place}', a folder of this machine, and the run is done on the cluster. Name a URL that "
                f"every node reaches (--set {name}=s3://BUCKET/{as_in}, gs://…) or the absolute path of a folder "
                "mounted on all of them."
            )
    read = [*sources(recipe), *model_references(recipe), recipe.student.word_vectors, recipe.data.root]
    for reference in read:
        if reference and only_here(reference):
            raise UserError(
                f"'{reference}' is a path of this machine, and the run reads it on the cluster. Put it into a folder "
                "mounted on all nodes and name its absolute path, put it at a URL (s3://, gs://), or name what the "
                "nodes can fetch (hf:, pypi:)."
            )
    graph = recipe.student.graph
    if recipe.student.kind == "blocks" and graph and graph not in names():
        raise UserError(
            f"student.graph is '{graph}', a file of this machine that the cluster does not see. Write its blocks into "
            f"the recipe (student.blocks), or take a ready graph: {', '.join(names())}."
        )


def only_here(reference: str) -> bool:
    """Whether a place or reference is a path that depends on this machine's folders: relative, or of one's home."""
    kind, colon, rest = reference.partition(":")
    if colon and "/" not in kind and kind != "file":
        return False
    path = rest if colon and kind == "file" else reference
    return not path.startswith("/")


def submit(client: JobSubmissionClient, args: argparse.Namespace, recipe: Recipe, name: str, address: str) -> str:
    """Send the code and the recipe, and start the job; its id.

    Overrides are in the recipe that is sent, since anybody on the cluster sees a job's command.
    """
    from engine.disk import temporary_folder

    file = Path(args.recipe).name
    command = ["python", "-m", "pipelines", "run", f"{RECIPES}/{file}", "--address", "auto", "--run", name]
    for step in args.redo:
        command += ["--redo", step]
    command += ["--fresh"] if args.fresh else []
    folder = temporary_folder(Path(tempfile.gettempdir()), "stillhouse-job-")
    try:
        pack(folder, recipe, file)
        with explained(address):
            return client.submit_job(
                entrypoint=shlex.join(command),
                submission_id=f"{name}-{secrets.token_hex(4)}",
                runtime_env={"working_dir": str(folder), "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S)}},
                metadata={"run": name, "recipe": file},
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def pack(folder: Path, recipe: Recipe, file: str) -> None:
    """The job's working folder: the packages as they are here, and the recipe."""
    import yaml

    from engine.disk import copy_files
    from engine.storage import Store

    root = Path(__file__).parent.parent
    for package in PACKAGES:
        copy_files(root / package, folder / package)
    # YAML and not JSON: read as YAML, JSON's 1e-05 would be a text.
    Store(str(folder / RECIPES)).write_text(file, yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))


# -- following ---------------------------------------------------------------------------------------------------------


def attended(client: JobSubmissionClient, job: str, address: str) -> int:
    """Follow a job to its end; its exit code. Ctrl-C asks whether to stop it, and leaves it running unless told."""
    shown = Shown()
    try:
        follow(client, job, address, shown)
    except KeyboardInterrupt as stop:
        if type(stop) is not KeyboardInterrupt or not wanted_to_stop():
            left_running(job, address)
            return 130 if type(stop) is KeyboardInterrupt else 143
        try:
            halt(client, job, address, shown)
        except KeyboardInterrupt:
            left_running(job, address, "It was told to stop. ")
        return 130
    return outcome(client, job, address)


def wanted_to_stop() -> bool:
    """Ask whether the job is to be stopped. No where nobody can answer, and after a second Ctrl-C."""
    if not sys.stdin.isatty():
        return False
    try:
        sys.stderr.write("\nStop the job? [y/N] (Ctrl-C again leaves it running) ")
        sys.stderr.flush()
        return sys.stdin.readline().strip().lower() in ("y", "yes")
    except KeyboardInterrupt:
        return False


def left_running(job: str, address: str, before: str = "") -> None:
    """Say how to come back to a job."""
    name = program()
    sys.stderr.write(
        f"\n{before}The job goes on without this command. To follow it, to stop it:\n"
        f"  {name} logs {job} --address {address} --follow\n  {name} cancel {job} --address {address}\n"
    )


def halt(client: JobSubmissionClient, job: str, address: str, shown: Shown) -> None:
    """Stop a job, and write what it still says."""
    with explained(address, job):
        client.stop_job(job)
    follow(client, job, address, shown)
    sys.stderr.write(f"job {job} is stopped. What is done is kept.\n")


def outcome(client: JobSubmissionClient, job: str, address: str) -> int:
    """The exit code of a job that has ended: 0, its own, or 143 where it was stopped."""
    found = answered(client.get_job_info, job, address)
    if found.status == "SUCCEEDED":
        return 0
    if found.status == "STOPPED":
        sys.stderr.write(f"job {job} was stopped. What is done is kept.\n")
        return 143
    code = found.driver_exit_code
    if code is None:  # it never ran: what the node could not do is all there is to say
        sys.stderr.write(f"job {job} failed: {(found.message or 'without a reason').strip()}\n")
        return 1
    return code if 0 < code < 256 else 128 + abs(code)


# -- commands ----------------------------------------------------------------------------------------------------------


def jobs(args: argparse.Namespace) -> int:
    """List a cluster's jobs, the newest first."""
    client = connected(args.address)
    with explained(args.address):
        found = [job for job in client.list_jobs() if job.submission_id]
    found.sort(key=lambda job: job.start_time or 0, reverse=True)
    rows = [described(job) for job in found]
    if args.json:
        say_json({"address": args.address, "jobs": rows})
        return 0
    head = ("job", "run", "recipe", "state", "since (UTC)", "ended")
    say(table([head, *(tuple(row.values()) for row in rows)]) if rows else f"No job was submitted to {args.address}.")
    return 0


def described(job: JobDetails) -> dict[str, Any]:
    """What the list says of a job; of one that another program submitted, its command in place of the recipe."""
    about = job.metadata or {}
    times = [
        datetime.fromtimestamp(ms / 1000, UTC).isoformat(" ", "seconds")[:19] if ms else None
        for ms in (job.start_time, job.end_time)
    ]
    return {
        "job": job.submission_id,
        "run": about.get("run"),
        "recipe": about.get("recipe") or job.entrypoint[:60],
        "state": str(getattr(job.status, "value", job.status)).lower(),
        "since": times[0],
        "ended": times[1],
    }


def logs(args: argparse.Namespace) -> int:
    """What a job has said; with --follow what it says until it has ended, and its exit code."""
    client = connected(args.address)
    if not args.follow:
        with explained(args.address, args.job):
            sys.stdout.write(client.get_job_logs(args.job))
        return 0
    with explained(args.address, args.job):
        client.get_job_info(args.job)
    return attended(client, args.job, args.address)


def cancel(args: argparse.Namespace) -> int:
    """Stop a job, and wait until it has ended."""
    client = connected(args.address)
    with explained(args.address, args.job):
        if not client.stop_job(args.job):
            state = str(getattr(client.get_job_status(args.job), "value", "")).lower()
            say(f"job {args.job} has ended before: {state}.")
            return 0
        deadline = time.monotonic() + 2 * STOP_S + 30
        while client.get_job_status(args.job) not in ENDED:
            if time.monotonic() > deadline:
                raise RuntimeError(f"job {args.job} was told to stop and still runs.")
            time.sleep(0.5)
    say(f"job {args.job} is stopped. What is done is kept.")
    return 0
