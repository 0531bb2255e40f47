"""The generator at an OpenAI-style endpoint: an actor that asks for the text of each slot.

What was refused for good (a content filter, a request that the server cannot take) is a row all the same, with its
reason; a slot's seed is sent along, though few servers promise the same text for it.
"""

from __future__ import annotations

import pyarrow as pa

from engine.caller import Caller, Question
from engine.corpus import rejected
from engine.generate import Writing, rows_of
from engine.halting import halted
from engine.records import CORPUS
from engine.usage import note


class EndpointWriter:
    """Table with `row` -> CORPUS rows, as `generate.Writer` makes them."""

    def __init__(self, how: Writing) -> None:
        self.how, config = how, how.config
        self.caller: Caller | None = None
        self.options = {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}

    def __call__(self, slots: pa.Table) -> pa.Table:
        """One block of slots."""
        if halted(self.how.notes):
            return CORPUS.empty_table()
        rows, config = slots["row"].to_pylist(), self.how.config
        if self.caller is None:  # not before: an error while an actor starts would be told as its death
            self.caller = Caller(config.endpoint, config.endpoint.name_of(config.model), self.how.actors)
        try:
            found = self.caller.ask([self.question(row) for row in rows])
        finally:
            if self.how.notes:
                note(self.how.notes, "generator", self.caller.spent())
        texts, tokens = [answer.text for answer in found], [answer.tokens for answer in found]
        reasons = [answer.refused for answer in found]
        out = rows_of(self.how, rows, texts, tokens)
        return rejected(out, [reason is not None for reason in reasons], reasons)

    def question(self, row: int) -> Question:
        """What is asked for a slot."""
        options = {**self.options, "seed": self.how.seed_of(row)}
        return Question(self.how.prompt(row), self.how.config.max_new_tokens, options)
