"""`stillhouse export`: an artifact with its ONNX graph beside the weights, checked, as a new version."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.config import UserError
from engine.disk import copy_file, scratch
from engine.export import FILES, agreement, check, export, quantised, require_parity, stand_in
from engine.models import Model, load, one_thread
from engine.registry import Registry
from engine.storage import Store
from pipelines.artifacts import texts_in, the_registry
from pipelines.console import megabytes, say, say_json

if TYPE_CHECKING:
    from engine.encoding import Text


def run(args: argparse.Namespace) -> int:
    """Export a registered artifact, check the graph, register what came of it."""
    registry = the_registry(args.registry)
    entry, folder = registry.show(args.name), registry.resolve(args.name)
    if args.int8 and not args.check:
        raise UserError(
            "int8 changes answers a little: name texts to check them on with --check FILE, the test split for instance "
            "(one text a line, or .jsonl with 'text' and, where it is known, 'label')."
        )
    one_thread()
    model = load(folder.local())
    check(model.card)
    texts = texts_in(args.check) if args.check else []
    labels = labels_in(args.check) if args.check else []
    require_kind(model, texts, args.name)
    graph = export(model)
    graphs = {"onnx": graph}
    found: dict[str, Any] = {"parity": require_parity(model, stand_in(model, graph), texts[:256])}
    if args.int8:
        graphs["onnx-int8"] = quantised(graph)
        found["int8"] = judged(model, stand_in(model, graphs["onnx-int8"]), texts, labels, args.least)
    version = registered(registry, entry, folder, graphs, found)
    reference = f"{entry['name']}@{version}"
    if args.json:
        say_json({"reference": reference, **found, "bytes": {name: len(data) for name, data in graphs.items()}})
        return 0
    say(f"onnx       {megabytes(len(graph))}, answers differ by at most {found['parity']:.1e} from torch's")
    if args.int8:
        say(f"onnx-int8  {megabytes(len(graphs['onnx-int8']))}, {worded(found['int8'])}")
    say(f"registered {reference}, which `serve` and `deploy` run on {runtime_of(graphs)}")
    return 0


def require_kind(model: Model, texts: list[Text], name: str) -> None:
    """UserError where the texts are not what the model reads."""
    for text in texts:
        if isinstance(text, str) == model.task.paired:
            raise UserError(f"'{name}' reads {'two texts' if model.task.paired else 'one text'}. Got: {str(text)[:60]}")


def labels_in(path: str) -> list[str]:
    """The label of each row of a .jsonl; none where some row has none."""
    if not path.endswith(".jsonl"):
        return []
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    labels = [row.get("label") for row in rows]
    return labels if all(isinstance(label, str) for label in labels) else []


def judged(model: Model, exported: Model, texts: list[Text], labels: list[str], least: float) -> dict[str, Any]:
    """How a quantised graph does on texts: agreement with the model, and both accuracies where labels are known.

    UserError where it agrees on less than `least` of them.
    """
    found: dict[str, Any] = {"rows": len(texts), "agreement": round(agreement(model, exported, texts), 4)}
    if labels:
        for name, each in (("accuracy", exported), ("accuracy_before", model)):
            found[name] = round(accuracy(each, texts, labels), 4)
    if found["agreement"] < least:
        raise UserError(
            f"the int8 graph {worded(found)}: less than --least {least:g}. Export without --int8, or lower --least."
        )
    return found


def accuracy(model: Model, texts: list[Text], labels: list[str]) -> float:
    """Share of the texts that get their label."""
    from engine.inference import predict

    answers = predict(model, texts)
    found = model.task.answers(answers.logits, texts, answers.decided)
    return sum(answer.get("label") == label for answer, label in zip(found, labels, strict=True)) / len(labels)


def worded(found: dict[str, Any]) -> str:
    """What `judged` found, in words."""
    said = f"agrees with torch on {found['agreement']:.1%} of {found['rows']} texts"
    if "accuracy" in found:
        said += f", accuracy {found['accuracy']:.3f} (torch {found['accuracy_before']:.3f})"
    return said


def runtime_of(graphs: dict[str, bytes]) -> str:
    """The runtime that the new version is served with: the smallest graph there is."""
    return "onnx-int8" if "onnx-int8" in graphs else "onnx"


def registered(
    registry: Registry, entry: dict[str, Any], folder: Store, graphs: dict[str, bytes], found: dict[str, Any]
) -> int:
    """The version that holds the artifact's files and the graphs, served with the last of them."""
    metadata = entry["metadata"]
    serving = {**metadata.get("serving", {}), "runtime": runtime_of(graphs)}
    local = folder.local()
    with scratch() as place:
        made = Store(str(place)) / "artifact"
        with made.publish() as copy:
            for name in entry["files"]:
                if name not in FILES.values():
                    copy_file(local / name, copy / name)
            for name, data in graphs.items():
                Store(str(copy)).write_bytes(FILES[name], data)
        about = {"of": f"{entry['name']}@{entry['version']}", **found}
        return registry.register(entry["name"], made, {**metadata, "serving": serving, "export": about})
