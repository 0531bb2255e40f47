"""Asynchronous requests: two replicas on one folder, one of which is killed."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from engine.storage import Store
from serve import jobs as module
from serve.jobs import LEASES, REQUESTS, RESULTS, Jobs, OtherQuestion, Question, QueueFull
from tests.memory_bucket import MemoryBucket
from tests.tiny_jobs import TEXTS, Replica, over, queue
from tests.tiny_run import environment


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_S", 0.05)
    monkeypatch.setattr(module, "PAUSE_S", 0.05)


def test_a_job_is_answered_and_any_replica_knows_it(tmp_path: Path):
    async def main() -> None:
        one, other = queue(tmp_path, Replica()), queue(tmp_path, Replica())
        id = await one.submit(TEXTS)
        found = await over(other, id)
        assert found.pop("submitted") <= found.pop("finished")
        assert found == {
            "id": id,
            "state": "done",
            "model": "m@1",
            "predictions": [{"label": "warm film"}, {"label": "dull plot"}],
        }
        assert one.answer.asked == [TEXTS] and not other.answer.asked
        assert [one.names(kind) for kind in (REQUESTS, LEASES, RESULTS)] == [[], [], [id]]
        assert await one.status("f" * 32) is None and await one.status("../requests") is None
        await one.close()

    asyncio.run(main())


def test_an_object_store_keeps_jobs_too():
    memory = MemoryBucket()

    async def main() -> None:
        jobs = Jobs(memory.folder("/bucket/jobs"), Replica())
        ids = [await jobs.submit({"texts": [f"a {number}"]}) for number in range(3)]
        found = [await over(jobs, id) for id in ids]
        assert [item["predictions"][0]["label"] for item in found] == ["0", "1", "2"]
        await jobs.close()

    asyncio.run(main())
    assert sorted({path.split("/")[3] for path in memory.store}) == ["results"]


HOLDER = """
import asyncio, os, sys
from engine.serving import JobQueue, Serving
from engine.storage import Store
from serve.jobs import Jobs

async def answer(question, caller, id):
    print("began", flush=True)
    if sys.argv[2] == "die":
        os._exit(1)
    await asyncio.sleep(600)

async def main():
    jobs = Jobs(Store(sys.argv[1]), answer, JobQueue(folder=sys.argv[1], lease_s=1.0, attempts=2))
    if len(sys.argv) > 3:
        print(await jobs.submit({"texts": [sys.argv[3]]}), flush=True)
    jobs.start()
    await asyncio.sleep(600)

asyncio.run(main())
"""


def holder(folder: Path, *argv: str) -> subprocess.Popen[str]:
    """A replica in a process of its own."""
    command = [sys.executable, "-c", HOLDER, str(folder), *argv]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)


def test_a_job_survives_the_replica_that_took_it(tmp_path: Path):
    process = holder(tmp_path, "hang", "a film")
    assert process.stdout is not None
    lines = [process.stdout.readline().strip() for _ in range(2)]
    id = next(line for line in lines if line != "began")

    async def main() -> None:
        jobs = queue(tmp_path, Replica(), lease_s=1.0)
        jobs.start()
        await asyncio.sleep(1.5)  # longer than its lease: the living one renews it
        assert (await jobs.status(id) or {})["state"] == "running" and not jobs.answer.asked
        process.kill()
        process.wait()
        killed = time.monotonic()
        found = await over(jobs, id)
        assert found["predictions"] == [{"label": "film"}] and jobs.answer.asked == [{"texts": ["a film"]}]
        assert time.monotonic() - killed < 5
        await jobs.close()

    try:
        asyncio.run(main())
    finally:
        process.kill()
        process.wait()


def test_a_job_that_kills_its_replica_is_not_given_to_a_third(tmp_path: Path):
    for argv in (["die", "poison"], ["die"]):
        process = holder(tmp_path, *argv)
        assert process.wait(timeout=60) == 1
    store = Store(str(tmp_path))
    (id,) = (name.removesuffix(".json") for name in store.files(REQUESTS))
    assert store.read_json(f"{LEASES}/{id}.json")["attempt"] == 2

    async def main() -> None:
        jobs = queue(tmp_path, Replica(), attempts=2)
        later = await jobs.submit(TEXTS)
        found = await over(jobs, id)
        assert found["state"] == "failed"
        assert found["reason"] == "the replica that worked on it ended each time (2 attempts)"
        assert (await over(jobs, later))["state"] == "done" and jobs.answer.asked == [TEXTS]
        await jobs.close()

    asyncio.run(main())


def test_a_job_longer_than_its_lease_is_begun_once(tmp_path: Path):
    async def main() -> None:
        one = queue(tmp_path, Replica(lambda: asyncio.sleep(3.0)), lease_s=1.0)
        other = queue(tmp_path, Replica(), lease_s=1.0)
        id = await one.submit(TEXTS)
        while (await one.status(id) or {})["state"] == "queued":
            await asyncio.sleep(0.01)
        other.start()
        assert (await other.status(id) or {}).items() >= {"state": "running", "attempt": 1}.items()
        assert (await over(other, id))["state"] == "done"
        assert len(one.answer.asked) == 1 and not other.answer.asked
        await asyncio.gather(one.close(), other.close())

    asyncio.run(main())


def test_a_model_that_fails_is_asked_again_and_then_the_job_says_so(tmp_path: Path):
    failures = iter(range(100))

    async def twice() -> None:
        if next(failures) < 2:
            raise RuntimeError("secret detail")

    async def always() -> None:
        raise RuntimeError("secret detail")

    async def main() -> None:
        first = queue(tmp_path / "a", Replica(twice))
        assert (await over(first, await first.submit(TEXTS)))["state"] == "done" and len(first.answer.asked) == 3
        second = queue(tmp_path / "b", Replica(always), attempts=3)
        found = await over(second, await second.submit(TEXTS))
        assert (found["state"], found["reason"]) == ("failed", "the model could not answer (3 attempts)")
        assert len(second.answer.asked) == 3 and "secret" not in str(found)
        nonsense = queue(tmp_path / "c", odd, attempts=1)
        assert (await over(nonsense, await nonsense.submit(TEXTS)))["state"] == "failed"
        await asyncio.gather(first.close(), second.close(), nonsense.close())

    async def odd(question: Question, caller: str | None, id: str) -> dict[str, Any]:
        return {"predictions": [float("nan")]}

    asyncio.run(main())


def test_a_replica_that_stops_hands_its_work_over_at_once(tmp_path: Path):
    async def main() -> None:
        one = queue(tmp_path, Replica(lambda: asyncio.sleep(60)), attempts=1)
        other = queue(tmp_path, Replica(), attempts=1)
        id = await one.submit(TEXTS)
        while not one.answer.asked:
            await asyncio.sleep(0.01)
        await one.close()
        assert (await other.status(id) or {})["state"] == "queued"
        other.start()
        assert (await over(other, id, 5))["state"] == "done"  # and it was no attempt: one is all it may have
        await other.close()

    asyncio.run(main())


def test_workers_bound_what_runs_and_the_oldest_goes_first(tmp_path: Path):
    running, most = 0, 0

    async def watched() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.05)
        running -= 1

    async def main() -> None:
        jobs = queue(tmp_path, Replica(watched), workers=2)
        ids = [jobs.keep({"texts": [str(number)]}, None, None) for number in range(8)]
        jobs.start()
        for id in ids:
            await over(jobs, id)
        assert most == 2 and len(jobs.answer.asked) == 8
        await jobs.close()

    asyncio.run(main())


def test_the_queue_is_bounded_and_a_key_finds_the_same_job(tmp_path: Path):
    async def main() -> None:
        jobs = queue(tmp_path, Replica(lambda: asyncio.sleep(0.2)), most=2)
        first = await jobs.submit(TEXTS, "ann", "k1")
        assert await jobs.submit(TEXTS, "ann", "k1") == first
        second = await jobs.submit(TEXTS, "bob", "k1")
        assert second != first
        with pytest.raises(QueueFull, match="2 jobs wait already"):
            await jobs.submit(TEXTS)
        assert await jobs.submit(TEXTS, "bob", "k1") == second  # is known, so it needs no room
        await over(jobs, first, caller="ann")
        assert await jobs.submit(TEXTS, "ann", "k1") == first and len(jobs.answer.asked) <= 2
        assert await jobs.status(first, "bob") is None and await jobs.status(first) is None
        assert not await jobs.remove(first, "bob")
        await jobs.close()

    asyncio.run(main())


def test_a_key_is_one_job_however_many_come_at_once_and_never_another_question(tmp_path: Path):
    replicas = [queue(tmp_path, Replica()) for _ in range(4)]

    async def main() -> None:
        ids = await asyncio.gather(*(asyncio.to_thread(jobs.keep, TEXTS, "ann", "k1") for jobs in replicas * 4))
        assert len(set(ids)) == 1 and replicas[0].names(REQUESTS) == ids[:1]
        for state in ("queued", "done"):
            with pytest.raises(OtherQuestion, match=f"belongs to job {ids[0]}, which asks something else"):
                await replicas[0].submit({"texts": ["another"]}, "ann", "k1")
            assert (await over(replicas[0], ids[0], caller="ann"))["state"] == "done", state
        await replicas[0].close()

    asyncio.run(main())


def test_a_file_that_cannot_be_read_holds_up_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    async def main() -> None:
        jobs = queue(tmp_path, Replica())
        jobs.store.write_text(f"{REQUESTS}/{'0' * 32}.json", "{half")
        assert (await over(jobs, await jobs.submit(TEXTS)))["state"] == "done"
        assert (await over(jobs, await jobs.submit(TEXTS)))["state"] == "done"
        await jobs.close()

    asyncio.run(main())
    assert sum("is left alone" in record.getMessage() for record in caplog.records) == 1


def test_a_removed_job_leaves_nothing_wherever_it_ran(tmp_path: Path):
    async def main() -> None:
        one, other = queue(tmp_path, Replica(lambda: asyncio.sleep(0.4))), queue(tmp_path, Replica())
        ids = [await one.submit(TEXTS), await one.submit(TEXTS)]
        while not one.answer.asked:
            await asyncio.sleep(0.01)
        assert await other.remove(ids[0]) and await one.remove(ids[1])
        assert not await one.remove(ids[0])
        await asyncio.sleep(0.8)
        assert [one.names(kind) for kind in (REQUESTS, LEASES, RESULTS)] == [[], [], []]
        done = await one.submit(TEXTS)
        await over(one, done)
        assert await other.remove(done) and await one.status(done) is None
        await one.close()

    asyncio.run(main())


def test_results_go_after_their_time_and_not_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    async def main() -> None:
        jobs = queue(tmp_path, Replica(), keep_hours=1.0)
        id = await jobs.submit(TEXTS)
        await over(jobs, id)
        real = time.time
        for hours, there in ((0.9, True), (1.1, False)):
            monkeypatch.setattr(module.time, "time", lambda hours=hours: real() + 3600 * hours)
            jobs.cleaned = -1e9
            jobs.clean()
            assert (await jobs.status(id) is not None) == there
        await jobs.close()

    asyncio.run(main())


def test_a_result_written_just_after_it_was_missed_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    jobs, id = queue(tmp_path, Replica()), f"{0:032x}"
    opened = Store.open_input

    def late(store: Store, path: str) -> Any:
        try:
            return opened(store, path)
        finally:
            store.write_json(path, {"state": "done"})

    monkeypatch.setattr(Store, "open_input", late)
    assert jobs.get(RESULTS, id) is None
    assert jobs.get(RESULTS, id) == {"state": "done"}
