"""Weights that lie in pieces on several ranks, and what has to be told apart because of it.

Enters: tensors that may be `DTensor`s. Leaves: whole ones, or pieces like another's. Both are collectives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from its pieces; itself, if it is in one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, held: Any) -> Tensor:
    """A whole tensor cut as `held` is; itself, if that is in one piece."""
    if not isinstance(held, DTensor) or isinstance(tensor, DTensor) or tensor.shape != held.shape:
        return tensor
    local = tensor.to(held.device)
    return distribute_tensor(local, held.device_mesh, held.placements, src_data_rank=None)  # every rank has it


def own_numel(tensor: Tensor) -> int:
    """Numbers of a tensor that lie on this rank."""
    return tensor.to_local().numel() if isinstance(tensor, DTensor) else tensor.numel()


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


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """Norm over all gradients, the same on every rank."""
    return whole(torch.nn.utils.get_total_norm(gradients))
