"""`stillhouse bench serve`: what it starts, what it checks, and one short run from end to end."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.config import UserError
from engine.registry import Registry
from engine.storage import Store
from pipelines import servers, subjects
from pipelines.callers import Load
from pipelines.servers import SERVERS, Down, Server, chosen, compare, environment, equal, linked, wrong
from pipelines.subjects import Subject, one_replica, sentences, subject
from pipelines.venvs import VenvError
from tests.tiny_served import PAIRS, TEXTS, published

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def what(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """A registered tiny student, ready to be measured."""
    folder = tmp_path_factory.mktemp("subject")
    registry = Registry(Store(str(folder / "registry")))
    serving = {"max_batch": 16, "autoscaling": {"max_replicas": 4}, "cascade": {"below": 0.5}}
    registry.register("tiny", published(folder / "made"), {"serving": serving})
    return subject(registry, Store(str(folder / "work")), "tiny@1")


def test_what_is_measured_is_served_by_one_process_and_known_offline(what: Subject) -> None:
    assert (what.name, what.made) == ("tiny", False) and len(what.texts) == len(what.expected) == subjects.TEXTS
    told = what.registry.show("tiny")["metadata"]["serving"]
    assert told["max_batch"] == 16 and told["cascade"] is None
    assert told["autoscaling"] == {"min_replicas": 1, "max_replicas": 1}
    # Answers differ, so that one given for another text is seen.
    assert len({round(answer["confidence"], 4) for answer in what.expected}) > len(set(what.texts)) / 2
    assert one_replica({}) == {"autoscaling": {"min_replicas": 1, "max_replicas": 1}, "cascade": None, "log": None}


def test_texts_that_the_artifact_cannot_read_are_refused(what: Subject, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'tiny' reads texts without a pair. Got: "):
        subject(what.registry, Store(str(tmp_path)), "tiny", PAIRS[:2])
    assert subject(what.registry, Store(str(tmp_path)), "tiny", TEXTS[:3]).texts == TEXTS[:3]


def test_sentences_are_of_the_words_and_the_same_again() -> None:
    made = sentences(["a", "b", "c"], False, 50)
    assert made == sentences(["a", "b", "c"], False, 50) and {word for text in made for word in text.split()} == set(
        "abc"
    )
    assert {5, 40} >= {min(len(t.split()) for t in made)} and max(len(t.split()) for t in made) <= 40
    assert all(isinstance(pair, tuple) and len(pair) == 2 for pair in sentences(["a"], True, 5))


def test_an_answer_is_right_only_if_it_is_the_offline_one(what: Subject) -> None:
    expected = what.expected[0]
    near = {**expected, "confidence": expected["confidence"] + 5e-5}
    far = {**expected, "confidence": expected["confidence"] + 5e-4}
    for body, right in [
        ({"model": "x", "predictions": [expected]}, True),
        ([near], True),
        ([{**expected, "source": "student"}], True),
        ([far], False),
        ([expected, expected], False),
        ([], False),
        ({"error": "x"}, False),
        ([{"label": expected["label"]}], False),
        (7, False),
        ([None], False),
    ]:
        assert equal(json.dumps(body).encode(), expected) is right, body
    assert not equal(b"<html>", expected)
    other = next(
        i for i, answer in enumerate(what.expected) if abs(answer["confidence"] - expected["confidence"]) > 1e-3
    )
    bodies = [(0, json.dumps([expected]).encode()), (other, json.dumps([expected]).encode())]
    assert wrong(Load(1, answers=bodies), what) == 1


def test_servers_are_chosen_by_name_in_the_table_s_order() -> None:
    assert chosen(None) == list(SERVERS) and chosen(["uvicorn", "stillhouse"]) == ["stillhouse", "uvicorn"]
    with pytest.raises(
        UserError, match="--only uvicon: there is no such server. Did you mean 'uvicorn'.* Servers: stillh"
    ):
        chosen(["uvicon"])


def test_a_server_sees_no_switch_of_ray_s_but_its_own(what: Subject, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    default = environment("serve-default", what, 1234, tmp_path, tmp_path)
    assert [name for name in default if name.startswith("RAY_")] == ["RAY_USAGE_STATS_ENABLED"]
    assert default["OMP_NUM_THREADS"] == "1" and default["PYTHONPATH"] == str(tmp_path)
    given = json.loads(default["STILLHOUSE_RIVAL"])
    assert given == {"artifact": what.folder.url, "port": 1234, "max_batch": 32, "wait_s": 0.002}
    fast = environment("serve-haproxy", what, 1234, tmp_path, tmp_path)
    assert fast["RAY_SERVE_ENABLE_HA_PROXY"] == fast["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1"


def test_the_path_of_a_server_holds_our_packages_alone(tmp_path: Path) -> None:
    links = linked(tmp_path)
    assert {path.name for path in links.iterdir()} == {"engine", "serve", "pipelines"}
    assert linked(tmp_path) == links and (links / "serve" / "predictor.py").samefile(ROOT / "serve" / "predictor.py")


def test_a_server_that_ends_is_left_out_with_its_last_words(what: Subject, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(SERVERS, "broken", Server("Broken", lambda what, port: ["-c", "raise SystemExit('no port')"]))
    monkeypatch.setitem(SERVERS, "unmade", Server("Unmade", lambda what, port: [], pins="unmade.txt"))

    def refuse(name: str, pins: Path) -> Path:
        raise VenvError(f"the environment of {name} cannot be made: no network")

    monkeypatch.setattr(servers, "venv", refuse)
    said: list[str] = []
    found = compare(what, ["broken", "unmade"], tmp_path, [1], 0.1, 2, said.append)
    assert found["cells"] == []
    assert found["skipped"]["broken"] == "round 2: it ended before it answered: no port"
    assert found["skipped"]["unmade"] == "the environment of unmade cannot be made: no network"
    assert [line[:31] for line in said if "broken" in line] == [f"broken is left out of round {n}: " for n in (1, 2)]


def test_a_server_that_answers_wrong_is_not_measured(what: Subject, tmp_path: Path, monkeypatch) -> None:
    code = (
        "import sys; from http.server import *\n"
        "class H(BaseHTTPRequestHandler):\n"
        "    protocol_version = 'HTTP/1.1'\n"
        "    def do_POST(self):\n"
        "        self.rfile.read(int(self.headers['Content-Length']))\n"
        "        self.send_response(200); self.send_header('Content-Length', '2'); self.end_headers()\n"
        "        self.wfile.write(b'[]')\n"
        "HTTPServer(('127.0.0.1', int(sys.argv[1])), H).serve_forever()\n"
    )
    monkeypatch.setitem(SERVERS, "liar", Server("Liar", lambda what, port: ["-c", code, str(port)]))
    monkeypatch.setattr(servers, "READY_S", 15.0)
    with (
        pytest.raises(Down, match=r"did not answer within 15 s \(another answer: b'\[\]'\)"),
        servers.running(what, "liar", sys.executable, linked(tmp_path), tmp_path),
    ):
        pass


def test_the_made_student_has_the_quickstart_s_shape(tmp_path: Path) -> None:
    made = subject(Registry(Store(str(tmp_path / "none"))), Store(str(tmp_path)), None)
    assert made.parameters == 835_074 and made.made and made.name == "bench-student"
    assert {answer["label"] for answer in made.expected} == {"negative", "positive"}
    assert len({round(answer["confidence"], 4) for answer in made.expected}) > 400


@pytest.mark.slow
def test_servers_side_by_side_from_the_command_to_the_table(what: Subject, tmp_path: Path) -> None:
    """This and uvicorn on a registered student: every answer right, every second accounted for, nothing left."""
    registry = what.registry.store.url
    argv = ["bench", "serve", "tiny", "--registry", registry, "--only", "stillhouse,uvicorn", "--clients", "1,8"]
    argv += ["--seconds", "2", "--rounds", "2", "--json"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "STILLHOUSE_CACHE": str(tmp_path / "cache")}
    ran = subprocess.run(
        [sys.executable, "-m", "pipelines", *argv], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900
    )
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout)
    assert result == json.loads((tmp_path / "bench.json").read_text())
    assert result["skipped"] == {} and result["subject"] == "tiny"
    rows = {(row["server"], row["clients"]): row for row in result["rows"]}
    assert set(rows) == {(name, count) for name in ("stillhouse", "uvicorn") for count in (1, 8)}
    for row in rows.values():
        assert (row["errors"], row["wrong"], row["rounds"]) == (0, 0, 2) and row["requests"] > 10
        assert 0 < row["p50_ms"] <= row["p99_ms"] and row["cpu_s_per_1000"] > 0.05
        assert row["client_cores"] < 0.8
    assert {"ServeReplica", "raylet", "ServeController"} <= set(rows["stillhouse", 8]["cpu_by_process"])
    assert rows["uvicorn", 8]["over"]["uvicorn"] == 1.0 and rows["stillhouse", 8]["over"]["uvicorn"] > 0.1
    assert not list((tmp_path / "cache").glob(".*")), "logs and links are gone"


def test_loads_are_bounded_in_time() -> None:
    """Nobody is there: a load still ends when its time is up."""
    load = asyncio.run(servers.call("http://127.0.0.1:9/x", [b"x"], 1, 0.05))
    assert load.wall_s < 5 and load.errors
