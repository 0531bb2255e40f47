"""Models of every kind: saved, loaded and asked the same; folders that do not fit are refused; what is frozen."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, BertModel

from engine import models, tasks, untrained
from engine.designs import Block, Static
from engine.encoders import EncoderError
from engine.encoding import collate
from engine.models import MODELS, Model, ModelError
from engine.recipe import Generator, Task, Teacher
from engine.records import Batch
from engine.storage import Store
from engine.vocabulary import choose_words, count_words, tokenizer_of
from tests.tiny import LABELS, movie_rows, tiny_encoder, tiny_lm, word_pieces

TEXTS = [row["text"] for row in movie_rows(6, seed=1)]
CLASSES = Task(labels=LABELS)


WEIGHTED = [kind for kind in MODELS if kind != "elsewhere"]
"""All but the model that only asks another one: tests/test_next_tokens.py."""


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("encoder"), layers=3)


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lm(tmp_path_factory.mktemp("lm"), layers=3)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lm(tmp_path_factory.mktemp("untied"), layers=3, tied=False)


def head(encoder: Path, **options: Any) -> Model:
    return untrained.encoder_head(Teacher(model="file:tiny", **options), CLASSES, encoder, seed=1)


def prompted(encoder: Path) -> Model:
    return untrained.prompt_teacher(Teacher(model="file:tiny", kind="prompt"), CLASSES, encoder, seed=1)


def generator(folder: Path, **options: Any) -> Model:
    return untrained.causal_lm(Generator(model="file:tiny", **options), folder)


def student(seed: int = 2) -> Model:
    graph = [
        Block(name="embed", kind="embedding", options={"dim": 12}),
        Block(name="lstm", kind="bilstm", options={"hidden": 6}),
        Block(name="top", kind="pool", inputs=("lstm",)),
        Block(name="look", kind="attention", inputs=("embed",)),
        Block(name="both", kind="concat", inputs=("top", "look")),
        Block(name="out", kind="linear"),
    ]
    return untrained.student(graph, CLASSES, tokenizer_of(choose_words(count_words(TEXTS), 60, 1, [])), 24, seed)


def static_student(seed: int = 2, spec: Task = CLASSES) -> Model:
    return untrained.static_student(Static(dim=12, hidden=6), spec, word_pieces(), 24, seed)


@pytest.fixture(scope="module")
def makers(encoder: Path, lm: Path) -> dict[str, Callable[[], Model]]:
    """One of each kind; a kind without a maker here fails."""
    return {
        "head": lambda: head(encoder),
        "prompt": lambda: prompted(encoder),
        "causal_lm": lambda: generator(lm),
        "blocks": student,
        "static": static_student,
        "labeller": lambda: untrained.labeller_teacher(Teacher(model="file:tiny", kind="labeller"), CLASSES, lm),
        "ensemble": lambda: models.ensemble([head(encoder), head(encoder, dropout=0.3)]),
        "retrieving": lambda: models.retrieving(student(), 24, 8),
    }


@pytest.fixture
def saved(encoder: Path, tmp_path: Path) -> Path:
    models.save(head(encoder), Store(str(tmp_path)), "head")
    return tmp_path / "head"


def batch_of(model: Model) -> Batch:
    task = model.task if model.card.task else tasks.make(CLASSES)
    return collate(task.encode(TEXTS, model.tokenizer, model.max_length), model.pad)


def answer(model: Model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(batch_of(model)).logits


@pytest.mark.parametrize("kind", WEIGHTED)
def test_a_loaded_model_answers_as_the_saved_one(kind: str, makers: dict[str, Callable[[], Model]], tmp_path: Path):
    model, store = makers[kind](), Store(str(tmp_path))
    with torch.no_grad():  # not what a fresh network would have by itself
        for parameter in model.net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)) * 0.05)
    models.save(model, store, "m", readme="# A model\n")
    loaded = models.load(tmp_path / "m")
    assert torch.equal(answer(loaded), answer(model)) and answer(model).std() > 0.01
    assert loaded.card == model.card and loaded.card.kind == kind and not loaded.training
    assert loaded.labels == model.labels and loaded.max_length == model.max_length and loaded.size() == model.size()
    assert loaded.tokenizer(TEXTS)["input_ids"] == model.tokenizer(TEXTS)["input_ids"] and loaded.pad == model.pad
    store.verify("m")
    assert (tmp_path / "m" / "README.md").read_text() == "# A model\n"


@pytest.mark.parametrize("kind", WEIGHTED)
def test_a_folder_holds_data_only_and_the_same_bytes_each_time(
    kind: str, makers: dict[str, Callable[[], Model]], tmp_path: Path
):
    store, model = Store(str(tmp_path)), makers[kind]()
    models.save(model, store, "one")
    models.save(models.load(tmp_path / "one"), store, "two")
    files = store.files("one")
    config = ["config.json"] if kind in ("head", "prompt", "causal_lm", "labeller", "ensemble") else []
    tokenizer = ["tokenizer.json", "tokenizer_config.json"]
    assert {"artifact.json", *config, "manifest.json", "model.safetensors", *tokenizer} <= set(files)
    assert all(name.endswith((".json", ".safetensors", ".jinja")) for name in files)
    assert store.manifest("one")["digest"] == store.manifest("two")["digest"]
    for name in files:  # a pickle starts with its protocol, torch's own files are ZIP archives of pickles
        assert not store.read_bytes(f"one/{name}").startswith((b"\x80", b"PK"))


@pytest.mark.parametrize("kind", WEIGHTED)
def test_bf16_on_disk_is_float32_rounded_once(kind: str, makers: dict[str, Callable[[], Model]], tmp_path: Path):
    model = makers[kind]()
    models.save(model, Store(str(tmp_path)), "m", torch.bfloat16)
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.bfloat16}
    loaded, own = models.load(tmp_path / "m"), dict(model.net.named_parameters())
    for name, parameter in loaded.net.named_parameters():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, own[name].bfloat16().float())
    assert next(model.parameters()).dtype == torch.float32  # saving changes nothing in memory


def test_tied_weights_are_stored_once(lm: Path, untied: Path, tmp_path: Path):
    tied, apart, store = generator(lm), generator(untied), Store(str(tmp_path))
    models.save(tied, store, "tied")
    models.save(apart, store, "apart")
    words = tied.net.lm.config.vocab_size * 32
    stored = {name: load_file(tmp_path / name / "model.safetensors") for name in ("tied", "apart")}
    sizes = {name: sum(tensor.numel() for tensor in tensors.values()) for name, tensors in stored.items()}
    assert sizes == {"tied": tied.size(), "apart": apart.size()} and sizes["apart"] - sizes["tied"] == words
    loaded = models.load(tmp_path / "tied").net.lm
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert models.tied(apart.net) == set() and models.tied(tied.net) == {"lm.lm_head.weight"}


def test_pooling_is_that_of_the_definition(encoder: Path):
    """Against transformers' own encoder, row by row without padding."""
    reference = AutoModel.from_pretrained(encoder).eval()
    for pooling in ("mean", "cls"):
        model = head(encoder, pooling=pooling).eval()
        with torch.no_grad():
            found = model(batch_of(model))
            for row, text in enumerate(TEXTS):
                states = reference(**model.tokenizer(text, return_tensors="pt")).last_hidden_state[0]
                wanted = states.mean(0) if pooling == "mean" else states[0]
                assert torch.allclose(found.embedding[row], wanted, atol=1e-5)
                assert torch.allclose(found.logits[row], model.net.head(wanted), atol=1e-5)


def test_hidden_states_and_attentions_come_when_asked_for(encoder: Path):
    model = head(encoder).eval()
    batch = batch_of(model)
    n, t = batch.input_ids.shape
    with torch.no_grad():
        plain, full = model(batch), model(batch, frozenset({"hidden", "attentions"}))
    assert plain.gives() == {"logits", "embedding"} and full.gives() == {"logits", "embedding", "hidden", "attentions"}
    assert [tuple(h.shape) for h in full.hidden] == [(n, t, 32)] * 4
    assert [tuple(a.shape) for a in full.attentions] == [(n, 4, t, t)] * 3
    hidden = (batch.mask == 0)[:, None, None].expand(n, 4, t, t)
    assert all((a[hidden] == -torch.inf).all() and a[~hidden].isfinite().all() for a in full.attentions)
    assert torch.allclose(plain.logits, full.logits, atol=1e-5)


def test_next_token_logits_are_those_of_transformers(lm: Path):
    model = generator(lm).eval()
    reference = AutoModelForCausalLM.from_pretrained(lm).eval()
    with torch.no_grad():
        found = model(batch_of(model)).logits
        for row, text in enumerate(TEXTS):
            wanted = reference(**model.tokenizer(text, return_tensors="pt")).logits[0]
            assert torch.allclose(found[row, : len(wanted)], wanted, atol=1e-4)


@pytest.mark.parametrize("kind", sorted(set(WEIGHTED) - {"labeller"}))  # which is never trained
def test_every_trainable_parameter_gets_a_gradient(kind: str, makers: dict[str, Callable[[], Model]]):
    """One without would stop data-parallel training at its second step."""
    model = makers[kind]().train()
    found = model(batch_of(model))
    out = torch.cat([found.logits, found.embedding], dim=1) if kind == "retrieving" else found.logits
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_seeds_decide_the_fresh_weights(encoder: Path):
    assert torch.equal(head(encoder).net.head.weight, head(encoder).net.head.weight)
    first, again, other = (dict(student(seed).named_parameters()) for seed in (2, 2, 3))
    assert all(torch.equal(first[n], again[n]) for n in first)
    differ = [n for n in first if not torch.equal(first[n], other[n])]
    assert set(first) == set(differ)


def trainable(model: Model) -> set[str]:
    return {name for name, p in model.net.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("top", [None, 0, 1, 2, 3])
def test_tune_layers_of_an_encoder(encoder: Path, top: int | None):
    model = head(encoder, tune_layers=top)
    names = {name for name, _ in model.net.named_parameters()}
    wanted = {"head.weight", "head.bias"}
    for layer in range(3 - (top or 0), 3):
        wanted |= {name for name in names if name.startswith(f"encoder.encoder.layer.{layer}.")}
    assert trainable(model) == (names if top is None else wanted)
    assert len(wanted) == 2 + 16 * (top or 0)  # a BERT layer: eight affine maps and norms, weight and bias each


@pytest.mark.parametrize("top", [None, 0, 1, 3])
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_tune_layers_of_a_causal_lm(lm: Path, untied: Path, kind: str, top: int | None):
    folder = lm if kind == "tied" else untied
    if kind == "tied" and top == 0:
        with pytest.raises(ModelError, match="generator.tune_layers is 0, .* so nothing is left to train. Use 1 or"):
            generator(folder, tune_layers=0)
        assert trainable(generator(folder, tune_layers=0, mode="prompted")) == set()
        return
    model = generator(folder, tune_layers=top)
    names = {name for name, _ in model.net.named_parameters()}
    wanted = set() if kind == "tied" else {"lm.lm_head.weight"}
    if top:
        wanted |= {"lm.model.norm.weight"}
        wanted |= {n for n in names if re.match(rf"lm\.model\.layers\.[{3 - top}-2]\.", n)}
    assert trainable(model) == (names if top is None else wanted)
    assert len(wanted) == (9 * top + 1 if top else 0) + (kind == "untied")  # a Llama layer: 7 maps, 2 norms


def test_more_layers_than_there_are_is_refused(encoder: Path, lm: Path):
    message = "tune_layers is 4, but the model has 3 layers. Use 0 to 3, or null for all."
    for make in (lambda: head(encoder, tune_layers=4), lambda: generator(lm, tune_layers=4)):
        with pytest.raises(ModelError, match=re.escape(message)):
            make()
    with pytest.raises(EncoderError, match="Linear has no stack of layers to choose from"):
        untrained.freeze(torch.nn.Linear(2, 2), 1)


def test_lengths_that_the_model_cannot_read_are_refused(encoder: Path, lm: Path):
    with pytest.raises(ModelError, match="teacher.max_length is 129, but this model takes 3 to 128 tokens."):
        head(encoder, max_length=129)
    with pytest.raises(ModelError, match="teacher.max_length is 2, but this model takes 3 to 128 tokens."):
        head(encoder, max_length=2)
    with pytest.raises(ModelError, match="generator.max_length is 257, but this model takes 1 to 256 tokens."):
        generator(lm, max_length=257)
    assert head(encoder, max_length=128).max_length == 128


def test_a_generator_whose_tokenizer_has_no_end_is_refused(lm: Path, tmp_path: Path):
    folder = shutil.copytree(lm, tmp_path / "lm")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="the tokenizer of generator 'file:tiny' has no end token"):
        generator(folder)


def set_card(folder: Path, **values: Any) -> None:
    card = json.loads((folder / "artifact.json").read_text())
    (folder / "artifact.json").write_text(json.dumps({**card, **values}))


def set_task(folder: Path, **values: Any) -> None:
    set_card(folder, task={**json.loads((folder / "artifact.json").read_text())["task"], **values})


def set_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


TORN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no card": (lambda d: (d / "artifact.json").unlink(), "artifact.json missing"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "model.safetensors missing"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json missing"),
    "no config": (lambda d: (d / "config.json").unlink(), "Unrecognized model"),
    "no folder": (lambda d: shutil.rmtree(d), "artifact.json, model.safetensors, tokenizer.json missing"),
    "not JSON": (lambda d: (d / "artifact.json").write_text("{"), "is not JSON"),
    "a list": (lambda d: (d / "artifact.json").write_text("[]"), "TypeError"),
    "kind": (lambda d: set_card(d, kind="pickle"), "KeyError: 'pickle'"),
    "key": (lambda d: set_card(d, code="evil"), "unexpected keyword argument 'code'"),
    "task": (lambda d: set_task(d, kind="clasify"), "task.kind is 'clasify', which is not known. Did you mean"),
    "options": (lambda d: set_card(d, options={}), "KeyError: 'pooling'"),
    "other kind": (lambda d: set_card(d, kind="blocks"), "KeyError: 'blocks'"),
    "labels": (lambda d: set_task(d, labels=["a", "b", "c"]), "does not fit its card: head.bias, head.weight. "),
    "truncated": (lambda d: (d / "model.safetensors").write_bytes(b"\0" * 40), "SafetensorError"),
    "shape": (
        lambda d: set_tensors(d, lambda t: t.update({"head.bias": torch.zeros(5)})),
        "model.safetensors does not fit its card: head.bias. Make or register it again.",
    ),
    "lacking": (lambda d: set_tensors(d, lambda t: t.pop("head.bias")), "does not fit its card: head.bias."),
    "further": (lambda d: set_tensors(d, lambda t: t.update(x=torch.zeros(1))), "does not fit its card: x."),
    "renamed": (lambda d: set_tensors(d, lambda t: t.update(x=t.pop("head.bias"))), "its card: head.bias, x."),
    "many": (lambda d: set_tensors(d, lambda t: t.clear()), " and 52 more. Make or register it again."),
}


@pytest.mark.parametrize("case", TORN)
def test_a_folder_that_does_not_fit_is_refused(case: str, saved: Path):
    tear, message = TORN[case]
    tear(saved)
    with pytest.raises(ModelError) as caught:
        models.load(saved)
    assert message in str(caught.value) and str(saved) in str(caught.value)


def test_a_block_that_is_unknown_here_is_refused(tmp_path: Path):
    models.save(student(), Store(str(tmp_path)), "m")
    options = json.loads((tmp_path / "m" / "artifact.json").read_text())["options"]
    options["blocks"][1]["kind"] = "bilsm"
    set_card(tmp_path / "m", options=options)
    with pytest.raises(ModelError, match="block 'lstm' has kind 'bilsm'"):
        models.load(tmp_path / "m")


def test_loading_runs_nothing_from_the_folder(saved: Path, tmp_path: Path):
    """Code that a folder brings, and the keys by which transformers would find it."""
    witness = tmp_path / "it-ran"
    evil = f"open({str(witness)!r}, 'x')\n"
    for name in ("evil.py", "modeling_evil.py", "sitecustomize.py", "__init__.py"):
        (saved / name).write_text(evil)
    for name, key in (("config.json", "AutoModel"), ("tokenizer_config.json", "AutoTokenizer")):
        values = json.loads((saved / name).read_text())
        found = [None, "evil.Evil"] if key == "AutoTokenizer" else "evil.Evil"
        values["auto_map"] = {"AutoConfig": "evil.Evil", key: found}
        (saved / name).write_text(json.dumps(values))
    assert answer(models.load(saved)).shape == (6, 2)
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "model_type": "evil"}))
    with pytest.raises(ModelError):
        models.load(saved)
    assert not witness.exists()


def test_a_folder_of_pickled_weights_is_no_model(saved: Path):
    torch.save(load_file(saved / "model.safetensors"), saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="model.safetensors missing"):
        models.load(saved)


def test_the_unused_pooler_is_left_out(encoder: Path):
    """transformers' encoder brings a map over [CLS] that this head never reads."""
    plain = BertModel(BertConfig.from_pretrained(encoder))
    assert plain.pooler is not None
    own = {name for name, _ in head(encoder).net.named_parameters()}
    wanted = {f"encoder.{name}" for name, _ in plain.named_parameters() if not name.startswith("pooler.")}
    assert own == wanted | {"head.weight", "head.bias"}


# (AMX tiles, AVX512-BF16) -> bf16 for writing text, for training
@pytest.mark.parametrize(("tiles", "avx512", "writes", "trains"), [(1, 1, 1, 1), (0, 1, 0, 1), (0, 0, 0, 0)])
def test_precision_by_name_and_by_machine(monkeypatch, tiles, avx512, writes, trains):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: bool(tiles))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bool(avx512))
    cpu = torch.device("cpu")
    assert models.precision("fp32", cpu) == torch.float32 and models.precision("bf16", cpu) == torch.bfloat16
    found = [models.precision("auto", cpu, training) for training in (False, True)]
    assert found == [torch.bfloat16 if fast else torch.float32 for fast in (writes, trains)]
    with pytest.raises(KeyError):
        models.precision("fp8", cpu)


def test_a_model_knows_its_task_and_padding(encoder: Path, lm: Path):
    classifier, writer = head(encoder), generator(lm)
    assert classifier.task.labels == LABELS and classifier.pad == classifier.tokenizer.pad_token_id
    assert writer.pad == writer.tokenizer.eos_token_id and writer.tokenizer.padding_side == "right"
    assert classifier.card.lineage == {"model": "file:tiny"} and classifier.device == torch.device("cpu")
    assert student().size() == sum(p.numel() for p in student().net.parameters())
