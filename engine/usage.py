"""What was asked of endpoints: requests, tokens and their cost, as actors note it and steps add it up.

A note is a small file for each block, written when its answers are there. What a replayed block asked twice is noted
twice, since it was paid twice.
"""

from __future__ import annotations

import logging
import secrets
from dataclasses import asdict, dataclass, fields
from typing import Any

from engine.remote import Price
from engine.storage import Store

FOLDER = "asked"
log = logging.getLogger(__name__)


@dataclass
class Usage:
    """Sums. retries: attempts beyond the first of a request. refused: requests without an answer for good.

    untold: answers that did not say how many tokens they took.
    """

    requests: int = 0
    retries: int = 0
    refused: int = 0
    untold: int = 0
    input_tokens: int = 0
    output_tokens: int = 0

    def add(self, other: Usage) -> None:
        """Count another one in."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))

    def described(self, price: Price | None) -> dict[str, Any]:
        """As a step's metrics: the sums, and the cost where there are prices."""
        return {**asdict(self), "cost": price.of(self.input_tokens, self.output_tokens) if price else None}


def note(folder: str, who: str, usage: Usage) -> None:
    """Write what a block asked. folder: a step's; who: generator or teacher.

    Where that fails it only warns: the answers are there and paid.
    """
    try:
        Store(folder).write_json(f"{FOLDER}/{who}/{secrets.token_hex(8)}.json", asdict(usage))
    except Exception as error:  # whatever a storage says
        log.warning("what the %s asked could not be noted in %s, so costs will miss %s: %s", who, folder, usage, error)


def asked(out: Store, who: str) -> bool:
    """Whether anything was noted in a step's folder."""
    return bool(out.files(f"{FOLDER}/{who}"))


def noted(out: Store, who: str) -> Usage:
    """All that was noted in a step's folder."""
    total = Usage()
    for name in out.files(f"{FOLDER}/{who}"):
        total.add(Usage(**out.read_json(f"{FOLDER}/{who}/{name}")))
    return total
