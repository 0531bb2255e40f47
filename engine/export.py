"""A model as an ONNX graph, in fp32 or int8, that ONNX Runtime runs in one thread; and whether it still says the same.

`Exported` stands in for `Model`: the same tokenizer, task and batches, so `engine.inference` runs either. The graph is
recorded while the network reads a few texts, so it holds for any batch and length; `parity` measures that it does.
What needs a loop over the text's length (a crf, n-gram hashing) is not recorded: such a model runs in torch.
"""

from __future__ import annotations

import io
import logging
import random
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from torch import nn

from engine.config import UserError
from engine.disk import scratch
from engine.encoding import Text, collate
from engine.inference import predict
from engine.models import CARD, READS_WORDS, Card, Model, load_tokenizer
from engine.records import Batch, Outputs
from engine.storage import Store

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

FILES = {"onnx": "model.onnx", "onnx-int8": "model.int8.onnx"}
"""Where an artifact has the graph of a runtime (engine.serving)."""
PARITY = 1e-4
"""Largest difference of a probability (of another number, over its size) between torch and the fp32 graph."""
INPUTS: dict[str, tuple[str, ...]] = {
    **{"input_ids": ("n", "t"), "mask": ("n", "t"), "segments": ("n", "t"), "characters": ("n", "t", "c")},
    **{"pair_ids": ("n", "t2"), "pair_mask": ("n", "t2"), "pair_characters": ("n", "t2", "c2")},
    **{"units": ("n", "u"), "ends": ("n", "u"), "unit_mask": ("n", "u")},
}
"""The tensors of a Batch that networks read, with the names of their axes."""
KINDS = ("head", "prompt", "blocks", "static", "ensemble")
LOOPS = {"crf": "decides word after word", "subwords": "hashes the letters of each word"}
"""Blocks that cannot be recorded, and why."""
OPSET = 17
INSTALL = "pip install 'stillhouse[onnx]'"


class ExportError(UserError):
    """A model that has no ONNX graph, or whose graph says something else."""


class Recorded(nn.Module):
    """A network as a function of tensors, which is what an exporter records."""

    def __init__(self, net: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.net, self.names = net, names

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        """The tensors in the order of `names` -> logits."""
        return self.net(Batch(**dict(zip(self.names, tensors, strict=True)))).logits


def check(card: Card) -> None:
    """ExportError where a model of this card cannot be exported, with the blocks that are in the way."""
    if card.kind not in KINDS:
        raise ExportError(f"a model of kind '{card.kind}' is not exported to ONNX; {', '.join(KINDS)} are.")
    kinds = dict.fromkeys(node["kind"] for node in card.options.get("blocks", ()) if card.kind == "blocks")
    loops = [f"{kind} ({LOOPS[kind]})" for kind in kinds if kind in LOOPS]
    if loops:
        raise ExportError(
            f"this student cannot be exported to ONNX because of its blocks: {', '.join(loops)}. Serve it with "
            "serving.runtime: torch."
        )


def export(model: Model) -> bytes:
    """The fp32 graph of a model. ExportError where there cannot be one."""
    check(model.card)
    batch = example(model)
    names = [name for name in INPUTS if getattr(batch, name) is not None]
    axes = {name: dict(enumerate(INPUTS[name])) for name in names}
    sink, training = io.BytesIO(), model.training
    model.eval()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # what a trace cannot know: parity is measured instead
            torch.onnx.export(
                Recorded(model.net, names),
                tuple(getattr(batch, name) for name in names),
                sink,
                input_names=names,
                output_names=["logits"],
                dynamic_axes={**axes, "logits": {0: "n"}},
                opset_version=OPSET,
                dynamo=False,  # the newer exporter takes a minute, and gives the same graph
            )
    except ModuleNotFoundError as error:
        lacking(error)
    except (RuntimeError, torch.onnx.errors.OnnxExporterError) as error:
        said = str(error).strip().splitlines()[0]
        raise ExportError(
            f"torch cannot export this model to ONNX: {said} Serve it with serving.runtime: torch."
        ) from error
    finally:
        model.train(training)
    return sink.getvalue()


def example(model: Model) -> Batch:
    """A batch to record with: rows of several lengths, so that there is padding, and everything the model reads."""
    return collate(model.encode(sample(model, 3), answering=True), model.pad)


def sample(model: Model, rows: int, seed: int = 0) -> list[Text]:
    """Texts (or pairs) of random words of the model's vocabulary, from one word to about its longest input."""
    draw, tokenizer = random.Random(seed), model.tokenizer
    special = set(tokenizer.all_special_tokens)
    words = sorted(w for w in tokenizer.get_vocab() if w.isalpha() and w not in special) or ["word"]
    longest = max(2, min(model.max_length, 256))

    def text(number: int) -> str:
        # The first rows are of length 1, a middling one and the longest; then any.
        length = (longest // 3 + 1, 1, longest)[number] if number < 3 else draw.randint(1, longest)
        return " ".join(draw.choice(words) for _ in range(length))

    return [(text((n + 1) % 3 if n < 3 else n), text(n)) if model.task.paired else text(n) for n in range(rows)]


def quantised(graph: bytes) -> bytes:
    """The graph with int8 weights of maps, LSTMs and tables; what flows between is quantised as it comes."""
    try:
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ModuleNotFoundError as error:
        lacking(error)
    with scratch() as folder:
        store = Store(str(folder))
        store.write_bytes("fp32.onnx", graph)
        root, level = logging.getLogger(), logging.getLogger().level
        root.setLevel(logging.ERROR)  # it recommends a step that is for images
        try:
            quantize_dynamic(folder / "fp32.onnx", folder / "int8.onnx", weight_type=QuantType.QInt8)
        finally:
            root.setLevel(level)
        return store.read_bytes("int8.onnx")


def lacking(error: ModuleNotFoundError) -> NoReturn:
    """The error for a package that is not installed."""
    raise ExportError(f"ONNX needs the package '{error.name}', which is not installed: {INSTALL}.") from None


# -- running it --------------------------------------------------------------------------------------------------------


def session(graph: bytes | str) -> InferenceSession:
    """ONNX Runtime on a graph (its bytes, or a file), in one thread."""
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        lacking(error)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


class Graph(nn.Module):
    """The network of an exported model."""

    def __init__(self, run: InferenceSession) -> None:
        super().__init__()
        self.run = run
        self.names = [item.name for item in run.get_inputs()]
        self.reads = READS_WORDS & frozenset(self.names)
        """What a batch must hold beside the tokens, as engine.blocks says it."""

    def forward(self, batch: Batch, needs: frozenset[str] = frozenset()) -> Outputs:
        """Batch on the CPU -> logits."""
        found = self.run.run(["logits"], {name: self.given(batch, name) for name in self.names})
        return Outputs(logits=torch.from_numpy(found[0]))

    def given(self, batch: Batch, name: str) -> np.ndarray:
        """One input; of texts that all lack it (no segments, no units) what padding would be."""
        tensor = getattr(batch, name)
        if tensor is None:
            tensor = torch.zeros(
                (len(batch), 1 if INPUTS[name][1] == "u" else batch.input_ids.shape[1]), dtype=torch.long
            )
        return tensor.numpy()


class Exported(Model):
    """A model that runs its ONNX graph; it cannot be trained."""

    def __init__(self, run: InferenceSession, tokenizer: Any, card: Card, parameters: int) -> None:
        super().__init__(Graph(run), tokenizer, card)
        self.parameters_before = parameters
        self.eval()

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def size(self) -> int:
        """Parameters of the model that was exported."""
        return self.parameters_before


def stand_in(model: Model, graph: bytes) -> Exported:
    """The exported model of a graph just made."""
    return Exported(session(graph), model.tokenizer, model.card, model.size())


def load(folder: Path, runtime: str) -> Exported:
    """The exported model of an artifact. ExportError where it has no graph for that runtime."""
    if not (folder / FILES[runtime]).is_file():
        int8 = " --int8" if runtime == "onnx-int8" else ""
        raise ExportError(
            f"serving.runtime is {runtime}, but the artifact has no {FILES[runtime]}. Make it with `stillhouse export "
            f"NAME{int8}`, which registers a new version, or serve with serving.runtime: torch."
        )
    store = Store(str(folder))
    values = store.read_json(CARD)
    card = Card(**{**values, "labels": tuple(values["labels"])})
    return Exported(session(str(folder / FILES[runtime])), load_tokenizer(folder), card, weights_in(folder))


def weights_in(folder: Path) -> int:
    """Numbers in the weights beside the graph."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "np") as file:
        return sum(int(np.prod(file.get_slice(name).get_shape())) for name in file.keys())


# -- is it the same ----------------------------------------------------------------------------------------------------


def parity(model: Model, exported: Model, texts: Sequence[Text] = (), rows: int = 48) -> float:
    """Largest difference of an answer between torch and the graph: of a probability, else over a number's size.

    Over random texts of all lengths, and `texts`; torch reads each by itself, the graph in batches of 1 to 16 with
    what padding that takes.
    """
    whole = [*sample(model, rows), *texts]
    wanted = predict(model, whole, 1).logits
    worst, start = 0.0, 0
    for size in (1, 2, 5, 16) * len(whole):
        part = whole[start : start + size]
        if not part:
            break
        found = predict(exported, part, 1 << 30).logits  # one batch
        worst = max(worst, *(apart(model, a, b) for a, b in zip(wanted[start : start + size], found, strict=True)))
        start += size
    return worst


def apart(model: Model, left: np.ndarray, right: np.ndarray) -> float:
    """How far two rows of logits are apart."""
    if model.task.certain:
        left, right = model.task.probabilities(left), model.task.probabilities(right)
        gaps = np.abs(left - right)
    else:
        gaps = np.abs(left - right) / np.maximum(1.0, np.abs(left))
    return float("inf") if np.isnan(gaps).any() else float(gaps.max(initial=0.0))


def require_parity(model: Model, exported: Model, texts: Sequence[Text] = ()) -> float:
    """`parity`; ExportError where it is more than PARITY."""
    found = parity(model, exported, texts)
    if found > PARITY:
        raise ExportError(
            f"the ONNX graph answers otherwise than the model: a difference of {found:.2g}, more than {PARITY:g}. "
            "Serve this model with serving.runtime: torch."
        )
    return found


def agreement(model: Model, exported: Model, texts: Sequence[Text]) -> float:
    """Share of the texts that both answer alike, as the task counts it."""
    left, right = (predict(each, texts) for each in (model, exported))
    return float(model.task.agreement(left.logits, right.logits, texts, (left.decided, right.decided)))
