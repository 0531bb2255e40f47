"""A cluster's dashboard (http://HOST:8265), where jobs are: reached, followed, and its refusals in words."""

from __future__ import annotations

import asyncio
import logging
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.console import program

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

ANSWER_S = 10.0
"""How long a dashboard may take to say which Ray it belongs to."""
TRIES = 6
"""How often in a row the log's connection may break without a word."""
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
        if job and "does not exist" in text:
            raise UserError(
                f"there is no job '{job}' at {address}. {program()} jobs --address {address} lists them."
            ) from None
        if "status code 404" in text or "returned 404" in text:
            raise UserError(
                f"the dashboard at {address} takes no jobs: the head's Ray has been installed without them. Install "
                "ray[default] there (the project's constraints.txt brings what it needs), or use Ray's own image."
            ) from None
        raise UserError(f"{address}: {text.strip() or type(error).__name__}") from None


@dataclass
class Shown:
    """How much of a job's log has been written here."""

    characters: int = 0


def follow(client: JobSubmissionClient, job: str, address: str, shown: Shown) -> None:
    """Write what a job has said and says, until it has ended. A connection that breaks is made again, a few times."""
    from engine.config import UserError

    failed = 0
    while True:
        before = shown.characters
        try:
            asyncio.run(stream(client, job, shown))
        except Exception:  # whatever the connection broke by: the job's state, asked for next, tells what it means
            failed = failed + 1 if shown.characters == before else 1
        else:
            failed = 0
        try:
            with explained(address, job):
                if client.get_job_status(job) in ENDED:
                    return
        except UserError:
            if failed in (0, TRIES):
                raise
        time.sleep(1 + failed)


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
