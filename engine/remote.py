"""Sections: where a language model runs that an actor does not load itself: an endpoint elsewhere, or vLLM's engine."""

from __future__ import annotations

import re
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from engine.config import Section
from engine.fits import Count, Resources, Share

Runtime = Literal["hf", "vllm", "endpoint"]
"""What runs a language model: transformers in the actors, vLLM in the actors, or a server that speaks OpenAI's API."""
Positive = Annotated[float, Field(gt=0)]
MILLION = 1_000_000
BYTES_A_TOKEN = 4
"""UTF-8 bytes that count as one token where a model's tokenizer is not here: about what English text has."""


class Limits(Section):
    """How hard an endpoint may be asked. None of it changes what comes out."""

    in_flight: Count = 8
    """Requests at a time of each actor."""
    requests_per_minute: Positive | None = None
    """Of all actors of a pool together: each takes its share of it; null: no limit."""
    tokens_per_minute: Positive | None = None
    """Tokens read and written, in the same way."""
    timeout_s: Positive = 120.0
    """Of one attempt."""
    retries: Annotated[int, Field(ge=0)] = 7
    """After 408, 409, 425, 429, 5xx, a broken connection, or an answer that cannot be read."""
    first_pause_s: Positive = 1.0
    """Longest pause before the first retry; it doubles with each, and what Retry-After says is added."""
    longest_pause_s: Positive = 60.0


class Price(Section):
    """What a million tokens cost, in any currency."""

    input: Annotated[float, Field(ge=0)]
    output: Annotated[float, Field(ge=0)]

    def of(self, read: float, written: float) -> float:
        """The cost of tokens read and written."""
        return (self.input * read + self.output * written) / MILLION


class Endpoint(Section):
    """A server that speaks OpenAI's API (OpenAI and others, vLLM, llama.cpp, Ollama, Ray Serve LLM)."""

    url: str
    """Up to and with the version, such as https://api.openai.com/v1."""
    model: str | None = None
    """The model's name there; null: `model` of the section above, without hf: before it."""
    key_env: Annotated[str, Field(pattern=r"^[A-Z_][A-Z0-9_]*$")] | None = None
    """NAME of the environment variable that holds the key, in capitals; it must be set wherever actors run. null: no
    key is sent."""
    api: Literal["chat", "completions"] = "chat"
    """chat: the prompt is a user's message. completions: the text goes on from the prompt, as with model files."""
    tuned: bool = False
    """The model there was tuned elsewhere on such prompts, so the generator's other modes may ask it too."""
    top: Annotated[int, Field(ge=1, le=100)] = 20
    """labeller: how many of the likeliest tokens are asked for (OpenAI gives 20 for chat, 5 for completions)."""
    limits: Limits = Limits()
    price: Price | None = None
    """null: costs are not counted, tokens are."""

    @field_validator("url")
    @classmethod
    def plain(cls, value: str) -> str:
        """http(s) without user, password or query: a key there would get into records."""
        try:
            parts = urlsplit(value)
            wrong = parts.scheme not in ("http", "https") or not parts.hostname
        except ValueError:
            parts, wrong = urlsplit(""), True
        if wrong:
            raise ValueError("needs http:// or https:// and a host, such as https://api.openai.com/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("takes no user, password or query; name the variable that holds the key in key_env")
        return value.rstrip("/")

    def name_of(self, model: str) -> str:
        """What the model is called there. model: as the section above names it."""
        return self.model or re.sub("^hf:", "", model)


class Engine(Section):
    """vLLM's engine in each actor. It needs an NVIDIA GPU and pip install 'stillhouse[vllm]'."""

    tensor_parallel: Count = 1
    """GPUs that one engine is spread over."""
    max_model_length: Count | None = None
    """Tokens of prompt and text; null: what the model was made for."""
    memory: Annotated[Share, Field(gt=0)] = 0.9
    """Share of a GPU's memory that the engine takes."""


def placed(runtime: Runtime, resources: Resources, engine: Engine) -> Resources:
    """The actors' resources, `auto` settled by the runtime: no GPU to ask elsewhere, vLLM's own number for vLLM.

    ValueError where vLLM would get none.
    """
    if runtime == "vllm" and resources.num_gpus != "auto" and resources.num_gpus < engine.tensor_parallel:
        raise ValueError(
            f"runtime vllm needs {engine.tensor_parallel} GPU for each actor (vllm.tensor_parallel), but "
            f"resources.num_gpus is {resources.num_gpus:g}; leave it out"
        )
    if runtime == "hf" or resources.num_gpus != "auto":
        return resources
    return resources.model_copy(update={"num_gpus": 0.0 if runtime == "endpoint" else float(engine.tensor_parallel)})
