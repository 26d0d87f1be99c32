"""Logprobs and entropies of a linear head by tiles of rows, or of logits that are given.

Enters: hidden states and the output head, or logits. Leaves: logprobs [T] (and entropies) with grad: for
objectives that are not fused, for scores without grad, and for samplers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fitrl.errors import InvalidArgumentError
from fitrl.objective.head_inputs import check_head, check_rows, check_targets, row_shape
from fitrl.objective.linear_head import HeadGradients, LinearHead, compute_dtype, in_tiles, product, tiles
from fitrl.objective.rows import RowShape, RowStatistics, gradients_, statistics, swept_
from fitrl.objective.vocabulary_shard import VocabularyShard


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    rows_per_tile: int | None = None,
    exact_logits: bool = False,
    with_entropies: bool = False,
    shard: VocabularyShard | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target under `softmax(hidden @ weight.T / temperature)`, by tiles of rows.

    One product without grad; with it, backward computes the logits again: four. With a `shard` of the vocabulary it is
    a collective, see `fused_linear_policy_loss`.

    Returns:
        logprobs [T] and, with `with_entropies`, entropies [T]; float32 (float64 from float64), with grad.

    Raises:
        InvalidArgumentError: shapes, devices or dtypes that do not fit, targets out of range.
    """
    check_head(hidden, weight, targets, bias, temperature, rows_per_tile, softcap, shard)
    check_targets(targets, len(weight) if shard is None else shard.size, None)
    shape = row_shape(hidden, targets, temperature, bias, softcap, shard=shard)
    logprobs, entropies = LinearLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, shape, rows_per_tile, exact_logits, with_entropies
    )
    return logprobs, entropies if with_entropies else None


def logits_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: Tensor | float = 1.0,
    rows: Tensor | None = None,
    with_entropies: bool = False,
    in_place: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target under `softmax(logits / temperature)`, for heads that cannot be taken apart.

    Reads the logits once in forward, and once in backward.

    Args:
        logits: [N, V] with grad.
        targets: [T] int64.
        temperature: scalar or [T].
        rows: [T] int64, different rows of the logits, on their device; None: all, T = N.
        with_entropies: also compute entropies.
        in_place: backward may write the gradient over the logits. Whoever else saved them for backward raises then.

    Returns:
        logprobs [T] and, with `with_entropies`, entropies [T]; float32 (float64 from float64), with grad.

    Raises:
        InvalidArgumentError: shapes, devices or dtypes that do not fit, targets out of range.
    """
    if logits.dim() != 2 or not logits.is_floating_point():
        raise InvalidArgumentError(f"logits must be [N, V] floating point, got {tuple(logits.shape)} {logits.dtype}")
    if rows is not None:
        if rows.dim() != 1 or rows.dtype != torch.int64 or rows.device != logits.device:
            raise InvalidArgumentError(
                f"rows must be [T] int64 on {logits.device}, got {tuple(rows.shape)} {rows.dtype} on {rows.device}"
            )
        rows = rows.contiguous()
    size = len(logits) if rows is None else len(rows)
    check_rows(logits, targets, temperature, size)
    check_targets(targets, logits.shape[1], None)
    shape = row_shape(logits, targets, temperature, None, None, size=size)
    logprobs, entropies = _LogitsLogprobs.apply(  # type: ignore[no-untyped-call]
        logits, shape, rows, with_entropies, in_place
    )
    return logprobs, entropies if with_entropies else None


def linear_logits(
    hidden: Tensor, weight: Tensor, *, bias: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """Float32 logits [T, V] of hidden states [T, H]; not rounded to 16 bits on the way. For samplers, without grad."""
    with torch.no_grad():
        dtype = compute_dtype(hidden)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        logits = product(hidden.to(dtype), weight.to(dtype).t(), wide)
        if bias is not None:
            logits += bias
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)


class LinearLogprobs(torch.autograd.Function):
    """Tiled log-softmax of a linear head; backward computes each tile again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        shape: RowShape,
        rows_per_tile: int | None,
        exact: bool,
        with_entropies: bool,
    ) -> tuple[Tensor, Tensor]:
        """Logprobs [T] and entropies [T] (empty without), one tile of logits at a time."""
        dtype = compute_dtype(hidden)

        def all_tiles(size: int) -> RowStatistics:
            head = LinearHead(hidden, weight, shape, exact=exact, dtype=dtype)
            found = [
                statistics(head.logits(tile), shape[tile], with_entropies=with_entropies)
                for tile in tiles(len(head), size)
            ]
            empty = shape.temperature.new_empty(0)
            return RowStatistics(
                lse=torch.cat([empty, *(s.lse for s in found)]),
                logprobs=torch.cat([empty, *(s.logprobs for s in found)]),
                entropies=torch.cat([empty, *(s.entropies for s in found if s.entropies is not None)])
                if with_entropies
                else None,
            )

        ctx.tiling = {
            "rows": len(hidden),
            "rows_per_tile": rows_per_tile,
            "vocabulary": len(weight),
            "itemsize": 4 if exact and dtype.itemsize == 2 else dtype.itemsize,
            "device": hidden.device,
            "shard": shape.shard,
        }
        found = in_tiles(all_tiles, **ctx.tiling)
        entropies = found.logprobs.new_empty(0) if found.entropies is None else found.entropies
        ctx.save_for_backward(hidden, weight, bias, found.lse, found.logprobs, entropies)
        ctx.shape, ctx.exact, ctx.dtype, ctx.with_entropies = shape, exact, dtype, with_entropies
        ctx.set_materialize_grads(False)
        return found.logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logprobs: Tensor | None, d_entropies: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of hidden states, weight and bias; each tile's logits are made again."""
        hidden, weight, bias, lse, logprobs, entropies = ctx.saved_tensors
        d_logprobs = torch.zeros_like(lse) if d_logprobs is None else d_logprobs.contiguous()
        d_entropies = d_entropies.contiguous() if ctx.with_entropies and d_entropies is not None else None

        def all_tiles(size: int) -> HeadGradients:
            head = LinearHead(hidden, weight, ctx.shape, exact=ctx.exact, dtype=ctx.dtype)
            gradients = HeadGradients(
                head, ctx.needs_input_grad[:3], size, hidden_dtype=hidden.dtype, weight_dtype=weight.dtype
            )
            for tile in tiles(len(head), size):
                logits = head.logits(tile)
                if head.one_sweep(with_entropies=d_entropies is not None):
                    _, values, units = swept_(logits, ctx.shape[tile], ctx.dtype)
                    gradients.add(tile, values, d_logprobs[tile] * units)
                    continue
                found = RowStatistics(
                    lse=lse[tile],
                    logprobs=logprobs[tile],
                    entropies=entropies[tile] if ctx.with_entropies else None,
                )
                slope = None if d_entropies is None else d_entropies[tile]
                gradients.add_rows(tile, logits, found, d_logprobs[tile], slope)
            gradients.join()
            return gradients

        found = in_tiles(all_tiles, **ctx.tiling)
        return (
            None if found.hidden is None else found.hidden.to(hidden.dtype),
            None if found.weight is None else found.weight.to(weight.dtype),
            None if found.bias is None else found.bias.to(bias.dtype),
            *[None] * 4,
        )


class _LogitsLogprobs(torch.autograd.Function):
    """Log-softmax of some rows of logits at their targets; the gradient may take the logits' place."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, shape: RowShape, rows: Tensor | None, with_entropies: bool, in_place: bool
    ) -> tuple[Tensor, Tensor]:
        found = statistics(_unit_stride(logits), shape, with_entropies=with_entropies, rows=rows)
        entropies = found.logprobs.new_empty(0) if found.entropies is None else found.entropies
        ctx.save_for_backward(logits, rows, found.lse, found.logprobs, entropies)
        ctx.shape, ctx.with_entropies, ctx.in_place = shape, with_entropies, in_place
        ctx.set_materialize_grads(False)
        return found.logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logprobs: Tensor | None, d_entropies: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, rows, lse, logprobs, entropies = ctx.saved_tensors
        shape: RowShape = ctx.shape
        d_logprobs = torch.zeros_like(lse) if d_logprobs is None else d_logprobs.contiguous()
        d_entropies = d_entropies.contiguous() if ctx.with_entropies and d_entropies is not None else None
        if rows is not None:  # rows without a target have derivative 0

            def spread(values: Tensor, fill: float) -> Tensor:
                return values.new_full((len(logits),), fill).index_copy_(0, rows, values)

            shape = RowShape(targets=spread(shape.targets, 0), temperature=spread(shape.temperature, 1.0))
            d_logprobs, lse, logprobs = spread(d_logprobs, 0.0), spread(lse, 0.0), spread(logprobs, 0.0)
            d_entropies = None if d_entropies is None else spread(d_entropies, 0.0)
            entropies = spread(entropies, 0.0) if ctx.with_entropies else entropies
        raw = _unit_stride(logits.detach())
        if not ctx.in_place and raw.data_ptr() == logits.data_ptr():
            raw = raw.clone()
        found = RowStatistics(lse=lse, logprobs=logprobs, entropies=entropies if ctx.with_entropies else None)
        d_logits = gradients_(raw, shape, found, d_logprobs, d_entropies, logits.dtype)
        if d_logits.data_ptr() == logits.data_ptr():
            torch.autograd.graph.increment_version(logits)
        return d_logits, *[None] * 4


def _unit_stride(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()
