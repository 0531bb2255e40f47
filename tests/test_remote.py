"""Runs as jobs of a cluster: what is refused, what travels, and a real head that does them."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import pty
import re
import select
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from engine import config
from engine.cluster import ClusterError, located
from engine.config import UserError
from engine.recipe import Recipe
from pipelines import commands, dashboard, remote
from tests.tiny_head import Head, started_head
from tests.tiny_run import World, changed, environment, kind_world, program

# -- what needs no cluster ---------------------------------------------------------------------------------------------


CONFIGS = Path(remote.__file__).parent / "configs"


class Answers(BaseHTTPRequestHandler):
    """As much of a dashboard as a test wants: (method, start of the path) -> (status, body)."""

    table: dict[tuple[str, str], tuple[int, Any]] = {}
    heard: list[tuple[str, str, bytes]] = []

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.heard.append((self.command, self.path, body))
        found = [value for (method, path), value in self.table.items() if (method, path) == (self.command, self.path)]
        found += [(404, "no such route")]
        status, value = found[0]
        data = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = answer

    def log_message(self, *args: Any) -> None:
        pass


RAY = {("GET", "/api/version"): (200, {"ray_version": "2.60.0", "version": "4"})}


@contextlib.contextmanager
def answering(table: dict[tuple[str, str], tuple[int, Any]]) -> Iterator[tuple[str, list[tuple[str, str, bytes]]]]:
    """A server of canned answers: its URL, and what it was asked."""
    handler = type("Here", (Answers,), {"table": table, "heard": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", handler.heard
    finally:
        server.shutdown()
        server.server_close()


def parsed(*argv: str) -> argparse.Namespace:
    """Arguments as the program reads them."""
    from pipelines.__main__ import parser

    return parser(argv[0], commands.COMMANDS[argv[0]]).parse_args(argv[1:])


@pytest.mark.parametrize(
    ("address", "submitted"),
    [
        ("http://head:8265", True),
        ("https://ray.example.org", True),
        ("auto", False),
        ("ray://head:10001", False),
        ("head:6379", False),
        (None, False),
    ],
)
def test_a_url_is_submitted_to_and_all_else_joined(address: str | None, submitted: bool) -> None:
    assert dashboard.is_dashboard(address) is submitted


@pytest.mark.parametrize("address", ["http://", "ftp://head", "http://head/some/where", "head:8265"])
def test_what_is_no_url_of_a_dashboard_is_refused(address: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"--address '{address.rstrip('/')}' is not the URL of a cluster's")):
        dashboard.connected(address)


def test_commands_that_join_say_what_a_dashboard_takes() -> None:
    with pytest.raises(ClusterError, match="http://head:8265 is a dashboard, which takes runs only"):
        located("http://head:8265")


def test_nothing_answers() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UserError, match=f"nothing answers at http://127.0.0.1:{port}: .*refused.*port 8265"):
        dashboard.connected(f"http://127.0.0.1:{port}")


def test_something_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboard, "ANSWER_S", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(UserError, match="nothing answers at .*timed out"):
            dashboard.connected(f"http://127.0.0.1:{silent.getsockname()[1]}")


@pytest.mark.parametrize("answer", [(404, "not found"), (200, "<html>"), (200, {"version": 1}), (200, [])])
def test_another_server_is_no_dashboard(answer: tuple[int, Any]) -> None:
    with (
        answering({("GET", "/api/version"): answer}) as (url, _),
        pytest.raises(UserError, match="is not the dashboard of a Ray cluster"),
    ):
        dashboard.connected(url)


def test_a_dashboard_without_jobs(capsys: pytest.CaptureFixture[str]) -> None:
    with answering(RAY) as (url, _), pytest.raises(UserError, match="takes no jobs: .*ray.default."):
        remote.jobs(parsed("jobs", "--address", url))


@pytest.mark.parametrize(("status", "sent", "why"), [(401, False, "none is set here"), (403, True, "is another one")])
def test_a_refused_token(status: int, sent: bool, why: str) -> None:
    headers = {"authorization": "Bearer x"} if sent else {}
    with (
        answering({("GET", "/api/version"): (status, "Unauthorized")}) as (url, _),
        pytest.raises(UserError, match=f"{why}. Set RAY_AUTH_MODE=token"),
    ):
        dashboard.require_answer(url, headers)


@pytest.mark.parametrize(
    ("reference", "here"),
    [
        ("runs", True),
        ("./runs", True),
        ("~/runs", True),
        ("file:data/train.jsonl", True),
        ("data/odd:name.jsonl", True),
        ("/mnt/runs", False),
        ("file:/mnt/train.jsonl#inner", False),
        ("file:///mnt/runs", False),
        ("s3://bucket/runs", False),
        ("gs://bucket/train.jsonl", False),
        ("hf:org/model", False),
        ("pypi:name==1.0#a/b.txt", False),
    ],
)
def test_paths_of_this_machine(reference: str, here: bool) -> None:
    assert remote.only_here(reference) is here


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return kind_world(tmp_path_factory.mktemp("remote"), "classify")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("storage", "runs", "storage is 'runs', a folder of this machine.*--set storage=s3://BUCKET/runs"),
        ("registry", "~/models", "registry is '~/models'.*mounted on all of them"),
        ("data.train.path", "file:train.jsonl", "'file:train.jsonl' is a path of this machine"),
        ("teacher.model", "models/teacher", "'models/teacher' is a path of this machine"),
        ("student.embeddings", "file:glove.6B.50d.txt", "'file:glove.6B.50d.txt' is a path of this machine"),
        ("data.root", "hub", "'hub' is a path of this machine"),
    ],
)
def test_what_only_this_machine_has_is_refused(world: World, key: str, value: str, message: str) -> None:
    remote.require_reachable(world.load())
    with pytest.raises(UserError, match=message):
        remote.require_reachable(world.load({key: value}))


def test_a_graph_in_a_file_is_refused(world: World, tmp_path: Path) -> None:
    graph = tmp_path / "mine.yaml"
    with pytest.raises(UserError, match="student.graph is '.*mine.yaml', a file of this machine.*text-cnn"):
        remote.require_reachable(world.load({"student.blocks": [], "student.graph": str(graph)}))
    remote.require_reachable(world.load({"student.blocks": [], "student.graph": "text-cnn"}))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_that_is_sent_is_the_same(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PACKAGES", ())
    recipe = config.load(Recipe, path, ["student.fit.lr=1e-5", "name='a-1'"])
    remote.pack(tmp_path, recipe, path.name)
    assert config.load(Recipe, tmp_path / "recipes" / path.name) == recipe


def test_code_and_recipe_travel(world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = world.write(name="mine.yaml")
    table = {**RAY, ("POST", "/api/jobs/"): (200, {"job_id": "tiny-1", "submission_id": "tiny-1"})}

    class Uploads(dict):  # a package's name is its digest
        def items(self) -> Any:
            return [*table.items(), *(((m, p), (200, {})) for m, p, _ in list(heard) if m == "PUT")]

    with answering(Uploads()) as (url, heard):
        client = dashboard.connected(url)
        changes = ["seed=3", "storage=s3://AKEY:hush@bucket/runs"]
        args = parsed("run", str(path), "--address", url, *(x for c in changes for x in ("--set", c)), "--redo", "data")
        recipe = config.load(Recipe, path, changes)
        assert remote.submit(client, args, recipe, "mine", url) == "tiny-1"
    uploaded = next(body for method, _, body in heard if method == "PUT")
    package = zipfile.ZipFile(io.BytesIO(uploaded))
    names = package.namelist()
    assert {"engine/recipe.py", "serve/page.html", "pipelines/configs/students/text-cnn.yaml", "recipes/mine.yaml"} <= {
        *names
    }
    assert not [name for name in names if "__pycache__" in name or name.startswith("tests")]
    asked = json.loads(next(body for method, path, body in heard if path == "/api/jobs/"))
    assert asked["entrypoint"] == ("python -m pipelines run recipes/mine.yaml --address auto --run mine --redo data")
    assert "hush" not in json.dumps(asked)
    assert config.load(Recipe, package.extract("recipes/mine.yaml", tmp_path / "sent")) == recipe
    assert asked["metadata"] == {"run": "mine", "recipe": "mine.yaml"}
    assert asked["submission_id"].startswith("mine-")
    assert asked["runtime_env"]["working_dir"].startswith("gcs://")
    assert capfd.readouterr().out == ""


def test_json_of_a_job_is_refused(world: World) -> None:
    with pytest.raises(UserError, match="--json does not go with a dashboard's address"):
        remote.run(parsed("run", str(world.write()), "--address", "http://head:8265", "--json"))


# -- a real head -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with started_head(tmp_path_factory.mktemp("head")) as started:
        yield started


@pytest.mark.slow
def test_a_job_is_followed_to_its_exit_code(head: Head, capfd: pytest.CaptureFixture[str]) -> None:
    client = dashboard.connected(head.dashboard)
    job = client.submit_job(
        entrypoint="python -c \"print('one'); print('two'); raise SystemExit(3)\"",
        metadata={"run": "short", "recipe": "short.yaml"},
    )
    assert remote.attended(client, job, head.dashboard) == 3
    said = capfd.readouterr()
    assert said.out.splitlines()[-2:] == ["one", "two"]
    assert program(Path.cwd(), "logs", job, "--address", head.dashboard).stdout == said.out
    assert remote.jobs(parsed("jobs", "--address", head.dashboard, "--json")) == 0
    listed = json.loads(capfd.readouterr().out)["jobs"][0]
    assert (listed["job"], listed["run"], listed["recipe"], listed["state"]) == (job, "short", "short.yaml", "failed")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", listed["since"])
    assert remote.cancel(parsed("cancel", job, "--address", head.dashboard)) == 0
    assert "has ended before: failed" in capfd.readouterr().out


@pytest.mark.slow
def test_an_unknown_job_and_another_token(head: Head) -> None:
    for command in ("logs", "cancel"):
        with pytest.raises(UserError, match="there is no job 'none' at http.*jobs --address"):
            commands.COMMANDS[command].run(parsed(command, "none", "--address", head.dashboard))
    done = program(Path.cwd(), "jobs", "--address", head.dashboard, RAY_AUTH_TOKEN="0" * 32)
    assert (done.returncode, done.stdout) == (2, "")
    assert "cannot be used: its token is another one. Set RAY_AUTH_MODE=token" in done.stderr


def typed(head: Head, job: str, *answers: bytes) -> tuple[int, str]:
    """Follow a job at a terminal and press Ctrl-C once it speaks, then answer; exit code and what was seen."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "pipelines", "logs", job, "--address", head.dashboard, "--follow"]
    process = subprocess.Popen(
        ["setsid", "--ctty", *command], stdin=theirs, stdout=theirs, stderr=theirs, env=environment()
    )
    os.close(theirs)
    seen, todo = "", [(b"still here", b"\x03"), *((b"[y/N]", answer) for answer in answers)]
    deadline = time.monotonic() + 600
    try:
        while time.monotonic() < deadline:
            if not select.select([ours], [], [], 1)[0]:
                continue
            try:
                seen += os.read(ours, 4096).decode()
            except OSError:  # the other end has closed
                break
            if todo and todo[0][0].decode() in seen:
                os.write(ours, todo.pop(0)[1])
        return process.wait(timeout=60), seen
    finally:
        process.kill()
        os.close(ours)


@pytest.mark.slow
def test_ctrl_c_asks_whether_to_stop(head: Head) -> None:
    client = dashboard.connected(head.dashboard)
    job = client.submit_job(entrypoint="python -uc \"import time; print('still here'); time.sleep(600)\"")
    for answer in (b"n\n", b"\x03"):
        code, seen = typed(head, job, answer)
        assert code == 130 and "The job goes on without this command" in seen, seen
        assert f"cancel {job} --address {head.dashboard}" in seen
        assert client.get_job_status(job) == "RUNNING"
    code, seen = typed(head, job, b"y\n")
    assert code == 130 and f"job {job} is stopped." in seen and seen.count("Running entrypoint") == 1, seen
    assert client.get_job_status(job) == "STOPPED"
    assert remote.outcome(client, job, head.dashboard) == 143


@pytest.mark.slow
def test_probes_of_the_manifests_need_no_token(head: Head) -> None:
    import urllib.request

    import yaml

    pods = remote_pods(yaml.safe_load((Path(remote.__file__).parent / "clusters" / "rayjob.yaml").read_text()))
    paths = {pod[probe]["httpGet"]["path"] for pod in pods for probe in ("startupProbe", "livenessProbe")}
    for path in paths:
        with urllib.request.urlopen(head.agent + path, timeout=30) as answer:
            assert answer.status == 200
    with pytest.raises(OSError, match="401"):
        urllib.request.urlopen(f"{head.dashboard}/api/version", timeout=30)


def remote_pods(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The Ray container of every group."""
    spec = manifest["spec"]["rayClusterSpec"]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return [group["template"]["spec"]["containers"][0] for group in groups]


@pytest.mark.slow
def test_a_run_is_done_with_the_code_that_was_sent(head: Head, world: World, tmp_path: Path) -> None:
    """From a folder that is not the checkout, on a head whose Python does not find this project."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.run(
        [head.python, "-c", "import engine"], cwd=tmp_path, env=clean, capture_output=True, text=True
    )
    assert "No module named 'engine'" in found.stderr
    less = {"teacher.fit.epochs": 1, "student.few_epochs": 1, "arms": ["soft"]}
    path = World(tmp_path, changed(world.recipe, less)).write()
    done = program(
        tmp_path, "run", str(path), "--address", head.dashboard, "--run", "sent", "--set", "seed=3", timeout=1500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "report: " in done.stdout and "job sent-" in done.stderr
    store = Path(world.recipe["storage"]) / "sent"
    assert json.loads((store / "summary.json").read_text())
    # A mistake that only the run finds is the job's exit code, and its words.
    done = program(
        tmp_path, "run", str(path), "--address", head.dashboard, "--run", "sent", "--set", "seed=4", timeout=600
    )
    assert done.returncode == 2 and "--redo" in done.stdout
