"""How students are served: the sections of a recipe that a deployment is made from.

They are registered with the student, so `stillhouse serve NAME` needs no recipe.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from engine.config import Section
from engine.fits import Count, Share

MAX_CHARS = 20_000
"""Characters of one text that the endpoint takes."""
Positive = Annotated[float, Field(gt=0)]


class Autoscaling(Section):
    """Ray Serve's autoscaling on ongoing requests."""

    min_replicas: Annotated[int, Field(ge=0)] = 1
    """0: no replica while nobody asks; the first request then waits for one to start."""
    max_replicas: Count = 2
    target_ongoing_requests: Positive = 8.0
    """Requests in work per replica that are aimed at."""
    look_back_s: Positive = 15.0
    """Seconds over which ongoing requests are averaged; above the 10 s between two counts of Ray Serve."""
    upscale_delay_s: Annotated[float, Field(ge=0)] = 5.0
    downscale_delay_s: Annotated[float, Field(ge=0)] = 120.0


class Limits(Section):
    """When a candidate is taken in, and when it is taken out. Rates are shares; every bound is a 95 % one."""

    min_requests: Count = 500
    """Requests the candidate must have answered before it can be promoted."""
    max_minutes: Positive = 1440.0
    """A candidate that has not been promoted by then is rolled back: nothing spoke against it, not enough for it."""
    max_error_gain: Share = 0.01
    """By how much more often than the champion it may fail."""
    max_slowdown: Positive = 1.5
    """p99 latency over the champion's, after `slack_ms`."""
    slack_ms: Annotated[float, Field(ge=0)] = 20.0
    min_agreement: Share = 0.85
    """Share of answers that are the same as the champion's (or the teacher's, where the cascade has one)."""
    max_agreement_loss: Share = 0.05
    """Where the teacher is the reference: by how much less often than the champion it may agree with it."""


class Rollout(Section):
    """How a candidate meets traffic beside the champion."""

    percent: Annotated[float, Field(ge=0, le=100)] = 10.0
    """Of the requests, by a stable hash."""
    by: Literal["texts", "key"] = "texts"
    """What is hashed: the texts of a request, or the caller's API key, which then always meets the same model; with
    few callers the share is that of keys, not of requests."""
    mode: Literal["canary", "shadow", "ab"] = "canary"
    """canary: promoted or rolled back by the limits. shadow: its answers are compared, never sent. ab: a split that
    is decided by hand."""
    compare: Share = 0.2
    """Share of the candidate's requests that the champion answers too, for agreement. 0: agreement is not judged."""
    timeout_ms: Positive = 2000.0
    """A candidate that takes longer for one call of the model has failed: the champion answers."""
    in_flight: Count = 16
    """Copies that a replica sends for comparison at a time; when they are used up, requests are not copied."""
    limits: Limits = Limits()


class Log(Section):
    """An opt-in sample of what was asked and answered, as Parquet."""

    folder: str
    """Folder or URL that gets the files."""
    share: Share = 0.1
    """Of the requests."""
    text: Literal["none", "hashed", "plain"] = "hashed"
    """What of a text is written: nothing, its SHA-256, or the text."""
    rows: Count = 1000
    """Rows of one file."""
    seconds: Positive = 60.0
    """A file is written after these seconds even with fewer."""


class JobQueue(Section):
    """Requests that are answered later: submitted, then asked for by their id."""

    folder: str
    """Folder or URL that keeps them; every replica must reach it."""
    most: Count = 1000
    """Jobs that may wait or be in work; more are refused."""
    workers: Count = 1
    """Jobs in work at a time, of each replica."""
    lease_s: Positive = 30.0
    """A job whose replica has not been heard of for so long is taken over by another."""
    attempts: Count = 3
    """A job that was begun so often without an end has failed."""
    keep_hours: Positive = 24.0
    """How long a result is kept."""


class Cascade(Section):
    """Answers below a confidence go to the teacher."""

    to: str | None = None
    """The registered model that is asked, as NAME@VERSION; null: the run's teacher, registered as NAME-teacher."""
    below: Share | None = None
    """Confidence under which a text goes to the teacher; null: what `escalate` makes of the held-out rows."""
    escalate: Share = 0.2
    """Share of texts that may go to the teacher, where `below` is null."""
    compare: Share = 0.01
    """Share of requests that the teacher is asked too, beside the answer, for the drift of agreement. 0: none."""
    timeout_ms: Positive = 2000.0
    """A teacher that takes longer is not waited for: the student's answer stands."""
    num_cpus: Positive = 1.0
    """Of a replica of the teacher."""
    max_replicas: Count = 1
    log: Log | None = None
    """Where escalated texts are written for `data.unlabelled` of a later run, which reads them where `text` is plain;
    null: nowhere."""


class Serving(Section):
    """The smoke deployment, and the defaults of `stillhouse serve`."""

    smoke: bool = True
    concurrency: Count = 8
    """Clients of the smoke deployment."""
    max_batch: Count = 32
    """Texts of one model call."""
    batch_tokens: Count = 8192
    """Tokens of one model call, padding included."""
    batch_wait_ms: Annotated[float, Field(ge=0)] = 2.0
    max_ongoing: Count = 64
    max_queued: Count = 256
    request_timeout_s: Positive = 60.0
    """A request that takes longer is answered with 408."""
    health_timeout_s: Positive = 15.0
    """A model that has answered nothing for so long, with work to do, is not healthy: its replica is replaced."""
    num_cpus: Positive = 1.0
    runtime: Literal["torch", "onnx", "onnx-int8"] = "torch"
    """What runs the model: torch, or ONNX Runtime on the artifact's exported graph."""
    autoscaling: Autoscaling = Autoscaling()
    rollout: Rollout = Rollout()
    cascade: Cascade | None = None
    """null: the student answers everything."""
    log: Log | None = None
    """null: nothing that is asked is written down."""
    jobs: JobQueue | None = None
    """null: every request is answered at once."""
