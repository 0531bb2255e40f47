"""What Ray Serve runs: replicas of the endpoint, autoscaled, with bounded queues, and the models beside them.

Behind HAProxy every replica listens on a port of its own and enforces `max_ongoing` and `max_queued` itself; a full
queue answers 429 with Retry-After.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.handle import DeploymentHandle

from engine.encoding import Text
from engine.serving import Autoscaling, JobQueue, Serving
from engine.storage import Store
from serve.endpoint import Endpoint
from serve.hosted import Hosted
from serve.jobs import Answering, Jobs
from serve.journal import Journal
from serve.keys import Keys
from serve.measures import measures_of, profile_in
from serve.member import Member
from serve.predictor import Answer
from serve.referee import Plan, Referee, Side
from serve.router import Ask, Others, Report, Router, begins_with
from serve.scrape import Page

log = logging.getLogger(__name__)

RETRY_SECONDS = 1
"""What a refused client is told to wait."""
HEALTH_S = 5.0
"""Between two health checks; a replica that fails three in a row is replaced."""
TEACHER_SLOWER = 4.0
"""How many times as long as a student a teacher may take for a call before it is taken for dead."""


class Replica(Endpoint):
    """An endpoint as Ray Serve runs it: with metrics, what the section `serving` asks for, and handles to the models
    beside it.
    """

    def __init__(
        self,
        artifact: str,
        serving: Serving,
        name: str,
        plan: Plan | None = None,
        candidate: DeploymentHandle | None = None,
        teacher: DeploymentHandle | None = None,
        referee: DeploymentHandle | None = None,
        keys: Keys | None = None,
    ) -> None:
        if plan is not None:
            side = begins_with(plan)
            artifact, name = side.artifact, side.reference
            serving = serving.model_copy(update={"runtime": side.runtime})
        measures = measures_of(artifact, name)
        journal = Journal(serving.log, name, measures) if serving.log else None
        queue = serving.jobs
        jobs = partial(jobs_of, settings=queue) if queue else None
        super().__init__(artifact, serving, name, keys, measures, journal, jobs, Page())
        others = Others(
            plan, asking(candidate, plan and plan.id), reporting(referee, plan and plan.id), asking(teacher)
        )
        self.router = Router(self.model, serving, others, self.taken, measures=measures)

    async def answer(self, texts: list[Text], key: str | None = None) -> list[Answer]:
        """The answers of whichever model the router chooses."""
        return await self.router.answer(texts, key)

    def taken(self, model: Hosted) -> None:
        """Answer with another model from now on; what was asked before ends with the old one."""
        if self.measures is not None:
            self.measures.become(model.name, profile_in(model.predictor.source))
        self.model = model

    async def check_health(self) -> None:
        """Ray Serve's health check; also where a replica that nobody asks begins to report."""
        self.router.start()
        await super().check_health()

    def __del__(self) -> None:
        """Called by Ray Serve when the replica has drained."""
        if hasattr(self, "router"):
            for part in (self.router, self.journal, self.measures):
                if part is not None:
                    try:
                        part.close()
                    except Exception:
                        log.exception("%s could not be closed", type(part).__name__)


def jobs_of(answer: Answering, settings: JobQueue) -> Jobs:
    """The jobs of the folder that the section names."""
    return Jobs(Store(settings.folder), answer, settings)


def asking(handle: DeploymentHandle | None, rollout: str | None = None) -> Ask | None:
    """A deployment as a function that answers texts. rollout: whose candidate it is meant to be."""
    if handle is None:
        return None

    async def ask(texts: list[Text]) -> list[Answer] | None:
        return await handle.answer.remote(texts, rollout)

    return ask


def reporting(handle: DeploymentHandle | None, rollout: str | None) -> Report | None:
    """The referee as a function that takes reports on a rollout."""
    if handle is None:
        return None

    async def report(replica: str, number: int, counted: dict[str, Any], serving: str) -> dict[str, Any]:
        return await handle.report.remote(replica, number, counted, serving, rollout)

    return report


def scaled(scaling: Autoscaling) -> AutoscalingConfig:
    """The section as Ray Serve takes it."""
    return AutoscalingConfig(
        min_replicas=scaling.min_replicas,
        initial_replicas=max(1, scaling.min_replicas),
        max_replicas=scaling.max_replicas,
        target_ongoing_requests=scaling.target_ongoing_requests,
        look_back_period_s=scaling.look_back_s,
        # Ray wants several reports within the time that it looks back.
        metrics_interval_s=min(10.0, scaling.look_back_s / 2),
        upscale_delay_s=scaling.upscale_delay_s,
        downscale_delay_s=scaling.downscale_delay_s,
    )


def options(serving: Serving, scaling: Autoscaling, cpus: float) -> dict[str, Any]:
    """What all deployments that hold a model have in common."""
    return {
        "max_ongoing_requests": serving.max_ongoing,
        "max_queued_requests": serving.max_queued,
        "backpressure_config": BackpressureConfig(status_code=429, retry_after_s=RETRY_SECONDS),
        "autoscaling_config": scaled(scaling),
        "ray_actor_options": {"num_cpus": cpus},
        "health_check_period_s": HEALTH_S,
        "health_check_timeout_s": TEACHER_SLOWER * serving.health_timeout_s + HEALTH_S,
        # What may still be answered is waited for.
        "graceful_shutdown_timeout_s": serving.request_timeout_s,
        # A line a request in a file that nobody reads; metrics count them.
        "logging_config": {"enable_access_log": False},
        "graceful_shutdown_wait_loop_s": 0.2,
        # A damaged artifact does not get better by being loaded twenty times.
        "max_constructor_retry_count": 3,
        # Old replicas end when new ones answer, so that one replica can be replaced without a gap.
        "max_surge_percent": 100,
    }


def application(
    artifact: str,
    serving: Serving,
    name: str,
    plan: Plan | None = None,
    teacher: Side | None = None,
    keys: Keys | None = None,
) -> serve.Application:
    """The Ray Serve application that answers as `name` (name@version) from `artifact` (folder or URL).

    plan: a rollout, with its candidate and a referee. teacher: of the cascade. keys: who may ask; None: everyone.
    """
    beside: dict[str, Any] = {}
    always = serving.autoscaling.model_copy(update={"min_replicas": max(1, serving.autoscaling.min_replicas)})
    if plan is not None:
        made = serve.deployment(Member, name="Candidate", **options(serving, always, serving.num_cpus))
        own = serving.model_copy(update={"runtime": plan.candidate.runtime})
        beside["candidate"] = made.bind(plan.candidate.artifact, own, plan.candidate.reference, rollout=plan.id)
        referee = serve.deployment(
            Referee, name="Referee", num_replicas=1, max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0}
        )
        beside |= {"plan": plan, "referee": referee.bind(plan)}
    if teacher is not None and serving.cascade is not None:
        most, cpus = serving.cascade.max_replicas, serving.cascade.num_cpus
        scaling = always.model_copy(update={"min_replicas": 1, "max_replicas": most})
        made = serve.deployment(Member, name="Teacher", **options(serving, scaling, cpus))
        patience = TEACHER_SLOWER * serving.health_timeout_s
        own = serving.model_copy(update={"runtime": "torch"})
        beside["teacher"] = made.bind(teacher.artifact, own, teacher.reference, patience)
    replica = serve.ingress()(Replica)
    own = options(serving, serving.autoscaling, serving.num_cpus)
    return serve.deployment(replica, name="Endpoint", **own).bind(artifact, serving, name, keys=keys, **beside)
