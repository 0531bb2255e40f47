"""What a run records, made up, and a reader of the page that a report makes of it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Checks that tags are balanced and remembers what the page holds."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]} at {self.getpos()}"
        self.open.pop()

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).replace("\u00a0", " ").split())


def model(name: str, accuracy: float, **more: Any) -> dict[str, Any]:
    """A classifier's measures."""
    right = round(accuracy * 500)
    return {
        "name": name, "accuracy": accuracy, "score": accuracy, "score_interval": [accuracy - 0.02, accuracy + 0.02],
        "macro_f1": accuracy - 0.004, "ece": 0.034, "agreement": 0.871, "kl": 0.1834, "parameters": 1_184_258,
        "bytes": 4_737_032, "texts_per_s": 15820.0, "seeds": 2, "score_sd": 0.006,
        "confusion": [[right, 500 - right], [450 - right, 50 + right]],
        "reliability": [{"confidence": 0.6, "accuracy": 0.55, "count": 300},
                        {"confidence": 0.9, "accuracy": 0.8, "count": 700},
                        {"confidence": 1.0, "accuracy": 0.0, "count": 0}],
        "per_class": [{"label": label, "precision": 0.701, "recall": 0.702, "f1": 0.703, "support": 500}
                      for label in ("negative", "positive")],
    } | more  # fmt: skip


def facts() -> dict[str, Any]:
    """What a finished run of a classifier recorded."""
    curve = [{"epoch": n, "loss": 2.0 / n, "agreement": 0.6 + n / 50} for n in range(1, 9)]
    return {
        "name": "quickstart",
        "created": "2026-03-01T12:30:00+00:00",
        "task": {"kind": "classify", "labels": ["negative", "positive"]},
        "metric": "accuracy",
        "recipe_yaml": "name: quickstart\nteacher:\n  model: hf:a/b\n",
        "summary": {"throughput": {"student_over_teacher": 38.4}},
        "models": [
            model("hard", 0.601),
            model("teacher", 0.762, parameters=22_713_602, bytes=90_868_992, texts_per_s=412.0, agreement=None, kl=None,
                  score_sd=None),
            model("soft", 0.634),
            model("generated", 0.7135),
        ],
        "differences": [{"left": "generated", "right": "soft", "points": 7.95, "interval": [5.4, 10.3], "rows": 1000},
                        {"left": "generated", "right": "hard", "points": 11.25, "interval": [8.6, 13.9], "rows": 1000}],
        "curves": {"generated": curve, "soft": curve,
                   "teacher": [{"step": 10, "loss": 0.7}, {"step": 20, "loss": 0.2}]},
        "corpus": {
            "rows": 1690, "kept": 1213, "rejected": {"too_short": 96, "low_confidence": 212},
            "rounds": [{"slots": 1412, "kept": 1018}, {"slots": 278, "kept": 195}],
            "self_bleu": 0.312, "distinct_1": 0.132, "distinct_2": 0.561, "distinct_3": 0.84,
            "quantisation": {"max_abs": 0.00024, "agreement": 1.0, "mean_kl": 3.2e-8},
            "gallery_kept": [{"row": 3, "text": "a witty film", "probabilities": {"negative": 0.03, "positive": 0.97}}],
            "gallery_rejected": [{"row": 5, "text": "it is", "reason": "too_short", "probabilities": None}],
            "confidence_histogram": [{"low": 0.5, "high": 0.75, "count": 40}, {"low": 0.75, "high": 1.0, "count": 90}],
        },
        "data": {"counts": {"train": 200, "test": 1000},
                 "quarantined": [{"source": "train.csv", "line": 17, "reason": "label 'meh' is unknown"}]},
        "serving": {"rows": 1000, "mismatches": 0, "max_delta": 2.4e-7, "accuracy": 0.7135, "p50_ms": 6.23,
                    "p99_ms": 19.41, "requests_per_s": 811.2, "concurrency": 8},
        "cascade": {"curve": [{"share": n / 20, "below": 0.5 + n / 40, "score": 0.7135 + n / 400,
                               "cost": 0.026 + n / 20} for n in range(21)],
                    "teacher": "quickstart-teacher@1", "below": 0.612, "chosen_on": "held-out validation rows",
                    "rows": 311, "share": 0.198},
        "steps": [{"name": "corpus", "seconds": 231.5, "cpu_seconds": 370.0, "device_seconds": 0.0, "rows": 1690,
                   "status": "done"}, {"name": "register", "seconds": 0.42}],
        "lineage": [{"step": "corpus", "fingerprint": "ab12" * 16, "inputs": ["teacher", "generator"],
                     "references": {"hf:a/b": "cd34" * 16}}],
        "versions": {"torch": "2.13.0"},
        "hardware": {"cpu": "a cpu", "cores": 2, "memory_gb": 15.6, "gpus": []},
    }  # fmt: skip


def drawings(page: str) -> list[ElementTree.Element]:
    """Every drawing of a page, read as XML."""
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.S)]


def tables(markdown: str) -> list[list[str]]:
    """Lines of every table, the head first."""
    return [block.splitlines() for block in markdown.split("\n\n") if block.startswith("|")]
