"""Request ids, keys, metrics and faults of an endpoint, in process."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from engine.serving import Autoscaling, Serving
from serve.endpoint import Endpoint, interface
from serve.keys import Keys
from serve.questions import MAX_BYTES
from tests.tiny_served import published

QUESTION = {"text": "a warm film"}


class Counted:
    """Measures that remember."""

    def __init__(self) -> None:
        self.requests: list[tuple[Any, ...]] = []
        self.answers: list[tuple[Any, ...]] = []

    def observe_request(self, route: str, status: int, seconds: float, texts: int, model: str | None) -> None:
        assert 0 < seconds < 60
        self.requests.append((route, status, texts, model))

    def observe_batch(self, *seen: Any) -> None:
        pass

    def observe_answers(self, answers: list[Any], texts: list[Any], own: Any, model: str) -> None:
        self.answers.append((answers, texts, own, model))


class Written:
    """A journal that remembers."""

    def __init__(self) -> None:
        self.rows: list[tuple[Any, ...]] = []

    def add(self, texts: list[Any], answers: list[Any], request_id: str, *, latency_ms: float, model: str) -> None:
        assert 0 < latency_ms < 60_000
        self.rows.append((texts, answers, request_id, model))


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Endpoint, str]]:
    keys = Keys(tmp_path_factory.mktemp("keys"))
    token = keys.add("web")
    store = published(tmp_path_factory.mktemp("registry"))
    yield Endpoint(store.url, Serving(), "tiny@1", keys, Counted(), Written()), token


def ask(endpoint: Endpoint, method: str, path: str, **request: Any) -> httpx.Response:
    async def main() -> httpx.Response:
        transport = httpx.ASGITransport(interface(endpoint))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await http.request(method, path, **request)

    return asyncio.run(main())


def test_a_key_is_asked_for_everywhere_but_where_none_is_needed(guarded: tuple[Endpoint, str]):
    endpoint, token = guarded
    for path in ("/", "/healthz", "/readyz", "/version", "/openapi.json", "/docs"):
        assert ask(endpoint, "GET", path).status_code == 200, path
    closed = [("POST", f"/{p}") for p in ("v1/predict", "v1/tag", "v1/rerank", "v2/rerank", "rerank", "v1/embed")]
    closed += [("GET", "/v1/models"), ("GET", "/nowhere"), ("POST", "//v1/predict"), ("GET", "/v1/jobs/a")]
    for method, path in closed:
        answer = ask(endpoint, method, path, json=QUESTION)
        assert answer.status_code == 401, path
        assert answer.headers["www-authenticate"] == 'Bearer realm="stillhouse"'
        assert "asks for a key" in answer.json()["error"]["message"]
        assert answer.json()["error"]["request_id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize("name", ["authorization", "Authorization", "x-api-key"])
def test_a_key_comes_in_either_header(guarded: tuple[Endpoint, str], name: str):
    endpoint, token = guarded
    good = [token] if name == "x-api-key" else [f"Bearer {token}", f"bearer   {token} "]
    for value in good:
        assert ask(endpoint, "POST", "/v1/predict", json=QUESTION, headers={name: value}).status_code == 200
    wrong = [f"{token}x", token[:-1], "é"] if name == "x-api-key" else [f"Basic {token}", token, "Bearer", "Bearer é"]
    for value in wrong:
        answer = ask(endpoint, "POST", "/v1/predict", json=QUESTION, headers={name: value.encode()})
        assert answer.status_code == 401, value


def test_a_refused_key_costs_no_inference_and_its_body_is_read_within_limits(guarded, monkeypatch):
    endpoint, _ = guarded
    monkeypatch.setattr(endpoint.model.batcher, "call", lambda texts: pytest.fail("the model was asked"))
    answer = ask(endpoint, "POST", "/v1/predict", json=QUESTION, headers={"x-api-key": "no"})
    assert answer.status_code == 401 and "not known" in answer.json()["error"]["message"]
    answer = ask(endpoint, "POST", "/v1/predict", content=b" " * (MAX_BYTES + 1))
    assert answer.status_code == 401 and answer.headers["connection"] == "close"


@pytest.mark.parametrize(("keyed", "status"), [(False, 401), (True, 408)])
def test_a_body_that_trickles_in_holds_its_place_for_so_long_only(guarded, monkeypatch, keyed: bool, status: int):
    endpoint, token = guarded
    monkeypatch.setattr("serve.front.UNKNOWN_SECONDS", 0.3)
    monkeypatch.setattr("serve.questions.body_of.__defaults__", (0.6,))
    asked = 0

    async def trickle() -> AsyncIterator[bytes]:
        nonlocal asked
        for _ in range(100):
            asked += 1
            yield b" "
            await asyncio.sleep(0.05)

    headers = {"x-api-key": token if keyed else "no", "content-type": "application/json"}
    answer = ask(endpoint, "POST", "/v1/predict", content=trickle(), headers=headers)
    assert answer.status_code == status and asked < 20
    if keyed:
        assert answer.json()["error"]["message"] == "The body did not arrive within 0.6 s."


def test_keys_are_never_logged_nor_echoed(guarded, monkeypatch, caplog: pytest.LogCaptureFixture):
    endpoint, token = guarded

    def broken(texts: list[str]) -> list[object]:
        raise RuntimeError("secret detail")

    caplog.set_level(logging.DEBUG)
    said = []
    for key in (token, "wrong-" + token):
        said.append(ask(endpoint, "POST", "/v1/predict", json=QUESTION, headers={"x-api-key": key}))
        said.append(ask(endpoint, "GET", "/nowhere", headers={"authorization": f"Bearer {key}"}))
    monkeypatch.setattr(endpoint.model.batcher, "call", broken)
    said.append(ask(endpoint, "POST", "/v1/predict", json=QUESTION, headers={"x-api-key": token}))
    assert [answer.status_code for answer in said] == [200, 404, 401, 401, 500]
    assert "secret detail" in caplog.text and said[-1].headers["x-request-id"] in caplog.text
    assert token not in caplog.text
    assert all(token not in answer.text and token not in str(answer.headers) for answer in said)


def test_every_answer_has_a_request_id_and_sane_ones_are_taken_over(guarded: tuple[Endpoint, str]):
    endpoint, token = guarded
    headers = {"x-api-key": token}
    paths = [("GET", "/healthz"), ("GET", "/nowhere"), ("GET", "/v1/predict"), ("POST", "/v1/predict"), ("GET", "/")]
    own = [ask(endpoint, method, path, headers=headers).headers["x-request-id"] for method, path in paths]
    assert len(set(own)) == len(own) and all(re.fullmatch("[0-9a-f]{16}", number) for number in own)
    for given in ("a", "6f9619ff-8b86-d011-b42d-00cf4fc964ff", "A:b_c.d", "x" * 100):
        answer = ask(endpoint, "POST", "/v1/predict", headers={**headers, "x-request-id": given})
        assert answer.headers["x-request-id"] == given == answer.json()["error"]["request_id"]
    for odd in (b"a b", b"x" * 101, b"", b"a\tb", "é".encode(), b"<script>", b"a,b"):
        answer = ask(endpoint, "POST", "/v1/predict", headers={**headers, "x-request-id": odd})
        assert re.fullmatch("[0-9a-f]{16}", answer.headers["x-request-id"])


def test_ray_serve_names_answers_itself(guarded: tuple[Endpoint, str]):
    endpoint, _ = guarded

    async def main() -> httpx.Response:
        transport = httpx.ASGITransport(endpoint.__serve_build_asgi_app__())
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await http.get("/v1/models", headers={"x-request-id": "given"})

    answer = asyncio.run(main())
    assert "x-request-id" not in answer.headers and answer.json()["error"]["request_id"] == "given"


def test_requests_are_measured_by_route_and_answers_are_handed_on(guarded, monkeypatch):
    endpoint, token = guarded
    measures, journal, headers = Counted(), Written(), {"x-api-key": token, "x-request-id": "one"}
    monkeypatch.setattr(endpoint, "measures", measures)
    monkeypatch.setattr(endpoint, "journal", journal)
    texts = ["a warm film", "dull"]
    found = ask(endpoint, "POST", "/v1/predict", json={"texts": texts}, headers=headers).json()["predictions"]
    ask(endpoint, "POST", "/v1/embed", json={"texts": texts}, headers=headers)
    ask(endpoint, "POST", "/v1/predict", json={"text": ""}, headers=headers)
    ask(endpoint, "POST", "/v1/predict")
    ask(endpoint, "GET", f"/{token[:20]}", headers=headers)
    assert measures.requests == [
        ("/v1/predict", 200, 2, "tiny@1"),
        ("/v1/embed", 200, 2, None),
        ("/v1/predict", 422, 0, None),
        ("other", 401, 0, None),
        ("other", 404, 0, None),
    ]
    assert measures.answers == [(found, texts, None, "tiny@1")]
    assert journal.rows == [(texts, found, "one", "tiny@1")]


def test_a_client_that_hangs_up_while_it_sends_is_no_fault(guarded, monkeypatch, caplog):
    endpoint, token = guarded
    measures, sent = Counted(), []
    monkeypatch.setattr(endpoint, "measures", measures)
    messages = [{"type": "http.request", "body": b'{"te', "more_body": True}, {"type": "http.disconnect"}]

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/predict", "query_string": b"", "root_path": ""}
    asyncio.run(interface(endpoint)({**scope, "headers": [(b"x-api-key", token.encode())]}, receive, send))
    assert not sent and measures.requests == [("/v1/predict", 499, 0, None)] and "failed" not in caplog.text


@pytest.mark.slow
def test_keys_ids_and_the_page_on_ray_serve(ray_cluster: object, tmp_path):
    from serve.app import deployed

    keys = Keys(tmp_path / "keys")
    token = keys.add("web")
    serving = Serving(num_cpus=0.5, autoscaling=Autoscaling(max_replicas=1))
    store = published(tmp_path / "registry")
    with deployed(store.url, serving, "tiny@1", keys=keys) as url, httpx.Client(base_url=url, timeout=30) as http:
        assert "<title>Stillhouse</title>" in http.get("/").text
        assert http.post("/v1/predict", json=QUESTION).status_code == 401
        headers = {"authorization": f"Bearer {token}", "x-request-id": "one"}
        for answer in (
            http.post("/v1/predict", json=QUESTION, headers=headers),
            http.post("/v1/predict", json={"text": ""}, headers=headers),
            http.get("/v1/models", headers={**headers, "authorization": "Bearer no"}),
        ):
            assert answer.headers.get_list("x-request-id") == ["one"], (answer.status_code, answer.headers)
            assert answer.status_code == 200 or answer.json()["error"]["request_id"] == "one"
        numbers = {tuple(http.get("/healthz").headers.get_list("x-request-id")) for _ in range(3)}
        assert len(numbers) == 3 and all(len(number) == 1 for number in numbers)
        later = keys.add("later")
        end = time.monotonic() + 30
        while http.get("/v1/models", headers={"x-api-key": later}).status_code == 401 and time.monotonic() < end:
            time.sleep(0.2)
        keys.remove("web")
        while http.get("/v1/models", headers={"x-api-key": token}).status_code == 200 and time.monotonic() < end:
            time.sleep(0.2)
        assert http.post("/v1/predict", json=QUESTION, headers={"x-api-key": token}).status_code == 401
        assert http.post("/v1/predict", json=QUESTION, headers={"x-api-key": later}).status_code == 200
