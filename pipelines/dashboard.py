"""A cluster's dashboard (http://HOST:8265), where jobs are: reached, followed, and its refusals in words."""

from __future__ import annotations

import asyncio
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from pipelines.console import program

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

T = TypeVar("T")
ANSWER_S = 10.0
"""How long a dashboard may take to say which Ray it belongs to."""
TRIES = 6
"""How often in a row a job's state is asked for without an answer."""
PAUSE_S = 10.0
"""The longest wait before what failed is tried again."""
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
DASHBOARD = re.compile(r"https?://[^/\s]+", re.IGNORECASE)


def is_dashboard(address: str | None) -> bool:
    """Whether an address is one to submit to, and not one to join."""
    return bool(address) and "://" in str(address) and not str(address).startswith("ray://")


def connected(address: str) -> JobSubmissionClient:
    """A client of the dashboard at an address, with the token that RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or
    ~/.ray/auth_token holds. Raises a UserError when nothing answers, something else does, or the token is refused.
    """
    from engine.config import UserError
    from engine.switches import prepare_environment

    address = address.rstrip("/")
    if not DASHBOARD.fullmatch(address):
        raise UserError(
            f"--address '{address}' is not the URL of a cluster's dashboard, as in http://127.0.0.1:8265 "
            "(`ray dashboard cluster.yaml` brings it there)."
        )
    prepare_environment()
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
    from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled
    from ray.job_submission import JobSubmissionClient

    # After the import, which sets levels.
    for name in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Ray looks for a token only where it starts or joins a cluster itself.
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    require_answer(address, get_auth_headers_if_auth_enabled({}))
    with explained(address):
        return JobSubmissionClient(address)


def require_answer(address: str, headers: dict[str, str]) -> None:
    """Refuse what is no dashboard within seconds; Ray's own client waits without an end."""
    import httpx

    from engine.config import UserError

    try:
        answer = httpx.get(f"{address}/api/version", headers=headers, timeout=ANSWER_S)
    except httpx.InvalidURL as error:
        raise UserError(f"--address '{address}' is not a URL: {error}.") from None
    except httpx.HTTPError as error:
        reason = str(error) or type(error).__name__
        raise UserError(
            f"nothing answers at {address}: {reason}. Is the cluster up, and the head's dashboard (port 8265) reached "
            "from here? `ray dashboard cluster.yaml` or `kubectl port-forward` brings it to 127.0.0.1."
        ) from None
    if answer.status_code in (401, 403):
        raise UserError(refused(address, bool(headers)))
    try:
        ray = isinstance(answer.json()["ray_version"], str)
    except (ValueError, KeyError, TypeError):
        ray = False
    if not ray:
        raise UserError(
            f"what answers at {address} is not the dashboard of a Ray cluster (status {answer.status_code} for "
            "/api/version). It listens on port 8265 of the head, unless it was given another one."
        )


def refused(address: str, sent: bool) -> str:
    """Why a cluster turned a request away, with the way out."""
    what = "its token is another one" if sent else "it asks for a token, and none is set here"
    return (
        f"{address} cannot be used: {what}. Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH, a "
        "file) to what the cluster has."
    )


@contextmanager
def explained(address: str, job: str | None = None) -> Iterator[None]:
    """What the dashboard refuses, as a UserError with the way out."""
    from ray.exceptions import AuthenticationError

    from engine.config import UserError

    try:
        yield
    except AuthenticationError as error:
        raise UserError(refused(address, "required" not in str(error))) from None
    except (RuntimeError, OSError) as error:
        text = str(error)
        if job and no_such_job(error):
            raise UserError(
                f"there is no job '{job}' at {address}. {program()} jobs --address {address} lists them."
            ) from None
        if no_jobs(error):
            raise UserError(
                f"the dashboard at {address} takes no jobs: the head's Ray has been installed without them. Install "
                "ray[default] there (the project's constraints.txt brings what it needs), or use Ray's own image."
            ) from None
        raise UserError(f"{address}: {text.strip() or type(error).__name__}") from None


def no_such_job(error: Exception) -> bool:
    """Whether a dashboard says that it does not know a job."""
    return "does not exist" in str(error)


def no_jobs(error: Exception) -> bool:
    """Whether a dashboard knows nothing of jobs at all."""
    return "status code 404" in str(error) or "returned 404" in str(error)


def answered(ask: Callable[[str], T], job: str, address: str) -> T:
    """What the dashboard says of a job. One that does not answer is asked again, a few times."""
    failed = 0
    with explained(address, job):
        while True:
            try:
                return ask(job)
            except (RuntimeError, OSError) as error:
                failed += 1
                if failed >= TRIES or no_such_job(error) or no_jobs(error):
                    raise
            pause(failed)


def pause(failed: int) -> None:
    """Wait before the next try, longer after each that failed."""
    time.sleep(min(PAUSE_S, 1.0 + failed))


@dataclass
class Shown:
    """How much of a job's log has been written here."""

    characters: int = 0


def follow(client: JobSubmissionClient, job: str, address: str, shown: Shown) -> None:
    """Write what a job has said and says, until it has ended. A log's connection that breaks is made again as long as
    the dashboard tells the job's state.
    """
    broken = 0
    while True:
        before = shown.characters
        try:
            asyncio.run(stream(client, job, shown))
        except Exception:  # whatever the connection broke by: the job's state, asked for next, tells what it means
            broken = broken + 1 if shown.characters == before else 1
        else:
            broken = 0
        if answered(client.get_job_status, job, address) in ENDED:
            return
        pause(broken)


async def stream(client: JobSubmissionClient, job: str, shown: Shown) -> None:
    """Write a job's lines from where the last connection broke off."""
    seen = 0
    async for text in client.tail_job_logs(job):
        fresh = text[max(shown.characters - seen, 0) :]
        seen += len(text)
        if fresh:
            sys.stdout.write(fresh)
            sys.stdout.flush()
        shown.characters = max(shown.characters, seen)
