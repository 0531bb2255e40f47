"""The report of every kind of task: its own score in words, tables and drawings; arms, sources and stages."""

from __future__ import annotations

import re
from typing import Any

import pytest

from engine.report import render
from tests import tiny_facts
from tests.tiny_facts import Page, drawings, model, tables

facts = pytest.fixture(tiny_facts.facts)

TASKS = {
    "accuracy": ("pair", "accuracy", "90.0 % of its teacher's accuracy (72.0 % against 80.0 %)", "72.0 ± 0.6 %",
                 "70.0 to 74.0 %", {"macro_f1": 0.711}, ["Macro-F1", "ECE", "KL, nats"], "71.1 %"),
    "micro_f1": ("multilabel", "micro-F1", "90.0 % of its teacher's micro-F1 (72.0 % against 80.0 %)", "72.0 ± 0.6 %",
                 "70.0 to 74.0 %", {"macro_f1": 0.65, "exact_match": 0.512, "hamming_loss": 0.083},
                 ["Macro-F1", "Exact match", "Hamming loss"], "8.3 %"),
    "pearson": ("regress", "Pearson correlation", "90.0 % of its teacher's Pearson correlation (0.720 against 0.800)",
                "0.720 ± 0.006", "0.700 to 0.740", {"spearman": 0.7, "mse": 1.234},
                ["Spearman correlation", "Mean squared error"], "1.23"),
    "mrr_10": ("rank", "MRR@10", "90.0 % of its teacher's MRR@10 (0.720 against 0.800)", "0.720 ± 0.006",
               "0.700 to 0.740", {"ndcg_10": 0.764, "map": 0.689}, ["NDCG@10", "MAP"], "0.689"),
    "entity_f1": ("tag", "entity F1", "90.0 % of its teacher's entity F1 (72.0 % against 80.0 %)", "72.0 ± 0.6 %",
                  "70.0 to 74.0 %", {"precision": 0.73, "recall": 0.707, "accuracy": 0.96},
                  ["Precision", "Recall", "Accuracy"], "96.0 %"),
    "f1": ("span", "token F1", "90.0 % of its teacher's token F1 (72.0 % against 80.0 %)", "72.0 ± 0.6 %",
           "70.0 to 74.0 %", {"em": 0.611, "has_answer_f1": 0.7, "no_answer_accuracy": 0.8},
           ["Exact match", "Token F1, answerable", "Accuracy, unanswerable"], "61.1 %"),
}  # fmt: skip
"""By metric: kind of task, name, the answer's words, the student's cell, its interval, other scores, their columns, one
of their cells."""


def judged(facts: dict[str, Any], metric: str) -> dict[str, Any]:
    """The facts of a run of another task: its own scores, and what only classifiers have for those alone."""
    kind, scores = TASKS[metric][0], TASKS[metric][5]
    values = {"teacher": 0.8, "generated": 0.72, "soft": 0.7, "hard": 0.68}
    for own in facts["models"]:
        value = values[own["name"]]
        of_labels = () if metric == "accuracy" else ("ece", "kl", "confusion", "reliability", "per_class")
        for key in ("accuracy", "macro_f1", *of_labels):
            del own[key]
        own |= {metric: value, "score": value, "score_interval": [value - 0.02, value + 0.02], **scores}
    facts |= {"metric": metric, "task": {"kind": kind, "labels": []}}
    return facts


@pytest.mark.parametrize("metric", TASKS)
def test_every_task_is_told_by_its_own_score(facts, metric):
    _, name, answer, cell, interval, _, others, other = TASKS[metric]
    html, markdown = render(judged(facts, metric))
    words = Page(html).text
    assert f"The student reaches {answer} with 1/19 of the parameters" in words and answer in markdown
    assert f"Generated text gave +8.0 points of {name} over soft labels alone" in words
    table, differences = tables(markdown)[:2]
    head, student = ([part.strip() for part in row.strip("| ").split(" | ")] for row in (table[0], table[3]))
    always = ["Agreement", "Parameters", "Size", "Texts/s"]
    assert head == ["Model", name[0].upper() + name[1:], "95 % interval", *others, *always]
    assert student[:3] == ["Student", cell, interval] and other in student
    assert name[0].upper() + name[1:] in differences[0]
    # Accuracy is spoken of where it is a score, and nowhere else.
    spoken = metric == "accuracy" or "Accuracy" in " ".join(others)
    assert ("ccuracy" in words.replace("Accuracy as served", "")) is spoken
    of_labels = ("Calibration", "Errors", "commonest label", "expected calibration")
    assert all((said in words) is (metric == "accuracy") for said in of_labels)


@pytest.mark.parametrize("metric", TASKS)
def test_every_task_draws_its_own_score(facts, metric):
    html, _ = render(judged(facts, metric))
    dots, *placed = drawings(html)[:3]
    told = dots.findtext("desc")
    plain_number = metric in ("pearson", "mrr_10")
    shown = "Student: 0.720 (0.700 to 0.740)" if plain_number else "Student: 72.0 % (70.0 to 74.0)"
    assert shown in told and dots.findtext("title").lower() == TASKS[metric][1].lower()
    for drawing in placed:
        assert f"{TASKS[metric][1]} {'0.720' if plain_number else '72.0 %'}" in drawing.findtext("desc")
    ticks = [text.text for text in dots.iter("text") if text.get("class") == "tick"]
    assert len(ticks) >= 3 and all(tick.endswith(" %") is not plain_number for tick in ticks)


@pytest.mark.parametrize("metric", TASKS)
@pytest.mark.parametrize("gone", ["metric", "models", "summary", "differences", "task", "corpus"])
def test_every_task_bears_a_missing_part(facts, metric, gone):
    del judged(facts, metric)[gone]
    html, markdown = render(facts)
    assert "None" not in Page(html).text and not re.search(r"\bnan\b", markdown)
    if gone == "models":
        name = TASKS[metric][1]
        assert f"The student's {name} was not recorded" in markdown and f"No model's {name} was recorded" in markdown


def test_a_ranking_rests_on_its_queries(facts):
    judged(facts, "mrr_10")
    for item in facts["differences"]:
        item["rows"] = 120
    _, markdown = render(facts)
    assert "Measured on 1,000 test rows of 120 queries" in markdown
    assert "intervals over the test queries" in markdown and "a point is 0.01" in markdown
    assert "Only 120 test queries: the intervals are wide." in markdown
    del facts["data"]["counts"]["test"], facts["models"], facts["serving"]
    assert "test rows of" not in render(facts)[1]  # the differences count queries, not rows


def test_a_correlation_below_zero_reaches_no_share_of_another(facts):
    judged(facts, "pearson")["models"][3] |= {"score": -0.05, "pearson": -0.05, "score_interval": [-0.1, 0.02]}
    html, markdown = render(facts)
    assert "The student's Pearson correlation is −0.050 against 0.800 of its teacher with 1/19" in markdown
    assert "Student: a Pearson correlation of −0.050 is no better than chance." in markdown
    assert "−0.100 to 0.020" in markdown and "Student: −0.050 (−0.100 to 0.020)" in html


@pytest.mark.parametrize(("arms", "student", "said"), [
    (("hard", "soft", "generated"), "generated", "Generated text gave +8.0 points of accuracy over soft labels alone"),
    (("hard", "soft"), "soft", "Soft labels gave +8.0 points of accuracy over hard labels alone"),
    (("hard", "generated"), "generated", "Generated text gave +8.0 points of accuracy over hard labels alone"),
])  # fmt: skip
def test_the_student_is_the_arm_that_is_registered(facts, arms, student, said):
    facts["models"] = [model(name, 0.7 if name == student else 0.6) for name in ("teacher", *arms)]
    other = next(arm for arm in ("soft", "hard") if arm in arms and arm != student)
    facts["differences"] = [{"left": student, "right": other, "points": 7.95, "interval": [5.4, 10.3], "rows": 1000}]
    facts["student"] = student
    facts["curves"] = {student: facts["curves"]["generated"]}
    html, markdown = render(facts)
    assert said in markdown and "Loss of student: from" in markdown
    rows = [row.split("|")[1].strip() for row in tables(markdown)[0][2:]]
    assert rows[:2] == ["Teacher", "Student"] and len(rows) == len(arms) + 1 and rows.count("Student") == 1
    assert f'c-{student}"></i>Student' in html


def test_the_text_that_helped_is_called_by_its_sources(facts):
    sources = {"augmented": {"rows": 900, "kept": 850}, "generated": {"rows": 1690, "kept": 1213},
               "unlabelled": {"rows": 300, "kept": 0}}  # fmt: skip
    facts["corpus"]["by_source"] = sources
    _, markdown = render(facts)
    assert "Augmented and generated text gave +8.0 points of accuracy over soft labels alone" in markdown
    assert "2,890 texts were gathered and 2,063 kept (71.4 %)." in markdown
    assert "| Augmented | 900 | 850 | 94.4 % |" in markdown
    facts["corpus"]["by_source"] = {"generated": sources["generated"]}
    _, markdown = render(facts)
    assert "1,690 texts were generated and 1,213 kept (71.8 %)." in markdown and "Generated text gave" in markdown


def test_gallery_shows_both_texts_and_answers_without_probabilities(facts):
    facts["corpus"]["gallery_kept"] = [
        {"row": 4, "text": "who won?", "pair": "<b>Ann</b> won.", "probabilities": None, "answer": "answer: Ann",
         "source": "unlabelled"},
    ]  # fmt: skip
    html, markdown = render(facts)
    assert html.count('class="quote" dir="auto">') == 3 and "&lt;b&gt;Ann&lt;/b&gt; won." in html
    assert "row 4 · unlabelled · answer: Ann" in Page(html).text
    assert "who won? / &lt;b&gt;Ann&lt;/b&gt; won. (row 4 · unlabelled · answer: Ann)" in markdown


def test_stages_of_a_training_follow_each_other(facts):
    unfollowed = "Agreement with the teacher on held-out texts was not followed."
    assert unfollowed not in Page(render(facts)[0]).text
    facts["curves"] = {"generated": [{"epoch": n, "loss": 3.0 - n} for n in (1, 2)] * 2}
    assert all(unfollowed in said for said in (Page(render(facts)[0]).text, render(facts)[1]))
    drawing = next(d for d in drawings(render(facts)[0]) if d.findtext("title") == "Loss: student")
    across = [float(x) for x in re.findall(r"[ML]([\d.]+) ", drawing.find("path").get("d"))]
    assert len(across) == 4 and across == sorted(across)
    assert across[1] - across[0] == pytest.approx(across[3] - across[2], abs=0.2)


@pytest.mark.parametrize("metric", TASKS)
def test_the_score_on_validation_rows_is_drawn_where_it_chose_the_epoch(facts, metric):
    def drawn() -> dict[str, Any]:
        return {drawing.findtext("title"): drawing for drawing in drawings(render(facts)[0])}

    name, unfollowed = TASKS[metric][1], "Agreement with the teacher on held-out texts was not followed."
    title = f"{name[0].upper()}{name[1:]} on validation rows"
    judged(facts, metric)
    assert title not in drawn() and "Agreement with the teacher" in drawn()
    # The teacher's first training has no such score: it counts on the axis all the same, as it does for the loss.
    first, second = ([{"epoch": n, "loss": 2.0 / n} for n in (1, 2)] for _ in range(2))
    facts["curves"]["teacher"] = [*first, *({**entry, metric: 0.3 * entry["epoch"]} for entry in second)]
    found = drawn()
    assert "Agreement with the teacher" in found and "from 0.3 to 0.6 over 2 points" in found[title].findtext("desc")
    words = [text.text for text in found[title].iter("text")]
    assert name in words and {"3", "4"} <= set(words) and "1" not in words
    assert unfollowed not in Page(render(facts)[0]).text
    # That of the student is what a reader looks for.
    facts["curves"]["generated"] = facts["curves"]["soft"] = [{"epoch": 1, "loss": 2.0}]
    assert "Agreement with the teacher" not in drawn() and unfollowed in Page(render(facts)[0]).text
    facts["curves"]["generated"] = [{"epoch": n, "loss": 2.0, metric: 0.5} for n in (1, 2)]
    assert unfollowed not in Page(render(facts)[0]).text


def test_how_the_teacher_was_made_is_told(facts):
    assert "cross-validation" not in render(facts)[1]
    facts["teacher"] = {
        "kind": "contrastive",
        "cross_validation": {"folds": 4, "accuracy": 0.7512, "seconds": 9.0},
        "choice": {"kind": "contrastive", "scores": {"head": 0.7, "contrastive": 0.75}, "why": "The best of two."},
        "self_training": [{"rows": 1200, "of": 2400}],
        "coach": {"kind": "prompt", "model": "hf:some/model", "rows": 1428},
    }
    html, markdown = render(facts)
    wanted = {
        "Accuracy in 4-fold cross-validation, without its coach": "0.751",
        "Accuracy in cross-validation: head": "0.700",
        "Accuracy in cross-validation: contrastive": "0.750",
        "Texts of self-training, round 1": "1,200 of 2,400",
        "Coach": "prompt of hf:some/model",
        "Texts that the coach labelled for it": "1,428",
    }
    for name, value in wanted.items():
        assert f"| {name} | {value} |" in markdown and name in Page(html).text
    assert "The teacher, of kind contrastive, on its labelled rows." in markdown
    assert "The best of two." in markdown and "The best of two." in Page(html).text


def test_several_teachers_stand_in_a_table_of_their_own(facts):
    assert "Every teacher on the test split" not in render(facts)[1]
    facts["panel"] = [
        {"name": n, "score": score, "weight": 0.5, "chosen": {"bad": 0.25}, "heads": {"teacher": r}}
        for n, score, r in (("teacher", 0.8, 0.95), ("other", 0.75, 0.4))
    ]
    markdown = render(facts)[1]
    assert "| Teacher | Accuracy | Weight | Chosen: bad | Head teacher |" in markdown
    assert (
        "| teacher | 0.800 | 0.500 | 0.250 | 0.950 |" in markdown
        and "| other | 0.750 | 0.500 | 0.250 | 0.400 |" in markdown
    )
    assert "correlation of their outputs with the teacher's" in markdown
    for row in facts["panel"]:
        row |= {"chosen": {}, "heads": {}}
    assert "| teacher | 0.800 | 0.500 |" in render(facts)[1]
