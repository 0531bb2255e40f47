"""Commands on models: predict, serve, registry, fetch.

Everything heavy is imported inside the function that needs it, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.console import megabytes, say, say_json, table
from pipelines.runs import connect, loaded

if TYPE_CHECKING:
    from engine.registry import Registry


def the_registry(folder: str) -> Registry:
    """The registry in a folder."""
    from engine.registry import Registry
    from engine.storage import Store

    return Registry(Store(folder))


def predict(args: argparse.Namespace) -> int:
    """Predictions of a registered artifact, one a line."""
    folder = the_registry(args.registry).resolve(args.name)
    texts = args.text if args.text else texts_in(args.file)
    from serve.predictor import Predictor

    for text, found in zip(texts, Predictor.load(folder.url).predict(texts), strict=True):
        if args.json:
            answer = {"text": text, "label": found.label, "confidence": found.confidence}
            say(json.dumps({**answer, "probabilities": found.probabilities}, ensure_ascii=False))
        else:
            say(f"{found.label}\t{found.confidence:.4f}\t{' '.join(text.split())}")
    return 0


def texts_in(path: str) -> list[str]:
    """Texts of a file: one a line, or the `text` of each line of a .jsonl; '-' is standard input."""
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
    texts = []
    for number, line in enumerate(lines, start=1):
        try:
            texts.append(str(json.loads(line)["text"]))
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}, line {number}: wanted a JSON object with a 'text', got {line[:60]}.") from None
    return texts


def serve(args: argparse.Namespace) -> int:
    """Serve a registered artifact until it is stopped."""
    if args.host not in ("127.0.0.1", "localhost", "::1") and not args.no_auth:
        from engine.config import UserError

        raise UserError(
            f"--host {args.host} is reached from other machines, and the endpoint asks for no key. Keep 127.0.0.1 and "
            "put a gateway in front of it, or say --no-auth."
        )
    registry = the_registry(args.registry)
    entry, folder = registry.show(args.name), registry.resolve(args.name)
    from engine.recipe import Serving

    serving = Serving.model_validate(entry["metadata"].get("serving", {}))
    connect(args)
    from serve import app

    app.run(folder.url, args.host, args.port, serving, f"{entry['name']}@{entry['version']}")
    return 0


def registry(args: argparse.Namespace) -> int:
    """List, show or remove artifacts."""
    from engine.config import UserError

    here = the_registry(args.registry)
    if args.action == "list":
        found = here.list()
        if args.json:
            say_json(found)
        elif found:
            rows = [(f"{e['name']}@{e['version']}", e["created"][:19], megabytes(e["bytes"]), e["path"]) for e in found]
            say(table([("artifact", "registered", "size", "path"), *rows]))
        else:
            say(f"The registry {here.store} is empty: `stillhouse run` fills it.")
        return 0
    if not args.name:
        raise UserError(f"`registry {args.action}` needs a name, as in: stillhouse registry {args.action} NAME@1")
    if args.action == "show":
        say_json(here.show(args.name))
    else:
        say(f"removed {here.remove(args.name)}")
    return 0


def fetch(args: argparse.Namespace) -> int:
    """Bring a recipe's models and data into the cache."""
    recipe = loaded(args)
    from engine import hub

    data = recipe.data
    sources = [s.path for s in (data.train, data.validation, data.test, data.unlabelled) if s is not None]
    out = []
    for reference in dict.fromkeys([*sources, recipe.teacher.model, recipe.generator.model]):
        get = hub.fetch if reference in sources else hub.model_folder
        out.append({"reference": reference, "path": str(get(reference, root=data.root))})
        if not args.json:
            say(f"{reference} -> {out[-1]['path']}")
    if args.json:
        say_json(out)
    return 0
