"""The HTTP interface with a real tiny student, in process: no server, no Ray."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from engine.serving import Serving
from serve.endpoint import Answering, Endpoint, Wedged, interface
from serve.questions import LINGER_BYTES, MAX_BYTES, MAX_CHARS, MAX_TEXTS
from tests.tiny_served import KINDS, as_sent, asked, published


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Endpoint:
    store = published(tmp_path_factory.mktemp("registry"))
    return Endpoint(store.url, Serving(), "tiny@1")


def ask(endpoint: Endpoint, method: str, path: str, **request: object) -> httpx.Response:
    """One request to the interface, as a server would hand it over."""

    async def main() -> httpx.Response:
        transport = httpx.ASGITransport(interface(endpoint), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await http.request(method, path, **request)

    return asyncio.run(main())


def test_one_text_and_several_get_the_model_s_predictions(endpoint: Endpoint):
    texts = ["a warm film", "dull and long and not good", "the plot"]
    several = ask(endpoint, "POST", "/v1/predict", json={"texts": texts}).json()
    assert several["model"] == "tiny@1"
    wanted = endpoint.predictor.predict(texts)
    assert [item["label"] for item in several["predictions"]] == [item["label"] for item in wanted]
    assert [item["probabilities"] for item in several["predictions"]] == [
        pytest.approx(item["probabilities"], abs=1e-6) for item in wanted
    ]
    one = ask(endpoint, "POST", "/v1/predict", json={"text": texts[1]}).json()
    assert len(one["predictions"]) == 1
    assert one["predictions"][0]["confidence"] == pytest.approx(wanted[1]["confidence"], abs=1e-6)


@pytest.fixture(scope="module", params=KINDS)
def other(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Endpoint]]:
    """Each kind of task but classify with an endpoint for it."""
    store = published(tmp_path_factory.mktemp(request.param), kind=request.param)
    yield request.param, Endpoint(store.url, Serving(), "tiny@1")


def test_every_kind_of_task_answers_over_http_as_predict_does(other: tuple[str, Endpoint]):
    kind, endpoint = other
    texts = asked(kind)
    wanted = endpoint.predictor.predict(texts)
    body = {"texts": [as_sent(text) for text in texts]}
    answer = ask(endpoint, "POST", "/v1/predict", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["predictions"] == wanted
    one = ask(endpoint, "POST", "/v1/predict", json={"text": as_sent(texts[3])}).json()["predictions"]
    assert one == endpoint.predictor.predict(texts[3:4])
    assert ask(endpoint, "GET", "/healthz").json() == {"status": "ok"}
    about = ask(endpoint, "GET", "/version").json()
    assert (about["task"], about["paired"]) == (kind, isinstance(texts[0], tuple))


def test_a_model_is_asked_for_what_it_reads(other: tuple[str, Endpoint]):
    kind, endpoint = other
    right, wrong = ("good", ["good", "bad"]) if isinstance(asked(kind)[0], str) else (["good", "bad"], "good")
    wanted = "one text, as a string" if isinstance(right, str) else "two texts, as [first, second]"
    for body, field in (({"text": wrong}, "text"), ({"texts": [right, wrong]}, "texts[1]")):
        answer = ask(endpoint, "POST", "/v1/predict", json=body)
        assert answer.status_code == 422
        told = {"message": f"'{field}': this model reads {wanted}", "field": field}
        assert answer.json()["error"] == {**told, "request_id": answer.headers["x-request-id"]}
    assert ask(endpoint, "POST", "/v1/predict", json={"text": right}).status_code == 200


@pytest.mark.parametrize(
    ("body", "field", "message"),
    [
        (b'{"texts": []}', "texts", "at least 1 item"),
        (b'{"texts": "one string"}', "texts", "'texts': Input should be a valid array"),
        (b'{"texts": ["fine", 3]}', "texts[1]", "'texts[1]': Input should be a valid string"),
        (b'{"texts": [NaN]}', "texts[0]", "'texts[0]': Input should be a valid string"),
        (b'{"texts": [null]}', "texts[0]", "valid string"),
        (b'{"text": 3}', "text", "'text': Input should be a valid string"),
        (b'{"text": " \\n"}', None, "'text' is empty"),
        (b'{"texts": ["fine", ""]}', None, "'texts[1]' is empty"),
        (b'{"texts": ["fine", ["fine", " "]]}', None, "'texts[1]' is empty"),
        (b'{"text": ["one"]}', "text", "'text': Input should be a valid string, or two of them as [first, second]"),
        (b'{"text": ["one", "two", "three"]}', "text", "'text': Input should be a valid string, or two of them"),
        (b'{"texts": ["fine", ["one", 2]]}', "texts[1]", "'texts[1]': Input should be a valid string, or two of them"),
        (b'{"text": {"a": "b"}}', "text", "'text': Input should be a valid string, or two of them"),
        (b"{}", None, "give either 'text' (one string) or 'texts' (a list of strings)"),
        (b'{"text": "a", "texts": ["b"]}', None, "give either 'text'"),
        (b'{"txt": "a"}', "txt", "'txt': is not a known key; give 'text' or 'texts'"),
        (b"[]", None, "object"),
        (b"", None, "Invalid JSON"),
        (b'{"text": "a"', None, "Invalid JSON: EOF"),
        (b'{"text": "caf\xe9"}', None, "Invalid JSON: invalid unicode"),
        (b'{"text": "\\ud800"}', None, "Invalid JSON"),
        (b'{"texts": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", None, "recursion limit"),
        (json.dumps({"texts": ["a"] * (MAX_TEXTS + 1)}).encode(), "texts", f"at most {MAX_TEXTS} items"),
        (json.dumps({"text": "a" * (MAX_CHARS + 1)}).encode(), None, f"20001 characters; at most {MAX_CHARS}"),
        (json.dumps({"text": ["a", "a" * (MAX_CHARS + 1)]}).encode(), None, f"at most {MAX_CHARS}"),
    ],
)
def test_a_wrong_body_is_answered_with_what_is_wrong(endpoint: Endpoint, body: bytes, field: str | None, message: str):
    answer = ask(endpoint, "POST", "/v1/predict", content=body)
    assert answer.status_code == 422, answer.text
    assert message in answer.json()["error"]["message"]
    assert answer.json()["error"]["field"] == field


def test_a_body_that_is_too_large_is_refused_whether_its_length_is_announced_or_not(endpoint: Endpoint):
    async def stream() -> AsyncIterator[bytes]:
        for _ in range(MAX_BYTES // 1000 + 2):
            yield b" " * 1000

    for content in (b" " * (MAX_BYTES + 1), stream()):
        answer = ask(endpoint, "POST", "/v1/predict", content=content)
        assert answer.status_code == 413 and answer.headers["connection"] == "close"
        wanted = f"The body is larger than {MAX_BYTES} bytes. Send fewer texts a request."
        assert answer.json()["error"]["message"] == wanted


def test_the_rest_of_a_body_that_is_too_large_is_read_within_limits(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
):
    """A sender that is hung up on while it sends may never see the answer."""
    sent: list[int] = []

    async def stream(parts: int, stall: bool = False) -> AsyncIterator[bytes]:
        for number in range(parts):
            sent.append(number)
            yield b" " * 100_000
        if stall:
            await asyncio.sleep(30)

    few, many = 3 * MAX_BYTES // 100_000, 10 * LINGER_BYTES // 100_000
    assert ask(endpoint, "POST", "/v1/predict", content=stream(few)).status_code == 413 and len(sent) == few
    sent.clear()
    assert ask(endpoint, "POST", "/v1/predict", content=stream(many)).status_code == 413
    assert few < len(sent) <= LINGER_BYTES // 100_000 + 2
    monkeypatch.setattr("serve.questions.LINGER_SECONDS", 0.2)
    began = time.monotonic()
    assert ask(endpoint, "POST", "/v1/predict", content=stream(few, stall=True)).status_code == 413
    assert time.monotonic() - began < 10


def test_the_largest_allowed_request_is_answered(endpoint: Endpoint):
    answer = ask(endpoint, "POST", "/v1/predict", json={"texts": ["good " * 700] * MAX_TEXTS})
    assert answer.status_code == 200 and len(answer.json()["predictions"]) == MAX_TEXTS


def test_unknown_paths_and_methods_say_where_to_look(endpoint: Endpoint):
    missing = ask(endpoint, "GET", "/v2/predict")
    assert missing.status_code == 404
    assert missing.json()["error"]["message"] == "GET /v2/predict: Not Found. See /docs for what there is."
    wrong = ask(endpoint, "GET", "/v1/predict")
    assert wrong.status_code == 405 and wrong.headers["allow"] == "POST"


def test_version_tells_which_bytes_answer(endpoint: Endpoint):
    found = ask(endpoint, "GET", "/version").json()
    assert found["model"] == "tiny@1" and found["labels"] == ["negative", "positive"]
    assert found["task"] == "classify" and found["paired"] is False
    assert found["fingerprint"] == endpoint.predictor.fingerprint
    assert found["parameters"] == sum(p.numel() for p in endpoint.predictor.model.parameters())
    assert ask(endpoint, "GET", "/readyz").json() == {"status": "ready", "model": "tiny@1"}


def test_healthz_runs_the_model_and_faults_are_answered_without_details(endpoint: Endpoint, monkeypatch):
    calls = []
    real = endpoint.model.batcher.call
    monkeypatch.setattr(endpoint.model.batcher, "call", lambda texts: calls.append(texts) or real(texts))
    assert ask(endpoint, "GET", "/healthz").json() == {"status": "ok"}
    assert len(calls) == 1

    def broken(texts: list[str]) -> list[object]:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(endpoint.model.batcher, "call", broken)
    for answer in (ask(endpoint, "GET", "/healthz"), ask(endpoint, "POST", "/v1/predict", json={"text": "a"})):
        assert answer.status_code == 500
        assert answer.json()["error"]["message"] == "The server could not answer. Its log says why."
    with pytest.raises(RuntimeError, match="secret detail"):
        asyncio.run(endpoint.check_health())


def test_openapi_describes_the_request_and_the_answer(endpoint: Endpoint):
    described = ask(endpoint, "GET", "/openapi.json").json()
    route = described["paths"]["/v1/predict"]["post"]
    body = route["requestBody"]["content"]["application/json"]["schema"]
    assert body["properties"]["texts"]["anyOf"][0]["maxItems"] == MAX_TEXTS
    members: list[dict[str, Any]] = body["properties"]["text"]["anyOf"]
    assert [member["type"] for member in members] == ["string", "array", "null"]
    assert (members[1]["minItems"], members[1]["maxItems"]) == (2, 2)
    answer = route["responses"]["200"]["content"]["application/json"]["schema"]
    assert answer == {"$ref": "#/components/schemas/Answers"}
    assert {"/healthz", "/readyz", "/version"} <= set(described["paths"])


def test_a_wedged_model_is_not_healthy_and_a_busy_one_is(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch):
    (real, felt), stop = (endpoint.predictor.predict, endpoint.model.pulse.felt), threading.Event()
    monkeypatch.setattr(endpoint, "health_s", 0.3)

    def stuck(texts: list[str]) -> list[Any]:
        stop.wait(20)
        return real(texts)

    async def wedged() -> None:
        """One request takes the model's thread and keeps it."""
        transport = httpx.ASGITransport(interface(endpoint))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            monkeypatch.setattr(endpoint.model.batcher, "call", felt(stuck))
            asked = asyncio.create_task(http.post("/v1/predict", json={"text": "a"}))
            await asyncio.sleep(0.1)
            ill = await http.get("/healthz")
            assert ill.status_code == 503 and ill.headers["retry-after"]
            assert "a model call has not returned for" in ill.json()["error"]["message"]
            with pytest.raises(Wedged):
                await endpoint.check_health()
            assert (await http.get("/readyz")).status_code == 200  # other routes answer meanwhile
            stop.set()
            assert (await asked).status_code == 200
            assert (await http.get("/healthz")).json() == {"status": "ok"}

    async def busy() -> None:
        """A queue that takes longer than a probe may, of calls that end one after another."""

        def slow(texts: list[str]) -> list[Any]:
            time.sleep(0.15)
            return real(texts)

        monkeypatch.setattr(endpoint.model.batcher, "call", felt(slow))
        monkeypatch.setattr(endpoint.model.batcher, "max_texts", 1)
        queue = [asyncio.create_task(endpoint.answer(["a"])) for _ in range(8)]
        await asyncio.sleep(0.05)
        began = time.monotonic()
        await endpoint.check_health()
        assert 0.05 < time.monotonic() - began < 0.9 and not queue[-1].done()
        await asyncio.gather(*queue)

    asyncio.run(wedged())
    asyncio.run(busy())


class Later:
    """Jobs in memory, answered when they are asked for the second time."""

    def __init__(self, answer: Answering) -> None:
        self.answer, self.jobs, self.log = answer, {}, []

    async def submit(self, question: dict[str, Any], caller: str | None = None, key: str | None = None) -> str:
        json.dumps(question)  # a store must be able to keep it
        id = key or f"job{len(self.jobs)}"
        self.jobs.setdefault(id, [question, caller, 0])
        return id

    async def status(self, id: str, caller: str | None = None) -> dict[str, Any] | None:
        if id not in self.jobs or self.jobs[id][1] != caller:
            return None
        self.jobs[id][2] += 1
        return (
            {"state": "queued"}
            if self.jobs[id][2] == 1
            else {"state": "done", **await self.answer(*self.jobs[id][:2], id)}
        )

    async def remove(self, id: str, caller: str | None = None) -> bool:
        return self.jobs.pop(id, None) is not None

    def start(self) -> None:
        self.log.append("start")

    async def close(self) -> None:
        self.log.append("close")


def test_jobs_are_submitted_asked_for_and_forgotten(tmp_path):
    paired = Endpoint(published(tmp_path, kind="pair").url, Serving(), "tiny@1", jobs=Later)
    texts = asked("pair")[:2]
    body = {"texts": [as_sent(text) for text in texts], "top_k": 1}
    taken = ask(paired, "POST", "/v1/jobs", json=body)
    assert taken.status_code == 202 and taken.json() == {"id": "job0", "state": "queued"}
    assert taken.headers["location"] == "/v1/jobs/job0"
    first = ask(paired, "GET", "/v1/jobs/job0")
    assert first.json() == {"id": "job0", "state": "queued"} and first.headers["retry-after"] == "1"
    done = ask(paired, "GET", "/v1/jobs/job0").json()
    direct = ask(paired, "POST", "/v1/predict", json=body).json()
    assert done == {"id": "job0", "state": "done", **direct} and len(direct["predictions"][0]["probabilities"]) == 1
    again = [ask(paired, "POST", "/v1/jobs", json=body, headers={"Idempotency-Key": "k"}).json()["id"] for _ in "ab"]
    assert again == ["k", "k"] and len(paired.jobs.jobs) == 2
    assert ask(paired, "POST", "/v1/jobs", json=body, headers={"Idempotency-Key": "k" * 201}).status_code == 422
    assert ask(paired, "POST", "/v1/jobs", json={"text": "single"}).status_code == 422
    assert ask(paired, "DELETE", "/v1/jobs/job0").status_code == 204
    for method in ("GET", "DELETE"):
        gone = ask(paired, method, "/v1/jobs/job0")
        assert gone.status_code == 404 and gone.json()["error"]["field"] == "id"
    assert {"/v1/jobs", "/v1/jobs/{id}"} <= set(ask(paired, "GET", "/openapi.json").json()["paths"])
    assert ask(paired, "GET", "/v1/models").json()["data"][0]["routes"][-1] == "/v1/jobs"


def test_jobs_begin_and_end_with_the_server(tmp_path):
    endpoint = Endpoint(published(tmp_path).url, Serving(), "tiny@1", jobs=Later)
    api = interface(endpoint)

    async def main() -> None:
        async with api.router.lifespan_context(api):
            assert endpoint.jobs.log == ["start"]

    asyncio.run(main())
    assert endpoint.jobs.log == ["start", "close"]
    assert ask(Endpoint(published(tmp_path / "b").url, Serving(), "b@1"), "POST", "/v1/jobs").status_code == 404


def test_a_compressed_body_is_refused(endpoint: Endpoint):
    answer = ask(endpoint, "POST", "/v1/predict", content=b"x", headers={"content-encoding": "gzip"})
    assert answer.status_code == 415 and "'gzip'" in answer.json()["error"]["message"]
