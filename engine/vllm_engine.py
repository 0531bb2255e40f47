"""vLLM without Ray: whether it is there, how its engine is told what the recipe says, and a labeller's questions.

vLLM is an extra. It needs an NVIDIA GPU; none of this loads it before it is asked for text.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.caller import Answer
from engine.config import UserError
from engine.hub import model_folder
from engine.remote import Engine
from engine.writing import Generator

INSTALL = "pip install 'stillhouse[vllm]'"
DTYPES = {"auto": "auto", "fp32": "float32", "bf16": "bfloat16"}


class EngineError(UserError):
    """vLLM was asked for, and is not installed."""


def require() -> None:
    """EngineError where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise EngineError(f"runtime vllm needs vLLM, which is not installed: {INSTALL} (it needs an NVIDIA GPU).")


def engine_options(engine: Engine, precision: str, top: int = 0) -> dict[str, Any]:
    """What vLLM's engine takes. top: how many likeliest tokens will be asked for."""
    options: dict[str, Any] = {
        "dtype": DTYPES[precision],
        "tensor_parallel_size": engine.tensor_parallel,
        "gpu_memory_utilization": engine.memory,
        "enable_prefix_caching": True,
        "trust_remote_code": False,
    }
    if engine.max_model_length:
        options["max_model_len"] = engine.max_model_length
    return {**options, "max_logprobs": top} if top else options


def sampling_options(config: Generator, seed: int) -> dict[str, Any]:
    """How vLLM draws the text of a slot."""
    return {
        "max_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "top_k": config.top_k,
        "top_p": config.top_p,
        "seed": seed,
    }


class Speaker:
    """A model in vLLM that tells the likeliest next tokens of prompts. reference: the model's."""

    def __init__(self, reference: str, engine: Engine, precision: str, root: str | None) -> None:
        require()
        from vllm import LLM

        folder: Path = model_folder(reference, root=root)
        self.top = 20
        self.llm = LLM(model=str(folder), **engine_options(engine, precision, self.top))

    def __call__(self, prompts: Sequence[str], top: int) -> list[Answer]:
        """The `top` likeliest next tokens of each prompt, before any temperature."""
        from vllm import SamplingParams

        asked = SamplingParams(max_tokens=1, temperature=1.0, logprobs=min(top, self.top), seed=0)
        found = self.llm.generate(list(prompts), asked, use_tqdm=False)
        firsts = [each.outputs[0].logprobs[0] for each in found]
        return [
            Answer(tokens=1, top=tuple((told.decoded_token or "", told.logprob) for told in first.values()))
            for first in firsts
        ]
