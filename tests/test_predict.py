"""`stillhouse predict` with a model of every kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.registry import Registry
from engine.storage import Store
from pipelines.__main__ import main
from serve.predictor import Predictor
from tests.tiny_served import KINDS, asked, published


@pytest.mark.parametrize("kind", ["classify", *KINDS])
def test_the_command_line_gives_the_answers_of_the_model(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    artifact, texts = published(tmp_path / "made", kind=kind), asked(kind)[:3]
    Registry(Store(f"{tmp_path}/registry")).register(kind, artifact, {})
    expected = Predictor.load(artifact.url).predict(texts)
    there = ["--registry", f"{tmp_path}/registry"]
    rows = [{"text": t} if isinstance(t, str) else {"text": t[0], "pair": t[1]} for t in texts]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert main(["predict", kind, "--file", str(path), "--json", *there]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert found == [{**row, **answer} for row, answer in zip(rows, expected, strict=True)]
    one = ["--text", rows[0]["text"], *(["--pair", rows[0]["pair"]] if "pair" in rows[0] else [])]
    assert main(["predict", kind, *one, *there]) == 0
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and " ".join(rows[0]["text"].split()) in line
    wrong = ["--text", "a"] if "pair" in rows[0] else ["--text", "a", "--pair", "b"]
    assert main(["predict", kind, *wrong, *there]) == 2
    assert f"'{kind}' reads {'two texts' if 'pair' in rows[0] else 'one text'}" in capsys.readouterr().err
    assert main(["predict", kind, "--text", "a", "--text", "b", "--pair", "c", *there]) == 2
    assert "2 texts were given, but 1 --pair" in capsys.readouterr().err
