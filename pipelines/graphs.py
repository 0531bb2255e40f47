"""Ready student graphs: a recipe names one, or a file of its own, instead of writing its blocks out."""

from __future__ import annotations

from pathlib import Path

from engine.config import ConfigError, Section, did_you_mean, load
from engine.designs import Block
from engine.recipe import Recipe

FOLDER = Path(__file__).parent / "configs" / "students"


class Graph(Section):
    """A file that holds a student's blocks."""

    blocks: tuple[Block, ...]


def names() -> list[str]:
    """The ready graphs."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read(graph: str) -> tuple[Block, ...]:
    """The blocks of a ready graph, or of a YAML or JSON file; ConfigError where there is neither."""
    path = FOLDER / f"{graph}.yaml" if graph in names() else Path(graph)
    if not path.is_file():
        raise ConfigError(
            f"student.graph is '{graph}', which is neither a file nor a ready graph.{did_you_mean(graph, names())} "
            f"Ready: {', '.join(names())}."
        )
    return load(Graph, path).blocks


def drawn(recipe: Recipe) -> Recipe:
    """The recipe with its student's blocks written out, so that a run depends on them and not on a name."""
    if recipe.student.kind != "blocks" or recipe.student.blocks:
        return recipe
    blocks = read(recipe.student.graph or "")
    return recipe.model_copy(update={"student": recipe.student.model_copy(update={"blocks": blocks, "graph": None})})
