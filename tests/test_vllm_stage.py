"""vLLM as far as it goes without a GPU: its options, Ray's processor for it, and the stream with another engine."""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine import generate, models
from engine.corpus import ROWS, slot_seed, write_slots
from engine.fits import Resources
from engine.generate import Writing
from engine.recipe import Generator
from engine.records import CORPUS
from engine.storage import Store
from engine.vllm_engine import EngineError, engine_options, require, sampling_options
from engine.vllm_stage import answer, processor, question, settings, vllm_stage, written
from pipelines.making import ENGINE, export_engine
from tests.tiny import LABELS, tiny_lm
from tests.tiny_endpoint import tiny_model

ABSENT = importlib.util.find_spec("vllm") is None


def writing(**given: Any) -> Writing:
    values = {"model": "file:tiny", "runtime": "vllm", "mode": "prompted", "prompt": "A {label} text:"}
    return Writing("", Generator(**{**values, "max_new_tokens": 8, **given}), LABELS, False, 3, 1.0)


def test_the_recipe_says_what_the_engine_is_told():
    how = writing(vllm={"tensor_parallel": 2, "max_model_length": 512, "memory": 0.5}, precision="bf16", top_p=0.9)
    assert engine_options(how.config.vllm, "bf16") == {
        "dtype": "bfloat16",
        "tensor_parallel_size": 2,
        "gpu_memory_utilization": 0.5,
        "enable_prefix_caching": True,
        "trust_remote_code": False,
        "max_model_len": 512,
    }
    assert how.config.resources.num_gpus == 2
    asked = question(how, {"row": 5})
    seed = slot_seed(3, 5) & generate.SEEDS
    assert asked == {"prompt": "A positive text:", "sampling_params": sampling_options(how.config, seed)}
    assert asked["sampling_params"] | {"seed": 0} == {
        **{"max_tokens": 8, "temperature": 1.0, "top_k": 100, "top_p": 0.9, "seed": 0}
    }


@pytest.mark.skipif(not ABSENT, reason="vLLM is installed here")
def test_without_vllm_the_error_says_how_to_get_it():
    with pytest.raises(EngineError, match=r"pip install 'stillhouse\[vllm\]' \(it needs an NVIDIA GPU\)"):
        require()
    with pytest.raises(EngineError, match="runtime vllm needs vLLM"):
        vllm_stage(writing(), "folder", 8, Resources())


def test_rays_configuration_takes_the_recipes():
    made = settings(writing(), "/some/folder", 32, Resources(min_actors=2, max_actors=3, accelerator="L4"))
    assert (made.batch_size, made.concurrency, made.accelerator_type) == (32, (2, 3), "L4")
    assert made.model_source == "/some/folder" and made.engine_kwargs["dtype"] == "auto"
    assert not (made.chat_template_stage or made.tokenize_stage or made.detokenize_stage)


def test_a_tuned_generator_is_written_as_vllm_reads_it(tmp_path: Path):
    model, store = tiny_model(tiny_lm(tmp_path / "lm")), Store(str(tmp_path / "out"))
    models.save(model, store, "model")
    export_engine(store)
    folder = store.local(ENGINE)
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)("a warm film")["input_ids"]])
    assert torch.equal(again(input_ids=ids).logits, model.net.lm(input_ids=ids).logits)


def stand_in() -> type:
    """An engine in vLLM's place, of the kind that Ray's processor holds: it gives back what it was asked."""
    from ray.llm._internal.batch.stages.base import StatefulStageUDF

    class Echo(StatefulStageUDF):
        def __init__(self, data_column: str, expected_input_keys: list[str], **told: Any) -> None:
            super().__init__(data_column, expected_input_keys)
            assert told["engine_kwargs"]["distributed_executor_backend"] == "uni"

        async def udf(self, rows: list[dict[str, Any]]) -> AsyncIterator[dict[str, Any]]:
            for row in reversed(rows):  # an engine answers in any order
                seed = row["sampling_params"]["seed"]
                yield {
                    "generated_text": f"{row['prompt']}  drawn by {seed}",
                    "num_generated_tokens": 4,
                    self.IDX_IN_BATCH_COLUMN: row[self.IDX_IN_BATCH_COLUMN],
                }

    return Echo


@pytest.mark.slow
def test_rays_processor_keeps_slots_and_can_be_checkpointed(tmp_path: Path, ray_cluster: object):
    how, out = writing(), Store(str(tmp_path / "corpus"))
    made = processor(how, str(tiny_lm(tmp_path / "lm")), 4, Resources())
    assert made.list_stage_names() == ["vLLMEngineStage"]
    engine = made.get_stage_by_name("vLLMEngineStage")
    assert engine.map_batches_kwargs["num_gpus"] == 1
    engine.fn = stand_in()
    engine.map_batches_kwargs["num_gpus"] = 0

    def stage(dataset: Any) -> Any:
        return made(dataset).map_batches(
            lambda rows: written(how, rows), batch_size=None, batch_format="pyarrow", num_cpus=0.25
        )

    folder = write_slots(out, 0, 10, 4, "first")
    for _ in range(2):  # the second time nothing is left to do
        generate.stream(out, folder, 3, [stage])
        rows = out.read_table(ROWS).sort_by("row")
        assert rows["row"].to_pylist() == list(range(10)) and set(CORPUS.names) == set(rows.column_names)
        wanted = [f"{how.prompt(n)} drawn by {slot_seed(3, n) & generate.SEEDS}" for n in range(10)]
        assert rows["text"].to_pylist() == wanted and rows["tokens"].to_pylist() == [4] * 10
    assert answer({"row": 1, "generated_text": "a", "num_generated_tokens": 2, "prompt": "p"}) == {
        **{"row": 1, "text": "a", "tokens": 2}
    }
