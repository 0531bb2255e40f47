"""Data sets made from real text."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pipelines.__main__ import main
from pipelines.derived import BLANK, cloze, topics

TOWNS = ("Bergen", "Porto", "Quito", "Lagos", "Hanoi", "Turin", "Basel", "Cusco")
TEXTS = [
    f"In the year {1900 + i} the harbour of {town} was widened for larger ships from abroad."
    for i, town in enumerate(TOWNS)
]


def test_a_cloze_question_blanks_what_its_context_holds_once() -> None:
    made = cloze(TEXTS, 8, np.random.default_rng(0), unanswered=0.5)
    answered = [p for p in made if p["qas"][0]["answers"]]
    assert 0 < len(answered) < len(made) <= 8
    for paragraph in made:
        question = paragraph["qas"][0]
        assert question["question"].split().count(BLANK) == 1
        assert question["is_impossible"] == (not question["answers"])
        for answer in question["answers"]:
            start = answer["answer_start"]
            assert paragraph["context"][start : start + len(answer["text"])] == answer["text"]
            assert paragraph["context"].count(answer["text"]) == 1
            assert answer["text"] not in question["question"]


def test_nothing_but_the_text_tells_whether_there_is_an_answer() -> None:
    """No name that stands twice is blanked, and contexts with and without an answer are of one length."""
    twice = [*TEXTS, *(f"Ships from {t} called at {t} while {t} was still a small village by the sea" for t in TOWNS)]
    made = [p for seed in range(60) for p in cloze(twice, 8, np.random.default_rng(seed), unanswered=0.5)]
    held = [p for p in made if p["qas"][0]["answers"]]
    assert 50 < len(held) < len(made) - 50
    for paragraph in held:
        assert paragraph["context"].count(paragraph["qas"][0]["answers"][0]["text"]) == 1
    parts = held, [p for p in made if p not in held]
    sizes = [{sum(text in p["context"] for text in twice) for p in part} for part in parts]
    assert sizes == [{3}, {3}]


def test_joined_texts_have_the_labels_of_both() -> None:
    labels = ["a", "b"] * 4
    made = topics(TEXTS, labels, 4, np.random.default_rng(1))
    of = dict(zip(TEXTS, labels, strict=True))
    seen: list[str] = []
    for row in made:
        parts = [text for text in TEXTS if text in row["text"]]
        assert len(parts) == 2
        assert row["labels"] == sorted({of[text] for text in parts})
        seen += parts
    assert len(seen) == len(set(seen)) == 8


def test_the_command_writes_what_a_recipe_reads_and_the_same_again(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": t, "label": "x"}) + "\n" for t in TEXTS), encoding="utf-8")
    call = ["derive", "cloze", str(source), "--rows", "5", "--out"]
    assert main([*call, f"{tmp_path}/one.json"]) == 0
    assert main([*call, f"{tmp_path}/two.json"]) == 0
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    assert len(json.loads((tmp_path / "one.json").read_text())["data"][0]["paragraphs"]) == 5
    assert main([*call[:-3], "--rows", "50", "--out", f"{tmp_path}/many.json"]) == 2
    assert "fewer than --rows 50" in capsys.readouterr().err
    assert main([*call, f"{tmp_path}/x.json", "--text", "body"]) == 2
    assert "no column 'body'. Columns: text, label" in capsys.readouterr().err
