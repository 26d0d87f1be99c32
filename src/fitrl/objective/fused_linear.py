"""From hidden states to the policy loss without the batch's logits: tiles of rows, recomputed in backward.

Enters: last hidden states and the output head. Leaves: logprobs (and entropies) with grad, or the whole policy
loss. Only one [rows_per_tile, V] tile of logits exists at a time, in forward and in backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fitrl.errors import InvalidArgumentError
from fitrl.objective.objective import Objective, PolicyLoss
from fitrl.objective.policy_loss import policy_loss

# elements of one tile of logits: 128 MiB in float32
_TILE_ELEMENTS = 2**25


def fused_linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    trajectory_ids: Tensor,
    objective: Objective,
    *,
    bias: Tensor | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    rows_per_tile: int | None = None,
    exact_logits: bool = False,
    with_entropies: bool = False,
    rollout_logprobs: Tensor | None = None,
    reference_logprobs: Tensor | None = None,
    num_tokens: Tensor | float | None = None,
    num_sequences: Tensor | float | None = None,
    kl_mean: Tensor | float | None = None,
) -> PolicyLoss:
    """`policy_loss` of `hidden @ weight.T`, never holding more than one tile of logits.

    Args:
        hidden: [T, H] bf16, fp16, fp32 or fp64, with grad.
        weight: [V, H] output head, with grad or frozen.
        targets: [T] int64, the token that each row predicts.
        old_logprobs: [T], see `policy_loss`; so are the other tensors of its names.
        advantages: [T].
        mask: [T]; hidden states of rows that are masked out may hold anything.
        trajectory_ids: [T] int64.
        objective: which loss.
        bias: [V] or None.
        temperature: scalar or [T]; logits are divided by it.
        softcap: logits become `softcap * tanh(logits / softcap)` before the temperature (Gemma 2).
        rows_per_tile: rows of logits held at once; None: 2^25 elements.
        exact_logits: float32 logits from 16-bit inputs, instead of logits rounded to 16 bits.
        with_entropies: also compute entropies when `entropy_coef` is 0.
        rollout_logprobs: [T].
        reference_logprobs: [T].
        num_tokens: global count.
        num_sequences: global count.
        kl_mean: see `policy_loss`.

    Returns:
        The loss with its metrics, and `.logprobs` [T] without grad; `.entropies` [T] when computed.
    """
    rows = _check(hidden, weight, targets, bias, temperature)
    if mask.shape != (rows,):
        raise InvalidArgumentError(f"mask must be [{rows}], got {tuple(mask.shape)}")
    keep = mask.bool()
    if isinstance(temperature, Tensor) and temperature.dim():
        temperature = torch.where(keep, temperature, 1.0)
    logprobs, entropies = linear_logprobs(
        torch.where(keep[:, None], hidden, 0.0),
        weight,
        torch.where(keep, targets, 0),
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        rows_per_tile=rows_per_tile,
        exact_logits=exact_logits,
        with_entropies=with_entropies or objective.entropy_coef != 0,
    )
    result = policy_loss(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        trajectory_ids,
        objective,
        rollout_logprobs=rollout_logprobs,
        reference_logprobs=reference_logprobs,
        entropies=entropies,
        num_tokens=num_tokens,
        num_sequences=num_sequences,
        kl_mean=kl_mean,
    )
    return PolicyLoss(
        loss=result.loss,
        metrics=result.metrics,
        logprobs=logprobs.detach(),
        entropies=None if entropies is None else entropies.detach(),
    )


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
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target under `softmax(hidden @ weight.T / temperature)`, by tiles of rows.

    Returns:
        logprobs [T] and, with `with_entropies`, entropies [T]; float32 (float64 from float64), with grad.

    Raises:
        InvalidArgumentError: shapes or dtypes that do not fit.
    """
    rows = _check(hidden, weight, targets, bias, temperature)
    if rows_per_tile is None:
        rows_per_tile = max(1, _TILE_ELEMENTS // weight.shape[0])
    elif rows_per_tile < 1:
        raise InvalidArgumentError(f"rows_per_tile must be at least 1, got {rows_per_tile}")
    accumulate = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    scale = torch.as_tensor(temperature, dtype=accumulate, device=hidden.device).expand(rows)
    logprobs, entropies = _LinearLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, scale, softcap, rows_per_tile, exact_logits, with_entropies
    )
    return logprobs, entropies if with_entropies else None


def linear_logits(
    hidden: Tensor, weight: Tensor, *, bias: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """Float32 logits [T, V] of hidden states [T, H]; not rounded to 16 bits on the way. For samplers."""
    head = _Head(hidden, weight, bias, softcap, True)
    return head(hidden, torch.ones(hidden.shape[0], dtype=head.accumulate, device=hidden.device))[0]


class _LinearLogprobs(torch.autograd.Function):
    """Tiled log-softmax of a linear head; backward recomputes each tile from the saved log-sum-exp."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: Tensor,
        softcap: float | None,
        rows_per_tile: int,
        exact_logits: bool,
        with_entropies: bool,
    ) -> tuple[Tensor, Tensor]:
        head = _Head(hidden, weight, bias, softcap, exact_logits)
        logprobs = torch.empty_like(temperature, memory_format=torch.contiguous_format)
        lse = torch.empty_like(logprobs)
        entropies = torch.zeros_like(logprobs)
        for tile in _tiles(hidden.shape[0], rows_per_tile):
            logits, _ = head(hidden[tile], temperature[tile])
            lse[tile] = logits.logsumexp(dim=1)
            logprobs[tile] = logits.gather(1, targets[tile, None]).squeeze(1) - lse[tile]
            if with_entropies:
                # not lse minus the mean logit: that cancels where the logits share an offset
                log_probs = logits - lse[tile, None]
                entropies[tile] = -(log_probs.exp() * log_probs).sum(dim=1)
        ctx.save_for_backward(hidden, weight, bias, targets, temperature, lse, entropies)
        ctx.head, ctx.rows_per_tile, ctx.with_entropies = head.settings, rows_per_tile, with_entropies
        ctx.set_materialize_grads(False)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logprobs: Tensor | None, d_entropies: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, temperature, lse, entropies = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        if not ctx.with_entropies:
            d_entropies = None
        head = _Head(hidden, weight, bias, *ctx.head)
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = torch.zeros(weight.shape, dtype=lse.dtype, device=lse.device) if need_weight else None
        d_bias = torch.zeros(weight.shape[0], dtype=lse.dtype, device=lse.device) if need_bias else None
        for tile in _tiles(hidden.shape[0], ctx.rows_per_tile):
            logits, cap_slope = head(hidden[tile], temperature[tile])
            log_probs = logits.sub_(lse[tile, None])
            probs = log_probs.exp()
            d_logits = torch.zeros_like(probs)
            if d_entropies is not None:  # dH/dz = -softmax (log softmax + H)
                d_logits -= d_entropies[tile, None] * probs * (log_probs + entropies[tile, None])
            if d_logprobs is not None:
                d_logits.addcmul_(probs, d_logprobs[tile, None], value=-1.0)
                d_logits.scatter_add_(1, targets[tile, None], d_logprobs[tile, None].to(d_logits.dtype))
            d_logits /= temperature[tile, None]
            if cap_slope is not None:
                d_logits *= cap_slope
            head.backward(d_logits, tile, d_hidden, d_weight)
            if d_bias is not None:
                d_bias += d_logits.sum(dim=0)
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None or bias is None else d_bias.to(bias.dtype),
            *[None] * 6,
        )


class _Head:
    """The matrix products of a linear head, in the dtype that autocast asks for."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        exact_logits: bool,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.device_type = hidden.device.type
        if dtype is None:
            autocast = torch.is_autocast_enabled(self.device_type) and hidden.dtype != torch.float64
            dtype = torch.get_autocast_dtype(self.device_type) if autocast else hidden.dtype
        self.settings = (softcap, exact_logits, dtype)
        self.softcap, self.exact, self.dtype = softcap, exact_logits, dtype
        self.accumulate = torch.float64 if dtype == torch.float64 else torch.float32
        self.hidden = hidden.to(dtype)
        self.weight = weight.to(dtype)
        self.bias = None if bias is None else bias.to(self.accumulate)
        self.half = dtype in (torch.bfloat16, torch.float16)

    def __call__(self, hidden: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits of a tile, divided by the temperature, and the slope of the soft cap."""
        rows = hidden.to(self.dtype)
        with torch.autocast(self.device_type, enabled=False):
            if self.half and self.exact and self.device_type == "cuda":
                logits = torch.mm(rows, self.weight.t(), out_dtype=torch.float32)
            elif self.half and self.exact:
                logits = rows.float() @ self.weight.float().t()
            else:
                logits = (rows @ self.weight.t()).to(self.accumulate)
            if self.bias is not None:
                logits += self.bias
            slope = None
            if self.softcap is not None:
                bent = torch.tanh(logits / self.softcap)
                slope = 1.0 - bent.square()
                logits = self.softcap * bent
            return logits / temperature[:, None], slope

    def backward(self, d_logits: Tensor, tile: slice, d_hidden: Tensor | None, d_weight: Tensor | None) -> None:
        """Write the tile's gradient of the hidden states and add to that of the weight."""
        with torch.autocast(self.device_type, enabled=False):
            rows = d_logits.to(self.dtype)
            if d_hidden is not None:
                d_hidden[tile] = (rows @ self.weight).to(d_hidden.dtype)
            if d_weight is not None:
                if self.half:
                    d_weight += rows.t() @ self.hidden[tile]
                else:
                    d_weight.addmm_(rows.t(), self.hidden[tile])


def _tiles(rows: int, rows_per_tile: int) -> list[slice]:
    return [slice(start, min(start + rows_per_tile, rows)) for start in range(0, rows, rows_per_tile)]


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: Tensor | float) -> int:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise InvalidArgumentError(
            f"hidden must be [T, H] and weight [V, H], got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    rows = hidden.shape[0]
    if targets.shape != (rows,) or targets.dtype != torch.int64:
        raise InvalidArgumentError(f"targets must be [{rows}] int64, got {tuple(targets.shape)} {targets.dtype}")
    if bias is not None and bias.shape != (weight.shape[0],):
        raise InvalidArgumentError(f"bias must be [{weight.shape[0]}], got {tuple(bias.shape)}")
    if isinstance(temperature, Tensor) and temperature.shape not in ((), (rows,)):
        raise InvalidArgumentError(f"temperature must be a scalar or [{rows}], got {tuple(temperature.shape)}")
    if not hidden.is_floating_point() or not weight.is_floating_point():
        raise InvalidArgumentError(f"hidden and weight must be floating point, got {hidden.dtype} and {weight.dtype}")
    return rows
