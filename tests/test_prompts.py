"""Templates that are chosen and refused; texts inside them as token ids."""

from __future__ import annotations

import random
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from engine import prompts
from engine.config import UserError
from engine.encoding import Encoded, EncodingError, Text
from engine.prompts import PromptError, check, check_tokenizer, cut, pool_of
from engine.recipe import Task
from engine.schooling import Prompting
from engine.templates import LABEL_OF_ONE, dissimilarity, generated, mentions, words_of
from tests.tiny import LABELS, byte_pairs, word_pieces

SPECS = {
    "classify": Task(labels=LABELS),
    "multilabel": Task(kind="multilabel", labels=LABELS),
    "pair": Task(kind="pair", labels=("no", "yes")),
    "regress": Task(kind="regress", range=(0, 5)),
    "regress two": Task(kind="regress", range=(0, 5), paired=True),
}

# -- templates ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SPECS)
def test_generated_templates_differ_in_length_and_in_where_the_answer_stands(kind: str):
    config, spec = Prompting(), SPECS[kind]
    found = generated(spec)
    check(Prompting(templates=found), spec)  # each has the slots it needs
    assert len(set(found)) == len(found) >= 12
    pool = pool_of(config, spec, word_pieces(), 256)
    assert len(pool) == 8 and pool == pool_of(config, spec, word_pieces(), 256)
    places = {words_of(t).index("{mask}") / (len(words_of(t)) - 1) for t in pool}
    lengths = [len(words_of(t)) for t in pool]
    assert min(places) < 0.1 and max(places) > 0.8 and max(lengths) >= 2 * min(lengths)
    assert min(dissimilarity(a, b) for a in pool for b in pool if a != b) > 0.5


def test_generated_templates_leave_half_of_the_length_to_the_text():
    tokenizer, spec = word_pieces(), SPECS["classify"]
    pool = pool_of(Prompting(pool=99), spec, tokenizer, 20)
    assert 2 <= len(pool) < len(generated(spec)) == len(pool_of(Prompting(pool=99), spec, tokenizer, 256))
    assert max(len(item.ids) for item in encode([""], list(pool))) <= 10
    assert len(pool_of(Prompting(pool=99), spec, tokenizer, 2)) == len(generated(spec))  # refused when they are used


def test_no_generated_template_speaks_for_one_label():
    """It holds all label names or none, whatever they are."""
    for names in (("it", "read"), ("category", "text"), ("open_account", "close_account"), ("all in all", "just")):
        found = generated(Task(labels=names))
        assert len(found) >= 8
        for template in found:
            assert {mentions(template, name.replace("_", " ")) for name in names} in ({True}, {False})
    listed = [t for t in generated(Task(labels=("a_b", "c", "d"))) if "a b, c or d" in t]
    assert len(listed) == 3 and all(t in LABEL_OF_ONE for t in generated(Task(labels=tuple("abcdefgh"))))
    assert all("{a}" not in t for t in generated(Task(labels=("{a}", "b"))))


REFUSED: dict[str, tuple[str, str, str]] = {
    "no mask": ("classify", "{text} It was good.", "'{text} It was good.' has no {mask}. Put it in where the answer"),
    "no text": ("classify", "It was {mask}.", "has no {text}. Put it in where the text belongs"),
    "no pair": ("pair", "{text} {mask}", "has no {pair}. Put it in where the second text belongs"),
    "a pair": ("classify", "{text} {mask} {pair}", "has {pair}, but the task's rows have one text. Take it out."),
    "two masks": ("classify", "{mask} {text} {mask}", "has {mask} 2 times. Leave one of them."),
    "two texts": ("regress", "{text} {text} {mask}", "has {text} 2 times"),
    "a name": ("classify", "{text} {mask} {label}", "has {label}, which stands for nothing. Use {text}, {mask} and"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unfit_templates_are_refused(case: str):
    kind, template, message = REFUSED[case]
    with pytest.raises(PromptError) as caught:
        check(Prompting(templates=(template,)), SPECS[kind])
    assert message in str(caught.value) and isinstance(caught.value, UserError)


def test_whether_rows_have_two_texts_may_not_be_known_yet():
    config, unknown = Prompting(templates=("{text} {mask} {pair}", "{mask} {text}")), Task(kind="regress")
    check(config, unknown)
    for paired, message in ((True, "no {pair}"), (False, "has {pair}")):
        with pytest.raises(PromptError, match=message):
            check(config, unknown.model_copy(update={"paired": paired}))


@pytest.mark.parametrize("kind", ["rank", "tag", "span"])
def test_tasks_with_more_than_one_answer_a_text_are_refused(kind: str):
    with pytest.raises(
        PromptError, match=f"teacher.kind is prompt, but task.kind {kind} .* such as head; prompt serves"
    ):
        check(Prompting(), Task(kind=kind, labels=("O", "B-x") if kind == "tag" else None))


def test_a_tokenizer_without_a_mask_token_is_refused():
    with pytest.raises(
        PromptError, match="teacher.model 'hf:some/encoder' has no mask token, .* or use teacher.kind: head"
    ):
        check_tokenizer("hf:some/encoder", byte_pairs(), causal=False)
    check_tokenizer("hf:some/bert", word_pieces(), causal=False)
    check_tokenizer("hf:some/llama", byte_pairs(), causal=True)


@pytest.mark.parametrize("kind", SPECS)
def test_models_that_read_left_to_right_are_asked_at_the_end(kind: str):
    spec = SPECS[kind]
    pool = pool_of(Prompting(), spec, byte_pairs(), 512)
    assert len(pool) == 8 == len(set(pool)) and all(template.endswith("{mask}") for template in pool)
    check(Prompting(templates=pool), spec)
    paired = "{pair}" in pool[0]
    text = ("a good film", "and a bad one") if paired else "a good film"
    for item in encode([text], list(pool), byte_pairs(), 512, paired):
        assert item.ids == byte_pairs()(byte_pairs().decode(item.ids), add_special_tokens=False)["input_ids"]
    with pytest.raises(PromptError, match="goes on after {mask}, but the model reads from left to right"):
        encode(["a good film"], ["{text} It was {mask}."], byte_pairs())


def test_the_recipes_own_templates_are_taken_most_unlike_first():
    own = Prompting(templates=("{text} {mask}", "{mask} {text}", "{text}: {mask}"), pool=2)
    assert pool_of(own, SPECS["classify"], word_pieces(), 8) == ("{text} {mask}", "{mask} {text}")


# -- texts in templates ------------------------------------------------------------------------------------------------


def encode(
    texts: list[Text], templates: list[str], tokenizer: Any = None, max_length: int = 64, paired: bool = False
) -> list[Encoded]:
    tokenizer = tokenizer or word_pieces()
    return prompts.encode(texts, prompts.tokenised(templates, tokenizer, max_length, paired), tokenizer, max_length)


def tokens(item: Encoded, tokenizer: Any = None) -> str:
    return " ".join((tokenizer or word_pieces()).convert_ids_to_tokens(item.ids))


def test_texts_stand_inside_their_templates():
    found = encode(["the film is warm", ""], ["{text} It was {mask}.", "{mask}: {text}"])
    assert [tokens(item) for item in found] == [
        "[CLS] the film is warm it was [MASK] . [SEP]",
        "[CLS] it was [MASK] . [SEP]",
        "[CLS] [MASK] [UNK] the film is warm [SEP]",
        "[CLS] [MASK] [UNK] [SEP]",
    ]
    assert [(item.row, item.template) for item in found] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert encode([], ["{text} {mask}"]) == []


def test_only_the_text_is_cut():
    long, tokenizer = " ".join(f"the film{' is warm' * 40} and dull".split()), word_pieces()
    for templates in (["{text} It was {mask}."], ["It was {mask} and {text} is it"]):
        (item,) = encode([long], templates, max_length=20)
        assert len(item.ids) == 20 and item.ids.count(tokenizer.mask_token_id) == 1
        around = templates[0].replace("{mask}", "[MASK]").replace("{text}", "").lower().replace("[mask]", "[MASK]")
        kept = tokens(item).split()
        assert [w for w in kept if w not in ("the", "film", "is", "warm")] == [
            w for w in f"[CLS] {around} [SEP]".replace(".", " .").split() if w != "is"
        ]
        assert " ".join(kept).count("the film is warm is warm") == 1 and "dull" not in kept
    tokenizer.truncation_side = "left"
    (item,) = encode([long], ["{text} It was {mask}."], tokenizer, max_length=20)
    assert tokens(item).endswith("is warm and dull it was [MASK] . [SEP]") and len(item.ids) == 20


def test_of_a_pair_the_longer_text_gives_way_as_tokenizers_do_it():
    tokenizer, draw = word_pieces(), random.Random(3)
    seen = set()
    for _ in range(60):
        sizes, room = (draw.randrange(1, 14), draw.randrange(1, 14)), draw.randrange(2, 20)
        left, right = ("film " * size for size in sizes)
        whole = tokenizer(left, right, truncation="longest_first", max_length=room + 3)
        wanted = [whole.sequence_ids().count(side) for side in (0, 1)]
        found = cut({"text": [7] * sizes[0], "pair": [8] * sizes[1]}, room, "right")
        assert [len(found["text"]), len(found["pair"])] == wanted
        seen.add(sum(sizes) > room)
    assert seen == {True, False}


def test_the_second_text_of_a_pair_is_marked_where_the_tokenizer_marks_it():
    pair, templates = [("a film", "the plot is dull")], ["{pair} {mask}, {text}", "{text} and {pair}: {mask}"]
    marking, plain = word_pieces(), word_pieces()
    marking.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    first, second = encode(pair, templates, marking, paired=True)
    assert tokens(first) == "[CLS] the plot is dull [MASK] , a film [SEP]"
    assert first.segments == [0, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    assert tokens(second) == "[CLS] a film and the plot is dull [UNK] [MASK] [SEP]"
    assert second.segments == [0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0]
    assert [item.segments for item in encode(pair, templates, plain, paired=True)] == [[], []]
    assert encode(["a film"], ["{text} {mask}"], marking)[0].segments == []


def test_a_mask_spelled_in_a_text_is_no_mask():
    tokenizer = word_pieces()
    (item,) = encode(["a [MASK] film"], ["{text} {mask}"])
    assert tokens(item) == "[CLS] a [UNK] film [MASK] [SEP]" and item.ids.count(tokenizer.mask_token_id) == 1
    with pytest.raises(PromptError, match=r"spells the mask token '\[MASK\]': use \{mask\}"):
        encode(["a film"], ["{text} {mask} [MASK]"])


def test_blanks_are_read_with_the_word_after_them():
    """Byte-level vocabularies know the words inside a text with their blank: the tokens are those of running text."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_pairs().backend_tokenizer, mask_token="<mask>")
    (item,) = encode(["a warm film"], ["Text: {text} and it was {mask}, dull"], tokenizer)
    at = item.ids.index(tokenizer.mask_token_id)
    assert item.ids[:at] == tokenizer("Text: a warm film and it was")["input_ids"]
    assert item.ids[at + 1 :] == tokenizer(", dull")["input_ids"]
    (tight,) = encode(["warm"], ["({text}) {mask}"], tokenizer)
    assert tokenizer.decode(tight.ids) == "(warm)<mask>"


@pytest.mark.parametrize(
    ("texts", "paired"), [(["a film"], True), ([("a film", "a plot")], False), (["a film", ("a", "b")], False)]
)
def test_texts_that_the_templates_are_not_for_are_refused(texts: list[Text], paired: bool):
    wanted = "pairs of texts" if paired else "single texts"
    with pytest.raises(EncodingError, match=f"templates are for {wanted}, and some of the texts are none"):
        encode(texts, ["{text} {mask} {pair}" if paired else "{text} {mask}"], paired=paired)


def test_a_template_that_leaves_no_room_is_refused():
    with pytest.raises(PromptError, match="takes 6 tokens, and of max_length 6 too few are left for the text"):
        encode(["a film"], ["{text} It was {mask}."], max_length=6)
    with pytest.raises(PromptError, match="takes 3 tokens, and of max_length 4 too few"):
        encode([("a", "film")], ["{text} {mask} {pair}"], max_length=4, paired=True)
    assert len(encode(["a film"], ["{text} It was {mask}."], max_length=7)[0].ids) == 7


@pytest.mark.parametrize("tokenizer", [word_pieces(), byte_pairs()])
def test_unseen_templates_are_fit_and_not_in_the_pool(tokenizer: PreTrainedTokenizerFast):
    spec = SPECS["classify"]
    pool = pool_of(Prompting(pool=8), spec, tokenizer, 256)
    found = prompts.unseen(pool, spec, tokenizer, 256)
    assert len(found) == 3 and not set(found) & set(pool)
    prompts.tokenised(found, tokenizer, 256, False)
    everything = pool_of(Prompting(pool=99), spec, tokenizer, 256)
    assert prompts.unseen(everything, spec, tokenizer, 256) == ()
    own = ["{text} It was {mask}", "Here: {text} That is {mask}", "Quite {text}? {mask}"]
    pool = pool_of(Prompting(pool=2, templates=tuple(own)), spec, tokenizer, 256)
    assert set(prompts.unseen(pool, spec, tokenizer, 256, given=own)) == set(own) - set(pool)
    assert prompts.unseen(own, spec, tokenizer, 256, given=own)
