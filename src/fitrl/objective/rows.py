"""The work on rows of logits, in Triton on a GPU and in torch elsewhere.

Enters: a [T, V] tile of raw logits as the head's matrix product leaves them, and vectors over its rows. Leaves: the
statistics that a loss needs, or the gradient of the logits. No loss is defined here: the gradient starts from
d loss / d logprob and d loss / d entropy of each row. Where the columns lie on several ranks the same sweeps run over
those that are here, and `VocabularyShard` joins what they found.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fitrl.objective.vocabulary_shard import VocabularyShard

_log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True, eq=False)
class RowStatistics:
    """What a sweep over rows of logits leaves.

    Attributes:
        lse: [T] log-sum-exp of the bent and scaled logits.
        logprobs: [T] of the targets.
        entropies: [T] or None.
    """

    lse: Tensor
    logprobs: Tensor
    entropies: Tensor | None


@dataclass(slots=True, kw_only=True, eq=False)
class RowShape:
    """How raw logits become those of the distribution: `softcap * tanh((logits + bias) / softcap) / temperature`.

    Attributes:
        targets: [T] int64.
        temperature: [T] float32 (float64 with float64 logits).
        bias: [V] or None; of the columns that are here.
        softcap: or None.
        shard: which columns are here; None: all.
    """

    targets: Tensor
    temperature: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    shard: VocabularyShard | None = None

    @property
    def columns(self) -> Tensor:
        """[T] the targets' columns; out of range where another rank has them."""
        return self.targets if self.shard is None else self.shard.columns(self.targets)

    def __getitem__(self, tile: slice) -> RowShape:
        """Of some of the rows."""
        return RowShape(
            targets=self.targets[tile],
            temperature=self.temperature[tile],
            bias=self.bias,
            softcap=self.softcap,
            shard=self.shard,
        )


def statistics(
    logits: Tensor, shape: RowShape, *, with_entropies: bool = False, rows: Tensor | None = None
) -> RowStatistics:
    """Log-sum-exp, target logprob and, if asked for, entropy of each row, in one sweep; a collective with a shard.

    Args:
        logits: [N, V] raw logits; rows may be apart in memory, a row may not.
        shape: of T rows.
        with_entropies: also compute entropies.
        rows: [T] int64, which rows of the logits; None: all, T = N.

    Returns:
        float32 vectors (float64 from float64).
    """
    columns = shape.columns
    if (kernels := _kernels(logits)) is not None:
        lse, logprobs, entropies = kernels.statistics(
            logits, columns, shape.temperature, shape.bias, shape.softcap, with_entropies, rows
        )
    else:
        z, _ = _bent(logits if rows is None else logits.index_select(0, rows), shape)
        lse = z.logsumexp(dim=1)
        logprobs = z.gather(1, _inside(columns, shape, z)[:, None]).squeeze(1) - lse
        entropies = None
        if with_entropies:
            # not lse minus the mean logit: that cancels where the logits share an offset
            log_probs = z.sub_(lse[:, None])
            entropies = -(log_probs.exp() * log_probs).sum(dim=1)
    if shape.shard is not None:
        is_here = (columns >= 0) & (columns < logits.shape[1])
        lse, logprobs, entropies = shape.shard.joined(lse, logprobs, entropies, is_here)
    return RowStatistics(lse=lse, logprobs=logprobs, entropies=entropies)


def swept_(logits: Tensor, shape: RowShape, dtype: torch.dtype) -> tuple[RowStatistics, Tensor, Tensor]:
    """Statistics and the gradient up to a factor of each row, in one sweep; the logits are gone after it.

    The gradient of a row's logits is `d loss / d logprob * unit * value`. The factor may be unknown until then,
    and a product with the values takes it afterwards, or on its other side. A value is exp(z - shift), at the target
    minus the sum of the others: no 1 - p is rounded to 16 bits where p is nearly 1.

    Args:
        logits: [T, V]; their storage may hold the result.
        shape: of the rows, all of whose columns are here: a shift that each rank chose for itself might be too far
            below the others' logits.
        dtype: of the values; that of the logits, or a narrower one, but not float16, whose exponent is too small.

    Returns:
        statistics without entropies, values [T, V], units [T].
    """
    if (kernels := _kernels(logits)) is not None:
        values = _narrow(logits, dtype)
        lse, logprobs, units = kernels.swept_(
            logits, values, shape.targets, shape.temperature, shape.bias, shape.softcap
        )
        return RowStatistics(lse=lse, logprobs=logprobs, entropies=None), values, units
    z, slope = _bent(logits, shape)
    target = shape.targets[:, None]
    shift = z.amax(dim=1, keepdim=True)
    at_target = (z.gather(1, target) - shift).squeeze(1)
    values = z.sub_(shift).exp_().scatter_(1, target, 0.0)
    others = values.sum(dim=1)
    whole = others + at_target.exp()
    log_whole = whole.log()
    values.scatter_(1, target, -others[:, None])
    if slope is not None:
        values *= slope
    found = RowStatistics(lse=shift.squeeze(1) + log_whole, logprobs=at_target - log_whole, entropies=None)
    return found, values.to(dtype), -1.0 / (whole * shape.temperature)


def gradients_(
    logits: Tensor,
    shape: RowShape,
    found: RowStatistics,
    d_logprobs: Tensor,
    d_entropies: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient of raw logits, in one sweep; the logits are gone after it.

    Args:
        logits: [T, V]; their storage may hold the result.
        shape: of the rows.
        found: of the same logits.
        d_logprobs: [T] d loss / d logprob; a row where all derivatives are 0 gets zeros, whatever it holds.
        d_entropies: [T] d loss / d entropy, or None; needs entropies in `found`.
        dtype: of the result; that of the logits, or a narrower one.
    """
    if (kernels := _kernels(logits)) is not None:
        result = _narrow(logits, dtype)
        kernels.gradients_(
            logits,
            result,
            shape.columns,
            shape.temperature,
            shape.bias,
            shape.softcap,
            found.lse,
            found.entropies,
            d_logprobs,
            d_entropies,
        )
        return result
    dead = d_logprobs == 0 if d_entropies is None else (d_logprobs == 0) & (d_entropies == 0)
    z, slope = _bent(torch.where(dead[:, None], 0.0, logits), shape)
    log_probs = z.sub_(torch.where(dead, 0.0, found.lse)[:, None])
    probs = log_probs.exp()
    gradient = probs * -d_logprobs[:, None]
    columns = shape.columns
    inside = _inside(columns, shape, gradient)
    at_target = torch.where(columns == inside, d_logprobs, 0.0)
    gradient.scatter_add_(1, inside[:, None], at_target[:, None].to(gradient.dtype))
    if d_entropies is not None and found.entropies is not None:  # dH/dz = -p (log p + H)
        gradient.sub_(d_entropies[:, None] * probs * (log_probs + found.entropies[:, None]))
    gradient /= shape.temperature[:, None]
    if slope is not None:
        gradient *= slope
    return torch.where(dead[:, None], 0.0, gradient).to(dtype)


def scaled(tensor: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor * factor` as `dtype`; in place where the dtype is the tensor's, and free on a GPU if the factor is 1.

    Args:
        tensor: contiguous; its storage may hold the result.
        factor: scalar on the tensor's device; its value never comes to the host.
        dtype: of the result.
    """
    result = tensor if tensor.dtype == dtype else torch.empty_like(tensor, dtype=dtype)
    if (kernels := _kernels(tensor)) is not None:
        kernels.scale(tensor, factor, result)
        return result
    return torch.mul(tensor, factor.to(tensor.dtype), out=tensor).to(dtype)


def _inside(columns: Tensor, shape: RowShape, logits: Tensor) -> Tensor:
    """Columns that can be read: those of targets that another rank has are moved to the nearest one here."""
    return columns if shape.shard is None else columns.clamp(0, logits.shape[1] - 1)


def _bent(logits: Tensor, shape: RowShape) -> tuple[Tensor, Tensor | None]:
    """Logits of the distribution, and the slope of the soft cap."""
    z = logits.to(shape.temperature.dtype)
    if shape.bias is not None:
        z = z + shape.bias.to(z.dtype)
    slope = None
    if shape.softcap is not None:
        bent = torch.tanh(z / shape.softcap)
        slope = 1.0 - bent.square()
        z = shape.softcap * bent
    return z / shape.temperature[:, None], slope


def _narrow(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """A view of the logits' storage as a dtype of half the width: the first half of each row."""
    if dtype == logits.dtype:
        return logits
    whole = logits.as_strided((len(logits), logits.stride(0)), (logits.stride(0), 1))
    return whole.view(dtype)[:, : logits.shape[1]]


def _kernels(tensor: Tensor) -> Any:
    """The Triton kernels if they can do a tensor's work, else None."""
    if tensor.dtype == torch.float64 or not _on_gpu(tensor):
        return None
    return _load_kernels()


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


@functools.cache
def _load_kernels() -> Any:
    if importlib.util.find_spec("triton") is None:
        _log.warning("Triton is not installed: rows of logits are worked on in torch, which is several times slower")
        return None
    from fitrl.objective import triton_rows

    return triton_rows
