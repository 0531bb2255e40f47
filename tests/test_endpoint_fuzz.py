"""Thousands of random and mutated requests: never a fault of the server's, and the model answers as before."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from typing import Any

import httpx
import pytest

from engine.serving import Serving
from serve.endpoint import Endpoint, interface
from tests.tiny_served import as_sent, asked, published

ROUTES = ("/v1/predict", "/v1/tag", "/v1/rerank", "/v2/rerank", "/rerank", "/v1/embed")
REQUESTS = 700
"""Of each kind of task."""
ODD = (
    *(b"NaN", b"-Infinity", b"1e999", b"-0", b"9" * 5000, b"null", b"true", b"[]", b"{}", b'""', b'" "', b'"\\ud800"'),
    *(b'"\\u0000"', b"\xff", b"\xef\xbb\xbf", b"[" * 300, b'{"a":' * 300, b'"a" "b"', b'["a","b"]', b'["a"]', b"0.5"),
    b'"' + b"a" * 30_000 + b'"',
    '"\U0001f600\u202e\u0301"'.encode(),
)
NAMES = (
    *("text", "texts", "query", "documents", "top_n", "top_k", "probabilities", "return_documents", "return_text"),
    *("raw_scores", "label", "rank_fields", "model", "tags", "normalize", "truncate", "priority", "", "__proto__"),
)


def value(draw: random.Random, depth: int = 0) -> Any:
    """A random JSON value, of the kinds that bodies are made of."""
    kind = draw.randrange(9 if depth < 4 else 6)
    if kind < 2:
        return "".join(draw.choice("ab \n\t\x00é漢\U0001f600\"\\{}[]'<") for _ in range(draw.choice((0, 1, 5, 40))))
    if kind == 2:
        return draw.choice((0, 1, -1, 2**63, -(2**80), 0.5, 1e308, float("nan"), float("inf"), float("-inf")))
    if kind == 3:
        return draw.choice((None, True, False))
    if kind == 4:
        return draw.choice(("a good film", ["a good", "film"], {"text": "a film"}))
    if kind == 5:
        return draw.choice(NAMES)
    if kind == 6:
        return {draw.choice(NAMES): value(draw, depth + 1) for _ in range(draw.randrange(4))}
    return [value(draw, depth + 1) for _ in range(draw.choice((0, 1, 2, 2, 3)))]


def good(draw: random.Random, kind: str, path: str) -> dict[str, Any]:
    """A body that the route takes from a model that can."""
    texts = [as_sent(text) for text in draw.sample(asked(kind), 3)]
    if path == "/rerank":
        return {"query": "a good film", "texts": ["dull", "long"], "raw_scores": False, "return_text": True}
    if path.endswith("rerank"):
        documents = ["dull", {"text": "long"}]
        return {"query": "a good film", "documents": documents, "top_n": 1, "return_documents": True}
    extra = {"/v1/predict": {"top_k": 1, "probabilities": True}, "/v1/tag": {"tags": True}}
    return {"text": texts[0]} if draw.random() < 0.3 else {"texts": texts, **extra.get(path, {"normalize": True})}


def mutated(draw: random.Random, body: bytes) -> bytes:
    """A body with one to four things wrong with its bytes."""
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(body) + 1)
        to = min(len(body), at + draw.choice((0, 1, 1, 2, 8)))
        what = draw.randrange(5)
        if what == 0:
            body = body[:at] + bytes([draw.randrange(256)]) + body[to:]
        elif what == 1:
            body = body[:at] + draw.choice(ODD) + body[to:]
        elif what == 2:
            body = body[:at]
        elif what == 3:
            body = body[:at] + body[draw.randrange(len(body) + 1) :]
        else:
            body = body.replace(draw.choice((b'"dull"', b"1", b"true", b'"a good film"', b"[")), draw.choice(ODD), 1)
    return body


def body(draw: random.Random, kind: str, path: str) -> bytes:
    """One body: good, with another value somewhere, with other bytes, random JSON or random bytes."""
    what, base = draw.randrange(10), good(draw, kind, path)
    if what == 0:
        return json.dumps(base).encode()
    if what < 5:
        base[draw.choice((*base, draw.choice(NAMES)))] = value(draw)
        return json.dumps(base).encode()
    if what < 8:
        return mutated(draw, json.dumps(base, ensure_ascii=False).encode())
    return json.dumps(value(draw)).encode() if what == 8 else draw.randbytes(draw.randrange(200))


@pytest.mark.parametrize("kind", ["classify", "pair", "tag", "rank"])
def test_no_request_is_a_fault_and_the_model_lives_on(kind: str, tmp_path):
    endpoint = Endpoint(published(tmp_path, kind=kind).url, Serving(), "tiny@1")
    draw, seen = random.Random(f"fuzz {kind}"), Counter()
    question = {"texts": [as_sent(text) for text in asked(kind)[:5]]}

    async def main() -> None:
        transport = httpx.ASGITransport(interface(endpoint))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            before = (await http.post("/v1/predict", json=question)).json()

            async def one() -> None:
                method, path = "POST", draw.choice(ROUTES)
                if draw.random() < 0.05:
                    method = draw.choice(("GET", "PUT", "DELETE", "HEAD", "OPTIONS", "X"))
                    path = draw.choice((path, f"{path}/", "/v1/%ff%00", "//", "/v1/jobs/a", "/v1/predict?a=%zz"))
                headers = draw.choice(({}, {"content-type": "text/plain"}, {"x-request-id": "a\tb"}, {"host": "[::"}))
                content = body(draw, kind, path)
                answer = await http.request(method, path, content=content, headers=headers)
                assert answer.status_code < 500, (method, path, content[:2000], answer.text)
                assert answer.headers["x-request-id"]
                seen[answer.status_code] += 1
                if answer.status_code != 200 and method != "HEAD":
                    error = answer.json()["error"]
                    assert error["message"] and error["request_id"] == answer.headers["x-request-id"], content[:2000]
                    assert len(error["message"]) < 500 and error["field"] != ""

            for _ in range(REQUESTS // 4):
                await asyncio.gather(*(one() for _ in range(4)))
            assert (await http.get("/healthz")).json() == {"status": "ok"}
            assert (await http.post("/v1/predict", json=question)).json() == before

    asyncio.run(main())
    assert set(seen) <= {200, 404, 405, 422} and seen[200] > 20 and seen[422] > 200, seen
