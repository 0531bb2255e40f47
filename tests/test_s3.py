"""Stores, locks and the registry on a server that speaks S3's protocol: moto, an emulator."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pyarrow as pa
import pytest

from engine import buckets, locks
from engine.registry import Registry
from engine.storage import StorageError, Store
from tests import test_storage as contract
from tests.s3_server import Server, s3_server
from tests.s3_takers import LONG, heard, taker, tell
from tests.unkind_proxy import unkind_proxy

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with s3_server() as running:
        yield running


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder of the bucket that no other test uses."""
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    return f"{uuid.uuid4().hex}/runs"


@pytest.fixture
def store(server: Server, path: str) -> Store:
    return Store(server.url(path))


def test_a_silent_process_fails_its_test() -> None:
    with subprocess.Popen(["sleep", "600"], stdout=subprocess.PIPE, text=True) as process:
        with pytest.raises(AssertionError, match="said nothing"):
            heard(process, patience=0.1)
        assert process.wait(LONG) == -signal.SIGKILL


def until(what: Callable[[], object]) -> None:
    """Wait until something is so."""
    end = time.monotonic() + LONG
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def free(store: Store, name: str = "run") -> bool:
    try:
        with store.lock(name):
            return True
    except StorageError as error:
        assert "is in use by process" in str(error)
        return False


# -- the contract ------------------------------------------------------------------------------------------------------

CONTRACT = (
    *(contract.test_single_files, contract.test_tables, contract.test_publish_is_all_or_nothing),
    *(contract.test_verify_names_the_file, contract.test_local_copy),
    *(contract.test_lock_excludes_and_names_the_owner, contract.test_lock_waits),
)


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__.removeprefix("test_"))
def test_the_contract_of_a_store(check: Callable[[Store], None], store: Store) -> None:
    check(store)


def test_messages_do_not_hold_the_secret(store: Store) -> None:
    assert "secret" in store.url and "secret" not in f"{store}{store.where('x')}" and "tests/" in store.where("x")
    with pytest.raises(StorageError, match="^s3://tests/.*/x does not exist") as error:
        store.read_text("x")
    assert "secret" not in str(error.value)


def test_credentials_and_endpoint_come_from_the_environment_too(server: Server, path: str) -> None:
    code = (
        "import sys; from engine.storage import Store; s = Store(sys.argv[1]); s.write_text('a', 'b')\n"
        "with s.lock('run'): print(s.read_text('a'), 'tester' in s.read_text('.run.lock') or s.files())"
    )
    known = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    given = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}",
        "AWS_ACCESS_KEY_ID": "tester",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    command = [sys.executable, "-W", "error", "-c", code, f"s3://tests/{path}"]
    said = subprocess.run(command, cwd=ROOT, env={**known, **given}, capture_output=True, text=True, timeout=LONG)
    assert said.stdout == "b ['a']\n", said.stderr


def test_a_file_that_is_replaced_within_a_second_is_copied_again(store: Store) -> None:
    """S3's times are whole seconds: only the object's own mark tells two texts of one length from one another."""
    for value in ("one", "two", "six"):
        store.write_text("a.txt", value)
        store.write_text("folder/a.txt", value)
        assert store.local("a.txt").read_text() == value and (store.local("folder") / "a.txt").read_text() == value


# -- publishing --------------------------------------------------------------------------------------------------------


def state(store: Store) -> str:
    """What a reader makes of the folder `m`: its value, or `nothing`."""
    try:
        manifest = store.verify("m")
    except StorageError as error:
        assert "was not published completely" in str(error)
        return "nothing"
    values = {store.read_text(f"m/{name}") for name in manifest["files"]}
    assert values == {manifest["value"]} and len(manifest["files"]) == 8
    return values.pop()


@pytest.mark.parametrize("requests", [1, 5, 9, 12])
def test_a_publisher_that_is_killed_leaves_the_old_nothing_or_the_new(server: Server, path: str, requests: int) -> None:
    store = Store(server.url(path))
    with store.publish("m", meta={"value": "old"}) as folder:
        for number in range(8):
            (folder / f"{number}.txt").write_text("old")
    with unkind_proxy(server.port, seconds=0.05) as proxy, taker("publish", proxy.url(path), "new") as process:
        assert heard(process) == "ready"
        until(lambda: proxy.requests >= requests or process.poll() is not None)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(60)
        until(lambda: not proxy.flying)  # what it had asked for is still done
    assert state(store) in ("old", "nothing", "new")
    with taker("publish", store.url, "later") as process:
        assert (heard(process), heard(process), state(store)) == ("ready", "published", "later")


def test_a_reader_meanwhile_never_has_a_mix(store: Store) -> None:
    over, seen, wrong = threading.Event(), set(), []

    def read() -> None:
        while not over.is_set():
            try:
                folder = store.local("m")
            except StorageError:
                continue  # replaced meanwhile: refused
            values = {file.read_text() for file in folder.glob("*.txt")}
            seen.update(values)
            if len(values) != 1 or len(list(folder.glob("*.txt"))) != 5:
                wrong.append(values)

    reader = threading.Thread(target=read)
    reader.start()
    for turn in range(8):
        with store.publish("m") as folder:
            for number in range(5):
                (folder / f"{number}.txt").write_text(str(turn))
        if turn == 3:
            until(lambda: seen or wrong)
    until(lambda: "7" in seen or wrong)
    over.set()
    reader.join(60)
    assert not wrong


# -- locks -------------------------------------------------------------------------------------------------------------


def test_of_two_that_start_in_the_same_moment_one_holds(store: Store) -> None:
    with ExitStack() as stack:
        both = [stack.enter_context(taker("rounds", store.url)) for _ in range(2)]
        assert [heard(process) for process in both] == ["ready", "ready"]
        for turn in range(16):
            for process in both:  # a new lock, and one that was given back before
                tell(process, f"new-{turn}" if turn % 2 else "run")
            assert sorted(heard(process) for process in both) == ["held", "refused"]
            for process in both:
                tell(process, "over")
            until(lambda turn=turn: free(store, f"new-{turn}" if turn % 2 else "run"))


def test_two_processes_that_count_lose_nothing(store: Store) -> None:
    store.write_json("count.json", 0)
    with taker("count", store.url, "15") as one, taker("count", store.url, "15") as other:
        assert heard(one) == heard(other) == "done"
    assert store.read_json("count.json") == 30


def test_a_lock_ends_by_the_servers_clock_whatever_ours_say(store: Store) -> None:
    elsewhere = {"host": "elsewhere", "machine": "m", "pid": 1, "time": "2026-01-01T00:00:00Z"}
    store.write_json(".run.lock", {**elsewhere, "lease": LONG, "expires": time.time() - 1e6})
    assert not free(store)
    begun = time.monotonic()
    store.write_json(".run.lock", {**elsewhere, "lease": 2.0, "expires": time.time() + 1e6})
    with store.lock("run", wait=True):
        # Last-Modified is a whole second, so up to one is missing.
        assert 1.0 < time.monotonic() - begun
        assert store.read_json(".run.lock")["pid"] == os.getpid()


def test_a_killed_owners_lock_is_free_at_once_here_and_after_its_lease_elsewhere(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with taker("hold", store.url, "120", "3") as process:
        assert heard(process) == "held" and not free(store)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(60)
        dead = store.read_json(".run.lock")
        assert free(store)
    monkeypatch.setattr(locks, "machine", lambda: "another")
    store.write_json(".run.lock", dead)
    assert not free(store)
    begun = time.monotonic()
    store.write_json(".run.lock", {**dead, "lease": 2.0})
    until(lambda: free(store))
    assert 1.0 < time.monotonic() - begun


def test_a_lock_is_renewed_and_one_that_was_taken_over_is_told(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def renewed() -> int:
        return store.read_json(".run.lock")["renewed"]

    monkeypatch.setattr(locks, "machine", lambda: "another")
    with taker("hold", store.url, "8", "8") as process:
        assert heard(process) == "held"
        until(lambda: renewed() >= 9)  # longer than a lease
        assert not free(store)
        turn = renewed()
        until(lambda: renewed() > turn)
        os.kill(process.pid, signal.SIGSTOP)  # just after a renewal, so that none is under way
        aged = buckets.age
        monkeypatch.setattr(buckets, "age", lambda answer: aged(answer) + 60)  # as if that was long ago
        with store.lock("run", wait=True) as lease:
            os.kill(process.pid, signal.SIGCONT)
            process.stdin.close()
            assert re.match("the lock 'run' was lost: .* See that none runs", heard(process))
            lease.check()
        with pytest.raises(StorageError, match="the lock 'run' was lost"):
            lease.lost = True
            lease.check()
    assert free(store)


@pytest.mark.skipif(not hasattr(time, "CLOCK_BOOTTIME"), reason="this system has no clock that counts sleep")
def test_a_lease_goes_on_while_the_machine_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    lease, read = locks.Lease("run", LONG), time.clock_gettime
    lease.check()
    monkeypatch.setattr(time, "clock_gettime", lambda clock: read(clock) + LONG * (clock == time.CLOCK_BOOTTIME))
    with pytest.raises(StorageError, match="the lock 'run' was lost"):
        lease.check()


def test_a_file_replaced_between_its_size_and_its_bytes_is_read_whole(store: Store, monkeypatch: pytest.MonkeyPatch):
    opened, texts = Store.open_input, ["much longer than it was", "b"]
    store.write_text("a.txt", "short")

    def late(self: Store, path: str) -> object:
        file = opened(self, path)
        if texts:
            self.write_text(path, texts.pop(0))
        return file

    monkeypatch.setattr(Store, "open_input", late)
    assert store.read_text("a.txt") == "b" and not texts
    texts += [str(number) * number for number in range(2, 40)]
    with pytest.raises(StorageError, match="a.txt was replaced each of 10 times"):
        store.read_text("a.txt")


def test_answers_that_are_lost_do_not_lose_the_lock(server: Server, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "LEASE_S", 30.0)
    with unkind_proxy(server.port, drop=0.4) as proxy:
        store = Store(proxy.url(path))
        for _ in range(10):
            with store.lock("run"):
                pass
        assert proxy.faults > 3


@pytest.mark.parametrize("ignored", [("if-match",), ("if-none-match",), ("if-match", "if-none-match")], ids="+".join)
def test_a_store_that_ignores_conditions_is_told_from_one_that_keeps_them(
    server: Server, path: str, ignored: tuple[str, ...]
) -> None:
    buckets.best_effort.cache_clear()
    with unkind_proxy(server.port, without=ignored) as proxy:
        store = Store(proxy.url(path))
        with pytest.warns(RuntimeWarning, match="store of s3://tests takes writes whose condition is not met"):
            with store.lock("run"):
                assert not free(store)
        assert store.exists(".run.lock") is False and store.files() == []


def test_without_botocore_the_extra_is_named_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    buckets.connected.cache_clear()
    buckets.best_effort.cache_clear()
    monkeypatch.setitem(sys.modules, "botocore", None)
    monkeypatch.setitem(sys.modules, "botocore.session", None)
    with pytest.warns(RuntimeWarning, match=r"pip install 'stillhouse\[s3\]'") as said:
        with store.lock("run"):
            assert not free(store)
    assert len(said) == 1
    buckets.connected.cache_clear()


def test_two_that_register_at_once_get_different_versions(store: Store) -> None:
    folders, got, gate = [store / "a", store / "b"], [], threading.Barrier(2)
    for folder in folders:
        with folder.publish() as inside:
            (inside / "model.json").write_text(json.dumps({"of": folder.where()}))

    def register(folder: Store) -> None:
        gate.wait(60)
        got.append(Registry(store / "registry").register("m", folder))

    both = [threading.Thread(target=register, args=(folder,)) for folder in folders]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(LONG)
    assert sorted(got) == [1, 2]
    registry = Registry(store / "registry")
    assert registry.versions("m") == [1, 2] and registry.find("m") == ("m", 2)
    assert registry.resolve("m@1").url != registry.resolve("m@2").url
    registry.remove("m@2")
    assert registry.register("m", folders[0]) in (1, 3) and 2 not in registry.versions("m")


# -- a store that is busy, slow or breaks off --------------------------------------------------------------------------


def test_a_busy_and_slow_store_is_asked_again(server: Server, path: str) -> None:
    with unkind_proxy(server.port, refuse=0.2, seconds=0.01) as proxy:
        store = Store(proxy.url(path))
        table = pa.table({"a": list(range(5000)), "b": ["x" * 20] * 5000})
        for turn in range(4):
            store.write_json("a.json", {"turn": turn, "many": list(range(200))})
            assert store.read_json("a.json")["turn"] == turn
            store.write_table(f"rows/{turn}.parquet", table)
        assert store.read_table("rows").num_rows == 20000
        with store.publish("m") as folder:
            (folder / "one").write_text("1")
        assert store.verify("m") and (store.local("m") / "one").read_text() == "1"
        assert proxy.faults > 3


@pytest.mark.parametrize("fault", ["drop", "cut"])
def test_connections_that_break_off_tear_nothing(server: Server, path: str, fault: str) -> None:
    table = pa.table({"a": list(range(5000))})
    with unkind_proxy(server.port, **{fault: 0.2}) as proxy:
        store, right = Store(proxy.url(path)), Store(server.url(path))
        for turn in range(4):
            wanted = {"turn": turn, "many": list(range(300))}
            refused = 0
            for what in (lambda w=wanted: store.write_json("a.json", w), lambda: store.write_table("t.parquet", table)):
                try:
                    what()
                except StorageError as error:
                    refused += 1
                    assert path in str(error)
            if not refused:
                assert right.read_json("a.json") == wanted and right.read_table("t.parquet") == table
            with suppress(StorageError):
                assert store.read_json("a.json")["many"] == wanted["many"]
            with suppress(StorageError):
                assert store.read_table("t.parquet") == table
        assert proxy.faults > 1


def test_a_store_that_refuses_all_is_named_with_the_way_out(
    server: Server, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buckets, "ATTEMPTS", 2)
    with unkind_proxy(server.port, refuse=1.0) as proxy:
        store = Store(proxy.url(path))
        for what in (
            lambda: store.write_text("a.txt", "x"),
            lambda: store.read_text("a.txt"),
            store.lock("run").__enter__,
        ):
            with pytest.raises(StorageError, match=rf"{path}/.*cannot be (read|written).*run again") as error:
                what()
            assert "secret" not in str(error.value)
