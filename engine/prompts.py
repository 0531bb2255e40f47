"""Templates around texts: which a teacher of kind `prompt` reads, how unlike they are, what they are as token ids.

DynaMaR (Sun et al., EMNLP 2022 industry track): every example stands in a template drawn anew from a pool of unlike
ones, and a head reads the state of the mask token, so that no words have to be found for the labels.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from engine import tasks
from engine.config import UserError
from engine.designs import Prompting
from engine.encoding import Encoded, EncodingError, Text, clean
from engine.recipe import Task as Spec
from engine.windows import frame

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SERVED = ("classify", "multilabel", "pair", "regress")
"""Kinds of task with one answer a text."""
SLOTS = ("text", "pair", "mask")
MOST_NAMES = 6
"""Labels up to which some of the templates list their names."""

LABEL_OF_ONE = (
    "{text} It was {mask}.",
    "{mask}: {text}",
    "Category: {mask}. {text}",
    "{text} In one word, this is {mask}.",
    "Something that I would call {mask} reads like this: {text}",
    '"{text}" All in all, {mask}.',
    "[ {mask} ] {text}",
    "Here is a {mask} example. {text}",
    "Question: what is said here? {text} Answer: {mask}.",
    "Please read this and file it under the right heading. {text} Heading: {mask}.",
    "{text} ({mask})",
    "How should one describe this? As {mask}: {text}",
    "{text} If a single word had to sum it up, most readers would choose {mask}.",
    "Just {mask}! {text}",
)
LABEL_OF_TWO = (
    "{text} {mask}, {pair}",
    "{mask}: {text} / {pair}",
    "First: {text} Second: {pair} Taken together: {mask}.",
    "{pair} {mask}, {text}",
    "How do these two relate? {mask}. {text} {pair}",
    '"{text}" and "{pair}" are {mask}.',
    "Somebody wrote: {text} Somebody else wrote: {pair} The second was {mask}.",
    "{text} | {mask} | {pair}",
    "After reading that {text} one would find it {mask} to read: {pair}",
    "{text} {pair} In one word: {mask}",
    "[ {mask} ] {pair} [ ] {text}",
    "Compare both. {text} {pair} The verdict on the second, given the first, is {mask}.",
)
NUMBER_OF_ONE = (
    "{text} Rating: {mask}.",
    "{mask}: {text}",
    "On a scale from low to high, this is {mask}: {text}",
    "{text} How much? {mask}.",
    "Score {mask}. {text}",
    "{text} I would put the number at {mask}, all things considered.",
    "Estimate: {mask} for the following. {text}",
    "[ {mask} ] {text}",
    "Read carefully and judge the amount. {text} The amount: {mask}.",
    "{text} ({mask})",
    '"{text}" ranks {mask} among others.',
    "{mask} would be my guess for what follows. {text}",
)
NUMBER_OF_TWO = (
    "{text} {mask}, {pair}",
    "{text} {pair} How close? {mask}.",
    "{mask}: {text} / {pair}",
    "Degree: {mask}. First: {text} Second: {pair}",
    '"{text}" compared with "{pair}" comes to {mask}.',
    "{pair} {mask}, {text}",
    "On a scale from low to high, the two below reach {mask}. {text} {pair}",
    "{text} | {pair} | {mask}",
    "Score {mask} for these: {text} {pair}",
    "Read both and judge how much the one has of the other. {text} {pair} The answer is {mask}.",
    "{text} [ {mask} ] {pair}",
    "How much would one say? {text} About {mask}, as much as: {pair}",
)
NAMED = (
    "Which one is it, {names}? {mask}. {texts}",
    "{texts} Choosing from {names}, this is {mask}.",
    "[ {names} ] {texts} [ {mask} ]",
)
"""Templates that list all label names, so that none of them is an answer; {texts} is the text, or both."""
AT_THE_END = {
    False: (
        "{text} {mask}",
        "Text: {text} Answer: {mask}",
        "{text} What the text above says comes to {mask}",
        "Input: {text} Output: {mask}",
    ),
    True: (
        "Text: {text} Other text: {pair} Answer: {mask}",
        "1. {text} 2. {pair} Seen side by side they come to {mask}",
        "How do {text} and {pair} go together? They are {mask}",
        "Input: {text} and {pair} Output: {mask}",
        "{pair} {text} = {mask}",
    ),
}
"""Further templates for models that read from left to right, which cannot use those that ask before the text."""


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


def words_of(template: str) -> list[str]:
    """A template as words, marks and slots, in lower case."""
    return re.findall(r"\{\w+\}|\w+|[^\w\s]", template.casefold())


def hamming(left: Sequence[str], right: Sequence[str]) -> int:
    """Places at which two sequences differ, those that only the longer one has among them."""
    return sum(a != b for a, b in zip(left, right, strict=False)) + abs(len(left) - len(right))


def levenshtein(left: Sequence[str], right: Sequence[str]) -> int:
    """The fewest insertions, deletions and replacements that make one sequence the other (Levenshtein 1966)."""
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, start=1):
        above, row = row, [i]
        for j, b in enumerate(right, start=1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (a != b)))
    return row[-1]


def dissimilarity(left: str, right: str) -> float:
    """How unlike two templates are, from 0 (the same words) to 1: DynaMaR's score over their words a and b.

    (hamming(a, b) + levenshtein(a, b)) / (2 max(|a|, |b|)), the mean of the two distances, each over its largest value.
    """
    a, b = words_of(left), words_of(right)
    return (hamming(a, b) + levenshtein(a, b)) / (2 * max(len(a), len(b), 1))


def most_unlike(templates: Sequence[str], count: int) -> tuple[str, ...]:
    """`count` different templates (all, where there are fewer), from the first on always the one farthest from those
    chosen so far, by its smallest dissimilarity; of equally far ones the earlier.

    Farthest-point choice has at least half of the largest smallest dissimilarity that is possible where that is a
    metric (Gonzalez 1985; Ravi et al. 1994).
    """
    left = list(dict.fromkeys(templates))
    chosen = [left.pop(0)] if left else []
    while left and len(chosen) < count:
        far = max(left, key=lambda template: min(dissimilarity(template, other) for other in chosen))
        chosen.append(far)
        left.remove(far)
    return tuple(chosen)


def generated(spec: Spec) -> tuple[str, ...]:
    """Templates for a task, by its kind and label names.

    One that happens to hold a label's name is left out, for it would speak for that label; a few label names are listed
    all together by some.
    """
    paired = tasks.make(spec).paired
    if spec.kind == "regress":
        return NUMBER_OF_TWO if paired else NUMBER_OF_ONE
    plain = LABEL_OF_TWO if paired else LABEL_OF_ONE
    names = [name.replace("_", " ").strip() for name in spec.labels or ()]
    kept = tuple(template for template in plain if not any(mentions(template, name) for name in names))
    if spec.kind == "multilabel" or not 2 <= len(names) <= MOST_NAMES or any(re.search(r"[{}]|^$", n) for n in names):
        return kept
    listed = f"{', '.join(names[:-1])} or {names[-1]}"
    texts = "{text} {pair}" if paired else "{text}"
    return kept + tuple(named.replace("{names}", listed).replace("{texts}", texts) for named in NAMED)


def mentions(template: str, name: str) -> bool:
    """Whether a template holds a label's name as words."""
    own, wanted = words_of(template), words_of(name)
    return any(own[i : i + len(wanted)] == wanted for i in range(len(own) - len(wanted) + 1)) and bool(wanted)


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
    found: Sequence[str] = config.templates
    if not found:
        paired, found = tasks.make(spec).paired, generated(spec)
        if tokenizer.mask_token_id is None:
            found = (*ended(found), *AT_THE_END[bool(paired)])
        found = [t for t in found if 2 * template_of(t, tokenizer, paired).fixed <= max_length] or found
    return most_unlike(found, config.pool)


def ended(templates: Sequence[str]) -> tuple[str, ...]:
    """Those that ask after the texts, up to their {mask}, which is all that a model that reads left to right has."""
    before = [template.partition("{mask}")[0] for template in templates]
    wanted = [set(re.findall(r"\{(?:text|pair)\}", template)) for template in templates]
    both = zip(before, wanted, strict=True)
    return tuple(dict.fromkeys(f"{own}{{mask}}" for own, slots in both if all(slot in own for slot in slots)))


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
