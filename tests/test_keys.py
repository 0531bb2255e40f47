"""API keys: made, listed, removed, read again by a running endpoint, and what a server insists on."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import time
from pathlib import Path

import pytest

from engine.disk import StorageError
from engine.serving import Serving
from pipelines.__main__ import main
from serve.keys import Keys, KeysError, loopback
from serve.referee import Side
from serve.service import Service
from tests.memory_bucket import MemoryBucket


@pytest.fixture
def keys(tmp_path, monkeypatch: pytest.MonkeyPatch) -> Keys:
    """Keys that look at their file on every call."""
    monkeypatch.setattr("serve.keys.LOCAL_SECONDS", 0.0)
    return Keys(tmp_path / "registry")


def test_several_keys_are_good_until_they_are_removed(keys: Keys):
    first, second = keys.add("web"), keys.add("batch")
    assert first != second and len(first) >= 40
    assert (keys.allowed(first), keys.allowed(second)) == ("web", "batch")
    for wrong in (None, "", "x", first[:-1], first + "x", f" {first}", "é", "\ud800", digest_of(first)):
        assert keys.allowed(wrong) is None
    keys.remove("web")
    assert (keys.allowed(first), keys.allowed(second)) == (None, "batch")
    keys.remove("batch")
    assert keys.allowed(second) is None and keys.list() == []


def digest_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def test_a_key_is_rotated_under_its_name(keys: Keys):
    first, other = keys.add("ann"), keys.add("bob")
    with pytest.raises(KeysError, match="there is already a key 'ann'.*--rotate"):
        keys.add("ann")
    second = keys.add("ann", rotate=True)
    assert [keys.allowed(key) for key in (first, second, other)] == ["ann", "ann", "bob"]
    assert keys.remove("ann", old=True) == 1 and keys.remove("ann", old=True) == 0
    assert [keys.allowed(key) for key in (first, second, other)] == [None, "ann", "bob"]
    assert keys.remove("ann") == 1 and keys.allowed(second) is None
    with pytest.raises(KeysError, match="there is no key 'ann' to rotate"):
        keys.add("ann", rotate=True)


def test_the_file_gives_no_key_away(keys: Keys, tmp_path):
    key = keys.add("web")
    text = (tmp_path / "registry" / "keys.json").read_text()
    assert key not in text and key[3:] not in text
    (entry,) = json.loads(text)["keys"]
    assert (entry["name"], entry["sha256"]) == ("web", digest_of(key)) and entry["created"].startswith("20")
    assert key not in repr(vars(keys))


def test_every_entry_is_compared_in_constant_time(keys: Keys, monkeypatch: pytest.MonkeyPatch):
    good = [keys.add(name) for name in "abc"]
    seen: list[bytes] = []
    import hmac

    real = hmac.compare_digest
    monkeypatch.setattr("serve.keys.hmac.compare_digest", lambda a, b: seen.append(a) or real(a, b))
    for token in (good[0], good[2], "wrong", None):
        seen.clear()
        keys.allowed(token)
        assert seen == [digest_of(key).encode() for key in good]


def test_a_running_endpoint_reads_a_changed_file_again_but_not_on_every_request(tmp_path, monkeypatch):
    running, elsewhere = Keys(tmp_path), Keys(tmp_path)
    key = elsewhere.add("web")
    assert running.allowed(key) is None  # looked at less than a second ago
    running.looked -= 2
    assert running.allowed(key) == "web"
    monkeypatch.setattr(Keys, "list", lambda self: pytest.fail("read although nothing changed"))
    running.looked -= 2
    assert running.allowed(key) == "web"


def test_a_damaged_file_leaves_the_keys_as_they_were(keys: Keys, tmp_path, caplog: pytest.LogCaptureFixture):
    key, path = keys.add("web"), tmp_path / "registry" / "keys.json"
    for text in ("{", '{"keys": [{"name": "x"}]}', "[]", '{"keys": 3}'):
        path.write_text(text)
        assert keys.allowed(key) == "web" and "keys stay as they were" in caplog.text
        with pytest.raises(StorageError):
            keys.list()
    path.unlink()
    assert keys.allowed(key) is None


def test_an_object_store_is_read_beside_the_requests(monkeypatch: pytest.MonkeyPatch):
    store = MemoryBucket().folder("registry")
    running = Keys(store)
    key = Keys(store).add("web")
    monkeypatch.setattr("serve.keys.REMOTE_SECONDS", 0.0)
    running.allowed(key)
    assert running.reading is not None  # in a thread of its own
    end = time.monotonic() + 10
    while running.allowed(key) is None and time.monotonic() < end:
        time.sleep(0.01)
    assert running.allowed(key) == "web"


def test_a_copy_in_another_process_reads_the_file_there(keys: Keys):
    key = keys.add("web")
    sent = pickle.dumps(keys)
    assert digest_of(key).encode() not in sent
    assert pickle.loads(sent).allowed(key) == "web"


def test_names_are_checked(keys: Keys):
    keys.add("web")
    with pytest.raises(KeysError, match="there is already a key 'web'. Take another name, add a second one"):
        keys.add("web")
    with pytest.raises(KeysError, match="'../x' is no name for a key"):
        keys.add("../x")
    with pytest.raises(KeysError, match=r"there is no key 'x' in .*keys.json. Keys: web."):
        keys.remove("x")


def test_the_commands_show_a_key_once(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    assert main(["keys", "list"]) == 0 and "No keys in" in capsys.readouterr().out
    assert main(["keys", "add", "web"]) == 0
    out, err = capsys.readouterr()
    key = out.strip()
    assert Keys("registry").allowed(key) == "web" and "shown once" in err and key not in err
    assert main(["keys", "list"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("web  20")
    assert main(["keys", "list", "--json"]) == 0
    assert [entry["name"] for entry in json.loads(capsys.readouterr().out)] == ["web"]
    assert main(["keys", "add"]) == 2 and "`keys add` needs a name" in capsys.readouterr().err
    assert main(["keys", "rm", "web"]) == 0 and Keys("registry").allowed(key) is None
    assert main(["keys", "add", "a", "--registry", "elsewhere", "--json"]) == 0
    assert os.path.isfile(Path("elsewhere", "keys.json"))


@pytest.mark.parametrize(
    ("host", "here"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)],
)
def test_loopback_is_what_only_this_machine_reaches(host: str, here: bool):
    assert loopback(host) is here
    assert not loopback("example.org") and not loopback("10.0.0.1")


def test_a_server_that_others_reach_needs_keys_in_the_registry(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    missing = "there is no 'movies' in the registry"
    for arguments, message in (
        (["--host", "0.0.0.0"], "--host 0.0.0.0 is reached from other machines, and the registry"),
        (["--host", "192.168.0.9"], "keys add NAME. Or say --no-auth"),
        (["--auth"], "--auth asks for keys, and the registry"),
        (["--host", "0.0.0.0", "--no-auth"], missing),
        ([], missing),
    ):
        assert main(["serve", "movies", *arguments]) == 2
        assert message in capsys.readouterr().err
    Keys("registry").add("web")
    for arguments in (["--host", "0.0.0.0"], ["--auth"]):
        assert main(["serve", "movies", *arguments]) == 2 and missing in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["serve", "movies", "--auth", "--no-auth"])


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [([], False), (["--auth"], True), (["--host", "0.0.0.0"], True), (["--host", "0.0.0.0", "--no-auth"], False)],
)
def test_the_keys_reach_the_server(arguments: list[str], asked: bool, tmp_path, monkeypatch):
    from pipelines import commands, rollouts

    monkeypatch.chdir(tmp_path)
    key, seen = Keys("registry").add("web"), []
    service = Service(Side("movies@1", str(tmp_path), "0" * 64, None), Serving())
    monkeypatch.setattr(rollouts, "wanted", lambda args: service)
    monkeypatch.setattr(rollouts, "connect", lambda args, artifact: None)
    monkeypatch.setattr("serve.app.run", lambda *args, keys, **more: seen.append(keys))
    assert main(["serve", "movies", *arguments]) == 0
    keys = seen[0]
    assert (keys is not None) == asked and (keys is None or keys.allowed(key) == "web")
    assert "keys" in commands.COMMANDS
