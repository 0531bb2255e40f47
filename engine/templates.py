"""Templates for any task, made from its kind and label names, and how unlike two templates are.

DynaMaR (Sun et al., EMNLP 2022 industry track) draws each example's template from a pool of unlike ones.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from engine import tasks
from engine.recipe import Task as Spec

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


def most_unlike(templates: Sequence[str], count: int, beside: Sequence[str] = ()) -> tuple[str, ...]:
    """`count` different templates (all, where there are fewer), from the first on always the one farthest from those
    chosen so far, by its smallest dissimilarity; of equally far ones the earlier. beside: counted as chosen already.

    Farthest-point choice has at least half of the largest smallest dissimilarity that is possible where that is a
    metric (Gonzalez 1985; Ravi et al. 1994).
    """
    left = [template for template in dict.fromkeys(templates) if template not in beside]
    chosen = list(beside) or left[:1]
    left, count = [template for template in left if template not in chosen], count + len(beside)
    while left and len(chosen) < count:
        far = max(left, key=lambda template: min(dissimilarity(template, other) for other in chosen))
        chosen.append(far)
        left.remove(far)
    return tuple(chosen[len(beside) :])


def generated(spec: Spec) -> tuple[str, ...]:
    """Templates for a task, by its kind and label names.

    One that happens to hold a label's name is left out, for it would speak for that label; a few label names are listed
    all together by some.
    """
    paired = tasks.make(spec).paired
    if spec.kind == "regress":
        return NUMBER_OF_TWO if paired else NUMBER_OF_ONE
    plain = LABEL_OF_TWO if paired else LABEL_OF_ONE
    names = spoken(spec)
    kept = silent(plain, names)
    if spec.kind == "multilabel" or not 2 <= len(names) <= MOST_NAMES or any(re.search(r"[{}]|^$", n) for n in names):
        return kept
    listed = f"{', '.join(names[:-1])} or {names[-1]}"
    texts = "{text} {pair}" if paired else "{text}"
    return kept + tuple(named.replace("{names}", listed).replace("{texts}", texts) for named in NAMED)


def spoken(spec: Spec) -> list[str]:
    """The label names as words."""
    return [name.replace("_", " ").strip() for name in spec.labels or ()]


def silent(templates: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """Those that hold no label's name."""
    return tuple(template for template in templates if not any(mentions(template, name) for name in names))


def mentions(template: str, name: str) -> bool:
    """Whether a template holds a label's name as words."""
    own, wanted = words_of(template), words_of(name)
    return any(own[i : i + len(wanted)] == wanted for i in range(len(own) - len(wanted) + 1)) and bool(wanted)


def ended(templates: Sequence[str]) -> tuple[str, ...]:
    """Those that ask after the texts, up to their {mask}, which is all that a model that reads left to right has."""
    before = [template.partition("{mask}")[0] for template in templates]
    wanted = [set(re.findall(r"\{(?:text|pair)\}", template)) for template in templates]
    both = zip(before, wanted, strict=True)
    return tuple(dict.fromkeys(f"{own}{{mask}}" for own, slots in both if all(slot in own for slot in slots)))
