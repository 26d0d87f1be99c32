"""Weights that lie in pieces on several ranks, and what has to be told apart because of it.

Enters: tensors that may be `DTensor`s. Leaves: whole ones, or pieces like another's. Both are collectives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from its pieces, without a gradient; itself, if it is in one."""
    if not isinstance(tensor, DTensor):
        return tensor
    pieces: Any = tensor.detach()
    mesh, placements = tensor.device_mesh, tensor.placements
    own = pieces.to_local()
    if own.device.type != mesh.device_type:  # offloaded: its ranks cannot meet on the CPU
        own = own.to(mesh.device_type)
        pieces = DTensor.from_local(own, mesh, placements, shape=tensor.shape, stride=tensor.stride())
    cuts = [n for n, placement in enumerate(placements) if mesh.size(n) > 1 and not placement.is_replicate()]
    if mesh.device_type == "cpu" and len(cuts) == 1 and type(cut := placements[cuts[0]]) is Shard:
        return _gathered(own, cut.dim, tensor.shape[cut.dim], mesh.get_group(cuts[0]))
    for dimension in range(mesh.ndim - 1):  # one at a time, or torch warns of the order it chooses
        pieces = pieces.redistribute(placements=[Replicate()] * (dimension + 1) + list(placements[dimension + 1 :]))
    gathered: Tensor = pieces.full_tensor()
    return gathered


def _gathered(own: Tensor, dimension: int, length: int, group: dist.ProcessGroup) -> Tensor:
    """`full_tensor` of pieces that lie along one dimension, by gloo.

    torch 2.13's own starts a gather and waits for it by the tensor; on CPUs ranks have been seen to die of that now and
    then: of SIGSEGV, or of memory that malloc finds overwritten, in a loop of nothing else, too.
    """
    own = own.movedim(dimension, 0)
    filled = own.new_zeros(-(-length // group.size()), *own.shape[1:])  # the last ranks have less, or nothing
    filled[: len(own)] = own
    parts = [torch.empty_like(filled) for _ in range(group.size())]
    dist.all_gather(parts, filled, group=group)
    return torch.cat(parts)[:length].movedim(0, dimension).contiguous()


def like(tensor: Tensor, held: Any) -> Tensor:
    """A whole tensor cut as `held` is; itself, if that is in one piece."""
    if not isinstance(held, DTensor) or isinstance(tensor, DTensor) or tensor.shape != held.shape:
        return tensor
    local = tensor.to(held.device)
    return distribute_tensor(local, held.device_mesh, held.placements, src_data_rank=None)  # every rank has it


def own_numel(tensor: Tensor) -> int:
    """Numbers of a tensor that lie on this rank."""
    return tensor.to_local().numel() if isinstance(tensor, DTensor) else tensor.numel()


def in_pieces(network: nn.Module) -> bool:
    """Whether a part of some weight is somewhere else, so that nothing outside of training can be computed."""
    return any(isinstance(parameter, DTensor) or parameter.is_meta for parameter in network.parameters())


class Root(nn.Module):
    """A module whose forward runs a call: what is sharded as a whole has to be entered, whichever part of it runs.

    Args:
        network: everything that the call may read.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, call: Callable[[], Any]) -> Any:
        """Run it, with the weights that belong to no decoder layer gathered."""
        return call()


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Norm over all gradients, the same on every rank.

    Each number counts once, however many ranks hold it: tensors in one piece, and in pieces over meshes that differ,
    are summed over the dimensions that cut them.
    """
    layouts: dict[tuple[DeviceMesh | None, tuple[int, ...]], list[Tensor]] = {}
    for gradient in gradients:
        if isinstance(gradient, DTensor):
            cut = tuple(n for n, placement in enumerate(gradient.placements) if not placement.is_replicate())
            layouts.setdefault((gradient.device_mesh, cut), []).append(gradient.to_local())
        else:
            layouts.setdefault((None, ()), []).append(gradient)
    squares: list[Tensor] = []
    for (mesh, cut), own in layouts.items():
        square = torch.nn.utils.get_total_norm(own).square()
        if mesh is not None:
            square = square.to(mesh.device_type)  # offloaded gradients are on the CPU
            for dimension in cut:
                dist.all_reduce(square, group=mesh.get_group(dimension))
        squares.append(square)
    if not squares:
        return torch.zeros(())
    return torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt()


def clip_by_norm(gradients: Sequence[Tensor], most: float, norm: Tensor) -> None:
    """Scale all gradients, whose norm is `norm`, so that it is `most`, if it is above."""
    factor = (most / (norm + 1e-6)).clamp(max=1.0)  # as torch's `clip_grad_norm_` does
    by_device: dict[torch.device, list[Tensor]] = {}
    for gradient in gradients:
        own = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        by_device.setdefault(own.device, []).append(own)
    for device, own_gradients in by_device.items():
        torch._foreach_mul_(own_gradients, factor.to(device))
