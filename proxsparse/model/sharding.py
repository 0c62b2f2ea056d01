"""Weights sharded over processes by FSDP2: the part stored here, sums over all parts, and masks put together again.

FSDP2 splits a weight along its first dimension, so a process holds whole rows of a linear layer (some processes one
row more, or none at all), and the operator needs no communication. Everything here does nothing to a plain tensor.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor stored in this process: the tensor itself, or the local shard of a DTensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def first_row(weight: Tensor) -> int:
    """Index in the whole weight of the first row stored in this process: 0 of a plain tensor."""
    first, rows = 0, weight.shape[0] if weight.dim() else 1
    if isinstance(weight, DTensor):
        places: Sequence[int] = weight.device_mesh.get_coordinate() or ()
        for dim, (place, sharding) in enumerate(zip(places, weight.placements, strict=True)):
            if sharding.is_shard(0):  # as torch.chunk cuts
                most = -(-rows // weight.device_mesh.size(dim))
                before = min(place * most, rows)
                first, rows = first + before, min(most, rows - before)
    return first


def first_entry(weight: Tensor) -> int:
    """Index in the whole weight of the first entry stored in this process, where whole rows are."""
    return first_row(weight) * math.prod(weight.shape[1:])


def total(values: Tensor, weight: Tensor) -> Tensor:
    """Sum of ``values`` over the processes that share the weight; each replica counts once."""
    if not isinstance(weight, DTensor):
        return values
    places = [Partial() if place.is_shard() else Replicate() for place in weight.placements]
    # Offloaded shards lie on the CPU, but the processes talk on the mesh's device.
    values = values.to(weight.device_mesh.device_type)
    return DTensor.from_local(values, weight.device_mesh, places, run_check=False).full_tensor()


def settled(tensor: Tensor) -> Tensor:
    """A tensor whose sum over processes is pending, summed; others as they are."""
    if not isinstance(tensor, DTensor) or not any(place.is_partial() for place in tensor.placements):
        return tensor
    return tensor.redistribute(placements=[Replicate() if p.is_partial() else p for p in tensor.placements])


def matching_part(scale: Tensor, weight: Tensor) -> Tensor:
    """The part of a scale (I,) or (E, I) that belongs to the rows stored here: (I,) serves them all."""
    if scale.dim() == 1 or not isinstance(weight, DTensor):
        return scale
    return distribute_tensor(scale.to(weight.device), weight.device_mesh, weight.placements).to_local()


def part_of(whole: Tensor, weight: Tensor) -> Tensor:
    """The part of a tensor shaped like a weight that belongs to what is stored here. Every process has the whole."""
    if not isinstance(weight, DTensor):
        return whole
    placed = (weight.device_mesh, weight.placements)
    return distribute_tensor(whole.to(weight.device_mesh.device_type), *placed, src_data_rank=None).to_local()


def gather(part: Tensor, weight: Tensor) -> Tensor | None:
    """Whole tensor of which every process has the rows of its shard: on the first process, None on the others.

    Args:
        part: (rows here, ...), all of the rows where the weight is a plain tensor.
        weight: whose sharding ``part`` shares.
    """
    if not isinstance(weight, DTensor):
        return part
    shape = torch.Size((weight.shape[0], *part.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    placed = (weight.device_mesh, weight.placements)
    found = DTensor.from_local(part.contiguous(), *placed, run_check=False, shape=shape, stride=stride).full_tensor()
    return found if torch.distributed.get_rank() == 0 else None


def reshard(model: nn.Module) -> None:
    """Drop gathered copies of the weights, which a change of the shards has made stale."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
