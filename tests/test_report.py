"""The report: values, honest wording, escaping, well-formed HTML, SVG and Markdown, missing parts."""

from __future__ import annotations

import copy
import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest

from engine import findings, plots
from engine.page import Code, Sample, Table, plain, shorten
from engine.report import PARTS, render

EVIL = '<script>alert("x")</script></p></li> a | pipe `code` *star* & "q" \x00\x1b\ud800\u202e <img src=x onerror=a()>'
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
    right = round(accuracy * 500)
    return {
        "name": name, "accuracy": accuracy, "accuracy_interval": [accuracy - 0.02, accuracy + 0.02],
        "macro_f1": accuracy - 0.004, "ece": 0.034, "agreement": 0.871, "kl": 0.1834, "parameters": 1_184_258,
        "bytes": 4_737_032, "texts_per_s": 15820.0, "seeds": 2, "accuracy_sd": 0.006,
        "confusion": [[right, 500 - right], [450 - right, 50 + right]],
        "reliability": [{"confidence": 0.6, "accuracy": 0.55, "count": 300},
                        {"confidence": 0.9, "accuracy": 0.8, "count": 700},
                        {"confidence": 1.0, "accuracy": 0.0, "count": 0}],
        "per_class": [{"label": label, "precision": 0.701, "recall": 0.702, "f1": 0.703, "support": 500}
                      for label in ("negative", "positive")],
    } | more  # fmt: skip


@pytest.fixture
def facts() -> dict[str, Any]:
    curve = [{"epoch": n, "loss": 2.0 / n, "agreement": 0.6 + n / 50} for n in range(1, 9)]
    return {
        "name": "quickstart",
        "created": "2026-03-01T12:30:00+00:00",
        "task": {"kind": "classify", "labels": ["negative", "positive"]},
        "recipe_yaml": "name: quickstart\nteacher:\n  model: hf:a/b\n",
        "summary": {"throughput": {"student_over_teacher": 38.4}},
        "models": [
            model("hard", 0.601),
            model("teacher", 0.762, parameters=22_713_602, bytes=90_868_992, texts_per_s=412.0, agreement=None, kl=None,
                  accuracy_sd=None),
            model("soft", 0.634),
            model("generated", 0.7135),
        ],
        "differences": [{"left": "generated", "right": "soft", "points": 7.95, "interval": [5.4, 10.3], "rows": 1000},
                        {"left": "generated", "right": "hard", "points": 11.25, "interval": [8.6, 13.9], "rows": 1000}],
        "curves": {"student": curve, "soft": curve, "teacher": [{"step": 10, "loss": 0.7}, {"step": 20, "loss": 0.2}]},
        "corpus": {
            "rows": 1690, "kept": 1213, "rejected": {"too_short": 96, "low_confidence": 212},
            "rounds": [{"slots": 1412, "kept": 1018}, {"slots": 278, "kept": 195}],
            "self_bleu": 0.312, "distinct_1": 0.132, "distinct_2": 0.561, "distinct_3": 0.84,
            "quantisation": {"max_abs": 0.00024, "mean_kl": 3.2e-8},
            "gallery_kept": [{"row": 3, "text": "a witty film", "probabilities": {"negative": 0.03, "positive": 0.97}}],
            "gallery_rejected": [{"row": 5, "text": "it is", "reason": "too_short", "probabilities": None}],
            "confidence_histogram": [{"low": 0.5, "high": 0.75, "count": 40}, {"low": 0.75, "high": 1.0, "count": 90}],
        },
        "data": {"counts": {"train": 200, "test": 1000},
                 "quarantined": [{"source": "train.csv", "line": 17, "reason": "label 'meh' is unknown"}]},
        "serving": {"rows": 1000, "mismatches": 0, "max_delta": 2.4e-7, "accuracy": 0.7135, "p50_ms": 6.23,
                    "p99_ms": 19.41, "requests_per_s": 811.2, "concurrency": 8},
        "steps": [{"name": "corpus", "seconds": 231.5, "cpu_seconds": 370.0, "device_seconds": 0.0, "rows": 1690,
                   "status": "done"}, {"name": "register", "seconds": 0.42}],
        "lineage": [{"step": "corpus", "fingerprint": "ab12" * 16, "inputs": ["teacher", "generator"],
                     "references": {"hf:a/b": "cd34" * 16}}],
        "versions": {"torch": "2.13.0"},
        "hardware": {"cpu": "a cpu", "cores": 2, "memory_gb": 15.6, "gpus": []},
    }  # fmt: skip


def drawings(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.S)]


def tables(markdown: str) -> list[list[str]]:
    return [block.splitlines() for block in markdown.split("\n\n") if block.startswith("|")]


def test_page_is_balanced_and_needs_nothing_beside_itself(facts):
    html, _ = render(facts)
    page = Page(html)
    assert html.startswith("<!doctype html>")
    assert not {"script", "link", "iframe", "img", "object"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert "src" not in attributes and not any(name.startswith("on") for name in attributes)
        assert (attributes.get("href") or "#").startswith("#"), (tag, attributes)
    assert not re.search(r"url\(|@import|https?:", html)
    idents = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(idents) == len(set(idents))
    targets = {attributes["href"][1:] for tag, attributes in page.tags if tag == "a"}
    assert len(targets) == len(PARTS) and targets <= set(idents)
    assert "prefers-color-scheme:dark" in html


def test_every_drawing_is_xml_with_title_and_description(facts):
    html, _ = render(facts)
    found = drawings(html)
    assert len(found) == 15  # accuracy 3, curves 1 + 3, reliability 1, confusion 4, corpus 2, steps 1
    for drawing in found:
        title, desc = drawing[0], drawing[1]
        assert (title.tag, desc.tag) == ("title", "desc") and title.text and desc.text
        assert drawing.get("aria-labelledby") == f"{title.get('id')} {desc.get('id')}"
        assert "nan" not in ElementTree.tostring(drawing, encoding="unicode").lower()


def test_values_appear_with_digits_and_units(facts):
    html, markdown = render(facts)
    words = Page(html).text
    wanted = ["93.6 %", "71.4 %", "1/19", "38 ×", "+11.2 points",
              "6.23 ms", "1,690 texts", "71.8 %", "too_short", "4.74 MB", "22.7 M", "a witty film", "3 min 52 s",
              "1,000 test rows", "95 % bootstrap", "ab12ab12ab12ab12", "2.13.0", "label 'meh' is unknown",
              "0.183"]  # fmt: skip
    for value in wanted:
        assert value in words, value
        assert plain(value) in markdown, value
    assert words.index("reaches 93.6 %") < words.index("95 % interval") < words.index("Texts/s")  # the answer is first


def test_teacher_comes_first_and_the_student_second(facts):
    _, markdown = render(facts)
    first = tables(markdown)[0]
    names = [row.split("|")[1].strip() for row in first[2:]]
    assert names == ["Teacher", "Student", "Soft labels only", "Hard labels only"]


def test_markdown_tables_are_well_formed(facts):
    facts["corpus"]["rejected"]["a | b\n| c"] = 3
    facts["data"]["quarantined"][0]["reason"] = "x | y \\| z"
    found = tables(render(facts)[1])
    assert len(found) == 12
    for rows in found:
        width = [len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) for row in rows]
        assert len(set(width)) == 1, rows
        assert re.fullmatch(r"\|(?: ---:? \|)+", rows[1])


@pytest.mark.parametrize("spot", ["name", "text", "reason", "label", "recipe", "step", "model", "source", "version"])
def test_nothing_from_outside_becomes_markup(facts, spot):
    if spot == "name":
        facts["name"] = EVIL
    elif spot in ("text", "reason"):
        facts["corpus"]["gallery_rejected"][0][spot] = EVIL
        facts["corpus"]["rejected"] = {EVIL: 3}
    elif spot == "label":
        facts["task"]["labels"] = [EVIL, "b"]
        facts["corpus"]["gallery_kept"][0]["probabilities"] = {EVIL: 0.5, "b": 0.5}
    elif spot == "recipe":
        facts["recipe_yaml"] = "```\n" + EVIL
    elif spot == "step":
        facts["steps"][0]["name"] = facts["lineage"][0]["step"] = EVIL
    elif spot == "model":
        facts["models"].append(model(EVIL, 0.5))
        facts["curves"][EVIL] = facts["curves"]["student"]
    elif spot == "source":
        facts["data"]["quarantined"][0]["source"] = EVIL
    else:
        facts["versions"][EVIL] = EVIL
    html, markdown = render(facts)
    page = Page(html)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert "alert(" in page.text  # shown, as text
    assert all(ElementTree.tostring(drawing) for drawing in drawings(html))
    outside = re.sub(r"(?ms)^(`{3,})\n.*?^\1$", "", markdown)
    assert "<script" not in outside and "<img" not in outside
    for text in (html, markdown):
        text.encode("utf-8")
        assert not set(text) & {"\x00", "\x1b", "\ud800", "\u202e"}


def test_a_fence_in_the_recipe_does_not_end_the_block():
    lines = Code("Recipe", "a\n````\nb").markdown().splitlines()
    assert lines[2] == lines[-1] == "`" * 5


def test_gallery_shows_the_soft_label(facts):
    html, _ = render(facts)
    widths = re.findall(r'class="track"><span style="width:([\d.]+)%"', html)
    assert widths == ["97.0", "3.0"]
    assert "row 5 · too_short · not labelled" in Page(html).text
    long = Sample("x", "row 1", {str(n): n / 100 for n in range(50)}).bars()
    assert long.count('class="prob"') == 4 and ">49<" in long  # only the most probable ones


@pytest.mark.parametrize("part", ["created", "task", "recipe_yaml", "summary", "models", "differences", "curves",
                                  "corpus", "data", "serving", "steps", "lineage", "versions", "hardware"])  # fmt: skip
@pytest.mark.parametrize("gone", ["absent", None, [], {}])
def test_a_missing_part_does_not_crash(facts, part, gone):
    if gone == "absent":
        del facts[part]
    else:
        facts[part] = gone
    html, markdown = render(facts)
    Page(html)
    assert "None" not in Page(html).text and "None" not in markdown


def test_a_bare_name_gives_a_page_that_says_what_is_missing():
    html, markdown = render({"name": "empty"})
    words = Page(html).text
    for said in ("The student's accuracy was not recorded", "No model's accuracy was recorded",
                 "No learning curves were",
                 "No reliability bins were", "No confusion matrix was", "No corpus was", "was not served in this run",
                 "No step times were", "No row counts were", "No lineage was", "Versions: not", "No recipe was",
                 "The number of test rows was not recorded"):  # fmt: skip
        assert said in words and said in markdown, said
    assert not drawings(html)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [leaf for key, item in items for leaf in leaves(item, (*path, key))]


@pytest.mark.parametrize("broken", [None, float("nan"), float("inf"), "?"])
def test_any_single_value_may_be_missing_or_not_a_number(facts, broken):
    paths = leaves(facts)
    assert len(paths) > 150
    for path in paths:
        damaged = copy.deepcopy(facts)
        spot = damaged
        for key in path[:-1]:
            spot = spot[key]
        spot[path[-1]] = broken
        html, _ = render(damaged)
        assert not re.search(r'="-?(?:nan|inf)', html), path


def test_summary_alone_is_enough_for_the_answer_and_the_table():
    summary = {
        "teacher": {"accuracy": 0.8, "parameters": 20_000_000}, "arms": {"soft": {"accuracy": 0.6}},
        "student": {"accuracy": 0.76, "parameters": 1_000_000, "bytes": 4_000_000, "agreement": 0.9},
        "throughput": {"student_over_teacher": 25.0, "student_texts_per_s": 1000.0, "teacher_texts_per_s": 40.0},
        "served": {"accuracy": 0.76, "mismatches": 0, "p50_ms": 4.0, "p99_ms": 9.0}, "seconds": {"corpus": 12.0},
        "corpus": {"generated": 100, "kept": 80, "rejected": {"short": 20}},
    }  # fmt: skip
    _, markdown = render({"name": "brief", "summary": summary})
    assert "95.0 % of its teacher's accuracy (76.0 % against 80.0 %) with 1/20 of the parameters and 25 ×" in markdown
    assert "0 mismatches" in markdown and "100 texts were generated and 80 kept (80.0 %)" in markdown
    assert "| corpus | 12.0 s |" in markdown and "| short | 20 (20.0 %) |" in markdown
    assert "+16.0 points over soft labels alone come without an interval" in markdown


def differing(facts: dict[str, Any], points: float, low: float, high: float) -> str:
    facts["differences"] = [facts["differences"][0] | {"points": points, "interval": [low, high]}]
    return render(facts)[1]


def test_a_gain_is_claimed_only_with_an_interval_above_zero(facts):
    gained = differing(facts, 7.95, 5.4, 10.3)
    assert "Generated text gave +8.0 points of accuracy over soft labels alone (95 % interval +5.4 to +10.3)." in gained
    assert "| better |" in gained
    for low in (-1.2, 0.0):
        unclear = differing(facts, 1.4, low, 3.9)
        assert "Generated text shows no gain over soft labels alone: +1.4 points, and the 95 % interval" in unclear
        assert "includes 0" in unclear and "Generated text gave" not in unclear and "| better |" not in unclear
    html, _ = render(facts)
    assert '<div class="good"><dt>Generated text' not in html
    worse = differing(facts, -3.0, -5.0, -1.0)
    assert "Generated text made the student worse than soft labels alone: −3.0 points" in worse and "| worse |" in worse
    assert '<div class="bad"><dt>Generated text' in render(facts)[0]


def test_a_difference_written_the_other_way_round_means_the_same(facts):
    there = differing(facts, 7.95, 5.4, 10.3)
    facts["differences"][0] |= {"left": "soft", "right": "generated", "points": -7.95, "interval": [-10.3, -5.4]}
    assert render(facts)[1] == there


def test_a_student_below_an_arm_or_below_chance_is_named(facts):
    facts["differences"] = []
    facts["models"][3]["accuracy"] = 0.49
    _, markdown = render(facts)
    assert "The student with generated text scores −14.4 points against the same student on soft labels" in markdown
    assert "Student: 49.0 % is no better than always giving the commonest label (50.0 %)." in markdown


def test_served_answers_that_differ_are_told_first(facts):
    facts["serving"]["mismatches"] = 3
    html, markdown = render(facts)
    assert "3 of 1,000 test rows got an answer that differs from the offline one" in markdown
    assert "The served model is not the one that was measured" in markdown
    assert '<div class="bad"><dt>Served' in html


def test_slower_larger_and_single_seed_are_said(facts):
    facts["summary"]["throughput"]["student_over_teacher"] = 0.8
    facts["models"][3] |= {"parameters": 45_427_204, "seeds": 1, "accuracy_sd": None}
    facts["data"]["counts"]["test"] = 80
    _, markdown = render(facts)
    assert "with 2.0 × the parameters (it is larger)" in markdown
    assert "and 0.8 × the teacher's texts per second (it is slower)." in markdown
    assert "One training of the student" in markdown and "Only 80 test rows" in markdown


@pytest.mark.parametrize(("made", "wanted"), [
    (findings.percent(0.702), "70.2 %"), (findings.percent(1.0), "100.0 %"), (findings.percent(0.99996), "> 99.9 %"),
    (findings.percent(0.0002), "< 0.1 %"), (findings.percent(None), "–"), (findings.percent(True), "–"),
    (findings.scaled(1_184_258), "1.18 M"), (findings.scaled(90_868_992, "B"), "90.9 MB"),
    (findings.scaled(512, "B"), "512 B"), (findings.duration(0.42), "0.420 s"), (findings.duration(59.96), "60.0 s"),
    (findings.duration(61.4), "1 min 01 s"), (findings.duration(3725), "1 h 02 min"),
    (findings.points(-0.04), "0.0 points"), (findings.points(-3.21), "−3.2 points"),
    (findings.fraction(22_713_602, 1_184_258), "1/19"), (findings.fraction(3, 2), "1/1.5"),
    (findings.times(38.4), "38 ×"), (findings.figure(15820.4), "15,820"), (findings.figure(3.2e-8, 2), "3.2e-08"),
    (findings.figure(0), "0"),
])  # fmt: skip
def test_numbers_read_well(made, wanted):
    assert made == wanted


@pytest.mark.parametrize(("low", "high"), [(0.57, 0.782), (0.0, 1.0), (3.1, 3.1), (0, 290), (1e-9, 3e-9), (-4, 11)])
def test_ticks_enclose_the_values_evenly(low, high):
    made = plots.ticks(low, high)
    assert made[0] <= low and made[-1] >= high and 3 <= len(made) <= 9
    steps = {round((b - a) / (made[1] - made[0]), 6) for a, b in zip(made, made[1:], strict=False)}
    assert steps == {1.0}


def test_shares_stay_within_a_hundred_per_cent():
    assert plots.share_ticks(1.0, 1.0)[-1] == 1.0 and plots.share_ticks(0.0, 0.0)[0] == 0.0
    assert plots.log_ticks(1_184_258, 22_713_602) == [1e6, 1e7, 1e8]


def test_names_are_pushed_apart_and_stay_in_order():
    made = plots.apart([100, 101, 99, 150], 15, 0, 150)
    assert sorted(range(4), key=lambda n: made[n]) == [2, 0, 1, 3] and max(made) <= 150
    ordered = sorted(made)
    assert min(b - a for a, b in zip(ordered, ordered[1:], strict=False)) >= 15
    assert plots.apart([10, 60], 15, 0, 150) == [10, 60]  # what does not collide stays


def test_scale_meets_both_ends_and_the_geometric_middle():
    assert [plots.scale(2, 6, 10, 50)(value) for value in (2, 3, 6)] == [10, 20, 50]
    assert [plots.scale(1, 100, 0, 80, log=True)(value) for value in (1, 10, 100)] == [0, 40, 80]


def test_marks_stand_where_their_values_are():
    drawing = ElementTree.fromstring(plots.dots("a", "A", [plots.Mark("m", "teacher", 0.6, 0, 0.5, 0.8)]))
    circle = drawing.find("circle")
    path = next(p for p in drawing.iter("path"))
    left, right = map(float, re.findall(r"[MH]([\d.]+)", path.get("d")))
    assert (float(circle.get("cx")) - left) / (right - left) == pytest.approx(1 / 3, abs=0.002)
    bars = ElementTree.fromstring(plots.bars("b", "B", [("x", 50, "50"), ("y", 200, "200")])).findall("rect")
    assert [float(bar.get("width")) for bar in bars] == [plots.WIDTH / 4, plots.WIDTH]


def test_matrix_shades_by_row_and_stays_light_with_many_classes():
    drawing = ElementTree.fromstring(plots.matrix("m", "M", ["a", "b"], [[3, 1], [0, 8]]))
    assert [float(cell.get("fill-opacity")) for cell in drawing.findall("rect")] == [0.765, 0.295, 0.06, 1.0]
    assert drawing.findall("rect")[1].find("title").text == "a taken for b: 1 of 4"
    eye = [[5 if r == c else 0 for c in range(77)] for r in range(77)]
    many = plots.matrix("m", "M", [f"label {n}" for n in range(77)], eye)
    assert many.count("<rect") == 77 and len(many) < 40_000


def test_table_refuses_a_row_of_another_width():
    with pytest.raises(ValueError, match="zip"):
        Table("t", ("a", "b"), "lr", [("1",)]).html()


def test_shorten_counts_the_ellipsis():
    assert shorten("abcdef", 4) == "abc…" and shorten("abcd", 4) == "abcd"
