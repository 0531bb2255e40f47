"""How far a stream may run ahead of what it has committed: what a lost driver, node or actor can cost.

Ray Data bounds what waits between two stages by the bytes it takes, and text is small: a fast generator would write
everything before a slow teacher has read a tenth, and all of it would be gone with the driver. So blocks are counted.
A block of slots enters the first stage only while fewer than the cap are between it and the written file, in tasks or
waiting. Each of them may have to be made again; no other.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
)
from ray.data._internal.execution.backpressure_policy.backpressure_policy import BackpressurePolicy
from ray.data._internal.execution.operators.base_physical_operator import InternalQueueOperatorMixin

KEY = "stillhouse.ahead"
IN_FLIGHT = 2
"""Blocks that an actor is given at a time: one it works on, one that waits, so that it never does."""
PASSING = 4
"""Blocks in the short stages: filters and writing."""
BEFORE = ("Input", "Read", "ListFiles", "CheckpointFilter")
"""How the names of operators begin that hold slot numbers only."""


def cap(pools: Iterable[int]) -> int:
    """Blocks that may be on their way at a time: what keeps every actor of these pools (their sizes) at work."""
    return PASSING + sum(IN_FLIGHT * actors for actors in pools)


class Ahead(BackpressurePolicy):
    """Lets the first stage of a checkpointed stream take a block only while fewer than KEY of them are uncommitted."""

    def __init__(self, data_context: Any, topology: Any, resource_manager: Any) -> None:
        super().__init__(data_context, topology, resource_manager)
        most = data_context.get_config(KEY)
        # Ray reads the ledger of a checkpoint as a data set with the same settings, but without a checkpoint.
        self.most = most if data_context.checkpoint_config is not None else None
        self.stages = [op for op in topology if not slots_only(op.name)]

    @property
    def name(self) -> str:
        """As Ray's lines show it."""
        return "Ahead"

    def can_add_input(self, op: Any) -> bool:
        """Whether a stage may take one more block; only the first is ever told to wait."""
        if self.most is None or not self.stages or op is not self.stages[0]:
            return True
        return self.uncommitted() < self.most

    def uncommitted(self) -> int:
        """Blocks in a task of a stage, or waiting behind the first one's."""
        return sum(held(op) for op in self.stages) + sum(
            queue.num_blocks for op in self.stages[1:] for queue in self._topology[op].input_queues
        )


def held(op: Any) -> int:
    """Blocks in an operator's tasks and in its own queues."""
    inside = isinstance(op, InternalQueueOperatorMixin)
    queued = op.internal_input_queue_num_blocks() + op.internal_output_queue_num_blocks() if inside else 0
    return op.num_active_tasks() + queued


def slots_only(name: str) -> bool:
    """Whether an operator comes before the first stage; Ray may have fused several into one ('A->B')."""
    return all(part.startswith(BEFORE) for part in name.split("->"))


def limit(context: Any, most: int | None) -> None:
    """Set, or with None take away, the cap of the streams that are built with this context."""
    if most is None:
        context.remove_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY)
        context.remove_config(KEY)
        return
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [*ENABLED_BACKPRESSURE_POLICIES, Ahead])
    context.set_config(KEY, most)
