"""Tensors of which each rank of a group holds a stretch, put together with a gradient.

Enters: a rank's stretch. Leaves: the whole, the same on every rank. Where its gradient is the same on every rank, too,
each takes its own stretch of it back, and nothing crosses.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _CountedOnce(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, tensor: Tensor, count: int) -> Tensor:
        context.count = count
        return tensor.view_as(tensor)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] / context.count, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, stretch: Tensor, group: dist.ProcessGroup, dimension: int, adds_up: bool) -> Tensor:
        context.group, context.dimension, context.adds_up = group, dimension, adds_up
        parts = [torch.empty_like(stretch) for _ in range(group.size())]
        dist.all_gather(parts, stretch.contiguous(), group=group)
        return torch.cat(parts, dim=dimension)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        whole = gradients[0]
        if context.adds_up:
            whole = whole.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(whole, group=context.group)
        own = whole.chunk(context.group.size(), dim=context.dimension)[context.group.rank()]
        return own, None, None, None


def counted_once(tensor: Tensor, count: int) -> Tensor:
    """A tensor that so many ranks use all of, each with the same gradient, which are going to be summed."""
    if count == 1:
        return tensor
    used: Tensor = _CountedOnce.apply(tensor, count)  # type: ignore[no-untyped-call]
    return used


def gather(stretch: Tensor, group: dist.ProcessGroup, dimension: int, *, adds_up: bool = False) -> Tensor:
    """Put equal stretches together along a dimension; a collective.

    Args:
        stretch: this rank's.
        group: the ranks that hold the others, in their order.
        dimension: along which they lie.
        adds_up: whether each rank's gradient is its own part of the whole one, so that they have to be summed.
    """
    whole: Tensor = _Gather.apply(stretch, group, dimension, adds_up)  # type: ignore[no-untyped-call]
    return whole
