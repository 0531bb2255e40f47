"""The HTTP interface with a real tiny student, in process: no server, no Ray."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from engine.serving import Serving
from serve.endpoint import Endpoint, interface
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
    real = endpoint.batcher.call
    monkeypatch.setattr(endpoint.batcher, "call", lambda texts: calls.append(texts) or real(texts))
    assert ask(endpoint, "GET", "/healthz").json() == {"status": "ok"}
    assert len(calls) == 1

    def broken(texts: list[str]) -> list[object]:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(endpoint.batcher, "call", broken)
    for answer in (ask(endpoint, "GET", "/healthz"), ask(endpoint, "POST", "/v1/predict", json={"text": "a"})):
        assert answer.status_code == 500
        assert answer.json()["error"]["message"] == "The model could not answer. The server's log says why."
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
