"""From hidden states to the policy loss without the batch's logits: gradients in forward, by tiles of rows.

Enters: last hidden states and the output head. Leaves: the policy loss, or logprobs (and entropies) with grad. Only one
tile of logits exists at a time. One sweep over it leaves logprobs, and the gradient of the logits up to a factor of
each row; `loss_terms` and autograd over vectors give the factors, and two products take the gradient to the hidden
states and the weight: three products in all, where computing the logits again in backward takes four. Entropies and
float16 take a second sweep. The loss itself is defined in `policy_loss` alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fitrl.objective.head_inputs import check_head, check_targets, check_vectors, row_shape, wide_dtype
from fitrl.objective.linear_head import HeadGradients, LinearHead, compute_dtype, in_tiles, tiles
from fitrl.objective.logprobs import LinearLogprobs
from fitrl.objective.objective import Objective, PolicyLoss
from fitrl.objective.policy_loss import LossTerms, added, loss_terms
from fitrl.objective.rows import RowShape, RowStatistics, scaled, statistics, swept_
from fitrl.objective.token_rows import TokenRows, independent_of_other_rows, token_rows
from fitrl.objective.vocabulary_shard import VocabularyShard


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
    leave_out: bool = True,
    shard: VocabularyShard | None = None,
    rollout_logprobs: Tensor | None = None,
    reference_logprobs: Tensor | None = None,
    num_tokens: Tensor | float | None = None,
    num_sequences: Tensor | float | None = None,
    kl_mean: Tensor | float | None = None,
) -> PolicyLoss:
    """`policy_loss` of `hidden @ weight.T`, never holding more than one tile of logits.

    Three products with the weight, two if it is frozen. Where the loss of a token depends on other tokens' new
    logprobs (sequence-level ratios; `kl_in="advantage"` without `kl_mean`) and the rows do not fit into one tile, the
    logits are computed twice. Without gradients: one product.

    Rows that cannot have a gradient are left out before the head: those masked out, and those of advantage 0 if the
    objective teaches nothing without one (of whole trajectories for sequence-level ratios; never if entropies or
    reference logprobs are given, whose metrics need them). The loss and its denominators stay the same; `token_count`
    and the metrics of ratios are over the rows that were computed. Finding the rows takes a device synchronisation if
    `mask` and `advantages` are on a GPU; with the mask alone on the CPU only masked-out rows are left out.

    With a `shard` of the vocabulary it is a collective of the ranks that hold the others. Statistics of each row cross
    between them, and in backward the sum of their gradients of the hidden states [T, H]; loss, logprobs and the
    gradient of `hidden` are those of the whole head on every rank, the gradients of `weight` and `bias` those of the
    rows that are here. It takes two sweeps, and a tile that does not fit is an error.

    Targets are checked against V on the CPU; on a GPU only with FITRL_DEBUG=1 in the environment, because it
    synchronises. Otherwise one that is out of range there makes a NaN.

    Args:
        hidden: [T, H] bf16, fp16, fp32 or fp64, with grad.
        weight: [V, H] output head, with grad or frozen; or the rows of it that `shard` says.
        targets: [T] int64, the token that each row predicts.
        old_logprobs: [T], see `policy_loss`; so are the other tensors of its names. None of them gets a gradient.
        advantages: [T].
        mask: [T], here or on the CPU; hidden states of rows that are masked out may hold anything.
        trajectory_ids: [T] int64.
        objective: which loss.
        bias: [V] or None, with grad or frozen.
        temperature: scalar or [T]; logits are divided by it.
        softcap: logits become `softcap * tanh(logits / softcap)` before the temperature (Gemma 2).
        rows_per_tile: rows of logits held at once; None: 2.3 GiB of logits (128 MiB on the CPU). Halved, and the
            number of bytes that fitted remembered for the device, when the GPU is out of memory.
        exact_logits: float32 logits from 16-bit inputs, instead of logits rounded to 16 bits.
        with_entropies: also compute entropies when `entropy_coef` is 0.
        leave_out: False: compute all rows, and never synchronise; for rows that were chosen before.
        shard: which rows of the head `weight` is, and who holds the others; None: it is the whole head.
        rollout_logprobs: [T].
        reference_logprobs: [T].
        num_tokens: global count.
        num_sequences: global count.
        kl_mean: see `policy_loss`.

    Returns:
        The loss with its metrics, and `.logprobs` [T] without grad, NaN where a row was left out or is masked out;
        `.entropies` [T] likewise when computed.

    Raises:
        InvalidArgumentError: shapes, devices or dtypes that do not fit, targets out of range.
    """
    size = check_head(hidden, weight, targets, bias, temperature, rows_per_tile, softcap, shard)
    vectors = {
        "old_logprobs": old_logprobs,
        "advantages": advantages,
        "mask": mask,
        "trajectory_ids": trajectory_ids,
        "rollout_logprobs": rollout_logprobs,
        "reference_logprobs": reference_logprobs,
    }
    check_vectors(hidden, size, vectors)
    with torch.no_grad():
        index = None
        if leave_out:
            index = _rows_with_gradient(
                objective,
                mask,
                advantages,
                trajectory_ids,
                only_masked=with_entropies or reference_logprobs is not None,
            )
            index = None if index is None else index.to(hidden.device, non_blocking=True)
        mask = mask.to(hidden.device, non_blocking=True).bool()
        check_targets(targets, len(weight) if shard is None else shard.size, mask)
        shape = row_shape(hidden, targets, temperature, bias, softcap, shard=shard)
        if index is not None:
            shape.targets = shape.targets.index_select(0, index)
            shape.temperature = shape.temperature.index_select(0, index)
        elif not leave_out:
            shape.targets = torch.where(mask, shape.targets, 0)
            shape.temperature = torch.where(mask, shape.temperature, 1.0)

    @functools.cache
    def rows() -> TokenRows:
        with torch.no_grad():
            return token_rows(
                old_logprobs,
                advantages,
                mask,
                trajectory_ids,
                objective,
                size=size,
                dtype=wide_dtype(hidden),
                rollout_logprobs=rollout_logprobs,
                reference_logprobs=reference_logprobs,
                num_tokens=num_tokens,
                num_sequences=num_sequences,
                kl_mean=kl_mean,
                chosen=(slice(None) if index is None else index) if leave_out else None,
            )

    job = _Job(
        rows=rows,
        shape=shape,
        objective=objective,
        independent=independent_of_other_rows(objective, kl_mean=kl_mean),
        index=index,
        mask=None if leave_out else mask,
        size=size,
        exact=exact_logits,
        with_entropies=with_entropies or objective.entropy_coef != 0,
        dtype=compute_dtype(hidden),
    )
    loss = in_tiles(
        lambda rows_per_tile: job.loss(hidden, weight, bias, rows_per_tile),
        rows=len(job),
        rows_per_tile=rows_per_tile,
        vocabulary=len(weight),
        itemsize=job.itemsize,
        device=hidden.device,
        shard=shard,
    )
    return PolicyLoss(
        loss=loss, metrics=job.metrics, logprobs=job.whole(job.logprobs), entropies=job.whole(job.entropies)
    )


class _Job:
    """One call of `fused_linear_policy_loss`, which may run again: with smaller tiles, or for a second backward.

    Args:
        rows: makes what the loss needs of the chosen rows, once; called when the first tile's logits are on their way.
        shape: of the chosen rows.
        objective: which loss.
        independent: whether the rows may be cut.
        index: [R] the chosen rows; None: all.
        mask: [T] bool, rows to clean; None: none.
        size: T.
        exact: see `fused_linear_policy_loss`.
        with_entropies: whether entropies are computed.
        dtype: of the products.
    """

    def __init__(
        self,
        *,
        rows: Callable[[], TokenRows],
        shape: RowShape,
        objective: Objective,
        independent: bool,
        index: Tensor | None,
        mask: Tensor | None,
        size: int,
        exact: bool,
        with_entropies: bool,
        dtype: torch.dtype,
    ) -> None:
        self.rows, self.shape, self.objective, self.independent = rows, shape, objective, independent
        self.index, self.mask, self.size = index, mask, size
        self.exact, self.with_entropies, self.dtype = exact, with_entropies, dtype
        self.itemsize = 4 if exact and dtype.itemsize == 2 else dtype.itemsize
        self.rows_per_tile = 1
        self.metrics: dict[str, Tensor] = {}
        self.logprobs: Tensor | None = None
        self.entropies: Tensor | None = None

    def __len__(self) -> int:
        return self.size if self.index is None else len(self.index)

    def loss(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows_per_tile: int) -> Tensor:
        """The loss with grad, and the rest of the results in the attributes."""
        self.rows_per_tile = rows_per_tile
        inputs = (hidden, weight) if bias is None else (hidden, weight, bias)
        trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
        if trains and (self.independent or len(self) <= rows_per_tile):
            return _GradientsInForward.apply(self, hidden, weight, bias)  # type: ignore[no-untyped-call, no-any-return]
        logprobs, entropies = LinearLogprobs.apply(  # type: ignore[no-untyped-call]
            self.chosen(hidden), weight, bias, self.shape, rows_per_tile, self.exact, self.with_entropies
        )
        terms = loss_terms(logprobs, self.rows(), self.objective, entropies if self.with_entropies else None)
        self.metrics, self.logprobs = terms.metrics(), logprobs.detach()
        self.entropies = entropies.detach() if self.with_entropies else None
        return terms.loss

    def gradients(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor, HeadGradients]:
        """Loss and gradients of all tiles."""
        head = LinearHead(self.chosen(hidden.detach()), weight, self.shape, exact=self.exact, dtype=self.dtype)
        gradients = HeadGradients(head, needs, self.rows_per_tile, hidden_dtype=hidden.dtype, weight_dtype=weight.dtype)
        metrics: dict[str, Tensor] = {}
        found: list[RowStatistics] = []
        for tile in tiles(len(head), self.rows_per_tile) if len(head) else [slice(0, 0)]:
            logits = head.logits(tile)
            if head.one_sweep(with_entropies=self.with_entropies):
                statistic, values, units = swept_(logits, self.shape[tile], self.dtype)
                terms, d_logprobs, _ = _derivatives(statistic, self.rows()[tile], self.objective)
                if len(head):
                    gradients.add(tile, values, d_logprobs * units)
            else:
                statistic = statistics(logits, self.shape[tile], with_entropies=self.with_entropies)
                terms, d_logprobs, d_entropies = _derivatives(statistic, self.rows()[tile], self.objective)
                if len(head):
                    gradients.add_rows(tile, logits, statistic, d_logprobs, d_entropies)
            metrics = added(metrics, terms.metrics()) if metrics else terms.metrics()
            found.append(statistic)
        gradients.join()
        self.metrics, self.logprobs = metrics, torch.cat([statistic.logprobs for statistic in found])
        if self.with_entropies:
            self.entropies = torch.cat([statistic.entropies for statistic in found if statistic.entropies is not None])
        return metrics["loss_train"], gradients

    def chosen(self, hidden: Tensor) -> Tensor:
        """Hidden states of the rows that are computed, clean."""
        if self.index is not None:
            return hidden.index_select(0, self.index)
        return hidden if self.mask is None else torch.where(self.mask[:, None], hidden, 0.0)

    def given_back(self, d_hidden: Tensor) -> Tensor:
        """The gradient of the chosen rows as that of all."""
        if self.index is None:
            return d_hidden
        return d_hidden.new_zeros((self.size, d_hidden.shape[1])).index_copy_(0, self.index, d_hidden)

    def whole(self, values: Tensor | None) -> Tensor | None:
        """Values of the rows as those of all: NaN where there is none."""
        if values is None:
            return None
        if self.index is not None:
            return values.new_full((self.size,), torch.nan).index_copy_(0, self.index, values)
        return values if self.mask is None else torch.where(self.mask, values, torch.nan)


def _derivatives(
    found: RowStatistics, rows: TokenRows, objective: Objective
) -> tuple[LossTerms, Tensor, Tensor | None]:
    """The loss of some rows, and its derivatives by their logprobs and entropies."""
    with torch.enable_grad():
        logprobs, entropies = found.logprobs.detach().requires_grad_(), found.entropies
        leaves = [logprobs]
        if entropies is not None and objective.entropy_coef:
            entropies = entropies.detach().requires_grad_()
            leaves.append(entropies)
        terms = loss_terms(logprobs, rows, objective, entropies)
    d_logprobs, *d_entropies = torch.autograd.grad(terms.loss, leaves)
    return terms, d_logprobs, d_entropies[0] if d_entropies else None


class _GradientsInForward(torch.autograd.Function):
    """A loss whose gradients are there when it is; backward multiplies them by what comes in."""

    @staticmethod
    def forward(ctx: Any, job: _Job, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        loss, ctx.gradients = job.gradients(hidden, weight, bias, ctx.needs_input_grad[1:4])
        ctx.job = job
        ctx.save_for_backward(hidden, weight, bias)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        found, ctx.gradients = ctx.gradients, None  # what goes out belongs to whoever takes it
        if found is None:  # the graph was retained, and this is not its first backward
            _, found = ctx.job.gradients(hidden, weight, bias, ctx.needs_input_grad[1:4])
        d_hidden = None if found.hidden is None else ctx.job.given_back(scaled(found.hidden, d_loss, hidden.dtype))
        d_weight = None if found.weight is None else scaled(found.weight, d_loss, weight.dtype)
        d_bias = None if found.bias is None else scaled(found.bias, d_loss, bias.dtype)
        return None, d_hidden, d_weight, d_bias


def _rows_with_gradient(
    objective: Objective, mask: Tensor, advantages: Tensor, trajectory_ids: Tensor, *, only_masked: bool
) -> Tensor | None:
    """Indices of the rows that can have a gradient; None if they are all."""
    needed = mask.bool()
    one_device = mask.device == advantages.device == trajectory_ids.device
    if one_device and not only_masked and not objective.teaches_without_advantage:
        teaches = needed & (advantages != 0)
        if objective.importance_sampling_level != "token":
            ids = torch.where(needed, trajectory_ids, 0)
            teaches = torch.zeros_like(teaches).index_put((ids[teaches],), teaches.new_ones(()))[ids]
        needed = needed & teaches
    index = needed.nonzero().squeeze(1)
    return None if len(index) == len(mask) else index
