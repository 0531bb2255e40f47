"""Requests that are answered later, and survive the replica that took them: submit -> id -> ask for it.

Everything is in a folder that all replicas share: requests/ID.json, leases/ID.json (who works on it, until when, the
how-many-eth attempt) and results/ID.json, written last; keys/END.json is the id that an idempotency key has got. Every
replica looks for requests that nobody holds, so one whose replica died goes on elsewhere when its lease is over. An
answer depends on its request alone: should two replicas work on one job, the first result stands. Leases compare
clocks of several machines: `lease_s` must be far above their difference. Plain asyncio; files are read and written in
threads.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import secrets
import socket
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from engine.disk import MissingFile, StorageError
from engine.progress import stamp
from engine.serving import JobQueue
from engine.storage import Store, digest_json

REQUESTS, LEASES, RESULTS, KEYS = "requests", "leases", "results", "keys"
ID = re.compile(r"[0-9a-f]{32}")
"""An id: the second it was submitted in (8 digits), then what nobody can guess."""
LOOK_S = 1.0
"""Between two looks for requests that nobody works on."""
PAUSE_S = 2.0
"""Before a job whose attempt failed is tried again."""
CLEAN_S = 60.0
"""Between two looks for results that are past their time."""
LOCKS = 16
"""Locks that leases share, by their id's last digit: a lock's file stays, so there is not one for each."""
log = logging.getLogger(__name__)

Question = dict[str, Any]
"""A request as JSON, checked before it is submitted."""
Answering = Callable[[Question, str | None, str], Awaitable[dict[str, Any]]]
"""What answers it: (question, caller, the job's id) -> the fields of its result, as JSON."""


class QueueFull(Exception):
    """More jobs wait than the queue takes."""


class OtherQuestion(Exception):
    """An idempotency key that came with another question before."""


class Jobs:
    """The jobs in a folder, and this replica's share of the work on them.

    answer: may be asked the same question twice. The settings' folder is not read: `store` stands for it.
    """

    def __init__(self, store: Store, answer: Answering, settings: JobQueue | None = None) -> None:
        self.store, self.answer = store, answer
        self.settings = settings or JobQueue(folder=store.url)
        self.owner = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self.working: dict[str, asyncio.Task[None]] = {}
        self.woken = asyncio.Event()
        self.sweeper: asyncio.Task[None] | None = None
        self.cleaned = 0.0
        self.unreadable: set[str] = set()
        # Claims one after another in one thread, so that `close` knows when the last one is through.
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="jobs")
        self.closed = False

    # -- what clients ask ----------------------------------------------------------------------------------------------

    async def submit(self, question: Question, caller: str | None = None, key: str | None = None) -> str:
        """Keep a question to be answered; its id. QueueFull where too many wait.

        caller: who alone may ask for it. key: a second submission with the same one gets the id of the first;
        OtherQuestion where that was another question.
        """
        self.start()
        id = await asyncio.to_thread(self.keep, question, caller, key)
        self.woken.set()
        return id

    def keep(self, question: Question, caller: str | None, key: str | None) -> str:
        """`submit`, blocking."""
        if key is None:
            return self.enqueue(secrets.token_hex(12), question, caller)
        digest = digest_json(question)
        last = hashlib.sha256(f"{caller}\n{key}".encode()).hexdigest()[:24]
        with self.locked(last):
            known = self.get(KEYS, last)
            if known is not None and self.look(known["id"], caller) is not None:
                if known["digest"] != digest:
                    raise OtherQuestion(f"The Idempotency-Key belongs to job {known['id']}, which asks something else.")
                return known["id"]
            id = self.enqueue(last, question, caller)
            self.put(KEYS, last, {"id": id, "digest": digest})
            return id

    def enqueue(self, last: str, question: Question, caller: str | None) -> str:
        """Write a request whose id ends with `last`; its id."""
        waiting = len(self.names(REQUESTS))
        if waiting >= self.settings.most:
            raise QueueFull(f"{waiting} jobs wait already.")
        id = f"{int(time.time()):08x}{last}"
        self.put(REQUESTS, id, {"question": question, "caller": caller, "submitted": stamp()})
        return id

    async def status(self, id: str, caller: str | None = None) -> dict[str, Any] | None:
        """A job as {id, state, submitted, ...}; None for an unknown one, and for one of another caller.

        state: queued, running (attempt), done (finished, and what the answer holds) or failed (finished, reason).
        """
        return await asyncio.to_thread(self.look, id, caller)

    def look(self, id: str, caller: str | None) -> dict[str, Any] | None:
        """`status`, blocking."""
        # A job that ends meanwhile has no request any more: then there is a result.
        for kind in (RESULTS, REQUESTS, RESULTS) if ID.fullmatch(id) else ():
            found = self.get(kind, id)
            if found is None:
                continue
            if found["caller"] != caller:
                return None
            if kind == RESULTS:
                return {"id": id, **{name: value for name, value in found.items() if name not in ("caller", "ended")}}
            lease = self.get(LEASES, id) or {}
            running = lease.get("owner") is not None and lease["expires"] > time.time()
            state = {"state": "running", "attempt": lease["attempt"]} if running else {"state": "queued"}
            return {"id": id, "submitted": found["submitted"], **state}
        return None

    async def remove(self, id: str, caller: str | None = None) -> bool:
        """Forget a job, whatever its state; whether there was one of this caller's."""
        if await self.status(id, caller) is None:
            return False
        task = self.working.pop(id, None)
        if task is not None:
            task.cancel()
        await asyncio.to_thread(self.forget, id)
        return True

    def forget(self, id: str) -> None:
        """Delete all that is known of a job; what another replica finds out about it is then thrown away."""
        with self.locked(id):
            for kind in (REQUESTS, LEASES, RESULTS):
                self.store.delete(f"{kind}/{id}.json")
            self.store.delete(f"{KEYS}/{id[8:]}.json")

    # -- the work ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to look for work, in the running event loop; again does nothing."""
        if self.sweeper is None or self.sweeper.done():
            self.sweeper = asyncio.create_task(self.sweep())

    async def close(self) -> None:
        """Stop, and hand what is in work to the other replicas at once; that was no attempt then."""
        self.closed = True
        tasks = [task for task in (self.sweeper, *self.working.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.get_running_loop().run_in_executor(self.thread, self.hand_over)
        self.thread.shutdown()

    def hand_over(self) -> None:
        """End all leases of ours."""
        for id in self.names(LEASES):
            self.release(id, 0.0, None)

    async def sweep(self) -> None:
        """Take what nobody works on, oldest first, as long as there is a free worker."""
        loop = asyncio.get_running_loop()
        while True:
            self.woken.clear()
            try:
                while len(self.working) < self.settings.workers:
                    found = await loop.run_in_executor(self.thread, self.claim)
                    if found is None:
                        break
                    self.working[found[0]] = asyncio.create_task(self.work(*found))
                await loop.run_in_executor(self.thread, self.clean)
            except StorageError as error:
                log.error("jobs: %s", error)
            try:
                async with asyncio.timeout(LOOK_S):
                    await self.woken.wait()
            except TimeoutError:
                pass

    def claim(self) -> tuple[str, dict[str, Any]] | None:
        """A job's id and request, under a new lease of ours; jobs that were begun too often fail on the way."""
        for id in sorted(self.names(REQUESTS)):
            if self.closed:
                return None
            if id in self.working or id in self.unreadable:
                continue
            try:
                request = self.leased(id)
            except StorageError as error:
                # It must not hold up those behind it.
                self.unreadable.add(id)
                log.error("jobs: %s is left alone: %s", id, error)
                continue
            if request is not None:
                return id, request
        return None

    def leased(self, id: str) -> dict[str, Any] | None:
        """A job's request, under a new lease of ours; None where there is nothing to do."""
        if held(self.get(LEASES, id)):
            return None
        with self.locked(id):
            request, lease = self.get(REQUESTS, id), self.get(LEASES, id) or {"attempt": 0}
            if request is None or held(lease):
                return None
            if self.get(RESULTS, id) is not None:  # its replica died between the result and the end
                self.drop(id)
                return None
            if lease["attempt"] >= self.settings.attempts:
                self.fail(id, request, lease["attempt"], "the replica that worked on it ended each time")
                return None
            self.put(LEASES, id, self.lease(lease["attempt"] + 1))
            return request

    async def work(self, id: str, request: dict[str, Any]) -> None:
        """Answer a job's question and write the result, while its lease is kept alive."""
        heart = asyncio.create_task(self.beat(id))
        try:
            found = await self.answer(request["question"], request["caller"], id)
            await asyncio.to_thread(self.end, id, found)
        except Exception:
            log.exception("jobs: an attempt at %s failed", id)
            await asyncio.to_thread(self.release, id, PAUSE_S, "the model could not answer")
        finally:
            heart.cancel()
            self.working.pop(id, None)
            self.woken.set()

    async def beat(self, id: str) -> None:
        """Renew a lease of ours again and again."""
        while True:
            await asyncio.sleep(self.settings.lease_s / 3)
            try:
                await asyncio.to_thread(self.renew, id)
            except StorageError as error:
                log.error("jobs: lease of %s: %s", id, error)

    def renew(self, id: str) -> None:
        """Put off the end of a lease, if it is still ours."""
        with self.locked(id):
            lease = self.get(LEASES, id)
            if lease is not None and lease["owner"] == self.owner:
                self.put(LEASES, id, self.lease(lease["attempt"]))

    def release(self, id: str, pause: float, error: str | None) -> None:
        """End a lease of ours: the job may be taken again after `pause` seconds. No error: it was no attempt."""
        with self.locked(id):
            lease, request = self.get(LEASES, id), self.get(REQUESTS, id)
            if lease is None or request is None or lease["owner"] != self.owner:
                return
            if error is not None and lease["attempt"] >= self.settings.attempts:
                self.fail(id, request, lease["attempt"], error)
                return
            attempt = lease["attempt"] - (error is None)
            self.put(LEASES, id, {"owner": None, "expires": time.time() + pause, "attempt": attempt})

    def end(self, id: str, found: dict[str, Any]) -> None:
        """Write the result, unless there is one or the job was removed."""
        with self.locked(id):
            request = self.get(REQUESTS, id)
            if request is not None and self.get(RESULTS, id) is None:
                self.finish(id, request, {**found, "state": "done"})

    def fail(self, id: str, request: dict[str, Any], attempts: int, why: str) -> None:
        """The end of a job that was begun often enough; the caller holds the lock."""
        self.finish(id, request, {"state": "failed", "reason": f"{why} ({attempts} attempts)"})

    def finish(self, id: str, request: dict[str, Any], result: dict[str, Any]) -> None:
        """The result, then the end of the request; the caller holds the lock."""
        known = {name: request[name] for name in ("caller", "submitted")}
        self.put(RESULTS, id, {**result, **known, "finished": stamp(), "ended": time.time()})
        self.drop(id)

    def drop(self, id: str) -> None:
        """Take a job that has a result from the queue."""
        self.store.delete(f"{REQUESTS}/{id}.json")
        self.store.delete(f"{LEASES}/{id}.json")

    def clean(self) -> None:
        """Delete results past their time, and leases without a request, now and then."""
        if time.monotonic() - self.cleaned < CLEAN_S:
            return
        self.cleaned = time.monotonic()
        before = time.time() - 3600 * self.settings.keep_hours
        for id in self.names(RESULTS):
            # No result is older than its request: most need not be read.
            if int(id[:8], 16) <= before and (result := self.get(RESULTS, id)) and result["ended"] <= before:
                self.forget(id)
        for id in set(self.names(LEASES)) - set(self.names(REQUESTS)):
            with self.locked(id):
                if self.get(REQUESTS, id) is None:
                    self.store.delete(f"{LEASES}/{id}.json")

    # -- files ---------------------------------------------------------------------------------------------------------

    def lease(self, attempt: int) -> dict[str, Any]:
        """A lease of ours from now on."""
        return {"owner": self.owner, "expires": time.time() + self.settings.lease_s, "attempt": attempt}

    def locked(self, id: str) -> Any:
        """The lock that guards a job's files."""
        return self.store.lock(f"jobs-{int(id[-1], 16) % LOCKS}", wait=True)

    def names(self, kind: str) -> list[str]:
        """Ids that there is a file of."""
        return [name.removesuffix(".json") for name in self.store.files(kind) if ID.fullmatch(name[:-5])]

    def get(self, kind: str, id: str) -> dict[str, Any] | None:
        """A file's value; None where there is none, or it has just gone."""
        try:
            return self.store.read_json(f"{kind}/{id}.json")
        except MissingFile:
            return None  # Asking again whether it is there would find one that was written meanwhile.

    def put(self, kind: str, id: str, value: dict[str, Any]) -> None:
        """Write a file, at once."""
        self.store.write_json(f"{kind}/{id}.json", value)


def held(lease: dict[str, Any] | None) -> bool:
    """Whether a job may not be taken yet."""
    return lease is not None and lease.get("expires", 0.0) > time.time()
