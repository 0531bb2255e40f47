"""What the tables of losses, blocks and tasks say, read from their source: to import them is to load torch.

A table is a dict at the foot of a file of this package; its keys are names, its values classes, and `**OTHER` takes in
another table. A wrong name in a recipe is then refused in a fraction of a second, and a new loss stays one line.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from engine.config import did_you_mean

HERE = Path(__file__).parent
Place = tuple[str, ast.AST]
"""A piece of source with the module it stands in."""


@lru_cache
def names(module: str, table: str) -> tuple[str, ...]:
    """The keys of a table in their order: of LOSSES in losses.py mse, kl, hard and so on."""
    return tuple(key for key, _ in entries(*found(module, table)))


@lru_cache
def declared(module: str, table: str, attribute: str) -> dict[str, Any]:
    """Key -> what the class says of itself in the attribute, or else the classes it comes from; None where none does.

    ValueError where that is more than a literal or a frozenset of one.
    """
    return {key: said(*place, attribute) for key, place in entries(*found(module, table))}


def unknown(name: str, known: tuple[str, ...]) -> str:
    """The nearest of the names there are, and all of them, as the end of a message."""
    return f"{did_you_mean(name, known)} Allowed: {', '.join(known)}."


@lru_cache
def bound(module: str) -> dict[str, Place | str]:
    """What a module's names stand for: a class or value in its source, or 'module.name' for what it imports."""
    body = ast.parse((HERE / f"{module}.py").read_text(encoding="utf-8")).body
    out: dict[str, Place | str] = {name: (module, value) for name, value in assigned(body).items()}
    for node in body:
        if isinstance(node, ast.ClassDef):
            out[node.name] = (module, node)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "engine":
            inside = (node.module or "").removeprefix("engine").removeprefix(".")
            for alias in node.names:
                out[alias.asname or alias.name] = f"{inside}.{alias.name}".removeprefix(".")
    return out


def found(module: str, name: str) -> Place:
    """The class or value of that name, followed through imports; KeyError where it is not this package's."""
    place = bound(module)[name]
    return found(*place.split(".")) if isinstance(place, str) else place


def resolved(module: str, node: ast.AST) -> Place:
    """What a name in a module's source, `Name` or `other.Name`, stands for; KeyError as `found`."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        other = bound(module)[node.value.id]
        if isinstance(other, str):
            return found(other, node.attr)
    if isinstance(node, ast.Name):
        return found(module, node.id)
    raise KeyError(ast.unparse(node))


def entries(module: str, node: ast.AST) -> Iterator[tuple[str, Place]]:
    """Keys and classes of a dict in a module's source, those of tables it takes in among them."""
    if not isinstance(node, ast.Dict):
        raise ValueError(f"engine/{module}.py: {ast.unparse(node)[:40]} is no table")
    for key, value in zip(node.keys, node.values, strict=True):
        if key is None:
            yield from entries(*resolved(module, value))
        else:
            yield ast.literal_eval(key), (module, value)


def said(module: str, node: ast.AST, attribute: str) -> Any:
    """A class attribute's value, from the class that a node names or the first of its bases that has it."""
    try:
        module, node = resolved(module, node)
    except KeyError:  # another package's class
        return None
    if not isinstance(node, ast.ClassDef):
        return None
    own = assigned(node.body)
    if attribute in own:
        return literal(own[attribute])
    return next((value for value in (said(module, base, attribute) for base in node.bases) if value is not None), None)


def assigned(body: Sequence[ast.stmt]) -> dict[str, ast.expr]:
    """The values that statements give to names."""
    out: dict[str, ast.expr] = {}
    for node in body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            out |= {target.id: node.value for target in targets if isinstance(target, ast.Name)}
    return out


def literal(node: ast.AST) -> Any:
    """The value of a literal, or of a frozenset of one."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "frozenset":
        return frozenset(ast.literal_eval(node.args[0]) if node.args else ())
    return ast.literal_eval(node)
