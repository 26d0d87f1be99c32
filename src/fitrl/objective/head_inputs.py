"""What a head is given: shapes, devices, dtypes and values checked, without waiting for the device.

Enters: the arguments of the functions over heads and logits. Leaves: a `RowShape`, or an error that names what does not
fit. Values of targets are looked at on the CPU; on a GPU only with FITRL_DEBUG=1 in the environment.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from fitrl.errors import InvalidArgumentError
from fitrl.objective.rows import RowShape
from fitrl.objective.vocabulary_shard import VocabularyShard


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """Dtype of vectors over rows: float32, or float64 from float64."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def row_shape(
    like: Tensor,
    targets: Tensor,
    temperature: Tensor | float,
    bias: Tensor | None,
    softcap: float | None,
    *,
    size: int | None = None,
    shard: VocabularyShard | None = None,
) -> RowShape:
    """How the logits of `like` [T, ...] become a distribution, as tensors on its device; nothing waits for it."""
    if isinstance(temperature, Tensor):
        scale = temperature.to(like.device, wide_dtype(like), non_blocking=True)
    else:  # filled in by the device: a copy of a Python number would wait for it
        scale = torch.full((), temperature, dtype=wide_dtype(like), device=like.device)
    return RowShape(
        targets=targets.contiguous(),
        temperature=scale.expand(len(like) if size is None else size),
        bias=None if bias is None else bias.detach().contiguous(),
        softcap=softcap,
        shard=shard,
    )


def check_head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: Tensor | float,
    rows_per_tile: int | None,
    softcap: float | None,
    shard: VocabularyShard | None = None,
) -> int:
    """Check a linear head and its rows; returns T.

    Raises:
        InvalidArgumentError: what does not fit, by name.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise InvalidArgumentError(
            f"hidden must be [T, H] and weight [V, H], got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if not hidden.is_floating_point() or not weight.is_floating_point():
        raise InvalidArgumentError(f"hidden and weight must be floating point, got {hidden.dtype} and {weight.dtype}")
    if bias is not None and (bias.shape != (len(weight),) or not bias.is_floating_point()):
        raise InvalidArgumentError(f"bias must be [{len(weight)}] floating point, got {tuple(bias.shape)} {bias.dtype}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise InvalidArgumentError(f"{name} is on {tensor.device}, hidden on {hidden.device}")
    if softcap is not None and not softcap > 0:
        raise InvalidArgumentError(f"softcap must be greater than 0, got {softcap}")
    if rows_per_tile is not None and rows_per_tile < 1:
        raise InvalidArgumentError(f"rows_per_tile must be at least 1, got {rows_per_tile}")
    if shard is not None:
        shard.check(len(weight))
    check_rows(hidden, targets, temperature, len(hidden))
    return len(hidden)


def check_rows(like: Tensor, targets: Tensor, temperature: Tensor | float, size: int) -> None:
    """Check targets and temperature of rows of a head or of logits."""
    if targets.shape != (size,) or targets.dtype != torch.int64:
        raise InvalidArgumentError(f"targets must be [{size}] int64, got {tuple(targets.shape)} {targets.dtype}")
    if targets.device != like.device:
        raise InvalidArgumentError(f"targets are on {targets.device}, the head on {like.device}")
    if isinstance(temperature, Tensor):
        if temperature.shape not in ((), (size,)):
            raise InvalidArgumentError(f"temperature must be a scalar or [{size}], got {tuple(temperature.shape)}")
        if temperature.requires_grad:
            raise InvalidArgumentError("temperature requires grad, but gets none: detach it")
    elif not temperature > 0:
        raise InvalidArgumentError(f"temperature must be greater than 0, got {temperature}")


def check_vectors(hidden: Tensor, size: int, vectors: dict[str, Tensor | None]) -> None:
    """Check what else a loss takes of each row: [T], on the head's device (a mask may be on the CPU), without grad."""
    for name, tensor in vectors.items():
        if tensor is None:
            continue
        if tensor.shape != (size,):
            raise InvalidArgumentError(f"{name} must be [{size}], got {tuple(tensor.shape)}")
        if tensor.device != hidden.device and not (name == "mask" and tensor.device.type == "cpu"):
            raise InvalidArgumentError(f"{name} is on {tensor.device}, hidden on {hidden.device}")
        if tensor.requires_grad:
            raise InvalidArgumentError(f"{name} requires grad, but gets none: detach it")
    ids = vectors["trajectory_ids"]
    if ids is not None and ids.dtype != torch.int64:
        raise InvalidArgumentError(f"trajectory_ids must be int64, got {ids.dtype}")


def check_targets(targets: Tensor, vocabulary: int, mask: Tensor | None) -> None:
    """Look at the values of targets where that takes no synchronisation, or in debug mode."""
    if targets.device.type != "cpu" and os.environ.get("FITRL_DEBUG", "0") in ("", "0"):
        return
    wrong = (targets < 0) | (targets >= vocabulary)
    if mask is not None:
        wrong = wrong & mask
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise InvalidArgumentError(f"targets[{row}] is {int(targets[row])}, the vocabulary has {vocabulary} tokens")
