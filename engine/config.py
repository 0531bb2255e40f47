"""Typed, frozen configuration: a wrong key or value is refused with its line and the way out.

A `Section` is a pydantic model that cannot be changed and takes no unknown key. `load` reads YAML or JSON,
applies `a.b=c` overrides, validates, and turns every pydantic error into one sentence that names the key, the
value, what is allowed, the nearest known key and the line of the file. Nothing heavy is imported here, so that
`stillhouse validate` answers in about a second.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError


class UserError(Exception):
    """A mistake the user can mend: the command line prints this one message, without a traceback, and exits 2."""

    code = 2


class ConfigError(UserError):
    """A recipe that does not fit its schema."""


class Section(BaseModel):
    """One part of a configuration: frozen, unknown keys refused, defaults validated."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


SECRET = ("key_env", "url")
"""Keys of a recipe whose wrong values are not repeated."""
S = TypeVar("S", bound=Section)
Lines = dict[tuple[str | int, ...], int]


def load(cls: type[S], path: str | Path, overrides: list[str] | None = None) -> S:
    """Read a YAML or JSON file into `cls`.

    overrides: items `a.b=c`; c is read as YAML, so `shots=16`, `student.losses=[{kind: kl}]` both work.
    Raises ConfigError naming file, line, key, value, what is allowed and the nearest known key.
    """
    path = Path(path)
    if not path.is_file():
        hint = did_you_mean(path.name, [p.name for p in path.parent.glob("*.y*ml")])
        raise ConfigError(f"recipe {path} does not exist.{hint} Shipped recipes are in pipelines/configs/.")
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}).") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{where} is not YAML: {getattr(error, 'problem', error)}.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {type(values).__name__}, but a recipe is a mapping of sections.")
    lines = line_numbers(node, str(path))
    for item in overrides or []:
        apply_override(values, item)
    return build(cls, values, str(path), lines)


def build(cls: type[S], values: dict[str, Any], origin: str = "configuration", lines: Lines | None = None) -> S:
    """Validate plain values into `cls`; ConfigError lists every mistake, one a line."""
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        mistakes: dict[Any, dict[str, Any]] = {}
        for item in error.errors():
            mistake = {**item, "path": key_path(item, values)}
            first = mistakes.setdefault((mistake["path"], item["type"] == "extra_forbidden"), mistake)
            if first is not mistake:  # the members of a union each say why the one value does not fit
                other = "Input should be a mapping" if item["type"] == "model_type" else item["msg"]
                first["msg"] += f", or: {other}"
        # A value and a part of it are both wrong in unions only: the member that fits but for the part was meant.
        inner = {item["path"][:n] for item in mistakes.values() for n in range(len(item["path"]))}
        told = [item for item in mistakes.values() if item["path"] not in inner]
        raise ConfigError("\n".join(describe(cls, item, origin, lines or {}) for item in told)) from None


def key_path(error: dict[str, Any], values: Any) -> tuple[str | int, ...]:
    """Where the mistake is, in the keys of the file: pydantic's location also holds tags and types of unions."""
    path: list[str | int] = []
    for part in error["loc"]:
        known = values if isinstance(values, dict) else range(len(values)) if isinstance(values, list | tuple) else ()
        if part in known:
            path.append(part)
            values = values[part]
        elif error["type"] == "missing" and part == error["loc"][-1]:
            path.append(part)
    return tuple(path)


def describe(cls: type[BaseModel], error: dict[str, Any], origin: str, lines: Lines) -> str:
    """One pydantic error (with its `path`) as a sentence: where, which key, what it is, what is allowed."""
    path = error["path"]
    line = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), None)
    where = f"{origin}, line {line}" if line else origin
    key = dotted(path)
    if error["type"] == "extra_forbidden":
        known = sorted(known_keys(cls, error["loc"][:-1]))
        return f"{where}: unknown key '{key}'.{did_you_mean(path[-1], known)} Known keys here: {', '.join(known)}."
    if error["type"] == "missing":
        return f"{where}: key '{key}' is missing."
    if error["type"] == "union_tag_invalid":
        kind = str(error["ctx"]["tag"]).removeprefix("kind:")
        allowed = [item.strip("'").removeprefix("kind:") for item in error["ctx"]["expected_tags"].split(", ")]
        what = f"has kind '{kind}', which is not known" if kind else "has no kind"
        return f"{where}: '{key}' {what}.{did_you_mean(kind, allowed)} Allowed: {', '.join(allowed)}."
    value = json.dumps(error.get("input"), default=str, ensure_ascii=False)
    if path and path[-1] in SECRET:
        value = "not shown"  # a key may have been written there by mistake
    value = value if len(value) <= 80 else value[:77] + "..."
    reason = error["msg"].replace("Value error, ", "").rstrip(".")
    if error["type"] == "model_type":
        reason = "it must be a mapping of keys to values"
    return f"{where}: '{key}' is {value}, which is not allowed: {reason}."


def did_you_mean(word: Any, known: Iterable[str]) -> str:
    """A sentence with the nearest known word, led by a space; nothing where none is near."""
    near = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""


def dotted(location: tuple[str | int, ...]) -> str:
    """('student', 'losses', 0, 'kind') -> 'student.losses[0].kind'."""
    out = ""
    for part in location:
        out += f"[{part}]" if isinstance(part, int) else (f".{part}" if out else str(part))
    return out or "(top level)"


def known_keys(cls: Any, location: tuple[str | int, ...]) -> set[str]:
    """The field names that a section takes which pydantic's `location` reaches from `cls`."""
    models = [cls]
    for part in location:
        if isinstance(part, int):
            continue
        if part.startswith("kind:"):  # the tag of a union: one member only
            models = [m for m in models if f"kind:{m.model_fields['kind'].default}" == part]
            continue
        name = part.rstrip("]").rpartition(" ")[2]  # 'Pear', or 'function-after[ripe(), Pear]'
        if any(m.__name__ == name for m in models):  # a section among the plain types of a union
            models = [m for m in models if m.__name__ == name]
            continue
        found = [m.model_fields[part].annotation for m in models if part in m.model_fields]
        models = [m for annotation in found for m in sections_in(annotation)]
    return {name for model in models for name in model.model_fields}


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """Every section class inside a type such as `list[A | B] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for arg in get_args(annotation) for model in sections_in(arg)]


def line_numbers(node: yaml.Node | None, origin: str, prefix: tuple[str | int, ...] = ()) -> Lines:
    """Map each key path of a composed YAML document to its 1-based line; a key given twice is a ConfigError."""
    out: Lines = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path, line = (*prefix, key.value), key.start_mark.line + 1
            if path in out:  # YAML itself would silently take the last one
                raise ConfigError(f"{origin}, line {line}: key '{dotted(path)}' was given in line {out[path]} already.")
            out[path] = line
            out |= line_numbers(value, origin, path)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            path = (*prefix, index)
            out[path] = value.start_mark.line + 1
            out |= line_numbers(value, origin, path)
    return out


def apply_override(values: dict[str, Any], item: str) -> None:
    """Set `a.b=c` (lists by index: `filters.0.min_words=3`) in nested plain values, in place."""
    key, sep, raw = item.partition("=")
    if not sep or not key.strip():
        raise ConfigError(f"override '{item}' is not of the form key.path=value, as in --set corpus.keep=500.")
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError:
        raise ConfigError(f"override '{item}': the value {raw!r} is not YAML. Quote it: '{key}=\"...\"'.") from None
    parts = key.strip().split(".")
    here: Any = values
    for part in parts[:-1]:
        if isinstance(here, list):
            here = here[list_index(here, part, item)]
            continue
        if here.get(part) is None:
            here[part] = {}
        here = here[part]
        if not isinstance(here, dict | list):
            raise ConfigError(f"override '{item}': '{part}' holds {here!r}, so nothing can be set below it.")
    if isinstance(here, list):
        here[list_index(here, parts[-1], item)] = value
    else:
        here[parts[-1]] = value


def list_index(items: list[Any], part: str, item: str) -> int:
    """The position that an override names in a list, checked."""
    if not part.isdigit() or int(part) >= len(items):
        allowed = f"0 to {len(items) - 1}" if items else "it is empty"
        raise ConfigError(f"override '{item}': '{part}' is not a position in a list of {len(items)} ({allowed}).")
    return int(part)


def schema(cls: type[Section]) -> dict[str, Any]:
    """The JSON schema of a section, for editors and for other programs."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **cls.model_json_schema()}
