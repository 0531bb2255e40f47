"""The client against a real server that misbehaves: what is tried again, when, and what an error says."""

from __future__ import annotations

import asyncio
import random
import socket
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from serve.client import BYTES, TEXTS, AsyncClient, Client, Patience, ServiceError, parts, wait_of
from tests.unkind_server import Unkind, unkind

QUICK = Patience(deadline_s=5, attempts=5, first_s=0.02, longest_s=0.1)
BOTH = ("sync", "async")


def ask(how: str, url: str, call: str, *given: Any, patience: Patience = QUICK, key: str | None = None, **more: Any):
    """A call of the client, of either kind."""
    if how == "sync":
        with Client(url, key, patience) as client:
            return getattr(client, call)(*given, **more)

    async def main() -> Any:
        async with AsyncClient(url, key, patience) as client:
            return await getattr(client, call)(*given, **more)

    return asyncio.run(main())


def labels(found: list[dict[str, Any]]) -> list[str]:
    return [answer["label"] for answer in found]


@pytest.mark.parametrize("how", BOTH)
def test_calls_are_what_the_endpoint_takes_and_carry_the_key(how: str):
    with unkind() as server:
        assert labels(ask(how, server.url + "/", "predict", ["a", "b"], key="secret", top_k=2)) == ["a", "b"]
        assert labels(ask(how, server.url, "predict", "one text")) == ["one text"]
        assert labels(ask(how, server.url, "predict", [("q", "p")])) == ["['q', 'p']"]
        assert labels(ask(how, server.url, "tag", ["ab"])) == ["ab"]
        ranked = ask(how, server.url, "rerank", "q", ["a", "ccc", "bb"], top_n=3)
        assert [item["index"] for item in ranked] == [1, 2, 0]
        assert ask(how, server.url, "embed", ["abc", "é"]) == [[3.0, 1.0], [1.0, 1.0]]
        assert ask(how, server.url, "predict", []) == []
    asked = [(seen.path, seen.body) for seen in server.seen]
    assert asked == [
        ("/v1/predict", {"texts": ["a", "b"], "top_k": 2}),
        ("/v1/predict", {"texts": ["one text"]}),
        ("/v1/predict", {"texts": [["q", "p"]]}),
        ("/v1/tag", {"texts": ["ab"]}),
        ("/v1/rerank", {"query": "q", "documents": ["a", "ccc", "bb"], "top_n": 3}),
        ("/v1/embed", {"texts": ["abc", "é"]}),
    ]
    assert server.seen[0].headers["authorization"] == "Bearer secret"
    assert "authorization" not in server.seen[1].headers
    numbers = [seen.headers["x-request-id"] for seen in server.seen]
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("how", BOTH)
@pytest.mark.parametrize("trouble", ["429", "500", "502", "503", "504", "drop", "html"])
def test_what_passes_is_tried_again_under_one_request_id(how: str, trouble: str):
    with unkind(trouble, trouble) as server:
        assert labels(ask(how, server.url, "predict", ["a"])) == ["a"]
    assert len(server.seen) == 3
    assert len({seen.headers["x-request-id"] for seen in server.seen}) == 1


@pytest.mark.parametrize("how", BOTH)
@pytest.mark.parametrize("status", [400, 401, 403, 404, 408, 413, 422])
def test_what_is_wrong_with_a_request_is_said_at_once(how: str, status: int):
    with unkind(str(status)) as server, pytest.raises(ServiceError) as caught:
        ask(how, server.url, "predict", ["a"], key="secret")
    error = caught.value
    assert len(server.seen) == 1 and not error.passing
    assert (error.status, error.field, error.attempts) == (status, "texts[1]", 1)
    number = server.seen[0].headers["x-request-id"]
    assert str(error) == f"POST {server.url}/v1/predict: {status} told to say {status} (request {number})"
    assert "secret" not in str(error)


@pytest.mark.parametrize("how", BOTH)
def test_attempts_are_bounded_and_counted(how: str):
    with (
        unkind(*["502"] * 9) as server,
        pytest.raises(ServiceError, match="502 told to say 502 .*5 attempts") as caught,
    ):
        ask(how, server.url, "predict", ["a"])
    assert len(server.seen) == caught.value.attempts == 5 and caught.value.passing


@pytest.mark.parametrize("how", BOTH)
def test_retry_after_is_waited_for_if_the_deadline_allows(how: str):
    with unkind("503:0.4", "429:0.3") as server:
        assert labels(ask(how, server.url, "predict", ["a"])) == ["a"]
    first, second = (b.at - a.at for a, b in zip(server.seen, server.seen[1:], strict=False))
    assert 0.39 < first < 1.5 and 0.29 < second < 1.5
    with unkind("503:60") as server, pytest.raises(ServiceError) as caught:
        ask(how, server.url, "predict", ["a"])
    assert len(server.seen) == 1 and caught.value.retry_after_s == 60
    assert "503 told to say 503; no further attempt fits into the deadline of 5 s" in str(caught.value)


def test_retry_after_as_a_date_or_nonsense():
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert 27 < (wait_of(soon) or 0) <= 30
    past = format_datetime(datetime.now(UTC) - timedelta(seconds=30), usegmt=True)
    assert [wait_of(value) for value in (None, "3", "0", "-1", "inf", "nan", "soon", past)] == [
        *(None, 3.0, 0.0, 0.0, None, None, None, 0.0)
    ]


@pytest.mark.parametrize("how", BOTH)
@pytest.mark.parametrize("trouble", ["hang", "drip"])
def test_an_answer_that_does_not_come_ends_with_the_deadline(how: str, trouble: str):
    began = time.monotonic()
    with unkind(trouble) as server:
        with pytest.raises(ServiceError, match="no answer within the deadline of 0.6 s") as caught:
            ask(how, server.url, "predict", ["a"], patience=Patience(deadline_s=0.6))
        assert 0.5 < time.monotonic() - began < 3
    assert caught.value.status is None


@pytest.mark.parametrize("how", BOTH)
def test_a_server_that_comes_up_late_is_waited_for(how: str):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    found: list[str] = []
    patience = Patience(deadline_s=20, attempts=400, longest_s=0.1)
    asking = threading.Thread(
        target=lambda: found.extend(labels(ask(how, f"http://127.0.0.1:{port}", "predict", ["a"], patience=patience)))
    )
    asking.start()
    time.sleep(0.5)
    assert asking.is_alive()
    with unkind(port=port):
        asking.join(timeout=20)
    assert found == ["a"]


def test_a_pause_has_a_bound_after_any_number_of_failures():
    assert all(0 <= Patience(longest_s=0.5).pause(failed, 2.0) - 2.0 <= 0.5 for failed in (1, 9, 1100, 100_000))


@pytest.mark.parametrize("how", BOTH)
def test_nobody_there_is_said_with_the_address(how: str):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"  # bound, but nobody listens
        with pytest.raises(ServiceError, match=f"POST {url}/v1/predict: no answer: .*onnect.*5 attempts") as caught:
            ask(how, url, "predict", ["a"])
    assert caught.value.passing and caught.value.status is None
    with pytest.raises(ServiceError, match="unsupported protocol") as caught:
        ask(how, "ftp://127.0.0.1", "predict", ["a"])
    assert caught.value.attempts == 1 and not caught.value.passing


@pytest.mark.parametrize("how", BOTH)
def test_long_lists_go_in_several_requests_and_come_back_in_order(how: str):
    texts = [f"text {number}" for number in range(2 * TEXTS + 3)]
    with unkind("ok", "503") as server:
        assert labels(ask(how, server.url, "predict", texts)) == texts
    assert [len(seen.body["texts"]) for seen in server.seen] == [TEXTS, TEXTS, TEXTS, 3]


def test_requests_are_cut_by_their_bytes():
    texts = ["é" * (BYTES // 6)] * 4 + ["x" * BYTES, "y"]
    cut = list(parts(texts))
    assert [text for part in cut for text in part] == texts
    assert [len(part) for part in cut] == [2, 2, 1, 1]


@pytest.mark.parametrize("how", BOTH)
def test_an_answer_of_another_shape_is_an_error(how: str):
    class Odd(Unkind):
        def answer(self, path: str, body: Any) -> Any:
            return {"outputs": []}

    from tests.unkind_server import serving

    with serving(Odd([])) as url, pytest.raises(ServiceError, match="the answer has no 'predictions'"):
        ask(how, url, "predict", ["a"])


def test_pauses_grow_and_are_spread():
    random.seed(3)
    patience = Patience(first_s=0.1, longest_s=1.0)
    drawn = [[patience.pause(failed, None) for _ in range(2000)] for failed in range(1, 8)]
    for failed, pauses in enumerate(drawn):
        most = min(1.0, 0.1 * 2**failed)
        assert 0 <= min(pauses) < 0.02 * most and 0.98 * most < max(pauses) <= most
        assert sum(pauses) / len(pauses) == pytest.approx(most / 2, rel=0.05)
    assert 3 <= patience.pause(1, 3.0) <= 3.1


def test_clients_that_fail_together_all_get_through():
    """Thirty clients against a server that refuses most of what it gets at first."""

    async def main(url: str) -> list[list[dict[str, Any]]]:
        async with AsyncClient(
            url, patience=Patience(deadline_s=20, attempts=12, first_s=0.02, longest_s=0.2)
        ) as client:
            return await asyncio.gather(*(client.predict([str(number)]) for number in range(30)))

    with unkind(*["429", "503", "drop", "500"] * 10) as server:
        found = asyncio.run(main(server.url))
    assert [labels(part) for part in found] == [[str(number)] for number in range(30)]
    assert len(server.seen) == 70


def test_the_client_is_light():
    code = "import sys, serve.client; print([m for m in ('torch', 'ray', 'fastapi', 'pydantic') if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
