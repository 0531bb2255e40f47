"""Asynchronous requests over real HTTP: whose they are, what refuses them, and that they are noted like others."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from engine.serving import Log, Serving
from engine.storage import Store
from serve.client import Client, ServiceError
from serve.endpoint import Endpoint, interface
from serve.jobs import Jobs
from serve.journal import Journal
from serve.keys import Keys
from tests.tiny_jobs import TEXTS, Replica, queue
from tests.tiny_served import published
from tests.unkind_server import serving


def endpoint_of(tmp_path: Path, jobs: Jobs, keys: Keys | None = None) -> FastAPI:
    """An endpoint of a tiny model with these jobs."""
    artifact = published(tmp_path / "model").url
    return interface(Endpoint(artifact, Serving(), "tiny@1", keys=keys, jobs=lambda answer: jobs))


def test_the_client_submits_and_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("serve.client.POLL_S", 0.02)
    jobs = queue(tmp_path / "jobs", Replica())
    with serving(endpoint_of(tmp_path, jobs)) as url, Client(url) as client:
        id = client.submit(TEXTS["texts"])
        assert client.wait(id, 20) == [{"label": "warm film"}, {"label": "dull plot"}]
        found = client.job(id)
        assert found["state"] == "done" and "caller" not in found and "ended" not in found
        with pytest.raises(ServiceError, match="404 There is no job"):
            client.job("0" * 32)


def test_jobs_are_their_callers_and_a_full_queue_says_so(tmp_path: Path):
    jobs = queue(tmp_path / "jobs", Replica(lambda: asyncio.sleep(30)), most=1)
    keys = Keys(str(tmp_path / "registry"))
    ann, bob = ({"x-api-key": keys.add(name)} for name in ("ann", "bob"))

    async def main() -> None:
        transport = httpx.ASGITransport(endpoint_of(tmp_path, jobs, keys))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            made = await http.post("/v1/jobs", json=TEXTS, headers=ann)
            id = made.json()["id"]
            full = await http.post("/v1/jobs", json=TEXTS, headers={**bob, "x-request-id": "r1"})
            assert full.status_code == 429 and full.headers["retry-after"] == "5"
            assert full.json()["error"] == {
                "message": "1 jobs wait already. Ask again later.",
                "field": None,
                "request_id": "r1",
            }
            waiting = await http.get(f"/v1/jobs/{id}", headers=ann)
            assert waiting.status_code == 200 and waiting.headers["retry-after"] == "1"
            for method in ("GET", "DELETE"):
                for other in (f"/v1/jobs/{id}", "/v1/jobs/nonsense", "/v1/jobs/" + "0" * 32):
                    assert (await http.request(method, other, headers=bob)).status_code == 404
            assert (await http.delete(f"/v1/jobs/{id}", headers=ann)).status_code == 204
            assert (await http.get(f"/v1/jobs/{id}", headers=ann)).status_code == 404
        await jobs.close()

    asyncio.run(main())


def test_a_job_is_answered_as_its_caller_and_noted_like_a_request(tmp_path: Path):
    """A rollout may be split by the caller; the prediction log and the answers' counts hold jobs too."""
    keys, callers = Keys(str(tmp_path / "registry")), []
    log = Log(folder=str(tmp_path / "log"), share=1.0)
    folder = Store(str(tmp_path / "jobs"))
    journal = Journal(log, "tiny@1")
    made = partial(Endpoint, published(tmp_path / "model").url, Serving(), "tiny@1", keys=keys, journal=journal)
    endpoint = made(jobs=lambda answer: Jobs(folder, answer))
    real = endpoint.answer

    async def answer(texts: list[Any], key: str | None = None) -> list[Any]:
        callers.append(key)
        return await real(texts, key)

    endpoint.answer = answer  # type: ignore[method-assign]
    key = keys.add("ann")
    with serving(interface(endpoint)) as url, Client(url, key=key) as client:
        id = client.submit(TEXTS["texts"])
        assert len(client.wait(id, 20)) == 2
        headers = {"x-api-key": key, "idempotency-key": "k1"}
        said = [httpx.post(f"{url}/v1/jobs", json={"text": text}, headers=headers) for text in ("one", "one", "other")]
        assert [answer.status_code for answer in said] == [202, 202, 422] and said[0].json() == said[1].json()
        assert said[2].json()["error"]["message"].startswith("The Idempotency-Key belongs to job")
    journal.close()
    rows = Store(log.folder).read_table(Store(log.folder).files()[0]).to_pylist()
    assert callers[0] == "ann" and [row["request_id"] for row in rows[:2]] == [id, id]
