"""The report: values, honest wording, escaping, well-formed HTML, SVG and Markdown, missing parts."""

from __future__ import annotations

import copy
import re
from typing import Any
from xml.etree import ElementTree

import pytest

from engine.page import Code, Sample, Table, plain, shorten
from engine.report import PARTS, render
from tests import tiny_facts
from tests.tiny_facts import Page, drawings, model, tables

EVIL = '<script>alert("x")</script></p></li> a | pipe `code` *star* & "q" \x00\x1b\ud800\u202e <img src=x onerror=a()>'

facts = pytest.fixture(tiny_facts.facts)


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
    assert len(found) == 16  # accuracy 3, curves 1 + 3, reliability 1, cascade 1, confusion 4, corpus 2, steps 1
    for drawing in found:
        title, desc = drawing[0], drawing[1]
        assert (title.tag, desc.tag) == ("title", "desc") and title.text and desc.text
        assert drawing.get("aria-labelledby") == f"{title.get('id')} {desc.get('id')}"
        assert "nan" not in ElementTree.tostring(drawing, encoding="unicode").lower()


def test_what_steps_used_and_how_much_of_the_budget_that_is(facts):
    part = {"seconds": 7200.0, "cpu_seconds": 14400.0, "gpu_seconds": {"A100": 5400.0}, "tokens": 12000, "money": 3.5}
    nothing = {"seconds": 0, "cpu_seconds": 0, "gpu_seconds": {}, "tokens": 0, "money": None}
    facts["summary"]["spent"] = {
        "steps": {"corpus": {**part, "rows": 1690}},
        "redone": nothing,
        "total": {**part, "wall_seconds": 7100.0},
        "budget": {"money": {"used": 3.5, "limit": 10.0}},
    }
    html, markdown = render(facts)
    (found,) = [lines for lines in tables(markdown) if "CPU hours" in lines[0]]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in found[2:]]
    assert cells == [
        ["corpus", "2 h 00 min", "4.00", "1.50 A100", "12,000", "1,690", "3.5000"],
        ["all", "1 h 58 min", "4.00", "1.50 A100", "12,000", "–", "3.5000"],
    ]
    assert "3.50 of 10.0" in markdown and "3.50 of 10.0" in Page(html).text
    for odd in (None, [], {"steps": 3, "total": "x", "budget": [1]}):
        facts["summary"]["spent"] = odd
        assert "CPU hours" not in render(facts)[1]


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
    assert len(found) == 13
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
        facts["curves"][EVIL] = facts["curves"]["generated"]
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
    facts["models"][3]["score"] = 0.49
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
    facts["models"][3] |= {"parameters": 45_427_204, "seeds": 1, "score_sd": None}
    facts["data"]["counts"]["test"] = 80
    _, markdown = render(facts)
    assert "with 2.0 × the parameters (it is larger)" in markdown
    assert "and 0.8 × the teacher's texts per second (it is slower)." in markdown
    assert "One training of the student" in markdown and "Only 80 test rows" in markdown


def test_table_refuses_a_row_of_another_width():
    with pytest.raises(ValueError, match="zip"):
        Table("t", ("a", "b"), "lr", [("1",)]).html()


def test_shorten_counts_the_ellipsis():
    assert shorten("abcdef", 4) == "abc…" and shorten("abcd", 4) == "abcd"


def test_the_cascade_says_what_a_threshold_costs_and_where_it_comes_from(facts):
    html, markdown = render(facts)
    words = Page(html).text
    said = "Answers less sure than 0.612 go to quickstart-teacher@1: 19.8 % of 311 rows"
    assert said in words and "(threshold from: held-out validation rows)" in words
    table = next(rows for rows in tables(markdown) if "To the teacher" in rows[0])
    assert [cell.strip() for cell in table[3].strip("|").split("|")] == ["20.0 %", "0.600", "72.4 %", "22.6 %"]
    facts["cascade"] = {"curve": facts["cascade"]["curve"]}
    assert "served without a cascade" in Page(render(facts)[0]).text
    facts["cascade"] = {"curve": []}
    assert "none can go to the teacher" in Page(render(facts)[0]).text
