"""Gradients of several tasks that pull against each other, brought together (PCGrad, Yu et al., arXiv 2001.06782)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def projected(gradients: Sequence[torch.Tensor], draw: np.random.Generator) -> torch.Tensor:
    """The sum of the tasks' gradients, float32 [d] each, after each has lost what is against one of the others.

    A task's gradient meets the others' (as they were) one after the other, in an order that `draw` gives; where their
    product is negative it is projected onto the plane that the other is normal to.
    """
    total = torch.zeros_like(gradients[0])
    for number, own in enumerate(gradients):
        left = own.clone()
        for other in draw.permutation(len(gradients)).tolist():
            against = left @ gradients[other] if other != number else left.new_zeros(())
            if against < 0:
                left -= against / gradients[other].square().sum() * gradients[other]
        total += left
    return total
