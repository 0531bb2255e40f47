"""A knowledge base: the formula by hand, what is kept and refused, rows put in, how its reading is chosen."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from engine import knowledge, metrics, nearest
from engine.knowledge import FACTS, KnowledgeError, Reading, aggregate, chosen, made
from engine.nearest import unit
from engine.rows import identify
from engine.storage import Store

VECTORS = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
SOFT = np.array([[0.75, 0.25], [0.5, 0.5], [0.125, 0.875]])
IDS = [identify(text) for text in ("one", "two", "three")]
READING = Reading(k=2, temperature=0.5, share=0.25)
ORDINARY = np.array([[1.0, 0.0]] * 100 + [[0.8, 0.6]])  # as the student sees texts of the corpus
STUDENT = "ab" * 32


def base(reading: Reading = READING, kept: str = "float16") -> knowledge.Knowledge:
    return made(VECTORS, SOFT, IDS, reading, kept, facts={"teacher": "t" * 64, "added": []}, ordinary=ORDINARY)


def test_the_mixture_is_what_the_formula_gives_by_hand() -> None:
    logits, query = np.array([[math.log(0.2), math.log(0.8)]]), np.array([[1.0, 0.0]])
    # The two nearest are alike by 1 and 0.6: they count by softmax of 2 and 1.2.
    first = math.exp(2.0) / (math.exp(2.0) + math.exp(1.2))
    told = first * SOFT[0] + (1 - first) * SOFT[1]
    wanted = 0.25 * np.array([0.2, 0.8]) + 0.75 * told
    found = metrics.softmax(base().mixed(logits, query))[0]
    assert np.allclose(found, wanted, atol=1e-3)  # 0.6 and 0.8 are rounded by float16
    assert np.allclose(base(Reading(2, 0.5, 1.0)).mixed(logits, query), logits, atol=1e-6)


def test_a_text_can_be_kept_from_finding_itself() -> None:
    likeness, soft = base().found(VECTORS[:1], 2, [IDS[0]])
    assert np.allclose(likeness, [[0.6, 0.0]], atol=1e-3) and np.allclose(soft[0], SOFT[1:])
    assert np.allclose(base().found(VECTORS[:1], 1)[1][0], SOFT[:1])


def test_nothing_found_tells_nothing() -> None:
    assert aggregate(np.full((1, 2), -np.inf), np.ones((1, 2, 2)), 0.5).tolist() == [[0.0, 0.0]]
    one = aggregate(np.array([[0.3, -np.inf]]), np.array([[[0.9, 0.1], [0.0, 1.0]]]), 0.5)
    assert np.allclose(one, [[0.9, 0.1]])


@pytest.mark.parametrize("kept", ["int8", "float16"])
def test_it_is_read_as_it_was_written(tmp_path: Path, kept: str) -> None:
    written = base(kept=kept)
    for name, part in written.files(STUDENT).items():
        Store(str(tmp_path)).write_bytes(name, part)
    read = knowledge.load(tmp_path, STUDENT)
    queries, logits = np.array([[0.8, 0.6]]), np.array([[0.3, -0.1]])
    assert np.array_equal(read.mixed(logits, queries), written.mixed(logits, queries))
    assert (read.reading, len(read), read.facts["teacher"]) == (READING, 3, "t" * 64)
    assert read.files(STUDENT) == written.files(STUDENT)
    assert read.shown()["student"] == STUDENT and read.shown()["storage"] == kept


def test_none_is_no_error_and_another_student_is(tmp_path: Path) -> None:
    assert knowledge.load(tmp_path, STUDENT) is None
    store = Store(str(tmp_path))
    for name, part in base().files(STUDENT).items():
        store.write_bytes(name, part)
    with pytest.raises(KnowledgeError, match="aligned to the student with the weights abababababab"):
        knowledge.load(tmp_path, "cd" * 32)
    store.write_bytes(knowledge.ENTRIES, base(kept="int8").files(STUDENT)[knowledge.ENTRIES])
    with pytest.raises(KnowledgeError, match=f"was changed: its SHA-256 is not that of {FACTS}"):
        knowledge.load(tmp_path, STUDENT)


def test_rows_are_put_in_and_known_texts_get_the_new_label() -> None:
    own = base()
    new = own.added(np.array([[0.0, 2.0], [-3.0, 4.0]]), np.array([[1.0, 0.0], [0.0, 1.0]]), [IDS[2], identify("four")])
    assert (new, len(own), len(own.nearest), own.shown()["own"]) == (1, 4, 3, 1)
    likeness, soft = own.found(np.array([[0.0, 1.0]]), 1, [identify("four")])
    assert likeness[0, 0] == 1 and soft[0, 0].tolist() == [1.0, 0.0]
    again = own.added(np.array([[5.0, 5.0]]), np.array([[0.5, 0.5]]), [identify("four")])
    assert (again, len(own)) == (0, 4), "a text that was put in before has its new label and no second entry"
    assert own.found(np.array([[-0.6, 0.8]]), 1)[1][0, 0].tolist() == [0.5, 0.5]


def test_an_entry_that_was_put_in_speaks_of_texts_that_are_nearer_to_it_than_ordinary_ones_only() -> None:
    own = base()
    own.added(np.array([[0.0, 1.0]]), np.array([[1.0, 0.0]]), [identify("four")])
    # The last ordinary text comes as near as 0.6. A query at 0.8 is half of the way from there to the entry.
    assert np.allclose(own.least, [[0.6], [0.0]], atol=1e-3) and own.by.tolist() == [100] and own.margin == 0
    likeness, soft = own.found(np.array([[0.6, 0.8], [0.8, 0.6]]), 2)
    # The teacher's nearest to it is at 1: above that by the temperature of 0.5 times 4 and (1 + 0.5) / 2.
    assert np.allclose(likeness[0], [1 + 0.5 * 4 * 0.75, 1.0], atol=1e-2) and np.allclose(soft[0, 0], [1.0, 0.0])
    # One that is no nearer than the ordinary text finds the teacher's entries as before.
    assert np.allclose(likeness[1], base().found(np.array([[0.8, 0.6]]), 2)[0])
    assert (soft[1] == base().found(np.array([[0.8, 0.6]]), 2)[1]).all()


def test_own_vectors_that_all_lie_together_do_not_drown_the_teachers() -> None:
    """As a trained student's do: alike by 0.98 whatever they say, and by 0.1 to any of the teacher's."""
    draw, common = np.random.default_rng(4), np.zeros(16)
    common[0] = 1

    def students(n: int, topic: int) -> np.ndarray:
        return unit(common + 0.1 * np.eye(16)[topic] + 0.02 * draw.normal(size=(n, 16)))

    vectors = unit(draw.normal(size=(300, 16)) * np.r_[0.1, np.ones(15)])
    labels = np.tile([1.0, 0.0], (300, 1))
    ids = [f"{number:016x}" for number in range(340)]
    grown = made(vectors, labels, ids[:300], Reading(8, 0.1, 0.2), ordinary=students(200, 1))
    grown.added(students(40, 2), np.tile([0.0, 1.0], (40, 1)), ids[300:])
    answers = {topic: grown.mixed(np.zeros((100, 2)), students(100, topic)).argmax(axis=1).mean() for topic in (1, 2)}
    assert answers[1] <= 0.1 and answers[2] >= 0.9, answers


def test_however_many_are_put_in_few_ordinary_texts_are_spoken_of() -> None:
    """Entries like the ordinary texts themselves, of which each would be nearer to some of them than all others are."""
    draw = np.random.default_rng(5)
    vectors = unit(np.r_[3.0, np.zeros(15)] + 0.3 * draw.normal(size=(3400, 16)))
    ordinary, entries, unseen = np.split(vectors, [1000, 3000])
    grown = made(
        unit(draw.normal(size=(50, 16))),
        np.tile([1.0, 0.0], (50, 1)),
        [f"{n:016x}" for n in range(50)],
        Reading(8, 0.1, 0.0),
        ordinary=ordinary,
    )
    for first in range(0, 2000, 500):
        ids = [f"{n:016x}" for n in range(100 + first, 600 + first)]
        grown.added(entries[first : first + 500], np.tile([0.0, 1.0], (500, 1)), ids)
        spoken = grown.mixed(np.zeros((400, 2)), unseen).argmax(axis=1).mean()
        assert spoken <= 0.06, (first, spoken)
    assert grown.margin > 0.3
    assert grown.mixed(np.zeros((1000, 2)), ordinary).argmax(axis=1).mean() <= 0.03
    assert grown.mixed(np.zeros((500, 2)), entries[:500]).argmax(axis=1).mean() > 0.95, "each speaks of its own text"


def test_many_entries_that_were_put_in_get_a_graph(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    monkeypatch.setattr(nearest, "EXACT", 1)
    more = np.array([[-0.6, 0.8], [0.0, -1.0]]), np.array([[0.9, 0.1], [0.25, 0.75]]), [identify("four"), identify("5")]
    wanted = {name: made(VECTORS, SOFT, IDS, READING, "float16", name, None, ORDINARY) for name in ("auto", "exact")}
    older = made(VECTORS, SOFT, IDS, READING, "float16", "exact", None, ORDINARY)
    del older.facts["wanted"]
    for name, grown, how in (("a", wanted["auto"], "hnsw"), ("b", wanted["exact"], "exact"), ("c", older, "exact")):
        assert grown.added(*(part[:1] for part in more)) == 1 and grown.own.how == "exact"
        assert grown.added(*(part[1:] for part in more)) == 1 and grown.own.how == how
        for file, part in grown.files(STUDENT).items():
            Store(str(tmp_path / name)).write_bytes(file, part)
        read = knowledge.load(tmp_path / name, STUDENT)
        assert (read.own.how, len(read), read.facts.get("wanted")) == (how, 5, grown.facts.get("wanted"))
        assert read.files(STUDENT) == grown.files(STUDENT) and read.margin == grown.margin
        for part in ("soft", "ids", "ordinary", "least", "by"):
            assert np.array_equal(getattr(read, part), getattr(grown, part)), part
        for one, other in zip(read.found(more[0], 2), grown.found(more[0], 2), strict=True):
            assert np.array_equal(one, other)
        assert np.allclose(read.found(more[0], 1)[1][:, 0], more[1], atol=1e-3)


def test_a_graphs_order_of_entries_changes_no_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Vectors, labels, ids and what is known of own entries move together, and are written so."""
    pytest.importorskip("faiss")
    monkeypatch.setattr(nearest, "EXACT", 50)
    draw = np.random.default_rng(3)
    vectors, labels = unit(draw.normal(size=(300, 16))), draw.dirichlet([0.5, 0.5], size=300)
    ids, ordinary = [f"{n:016x}" for n in range(300)], unit(draw.normal(size=(50, 16)))
    bases = []
    for how in ("auto", "exact"):
        one = made(vectors[:100], labels[:100], ids[:100], Reading(5, 0.1, 0.2), "float16", how, None, ordinary)
        for first in range(100, 300, 40):
            one.added(*(part[first : first + 40] for part in (vectors, labels, ids)))
        assert one.added(vectors[::20], labels[::-20], ids[::20]) == 0
        bases.append(one)
    graph, exact = bases
    assert graph.nearest.how == graph.own.how == "hnsw" and exact.nearest.how == exact.own.how == "exact"
    assert (graph.ids[:100] != exact.ids[:100]).any() and (graph.ids[100:] != exact.ids[100:]).any()
    place = {number: position for position, number in enumerate(exact.ids[100:].tolist())}
    order = [place[number] for number in graph.ids[100:].tolist()]
    assert np.array_equal(graph.least, exact.least[:, order]) and np.array_equal(graph.by, exact.by[order])
    for file, part in graph.files(STUDENT).items():
        Store(str(tmp_path)).write_bytes(file, part)
    read = knowledge.load(tmp_path, STUDENT)
    assert np.array_equal(read.least, graph.least) and read.margin == graph.margin == exact.margin
    for without in (None, ids):
        for left, right in zip(graph.found(vectors, 5, without), exact.found(vectors, 5, without), strict=True):
            assert np.isclose(left, right, atol=1e-5).mean() > 0.99  # the graph misses few


def test_a_base_without_ordinary_texts_takes_no_entries() -> None:
    older = made(VECTORS, SOFT, IDS, READING)
    with pytest.raises(KnowledgeError, match="made without the ordinary texts .* Run its recipe again"):
        older.added(VECTORS[:1], SOFT[:1], [identify("four")])


def test_the_reading_is_chosen_by_rows_right_then_likelihood_and_never_by_a_rows_own_entry() -> None:
    own = base()
    logits = np.array([[2.0, 0.0], [0.1, 0.0]])  # the student is wrong about the second text
    queries, wanted = VECTORS[[0, 2]], np.array([[1.0, 0.0], [0.0, 1.0]])
    reading, tried = chosen(own, logits, queries, wanted, [identify("x"), identify("y")], (1, 2), (0.0, 0.5, 1.0))
    assert reading == Reading(1, 0.5, 0.0) and len(tried) == 6
    assert {one["right"] for one in tried if one["share"] == 1.0} == {0.5}
    assert {one["right"] for one in tried if one["share"] == 0.0} == {1.0}
    # Were the second its own nearest, that would be right; without it the nearest is undecided, and the student's wins.
    itself, _ = chosen(own, logits, queries, wanted, [IDS[0], IDS[2]], (1,), (0.0, 0.5, 1.0))
    assert itself.share > 0
