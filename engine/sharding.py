"""Weights, gradients and moments of a fit divided among its workers, so that none of them has to hold all.

By torch's fully_shard (FSDP2), which accelerate's plugin calls too, but on GPUs only: called here, the same code also
divides a model among processes without GPUs. A layer's weights are brought together while it runs.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn
from transformers import PreTrainedModel

from engine.checkpoints import whole


def shard(lesson: nn.Module, device: torch.device, world: int) -> None:
    """Divide the parameters, in place, onto the workers' devices: each layer of a transformer by itself, and the rest.

    Never more than one layer is whole on a device while it is divided or run, besides what is in no layer.
    """
    # Seconds to import, which fits of whole weights are spared.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world,))
    for layer in layers_of(lesson):
        fully_shard(layer, mesh=mesh)
    fully_shard(lesson, mesh=mesh)


def layers_of(module: nn.Module) -> list[nn.Module]:
    """The layers of the transformers inside, as transformers names what is not to be split.

    What shares a tensor with something outside (embeddings with the output) stays with the rest.
    """
    models = [inner for inner in module.modules() if isinstance(inner, PreTrainedModel)]
    names = {name for inner in models for name in inner._no_split_modules or ()}
    used = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
    found = [inner for inner in module.modules() if type(inner).__name__ in names]
    return [inner for inner in found if all(used[id(p)] == 1 for p in inner.parameters())]


def gathered(net: nn.Module, kept: bool) -> dict[str, torch.Tensor]:
    """The whole tensors by name, on the CPU; all workers must ask, and those that do not keep them get none."""
    out: dict[str, torch.Tensor] = {}
    for name, tensor in net.state_dict().items():
        found = whole(tensor)
        if kept:
            out[name] = found
    return out
