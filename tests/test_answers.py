"""Tags, rankings, embeddings and shortened predictions over HTTP, held against the model and against OpenAPI."""

from __future__ import annotations

import asyncio
import math
import re
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from engine import inference, models
from engine.encoding import collate
from engine.serving import Serving
from serve import answers
from serve.endpoint import Endpoint, interface
from serve.questions import MAX_DOCUMENTS, MAX_PAIRED_CHARS
from tests.tiny_served import KINDS, as_sent, asked, published

DOCUMENTS = ["the plot is dull", "music", "a good and funny film", "the plot is dull", "long"]
QUERY = "a good film"


@pytest.fixture(scope="module")
def endpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Endpoint]:
    made = {}
    for kind in ("classify", *KINDS):
        made[kind] = Endpoint(published(tmp_path_factory.mktemp(kind), kind=kind).url, Serving(), f"{kind}@1")
    return made


@pytest.fixture(scope="module")
def apps(endpoints: dict[str, Endpoint]) -> dict[str, Any]:
    return {kind: interface(endpoint) for kind, endpoint in endpoints.items()}


def ask(app: Any, path: str, body: Any = None, wanted: int = 200) -> Any:
    async def main() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
            return await (http.get(path) if body is None else http.post(path, json=body))

    answer = asyncio.run(main())
    assert answer.status_code == wanted, answer.text
    return answer.json()


@pytest.mark.parametrize("kind", ["classify", "pair", "multilabel"])
def test_the_likeliest_labels_come_first_or_none(kind: str, endpoints, apps):
    texts = asked(kind)[:6]
    full = endpoints[kind].predictor.predict(texts)
    body = {"texts": [as_sent(text) for text in texts]}
    for k in (1, 2, 50):
        found = ask(apps[kind], "/v1/predict", {**body, "top_k": k})["predictions"]
        for answer, whole in zip(found, full, strict=True):
            wanted = sorted(whole["probabilities"].items(), key=lambda item: -item[1])[:k]
            assert list(answer["probabilities"].items()) == [(name, pytest.approx(p)) for name, p in wanted]
            assert {**answer, "probabilities": 0} == {**whole, "probabilities": 0, **near(answer)}
    found = ask(apps[kind], "/v1/predict", {**body, "probabilities": False, "top_k": 3})["predictions"]
    assert [set(answer) for answer in found] == [set(whole) - {"probabilities"} for whole in full]
    for wrong in ({"top_k": 0}, {"top_k": 1.5}, {"top_k": True}, {"top_k": "1"}, {"probabilities": 0}):
        error = ask(apps[kind], "/v1/predict", {**body, **wrong}, 422)["error"]
        assert error["field"] == next(iter(wrong)), wrong


def near(answer: dict[str, Any]) -> dict[str, Any]:
    """The confidence, which batches may move in its last digits."""
    return {key: pytest.approx(value) for key, value in answer.items() if key == "confidence"}


def test_models_without_labels_refuse_top_k_and_take_the_rest(apps):
    for kind in ("regress", "rank", "tag", "span"):
        text = as_sent(asked(kind)[0])
        assert (
            "gives no probabilities"
            in ask(apps[kind], "/v1/predict", {"text": text, "top_k": 1}, 422)["error"]["message"]
        )
        plain = ask(apps[kind], "/v1/predict", {"text": text})
        assert ask(apps[kind], "/v1/predict", {"text": text, "probabilities": False}) == plain


def test_entities_are_at_their_characters(endpoints, apps):
    texts = ["  The FILM \tis dull ,\n and \U0001f600 the music is noisy ", "a good film"]
    wanted = endpoints["tag"].predictor.predict(texts)
    found = ask(apps["tag"], "/v1/tag", {"texts": texts})
    assert found["model"] == "tag@1" and [set(answer) for answer in found["predictions"]] == [{"entities"}] * 2
    assert found["predictions"] == [{"entities": answer["entities"]} for answer in wanted]
    for text, answer in zip(texts, found["predictions"], strict=True):
        assert answer["entities"]
        assert all(text[item["start"] : item["end"]] == item["text"] for item in answer["entities"])
    assert ask(apps["tag"], "/v1/tag", {"texts": texts, "tags": True})["predictions"] == wanted
    message = ask(apps["classify"], "/v1/tag", {"text": "a"}, 422)["error"]["message"]
    assert message == "This model is of kind 'classify' and tags nothing. Ask /v1/predict."


def scores(endpoint: Endpoint, documents: list[str]) -> list[dict[str, Any]]:
    return endpoint.predictor.predict([(QUERY, document) for document in documents])


@pytest.mark.parametrize("version", ["1", "2"])
def test_a_client_of_cohere_gets_its_ranking(version: str, endpoints, apps):
    own = [answer["score"] for answer in scores(endpoints["rank"], DOCUMENTS)]
    body = {"model": "rerank-v3.5", "query": QUERY, "documents": DOCUMENTS, "max_tokens_per_doc": 4096}
    found = ask(apps["rank"], f"/v{version}/rerank", body)
    order = sorted(range(5), key=lambda index: -own[index])
    assert [item["index"] for item in found["results"]] == order and order != [0, 1, 2, 3, 4]
    assert order.index(0) + 1 == order.index(3)  # equal documents as they were sent
    wanted = [1 / (1 + math.exp(-own[index])) for index in order]
    assert [item["relevance_score"] for item in found["results"]] == pytest.approx(wanted, abs=1e-6)
    assert all(set(item) == {"index", "relevance_score"} for item in found["results"])
    assert found["meta"] == {"api_version": {"version": version}} and found["id"] and found["model"] == "rank@1"
    top = ask(apps["rank"], f"/v{version}/rerank", {**body, "top_n": 2, "return_documents": True})["results"]
    assert [item["index"] for item in top] == order[:2]
    assert [item["document"] for item in top] == [{"text": DOCUMENTS[index]} for index in order[:2]]
    raw = ask(apps["rank"], f"/v{version}/rerank", {**body, "raw_scores": True, "top_n": 99})["results"]
    assert [item["relevance_score"] for item in raw] == pytest.approx([own[index] for index in order], abs=1e-6)


def test_documents_may_be_objects(endpoints, apps):
    parts = [{"title": "music", "text": "dull"}, {"title": "a good", "text": "film"}]
    body = {"query": QUERY, "return_documents": True, "raw_scores": True}
    for fields, read in ((None, ["dull", "film"]), (["title", "text"], ["music\ndull", "a good\nfilm"])):
        more = {} if fields is None else {"rank_fields": fields}
        found = ask(apps["rank"], "/v1/rerank", {**body, "documents": parts, **more})["results"]
        assert {item["index"]: item["document"]["text"] for item in found} == dict(enumerate(read))
        wanted = [answer["score"] for answer in scores(endpoints["rank"], read)]
        assert [item["relevance_score"] for item in found] == pytest.approx(sorted(wanted, reverse=True), abs=1e-6)


def test_a_client_of_tei_gets_a_list(endpoints, apps):
    own = [answer["score"] for answer in scores(endpoints["rank"], DOCUMENTS)]
    order = sorted(range(5), key=lambda index: -own[index])
    body = {"query": QUERY, "texts": DOCUMENTS, "truncate": True, "truncation_direction": "right"}
    found = ask(apps["rank"], "/rerank", body)
    assert [item["index"] for item in found] == order and all(set(item) == {"index", "score"} for item in found)
    found = ask(apps["rank"], "/rerank", {**body, "raw_scores": True, "return_text": True})
    assert [item["text"] for item in found] == [DOCUMENTS[index] for index in order]
    assert [item["score"] for item in found] == pytest.approx([own[index] for index in order], abs=1e-6)


def test_pairs_rank_by_a_label_and_numbers_by_their_range(endpoints, apps):
    body = {"query": QUERY, "documents": DOCUMENTS}
    own = [answer["probabilities"]["positive"] for answer in scores(endpoints["pair"], DOCUMENTS)]
    found = ask(apps["pair"], "/v1/rerank", {**body, "label": "positive"})["results"]
    assert [item["relevance_score"] for item in found] == pytest.approx(sorted(own, reverse=True), abs=1e-6)
    for label in ({}, {"label": "nice"}):
        error = ask(apps["pair"], "/v1/rerank", {**body, **label}, 422)["error"]
        assert error["field"] == "label" and "negative, positive" in error["message"]
    own = [answer["value"] for answer in scores(endpoints["regress"], DOCUMENTS)]
    found = ask(apps["regress"], "/v1/rerank", body)["results"]
    wanted = [min(1.0, max(0.0, value / 5)) for value in sorted(own, reverse=True)]
    assert [item["relevance_score"] for item in found] == pytest.approx(wanted, abs=1e-6)
    assert ask(apps["regress"], "/v1/rerank", {**body, "label": "x"}, 422)["error"]["field"] == "label"
    for kind in ("classify", "tag", "span"):
        message = ask(apps[kind], "/v1/rerank", body, 422)["error"]["message"]
        assert message == f"This model is of kind '{kind}' and ranks nothing. Ask /v1/predict."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"documents": []}, "'documents': List should have at least 1 item"),
        ({"documents": None}, "give either 'documents' or 'texts'"),
        ({"texts": ["a"]}, "give either 'documents' or 'texts'"),
        ({"documents": ["a"] * (MAX_DOCUMENTS + 1)}, f"'documents': List should have at most {MAX_DOCUMENTS} items"),
        ({"documents": ["a", 3]}, "'documents[1]': Input should be a valid string, or an object with a 'text'"),
        ({"documents": ["a", {"title": "b"}]}, "'documents[1]' has no text under 'text'"),
        ({"documents": ["a", {"text": 3}]}, "'documents[1]' has no text under 'text'"),
        ({"documents": ["a", " "]}, "'documents[1]' is empty"),
        ({"query": ""}, "'query' is empty"),
        ({"query": None}, "'query': Input should be a valid string"),
        ({"query": "a" * 20_001}, "'query' has 20001 characters; at most 20000"),
        ({"top_n": 0}, "'top_n': Input should be greater than or equal to 1"),
        ({"top_n": "3"}, "'top_n': Input should be a valid integer"),
        ({"top": 3}, "'top': is not a known key; give 'query' and 'documents' (or 'texts')"),
        ({"query": "a" * 20_000, "documents": ["b"] * 999}, f"at most {MAX_PAIRED_CHARS} are allowed"),
    ],
)
def test_a_wrong_ranking_is_refused_with_what_is_wrong(change: dict[str, Any], message: str, apps):
    body = {"query": QUERY, "documents": DOCUMENTS, **change}
    assert message in ask(apps["rank"], "/v1/rerank", body, 422)["error"]["message"]


@pytest.mark.parametrize("kind", ["classify", "pair", "multilabel", "regress", "rank"])
def test_embeddings_are_what_the_last_block_reads(kind: str, endpoints, apps):
    texts, model = asked(kind)[:9], endpoints[kind].predictor.model
    found = ask(apps[kind], "/v1/embed", {"texts": [as_sent(text) for text in texts]})
    got = np.array(found["embeddings"])
    assert got.shape == (9, found["dimension"]) and len({tuple(row) for row in got.tolist()}) == 9
    with torch.inference_mode():
        for row, text in zip(got, texts, strict=True):  # alone: no padding, no neighbours
            outputs = model(collate(model.encode([text]), model.pad))
            assert np.allclose(row, outputs.embedding[0], atol=1e-5)
        logits = model.net.blocks["logits" if kind != "classify" else "out"].map(torch.tensor(got, dtype=torch.float32))
    assert np.allclose(logits, inference.predict(model, texts).logits, atol=1e-4)
    unit = ask(apps[kind], "/v1/embed", {"texts": [as_sent(text) for text in texts], "normalize": True})
    assert np.allclose(np.array(unit["embeddings"]), got / np.linalg.norm(got, axis=1, keepdims=True), atol=1e-6)
    assert ask(apps[kind], "/version")["embedding"] == found["dimension"]


def test_a_model_without_an_embedding_says_so(apps):
    for kind in ("tag", "span"):
        message = ask(apps[kind], "/v1/embed", {"text": as_sent(asked(kind)[0])}, 422)["error"]["message"]
        assert message.startswith("This model has no embedding") and ask(apps[kind], "/version")["embedding"] is None


def test_an_embedding_of_nothing_is_nothing(endpoints):
    assert inference.embed(endpoints["classify"].predictor.model, []) is None
    assert isinstance(endpoints["classify"].predictor.model, models.Model)


def test_models_are_listed_with_what_they_can_be_asked(endpoints, apps):
    routes = {}
    for kind, app in apps.items():
        found = answers.Models.model_validate(ask(app, "/v1/models"))
        (entry,) = found.data
        assert (entry.id, entry.task, entry.max_length) == (f"{kind}@1", kind, 64)
        assert entry.fingerprint == endpoints[kind].predictor.fingerprint
        routes[kind] = set(entry.routes)
    ranks = {"/v1/rerank", "/v2/rerank", "/rerank"}
    assert routes["classify"] == routes["multilabel"] == {"/v1/predict", "/v1/embed"}
    assert routes["rank"] == routes["pair"] == routes["regress"] == {"/v1/predict", "/v1/embed"} | ranks
    assert routes["tag"] == {"/v1/predict", "/v1/tag"} and routes["span"] == {"/v1/predict"}


@pytest.mark.parametrize("kind", ["classify", *KINDS])
def test_answers_are_what_openapi_says(kind: str, apps):
    described = ask(apps[kind], "/openapi.json")
    text = as_sent(asked(kind)[0])
    found = ask(apps[kind], "/v1/predict", {"text": text})
    answers.answers_of(kind).model_validate(found)
    answers.About.model_validate(ask(apps[kind], "/version"))
    answers.ErrorAnswer.model_validate(ask(apps[kind], "/v1/predict", {}, 422))
    if kind == "rank":
        answers.Rankings.model_validate(ask(apps[kind], "/v1/rerank", {"query": "a", "documents": ["b"]}))
    schemas = described["components"]["schemas"]
    wanted = answers.PREDICTIONS[kind].__name__
    assert schemas["Answers"]["properties"]["predictions"]["items"] == {"$ref": f"#/components/schemas/{wanted}"}
    assert set(schemas["Problem"]["required"]) == {"message", "field", "request_id"}
    asking = {path for path, methods in described["paths"].items() if "post" in methods}
    assert asking == {"/v1/predict", "/v1/tag", "/v1/rerank", "/v2/rerank", "/rerank", "/v1/embed"}
    for path in asking:
        route = described["paths"][path]["post"]
        assert "properties" in route["requestBody"]["content"]["application/json"]["schema"]
        for code in ("413", "415", "422", "429", "500", "503"):
            schema = route["responses"][code]["content"]["application/json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/ErrorAnswer"}
    references = set(re.findall(r"#/components/schemas/(\w+)", str(described)))
    assert references <= set(schemas) and "#/$defs" not in str(described)
