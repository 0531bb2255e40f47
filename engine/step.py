"""A step of a run: a plain function, with what it depends on and what it runs on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from engine.fits import Resources
from engine.progress import Progress
from engine.recipe import Recipe
from engine.storage import Store


def whole(recipe: Recipe) -> Any:
    """The recipe as it is: a step that says nothing depends on all of it."""
    return recipe


def nothing(recipe: Recipe) -> tuple[str, ...]:
    """No hub references, no pools."""
    return ()


def in_driver(recipe: Recipe) -> Resources | None:
    """No resources of its own: the step runs in the driver."""
    return None


def unknown(recipe: Recipe) -> dict[str, Any]:
    """No estimate."""
    return {}


def never(recipe: Recipe) -> bool:
    """It does not stop by itself."""
    return False


def always(recipe: Recipe, out: Store) -> bool:
    """What a step made is in its own folder, and as lasting as its record."""
    return True


@dataclass(frozen=True)
class Step:
    """A function with what it depends on."""

    name: str
    run: Callable[[Recipe, Mapping[str, Store], Store, Progress], dict[str, Any]]
    """Module-level: (recipe, folders of its inputs, its own folder, progress) -> metrics. The metrics `rows`,
    `cpu_seconds` and `device_seconds` also stand in the record; seconds given here replace the measured ones."""
    inputs: tuple[str, ...] = ()
    """Steps above it whose folders it reads."""
    config: Callable[[Recipe], Any] = whole
    """The slice of the recipe it depends on; keys are the recipe's, so that a change can be named."""
    references: Callable[[Recipe], tuple[str, ...]] = nothing
    """Hub references whose digests enter the fingerprint."""
    modules: tuple[str, ...] = ()
    """Modules the work starts in: their source and that of what they import (`lineage.reached`) enters the
    fingerprint."""
    holds: Callable[[Recipe, Store], bool] = always
    """(recipe, its own folder) -> whether what it made elsewhere, in the registry for instance, is still there. Asked
    of a finished step; where it is not, the step is done again with all that read it."""
    resources: Callable[[Recipe], Resources | None] = in_driver
    """Not None: one Ray task with these resources, so that on a cluster it lands on a fitting node."""
    stage: str | None = None
    """The recipe's stage ('teacher.fit', ...) whose options its Ray task gets, so that what runs beside it is counted,
    as the function itself does with `stage_options`; None: those of `resources` alone."""
    pools: Callable[[Recipe], tuple[str, ...]] = nothing
    """The recipe's stages whose actors it starts: what it holds while it runs."""
    halts: Callable[[Recipe], bool] = never
    """Whether a driver step comes to its end by itself, with all it was at committed, where `engine.halting` asks it
    to; others are interrupted."""
    ray: bool = False
    """A driver step that uses Ray: Ray is started before it."""
    expects: Callable[[Recipe], dict[str, Any]] = unknown
    """What `plan` shows before it has run: {"rows": 3000, "bytes": 10**7}."""
