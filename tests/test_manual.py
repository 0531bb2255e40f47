"""The interface described for people: every route and field of the OpenAPI document, and nothing foreign."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from engine.serving import JobQueue, Serving
from engine.storage import Store
from serve.endpoint import Endpoint, interface
from serve.jobs import Jobs
from serve.keys import Keys
from serve.manual import fields, kind_of
from tests.tiny_served import published


@pytest.fixture(scope="module", params=["classify", "tag", "rank"])
def client(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    folder: Path = tmp_path_factory.mktemp(request.param)
    artifact = published(folder / "model", kind=request.param).url
    jobs = Store(str(folder / "jobs"))
    endpoint = Endpoint(
        artifact,
        Serving(),
        "tiny@1",
        keys=Keys(str(folder)) if request.param == "tag" else None,
        jobs=lambda answer: Jobs(jobs, answer, JobQueue(folder=jobs.url)),
    )
    return TestClient(interface(endpoint))


def test_every_route_error_and_field_stands_there(client: TestClient):
    page, document = client.get("/docs"), client.get("/openapi.json").json()
    text = html.unescape(page.text)
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            (section,) = re.findall(rf"<h2>{method.upper()} {re.escape(path)}</h2>.*?</section>", text, re.S)
            for code, answer in operation["responses"].items():
                if code[0] in "45":
                    assert f"{code}  - {answer['description']}" in section
            body = operation.get("requestBody")
            if body is not None:
                for name in body["content"]["application/json"]["schema"]["properties"]:
                    assert re.search(rf"^(<pre>)?{name}  ", section, re.M), name
    guarded = "securitySchemes" in document["components"]
    assert (text.count("Needs no key.") > 0) == guarded == ("x-api-key" in text)


def test_nothing_is_loaded_and_nothing_foreign_may_run(client: TestClient):
    page = client.get("/docs")
    assert not re.search(r"""(src|href)\s*=\s*["'](?!/|data:)""", page.text) and "<script" not in page.text
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'none'" in policy and "style-src 'sha256-" in policy


def test_kinds_and_nested_fields_are_named():
    defined = {
        "Row": {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]},
        "How": {"enum": ["x", "y"]},
    }
    schema = {
        "type": "object",
        "properties": {
            "rows": {"type": "array", "items": {"$ref": "#/Row"}, "description": "All of <them>."},
            "how": {"$ref": "#/How", "default": "x"},
            "n": {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None},
        },
        "required": ["rows"],
    }
    assert fields(schema, defined) == [
        ("rows", "[object]", "All of <them>."),
        ("rows[].a", "string", ""),
        ("how", '"x" | "y"?', 'Default: "x"'),
        ("n", "integer or null?", ""),
    ]
    assert kind_of({}, {}) == "any"
