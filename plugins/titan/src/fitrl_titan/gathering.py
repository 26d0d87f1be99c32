"""Tensors of which each rank of a group holds a stretch, put together with a gradient.

Enters: a rank's stretch. Leaves: the whole, the same on every rank. Where its gradient is the same on every rank, too,
each takes its own stretch of it back, and nothing crosses.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.library import custom_op


class _CountedOnce(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, tensor: Tensor, count: int) -> Tensor:
        context.count = count
        return tensor.view_as(tensor)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] / context.count, None


@custom_op("fitrl_titan::gather", mutates_args=())
def _gather(stretch: Tensor, group_name: str, dimension: int, adds_up: bool) -> Tensor:
    """A custom operation, because compiled layers have it in their middle."""
    group = _group(group_name)
    parts = stretch.new_empty((group.size() * len(stretch), *stretch.shape[1:]))
    dist.all_gather_into_tensor(parts, stretch.contiguous(), group=group)
    # of a single row, a view
    return parts.view(group.size(), *stretch.shape).movedim(0, dimension).flatten(dimension, dimension + 1)


@_gather.register_fake
def _(stretch: Tensor, group_name: str, dimension: int, adds_up: bool) -> Tensor:
    shape = list(stretch.shape)
    shape[dimension] *= _group(group_name).size()
    return stretch.new_empty(shape)


@custom_op("fitrl_titan::own_stretch", mutates_args=())
def _own_stretch(whole: Tensor, group_name: str, dimension: int, adds_up: bool) -> Tensor:
    group = _group(group_name)
    parts = torch.unflatten(whole, dimension, (group.size(), -1)).movedim(dimension, 0)
    if not adds_up:
        return parts[group.rank()].clone(memory_format=torch.contiguous_format)
    own = whole.new_empty(parts.shape[1:])
    dist.reduce_scatter_tensor(own, parts.flatten(0, 1).contiguous(), group=group)
    return own


@_own_stretch.register_fake
def _(whole: Tensor, group_name: str, dimension: int, adds_up: bool) -> Tensor:
    shape = list(whole.shape)
    shape[dimension] //= _group(group_name).size()
    return whole.new_empty(shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.arguments = inputs[1:]


def _backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    return _own_stretch(gradient, *context.arguments), None, None, None


_gather.register_autograd(_backward, setup_context=_keep)


def _group(name: str) -> dist.ProcessGroup:
    c10d: Any = distributed_c10d
    group: dist.ProcessGroup = c10d._resolve_process_group(name)
    return group


def counted_once(tensor: Tensor, count: int) -> Tensor:
    """A tensor that so many ranks use all of, each with the same gradient, which are going to be summed."""
    if count == 1:
        return tensor
    used: Tensor = _CountedOnce.apply(tensor, count)  # type: ignore[no-untyped-call]
    return used


def gather(stretch: Tensor, group_name: str, dimension: int, *, adds_up: bool = False) -> Tensor:
    """Put equal stretches together along a dimension; a collective.

    Args:
        stretch: this rank's.
        group_name: of the ranks that hold the others, in their order.
        dimension: along which they lie.
        adds_up: whether each rank's gradient is its own part of the whole one, so that they have to be summed.
    """
    whole: Tensor = _gather(stretch, group_name, dimension, adds_up)
    return whole
