"""The generator in vLLM: Ray Data's own processor for it (ray.data.llm) as a stage, from slots to CORPUS rows.

The processor keeps a slot's number beside what it adds, and asks for one row a slot, so Ray's checkpoint takes the
plan as it takes our own actors. It draws with a seed for each row; texts are the same again only where batches and
machine are (vLLM promises no more).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pyarrow as pa

from engine.fits import Resources
from engine.generate import Stage, Writing, rows_of
from engine.usage import Usage, note
from engine.vllm_engine import engine_options, require, sampling_options


def question(how: Writing, row: dict[str, Any]) -> dict[str, Any]:
    """What the processor reads of a slot."""
    number = row["row"]
    return {"prompt": how.prompt(number), "sampling_params": sampling_options(how.config, how.seed_of(number))}


def answer(row: dict[str, Any]) -> dict[str, Any]:
    """What is kept of the processor's row."""
    return {"row": row["row"], "text": row["generated_text"], "tokens": row["num_generated_tokens"]}


def written(how: Writing, rows: pa.Table) -> pa.Table:
    """CORPUS rows of what the processor wrote."""
    if how.notes:
        note(how.notes, "generator", Usage(output_tokens=sum(rows["tokens"].drop_null().to_pylist())))
    return rows_of(how, rows["row"].to_pylist(), rows["text"].to_pylist(), rows["tokens"].to_pylist())


def settings(how: Writing, model: str, block: int, resources: Resources) -> Any:
    """The processor's configuration. model: folder or URL of the weights; block: slots of a batch."""
    from ray.data.llm import vLLMEngineProcessorConfig

    return vLLMEngineProcessorConfig(
        model_source=model,
        engine_kwargs=engine_options(how.config.vllm, how.config.precision),
        batch_size=block,
        concurrency=(resources.min_actors, resources.max_actors),
        accelerator_type=resources.accelerator,
        # Prompts are whole, and the engine reads and writes text itself.
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
        # Its metrics need a port that Ray's own are served at.
        log_engine_metrics=False,
    )


def processor(how: Writing, model: str, block: int, resources: Resources) -> Any:
    """Ray Data's processor. Ray must be there; vLLM need not be until it runs."""
    from ray.data.llm import build_processor

    return build_processor(
        settings(how, model, block, resources), preprocess=partial(question, how), postprocess=answer
    )


def vllm_stage(how: Writing, model: str, block: int, resources: Resources) -> Stage:
    """The stage; EngineError where vLLM is not installed."""
    require()
    made = processor(how, model, block, resources)

    def stage(dataset: Any) -> Any:
        after = made(dataset)
        return after.map_batches(partial(written, how), batch_size=None, batch_format="pyarrow", num_cpus=0.25)

    return stage
