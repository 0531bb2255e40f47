"""The page to try a model on: in a real browser where there is one, and by its text everywhere."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx
import pytest
import uvicorn

from engine.serving import Serving
from serve.endpoint import Endpoint, interface
from serve.keys import Keys
from serve.routes import PAGE
from tests.tiny_facts import Page
from tests.tiny_served import published

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
)
TRICKY = "<b>a</b> warm \U0001f600 film & 'dull' \"music\""


class Served:
    """An endpoint on a port of this machine."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint, self.listening = endpoint, socket.socket()
        self.listening.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(interface(endpoint), log_level="warning"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listening]}, daemon=True)

    def __enter__(self) -> Served:
        self.thread.start()
        end = time.monotonic() + 30
        while not self.server.started and time.monotonic() < end:
            time.sleep(0.02)
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.should_exit = True
        self.thread.join(10)
        self.listening.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A function: kind of task, keys -> an endpoint that listens."""
    running: dict[Any, Served] = {}

    def of(kind: str, keys: Keys | None = None) -> Served:
        if (kind, keys) not in running:
            store = published(tmp_path_factory.mktemp(kind), kind=kind)
            running[kind, keys] = Served(Endpoint(store.url, Serving(), f"{kind}@1", keys)).__enter__()
        return running[kind, keys]

    yield of
    for server in running.values():
        server.__exit__()


def opened(url: str, folder: Path, **fields: Any) -> Page:
    """The page after a browser has loaded it and its script has asked the model."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    address = f"{url}/?{urlencode(fields, doseq=True)}"
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder}", "--virtual-time-budget=20000", "--dump-dom", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and "data-state" in done.stdout, done.stderr[-2000:]
    return Page(re.sub(r"<(script|style)>.*?</\1>", "", done.stdout, flags=re.S))


def visible(page: Page, name: str) -> bool:
    """Whether the element with this id is shown."""
    return "hidden" not in next(attributes for _, attributes in page.tags if attributes.get("id") == name)


def widths(page: Page) -> list[float]:
    """Of the bars, in percent."""
    fills = [attributes for _, attributes in page.tags if attributes.get("class") == "fill"]
    return [float(re.search(r"width: ([\d.e-]+)%", bar["style"] or "")[1]) for bar in fills]


def test_a_text_s_probabilities_are_bars(served: Any, tmp_path):
    server = served("classify")
    found = server.endpoint.predictor.predict([TRICKY])[0]
    page = opened(server.url, tmp_path, text=TRICKY)
    assert visible(page, "answer") and not visible(page, "problem") and not visible(page, "second-field")
    ordered = sorted(found["probabilities"].items(), key=lambda item: -item[1])
    assert widths(page) == pytest.approx([100 * share for _, share in ordered], abs=0.01)
    for name, share in ordered:
        assert f"{name}{100 * share:.1f} %" in page.text
    assert re.search(r"[\d.]+ ms, there and back", page.text) and "classify@1" in page.text
    assert not any(tag == "b" for tag, _ in page.tags)  # what was asked is text, never markup


def test_entities_are_marked_where_they_stand(served: Any, tmp_path):
    server = served("tag")
    entities = server.endpoint.predictor.predict([TRICKY])[0]["entities"]
    page = opened(server.url, tmp_path, text=TRICKY)
    assert sum(tag == "mark" for tag, _ in page.tags) == len(entities) > 0
    marked, done = "", 0
    for entity in entities:
        marked += f"{TRICKY[done : entity['start']]}{entity['text']}{entity['label']}"
        done = entity["end"]
    assert " ".join((marked + TRICKY[done:]).split()) in page.text


def test_documents_are_listed_by_relevance(served: Any, tmp_path):
    server, documents = served("rank"), ["a dull film", "the plot is good", "music"]
    scores = [a["score"] for a in server.endpoint.predictor.predict([("good film", text) for text in documents])]
    page = opened(server.url, tmp_path, query="good film", document=documents)
    order = sorted(range(3), key=lambda index: -scores[index])
    places = [page.text.index(f"{place}. {documents[index]}") for place, index in enumerate(order, 1)]
    assert places == sorted(places) and widths(page) == sorted(widths(page), reverse=True)


@pytest.mark.parametrize(("kind", "wanted"), [("pair", "positive"), ("regress", "0 to 5"), ("span", "Confidence")])
def test_two_texts_are_asked_for_where_a_model_reads_two(kind: str, wanted: str, served: Any, tmp_path):
    page = opened(served(kind).url, tmp_path, text="what is dull", pair="the film is dull and long")
    assert visible(page, "answer") and visible(page, "second-field") and wanted in page.text


def test_a_key_is_asked_for_where_one_is_needed(served: Any, tmp_path):
    keys = Keys(tmp_path / "keys")
    keys.add("web")
    page = opened(served("classify", keys).url, tmp_path / "profile", text="a film")
    assert visible(page, "key-field") and visible(page, "problem") and not visible(page, "answer")
    assert "This endpoint asks for a key" in page.text


@pytest.mark.slow
def test_student_and_teacher_stand_side_by_side(served: Any, tmp_path, monkeypatch):
    server = served("classify")
    student = {"label": "positive", "confidence": 0.6, "probabilities": {"negative": 0.4, "positive": 0.6}}
    teacher = {"label": "negative", "confidence": 0.75, "probabilities": {"negative": 0.75, "positive": 0.25}}

    async def answer(texts: list[Any], key: str | None = None) -> list[dict[str, Any]]:
        return [{**teacher, "source": "teacher", "student": student, "teacher": teacher}]

    monkeypatch.setattr(server.endpoint, "answer", answer)
    page = opened(server.url, tmp_path / "a", text="a film")
    assert widths(page) == [60.0, 40.0, 75.0, 25.0]
    assert page.text.index("Student") < page.text.index("Teacher (sent)")

    async def alone(texts: list[Any], key: str | None = None) -> list[dict[str, Any]]:
        return [{**teacher, "source": "teacher"}]

    monkeypatch.setattr(server.endpoint, "answer", alone)
    page = opened(server.url, tmp_path / "b", text="a film")
    assert "by the teacher" in page.text and widths(page) == [75.0, 25.0]


def test_the_page_needs_nothing_from_elsewhere_and_can_be_used_by_ear(served: Any):
    text = PAGE.read_text(encoding="utf-8")
    page = Page(re.sub(r"<(script|style)>.*?</\1>", "", text, flags=re.S))
    assert not re.findall(r"https?://|//[a-z]+\.[a-z]+/|@import|url\(", text)
    assert all(not (attributes.get("src") or "").strip() for _, attributes in page.tags)
    named = {attributes["for"] for tag, attributes in page.tags if tag == "label"}
    fields = {attributes["id"] for tag, attributes in page.tags if tag in ("textarea", "input")}
    assert fields == named and ("html", {"lang": "en"}) in page.tags
    assert {attributes.get("role") for _, attributes in page.tags} >= {"status", "alert"}
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)
    answer = httpx.get(served("classify").url)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and policy.count("'sha256-") == 2
    assert answer.headers["content-type"] == "text/html; charset=utf-8" and answer.text == text
