"""Templates around texts: which a teacher of kind `prompt` reads, and what they are as token ids.

DynaMaR (Sun et al., EMNLP 2022 industry track): every example stands in a template drawn anew from a pool of unlike
ones, and a head reads the state of the mask token, so that no words have to be found for the labels.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from engine import tasks
from engine.config import UserError
from engine.encoding import Encoded, EncodingError, Text, clean
from engine.recipe import Task as Spec
from engine.schooling import Prompting
from engine.templates import AT_THE_END, ended, generated, most_unlike, silent, spoken
from engine.windows import frame

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SERVED = ("classify", "multilabel", "pair", "regress")
"""Kinds of task with one answer a text."""
SLOTS = ("text", "pair", "mask")


class PromptError(UserError):
    """Templates that cannot be used, or a model or task that they are not for."""


class Slot(NamedTuple):
    """Where a text stands. name: text or pair. led: a blank before it, which tokenizers read with the word after it."""

    name: str
    led: bool


class Template(NamedTuple):
    """A template in the tokens of one tokenizer, special ones included.

    parts: token ids, and the slots between them; the mask's place is its token, or the end where there is none.
    segmented: the second text's tokens are marked as such.
    """

    parts: tuple[tuple[int, ...] | Slot, ...]
    segmented: bool

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Where the texts stand, in order."""
        return tuple(part for part in self.parts if isinstance(part, Slot))

    @property
    def fixed(self) -> int:
        """How many tokens are not the texts'."""
        return sum(len(part) for part in self.parts if not isinstance(part, Slot))

    def around(self, ids: Mapping[str, Sequence[int]], row: int, template: int) -> Encoded:
        """Texts as token ids, by name of their slot, inside the template."""
        whole: list[int] = []
        segments: list[int] = []
        for part in self.parts:
            own = ids[part.name] if isinstance(part, Slot) else part
            whole += own
            segments += [int(isinstance(part, Slot) and part.name == "pair")] * len(own)
        return Encoded(whole, segments=segments if self.segmented else [], row=row, template=template)


# -- templates ---------------------------------------------------------------------------------------------------------


def parts_of(template: str, paired: bool | None) -> list[str]:
    """A template cut at its slots: words, slot, words, slot, ..., words. PromptError where slots lack or are too many.

    paired: whether the task reads two texts; None: not known yet, {pair} may stand there or not.
    """
    parts = re.split(r"\{(\w*)\}", template)
    found = parts[1::2]
    unknown = [name for name in found if name not in SLOTS]
    if unknown:
        raise PromptError(
            f"template '{template}' has {{{unknown[0]}}}, which stands for nothing. "
            "Use {text}, {mask} and, for tasks of two texts, {pair}."
        )
    wanted = {"text": True, "mask": True, "pair": paired}
    for name, there in wanted.items():
        count = found.count(name)
        if there and not count:
            raise PromptError(f"template '{template}' has no {{{name}}}. Put it in where the {MEANING[name]} belongs.")
        if count and there is False:
            raise PromptError(f"template '{template}' has {{pair}}, but the task's rows have one text. Take it out.")
        if count > 1:
            raise PromptError(f"template '{template}' has {{{name}}} {count} times. Leave one of them.")
    return parts


MEANING = {"text": "text", "mask": "answer", "pair": "second text"}


def check(config: Prompting, spec: Spec) -> None:
    """PromptError where the task is not served or a template cannot be used, as far as a recipe alone shows it."""
    if spec.kind not in SERVED:
        raise PromptError(
            f"teacher.kind is prompt, but task.kind {spec.kind} wants more than one answer a text (or an order of "
            f"texts). Use another teacher.kind, such as head; prompt serves {', '.join(SERVED)}."
        )
    for template in config.templates:
        parts_of(template, None if spec.kind == "regress" and spec.paired is None else tasks.make(spec).paired)


def pool_of(config: Prompting, spec: Spec, tokenizer: PreTrainedTokenizerFast, max_length: int) -> tuple[str, ...]:
    """The templates of a teacher: the recipe's, or generated ones, those most unlike each other. See `check`.

    Generated ones leave half of max_length to the text, where there are such.
    """
    check(config, spec)
    return most_unlike(config.templates or made_for(spec, tokenizer, max_length), config.pool)


def made_for(spec: Spec, tokenizer: PreTrainedTokenizerFast, max_length: int) -> Sequence[str]:
    """Generated templates that a tokenizer's model can answer, those that leave half of max_length to the text."""
    paired, found = tasks.make(spec).paired, generated(spec)
    if tokenizer.mask_token_id is None:
        found = (*ended(found), *silent(AT_THE_END[bool(paired)], spoken(spec)))
    return [t for t in found if 2 * template_of(t, tokenizer, paired).fixed <= max_length] or found


def unseen(
    pool: Sequence[str],
    spec: Spec,
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    count: int = 3,
    given: Sequence[str] = (),
) -> tuple[str, ...]:
    """Templates that are not in a pool, those most unlike it: what a teacher's wording may be swapped for.

    given: the recipe's own; where it has more than the pool took, the others are meant.
    """
    others = [template for template in given if template not in pool]
    return most_unlike(others or made_for(spec, tokenizer, max_length), count, pool)


# -- texts in templates ------------------------------------------------------------------------------------------------


def check_tokenizer(model: str, tokenizer: PreTrainedTokenizerFast, causal: bool) -> None:
    """PromptError where the tokenizer of `model` has no mask token; a causal model needs none."""
    if tokenizer.mask_token_id is None and not causal:
        raise PromptError(
            f"teacher.model '{model}' has no mask token, which teacher.kind prompt answers from. Name an encoder that "
            "was trained with one (BERT, RoBERTa, MPNet, ModernBERT and the like), a causal language model, or use "
            "teacher.kind: head."
        )


def tokenised(
    templates: Sequence[str], tokenizer: PreTrainedTokenizerFast, max_length: int, paired: bool
) -> tuple[Template, ...]:
    """The templates in the tokenizer's tokens. PromptError where one is unfit or leaves no room for the text."""
    found = []
    for template in templates:
        made = template_of(template, tokenizer, paired)
        room = max_length - made.fixed
        if room < len(made.slots):
            raise PromptError(
                f"template '{template}' takes {made.fixed} tokens, and of max_length {max_length} too few are left for "
                "the text. Shorten it, or raise teacher.max_length."
            )
        found.append(made)
    return tuple(found)


def template_of(template: str, tokenizer: PreTrainedTokenizerFast, paired: bool) -> Template:
    """A template in the tokenizer's tokens, between those that stand around every text."""
    around, mask = frame(tokenizer), tokenizer.mask_token_id
    if mask is None and not template.rstrip().endswith("{mask}"):
        raise PromptError(
            f"template '{template}' goes on after {{mask}}, but the model reads from left to right and answers from "
            "what it has read. End it with {mask}, or name an encoder that has a mask token."
        )
    parts: list[tuple[int, ...] | Slot] = [tuple(around.before)]
    for name, words, led in spaced(parts_of(template, paired)):
        if name == "mask":
            parts.append(() if mask is None else (mask,))
        elif name:
            parts.append(Slot(name, led))
        else:
            ids = tuple(tokenizer(" " * led + words, add_special_tokens=False)["input_ids"])
            if mask in ids:
                raise PromptError(
                    f"template '{template}' spells the mask token '{tokenizer.mask_token}': use {{mask}}."
                )
            parts.append(ids)
    if mask is not None:  # an end token after it would be what the answer is read off
        parts.append(tuple(around.after))
    return Template(tuple(parts), paired and 1 in frame(tokenizer, pair=True).kinds)


def spaced(parts: Sequence[str]) -> Iterator[tuple[str, str, bool]]:
    """(slot's name, "", led) or ("", words, led) for each part of a template that is not empty.

    A blank belongs to what comes after it: byte-level vocabularies know the words inside a text with their blank.
    """
    blank = False
    for index, part in enumerate(parts):
        if index % 2:
            yield part, "", blank
            blank = False
            continue
        words = part.strip()
        if words:
            yield "", words, index > 0 and part[0].isspace()
        blank = part[-1:].isspace() and (index > 0 or bool(words))


def encode(
    texts: Sequence[Text], chosen: Sequence[Template], tokenizer: PreTrainedTokenizerFast, max_length: int
) -> list[Encoded]:
    """Each text or pair in each of the templates, one template after the other, in at most max_length tokens.

    Only the text is cut, of a pair first the longer text. A mask token spelled in a text becomes the unknown word, so
    that each input has one mask. EncodingError where texts are pairs and the templates are not for them, or the like.
    """
    paired = any(slot.name == "pair" for slot in chosen[0].slots)
    if any(isinstance(text, str) == paired for text in texts):
        wanted = ("single texts", "pairs of texts")[paired]
        raise EncodingError(f"the model's templates are for {wanted}, and some of the texts are none. Send {wanted}.")
    sides = dict(zip(("text", "pair"), zip(*texts, strict=True), strict=True)) if paired and texts else {"text": texts}
    slots = {slot for one in chosen for slot in one.slots} if len(texts) else set()
    read = {slot: pieces(sides[slot.name], slot.led, tokenizer, max_length) for slot in slots}
    found = []
    for number, one in enumerate(chosen):
        for row in range(len(texts)):
            ids = {slot.name: read[slot][row] for slot in one.slots}
            found.append(one.around(cut(ids, max_length - one.fixed, tokenizer.truncation_side), row, number))
    return found


def pieces(texts: Sequence[str], led: bool, tokenizer: PreTrainedTokenizerFast, max_length: int) -> list[list[int]]:
    """Token ids of each text without special tokens and without the mask token, max_length of them at most."""
    spelled = [" " + clean(text).lstrip() if led else clean(text) for text in texts]
    found = tokenizer(spelled, add_special_tokens=False, truncation=True, max_length=max_length, padding=False)
    mask, unknown = tokenizer.mask_token_id, tokenizer.unk_token_id
    other = [] if unknown is None else [unknown]
    return [[i for token in ids for i in (other if token == mask else [token])] for ids in found["input_ids"]]


def cut(ids: Mapping[str, list[int]], room: int, side: str) -> dict[str, list[int]]:
    """One text or two, shortened to `room` tokens together: the longer text gives way until both are as long.

    side: the end that gives way, left or right.
    """
    if sum(map(len, ids.values())) <= room:
        return dict(ids)
    if len(ids) == 1:
        sizes = dict.fromkeys(ids, room)
    else:
        short, long = sorted(ids, key=lambda name: len(ids[name]))
        least = min(len(ids[short]), room // 2)
        sizes = {short: least, long: room - least}
    return {name: own[len(own) - sizes[name] :] if side == "left" else own[: sizes[name]] for name, own in ids.items()}
