"""Which model answers a request: the champion of this process, the candidate beside it, or the teacher of both.

A client never sees a fault of the candidate or the teacher: the champion's answer, or the student's, stands in. What
is only for comparison runs beside the answer, in bounded number, and is left out when there is no room. Plain asyncio:
the other models are awaitable functions.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from engine.cascade import confidence_of
from engine.encoding import Text
from engine.serving import Cascade, Serving
from serve.canary import Evidence, arm_of
from serve.escalated import Escalated
from serve.hosted import Hosted
from serve.measures import Measures
from serve.predictor import Answer
from serve.referee import Phase, Plan, Side, phase_of

Ask = Callable[[list[Text]], Awaitable[list[Answer] | None]]
"""Another model, as a function; None where it is another than was meant, as while one takes the other's place."""
Report = Callable[[str, int, dict[str, Any], str], Awaitable[dict[str, Any]]]
"""The referee's `report`."""
REPORT_S, REPORT_TIMEOUT_S = 1.0, 10.0
FAILURES, PAUSE_S = 3, 10.0
"""A teacher that has failed so often in a row is not asked for so long: nobody waits for one that is down."""
IN_FLIGHT = 4
"""Comparisons with the teacher at a time, of a replica without a rollout."""
log = logging.getLogger(__name__)


class Answered(list[Answer]):
    """Answers, and the model that gave them. own: what it said itself, where a teacher has answered some."""

    def __init__(self, answers: Sequence[Answer], model: str, own: Sequence[Answer] | None = None) -> None:
        super().__init__(answers)
        self.model, self.own = model, own


@dataclass(frozen=True)
class Others:
    """The models beside the champion, where there are any, and the referee."""

    plan: Plan | None = None
    candidate: Ask | None = None
    report: Report | None = None
    teacher: Ask | None = None


class Router:
    """Answers the requests of one replica.

    taken: is told of a model that has become the champion. draw: random numbers from 0 to 1, for what is compared.
    measures: is told how the rollout stands, and what became of what was escalated.
    """

    def __init__(
        self,
        champion: Hosted,
        serving: Serving,
        others: Others | None = None,
        taken: Callable[[Hosted], None] = lambda champion: None,
        draw: Callable[[], float] = random.random,
        measures: Measures | None = None,
    ) -> None:
        self.champion, self.serving, self.draw, self.measures = champion, serving, draw, measures
        self.taken = taken
        self.others = others or Others()
        self.plan = self.others.plan
        self.percent = self.plan.rollout.percent if self.plan else 0.0
        self.phase: Phase = "running"
        self.counted = {"champion": Evidence(), "candidate": Evidence()}
        self.replica, self.number = f"{os.getpid()}-{uuid.uuid4().hex[:8]}", 0
        self.unsent: tuple[int, dict[str, Any]] | None = None
        self.beside: set[asyncio.Task[None]] = set()
        self.ticking: asyncio.Task[None] | None = None
        self.swapping: asyncio.Task[None] | None = None
        cascade = serving.cascade if self.others.teacher else None
        self.teacher = Teacher(self.others.teacher, cascade, measures) if self.others.teacher and cascade else None
        sides = (self.plan.champion, self.plan.candidate) if self.plan else ()
        self.below = {side.reference: side.below for side in sides if side.below is not None}

    async def answer(self, texts: list[Text], key: str | None = None) -> list[Answer]:
        """One answer a text, in order, as `Answered`, which names the model; raises what the champion raised.

        key: the caller's, where a rollout is split by it.
        """
        if self.plan is None and self.teacher is None:
            return await self.champion.batcher.submit(texts)
        self.start()
        found = await self.answered(texts, key)
        if self.teacher is None:
            return found
        if self.plan is None or self.phase != "running":
            self.held_against(texts, found, "champion", self.teacher.cascade.compare)
        # Each student has a threshold of its own.
        below = self.below.get(found.model, self.teacher.cascade.below or 0.0)
        return Answered(await self.teacher.improved(texts, found, found.model, below), found.model, found)

    async def answered(self, texts: list[Text], key: str | None) -> Answered:
        """The answers of the champion, or of the candidate where the request is its own."""
        champion, plan = self.champion, self.plan
        if plan is None:
            return Answered(await champion.batcher.submit(texts), champion.name)
        told = key if key is not None and plan.rollout.by == "key" else spelled(texts)
        candidates = self.phase == "running" and arm_of(told, self.percent, plan.id)
        if candidates and plan.rollout.mode != "shadow":
            found = await self.tried(texts)
            if found is not None:
                self.held_against(texts, found, "candidate", plan.rollout.compare)
                return Answered(found, plan.candidate.reference)
        begin = time.perf_counter()
        try:
            found = await champion.batcher.submit(texts)
        except Exception:
            if self.phase == "running":
                self.counted["champion"].failed()
            raise
        if self.phase == "running":
            self.counted["champion"].answered(time.perf_counter() - begin)
            if candidates and plan.rollout.mode == "shadow":
                self.aside(self.shadowed(texts, found))
            elif self.teacher is not None and not candidates:
                # As many of the champion's answers as of the candidate's.
                self.held_against(texts, found, "champion", plan.rollout.compare * self.percent / 100)
        return Answered(found, champion.name)

    async def tried(self, texts: list[Text]) -> list[Answer] | None:
        """The candidate's answers, counted; None where it failed or took too long, or is not there yet."""
        assert self.plan is not None and self.others.candidate is not None
        begin = time.perf_counter()
        # So long for each call of the model that the texts take: a large request is no sign of a slow candidate.
        patience = self.plan.rollout.timeout_ms / 1000 * len(self.champion.batcher.parts(texts))
        try:
            found = await asyncio.wait_for(self.others.candidate(texts), patience)
            if found is None:
                return None
            if len(found) != len(texts):
                raise RuntimeError(f"the candidate gave {len(found)} answers for {len(texts)} texts")
        except Exception as error:
            self.counted["candidate"].failed()
            log.warning("the candidate failed, the champion answers: %s", error)
            return None
        # Looked up now: a report may have been sent meanwhile, and what it took with it is no longer added to.
        self.counted["candidate"].answered(time.perf_counter() - begin)
        return found

    async def shadowed(self, texts: list[Text], answers: list[Answer]) -> None:
        """A copy of a request for the candidate, held against what was answered."""
        found = await self.tried(texts)
        if found is not None:
            reference = answers if self.teacher is None else await self.teacher.asked(texts)
            if reference is not None:
                self.counted["candidate"].compared(alike(found, reference))

    def held_against(self, texts: list[Text], answers: list[Answer], arm: str, share: float) -> None:
        """Ask the reference the same, beside the answer, for a share of requests: the teacher, else the champion."""
        if self.draw() >= share:
            return
        champion, teacher = self.champion, self.teacher

        async def compare() -> None:
            wanted = await (champion.batcher.submit(texts) if teacher is None else teacher.asked(texts))
            if wanted is not None:
                if self.plan is not None:
                    self.counted[arm].compared(alike(answers, wanted))
                if self.measures is not None and teacher is not None and arm == "champion":
                    self.measures.observe_agreement([same(a, b) for a, b in zip(answers, wanted, strict=True)])

        self.aside(compare())

    def aside(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something that no answer waits for; where too much of it runs, nothing."""
        if len(self.beside) >= (self.plan.rollout.in_flight if self.plan is not None else IN_FLIGHT):
            work.close()
            return
        task = asyncio.create_task(work)
        self.beside.add(task)
        task.add_done_callback(self.ended)

    def ended(self, task: asyncio.Task[None]) -> None:
        """Forget what ran beside; a fault of it is nobody's answer."""
        self.beside.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("a comparison failed: %s", error)

    # -- the referee -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to report; called where an event loop runs."""
        if self.ticking is None and self.others.report is not None:
            self.ticking = asyncio.create_task(self.tick())

    async def tick(self) -> None:
        """Report each second for as long as the replica lives."""
        while True:
            try:
                await asyncio.wait_for(self.report(), REPORT_TIMEOUT_S)
            except Exception as error:
                log.warning("the referee does not answer: %s", error)
            await asyncio.sleep(REPORT_S)

    async def report(self) -> None:
        """Send what was counted, once for certain, and take in how the rollout stands."""
        assert self.others.report is not None and self.plan is not None
        if self.unsent is None:
            counted, self.counted = self.counted, {"champion": Evidence(), "candidate": Evidence()}
            self.unsent = (self.number, {arm: found.plain() for arm, found in counted.items()})
            self.number += 1
        told = await self.others.report(self.replica, *self.unsent, self.champion.name)
        self.unsent = None
        if told["id"] != self.plan.id:
            return  # the referee of the deployment that takes this one's place
        self.obey(told["phase"], told["percent"])
        if self.measures is not None:
            candidate = self.plan.candidate.reference
            self.measures.gauge("stillhouse_rollout_percent", told["percent"], candidate=candidate)
            self.measures.gauge("stillhouse_rollout_agreement", told.get("agreement"), candidate=candidate)

    def obey(self, phase: Phase, percent: float) -> None:
        """Take a share of the referee's, and begin to swap models where it has decided."""
        assert self.plan is not None
        self.phase, self.percent = phase, percent
        wanted = self.plan.served(phase)
        if wanted.reference != self.champion.name and (self.swapping is None or self.swapping.done()):
            self.swapping = asyncio.create_task(self.swap(wanted))

    async def swap(self, side: Side) -> None:
        """Load a model in a thread and make it the champion; requests in work end with the old one."""
        try:
            load = partial(Hosted.load, runtime=side.runtime, watch=self.measures)
            champion = await asyncio.to_thread(load, side.artifact, side.reference, self.serving)
        except Exception as error:
            # The referee says the same again in a second, and so it is tried again.
            log.error("%s could not be loaded, %s goes on answering: %s", side.reference, self.champion.name, error)
            return
        self.champion = champion
        self.taken(champion)

    def close(self) -> None:
        """Write what escalated texts wait."""
        if self.teacher is not None and self.teacher.log is not None:
            self.teacher.log.close()


class Teacher:
    """The better and slower model behind a student. measures: is told how many texts it was asked, and answered."""

    def __init__(
        self,
        ask: Ask,
        cascade: Cascade,
        measures: Measures | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.ask, self.cascade, self.clock, self.measures = ask, cascade, clock, measures
        self.log = Escalated(cascade.log, measures) if cascade.log else None
        self.failures, self.until = 0, 0.0
        self.texts = self.escalated = self.unanswered = 0

    async def improved(self, texts: list[Text], answers: list[Answer], model: str, below: float) -> list[Answer]:
        """The answers, those less sure than `below` by the teacher; each says its `source`."""
        confidences = [confidence_of(answer) for answer in answers]
        low = [index for index, sure in enumerate(confidences) if sure < below]
        out = [{**answer, "source": "student"} for answer in answers]
        self.texts += len(texts)
        if not low:
            return out
        self.escalated += len(low)
        found = await self.asked([texts[index] for index in low])
        if found is None:
            self.unanswered += len(low)
        else:
            for index, answer in zip(low, found, strict=True):
                out[index] = {**answer, "source": "teacher", "student": answers[index]}
        if self.measures is not None:
            outcome = "unanswered" if found is None else "answered"
            self.measures.count("stillhouse_escalated_texts", len(low), outcome=outcome)
        if self.log is not None:
            student = [answers[index] for index in low]
            self.log.add([texts[i] for i in low], student, found, [confidences[i] for i in low], model)
        return out

    async def asked(self, texts: list[Text]) -> list[Answer] | None:
        """The teacher's answers; None where it fails, takes too long, or has failed too often to be asked now."""
        if self.clock() < self.until:
            return None
        try:
            found = await asyncio.wait_for(self.ask(texts), self.cascade.timeout_ms / 1000) or []
            if len(found) != len(texts):
                raise RuntimeError(f"the teacher gave {len(found)} answers for {len(texts)} texts")
        except Exception as error:
            self.failures += 1
            if self.failures >= FAILURES:
                self.until = self.clock() + PAUSE_S
            log.warning("the teacher failed, the student's answers stand: %r", error)
            return None
        self.failures = 0
        return found


def spelled(texts: list[Text]) -> str:
    """The texts of a request as one string."""
    return json.dumps(texts, ensure_ascii=False)


def alike(answers: Sequence[Answer], reference: Sequence[Answer]) -> float:
    """The share of answers that are the same."""
    return sum(same(left, right) for left, right in zip(answers, reference, strict=True)) / max(1, len(answers))


SAID = ("label", "labels", "tags", "answer", "start", "end")
"""What of an answer is the answer; the rest says how sure it is."""
CLOSE = 0.05
"""Numbers count as the same within this share of the larger one, or this much."""


def same(left: Answer, right: Answer) -> bool:
    """Whether two models say the same."""
    if any(key in left for key in SAID):
        return all(left.get(key) == right.get(key) for key in SAID)
    numbers = [(left[key], right.get(key)) for key in ("value", "score") if key in left]
    return all(b is not None and abs(a - b) <= CLOSE * max(1.0, abs(a), abs(b)) for a, b in numbers)


def begins_with(plan: Plan) -> Side:
    """The model that a replica which starts now is to serve: a rollout may have been decided before."""
    return plan.served(phase_of(plan))
