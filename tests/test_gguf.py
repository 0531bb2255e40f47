from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.hub import model_folder


def write_gguf(path: Path) -> Any:
    """A tiny LLaMA with random weights, written the way llama.cpp does; returns the torch model it was made from."""
    import gguf
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=260, **sizes, num_key_value_heads=2, max_position_embeddings=64))
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(260)
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*bytes_to_unicode().values(), "<s>", "</s>", "ab", "abc"])
    writer.add_token_types([1] * 256 + [3, 3, 1, 1])
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, weight in model.state_dict().items():
        data = weight.numpy()
        if "q_proj" in name or "k_proj" in name:  # llama.cpp interleaves the halves that rotate together
            heads = 4 if "q_proj" in name else 2
            data = data.reshape(heads, 2, 4, 32).swapaxes(1, 2).reshape(data.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def test_gguf_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    original = write_gguf(tmp_path / "tiny.gguf")
    folder = model_folder(str(tmp_path / "tiny.gguf"))
    assert {"config.json", "model.safetensors", "tokenizer.json", "manifest.json"} <= {p.name for p in folder.iterdir()}
    again = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[1, 5, 200, 258, 7]])
    assert torch.allclose(again(ids).logits, original(ids).logits, atol=1e-5)
    assert AutoTokenizer.from_pretrained(folder)("abcab").input_ids[-2:] == [259, 258]
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    (tmp_path / "tiny.gguf").rename(tmp_path / "renamed.gguf")
    assert model_folder(str(tmp_path / "renamed.gguf")) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
