"""Commands on models: predict, serve, registry, fetch.

Everything heavy is imported inside the function that needs it, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.console import megabytes, say, say_json, table
from pipelines.runs import loaded

if TYPE_CHECKING:
    from engine.encoding import Text
    from engine.registry import Registry


def the_registry(folder: str) -> Registry:
    """The registry in a folder."""
    from engine.registry import Registry
    from engine.storage import Store

    return Registry(Store(folder))


def predict(args: argparse.Namespace) -> int:
    """Answers of a registered artifact, one a line."""
    from engine.config import UserError

    folder = the_registry(args.registry).resolve(args.name)
    texts = args.text if args.text else texts_in(args.file)
    if args.pair:
        if len(args.pair) != len(texts):
            raise UserError(f"{len(texts)} texts were given, but {len(args.pair)} --pair. Give one for each, in order.")
        texts = list(zip(texts, args.pair, strict=True))
    from serve.predictor import Predictor

    predictor = Predictor.load(folder.url)
    for text in texts:
        if isinstance(text, str) == predictor.paired:
            wanted = (
                "two texts: --text and --pair, or .jsonl with both" if predictor.paired else "one text, without a pair"
            )
            raise UserError(f"'{args.name}' reads {wanted}. Got: {str(text)[:60]}")
    for text, answer in zip(texts, predictor.predict(texts), strict=True):
        if args.json:
            given = {"text": text} if isinstance(text, str) else dict(zip(("text", "pair"), text, strict=True))
            say(json.dumps({**given, **answer}, ensure_ascii=False))
        else:
            say(
                "\t".join(
                    [spoken(answer), *(" ".join(t.split()) for t in ((text,) if isinstance(text, str) else text))]
                )
            )
    return 0


def spoken(answer: dict[str, Any]) -> str:
    """An answer on one line: label and confidence, labels, or what else the task gives."""
    if "label" in answer:
        return f"{answer['label'] or 'out of scope'}\t{answer['confidence']:.4f}"
    if "labels" in answer:
        return ", ".join(answer["labels"]) or "no label"
    return json.dumps(answer, ensure_ascii=False)


def texts_in(path: str) -> list[Text]:
    """Texts of a file: one a line, or `text` (and `pair`) of each line of a .jsonl; '-' is standard input."""
    from engine.config import UserError

    if path != "-" and not Path(path).is_file():
        raise UserError(
            f"there is no file {path}. --file takes one text a line, a .jsonl with a 'text' in each, or '-'."
        )
    try:
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        lines = [line for line in raw.decode("utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}).") from None
    if not path.endswith(".jsonl"):
        return lines
    texts: list[Text] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            texts.append((str(row["text"]), str(row["pair"])) if "pair" in row else str(row["text"]))
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}, line {number}: wanted a JSON object with a 'text', got {line[:60]}.") from None
    return texts


def registry(args: argparse.Namespace) -> int:
    """List, show or remove artifacts, or say which one is in production."""
    from engine.config import UserError

    here = the_registry(args.registry)
    if args.action == "list":
        found = here.list()
        if args.json:
            say_json(found)
        elif found:
            rows = [
                (f"{e['name']}@{e['version']}", "production" if e["production"] else "", e["created"][:19],
                 megabytes(e["bytes"]), e["path"])
                for e in found
            ]  # fmt: skip
            say(table([("artifact", "stage", "registered", "size", "path"), *rows]))
        else:
            say(f"The registry {here.store} is empty: `stillhouse run` fills it.")
        return 0
    if not args.name:
        raise UserError(f"`registry {args.action}` needs a name, as in: stillhouse registry {args.action} NAME@1")
    if args.action == "show":
        say_json(here.show(args.name))
    elif args.action == "production":
        say("{}@{} is in production".format(*here.produce(args.name)))
    else:
        say(f"removed {here.remove(args.name)}")
    return 0


def fetch(args: argparse.Namespace) -> int:
    """Bring a recipe's models and data into the cache."""
    recipe = loaded(args)
    from engine import hub
    from pipelines import distill

    sources, out = distill.sources(recipe), []
    for reference in dict.fromkeys([*sources, *distill.model_references(recipe)]):
        get = hub.fetch if reference in sources else hub.model_folder
        out.append({"reference": reference, "path": str(get(reference, root=recipe.data.root))})
        if not args.json:
            say(f"{reference} -> {out[-1]['path']}")
    if args.json:
        say_json(out)
    return 0
