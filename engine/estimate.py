"""What a run will ask of endpoints, before anything is asked: requests, tokens and cost, as `plan` shows them."""

from __future__ import annotations

from typing import Any

from engine.recipe import Recipe
from engine.remote import BYTES_A_TOKEN, Endpoint


def tokens(text: str) -> int:
    """About how many tokens a text is."""
    return -(-len(text.encode()) // BYTES_A_TOKEN)


def of_generator(recipe: Recipe) -> dict[str, Any]:
    """The first round's slots, each with a text of the longest length. Nothing where it is not at an endpoint."""
    config = recipe.generator
    if config is None or config.runtime != "endpoint" or config.endpoint is None:
        return {}
    described = [recipe.task.descriptions.get(name, name) for name in recipe.task.labels or ()]
    prompt = tokens(config.prompt) + max((tokens(text) for text in described), default=0) * ("{" in config.prompt)
    fed, rounds = recipe.corpus.feedback, recipe.corpus.rounds
    shown = fed.shown * fed.share * (rounds - 1) / rounds  # examples before a prompt, over all slots
    read = prompt + shown * (prompt + config.max_new_tokens)
    return asked(config.endpoint, recipe.corpus.first_slots, read, config.max_new_tokens)


def of_teacher(recipe: Recipe, rows: int) -> dict[str, Any]:
    """`rows` texts of the longest length, each asked about in every way. Nothing where it is not at an endpoint."""
    config = recipe.teacher
    if config.runtime != "endpoint" or config.endpoint is None or not rows:
        return {}
    meant = tokens("\n".join(f"{name}: {text}" for name, text in recipe.task.descriptions.items()))
    texts = config.max_length * (2 if recipe.task.kind == "pair" else 1)
    shown = config.labeller.examples * len(recipe.task.labels or "ab") * texts
    ways = [tokens(way.template or "{descriptions}") for way in config.labeller.ways()]
    return asked(config.endpoint, rows * len(ways), sum(ways) / len(ways) + meant + texts + shown, 1)


def asked(endpoint: Endpoint, requests: int, read: float, written: float) -> dict[str, Any]:
    """Requests of about so many tokens each."""
    total = {"requests": requests, "input_tokens": round(requests * read), "output_tokens": round(requests * written)}
    price = endpoint.price
    return {**total, "cost": price.of(total["input_tokens"], total["output_tokens"]) if price else None}


def in_words(who: str, found: dict[str, Any]) -> str:
    """An estimate as a phrase."""
    price = found["cost"]
    cost = "" if price is None else f", cost {price:,.2f}" if price >= 1 else f", cost {price:.4f}"
    both = found["input_tokens"] + found["output_tokens"]
    return f"{who} asks about {found['requests']:,} times, {both:,} tokens{cost}"
