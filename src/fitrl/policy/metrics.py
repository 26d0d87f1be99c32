"""Metrics of a call: raw sums and maxima collected on the device, reduced once, ratios derived after that.

Enters: the raw scalars of every microbatch and optimizer step. Leaves: `area/name` floats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from fitrl.data import ranks
from fitrl.errors import InvalidArgumentError


class RawTotals(Metric):
    """Named raw scalars; a name that ends in `_max` is reduced by maximum, any other by sum.

    Names are those of the first update after a reset, the same on every rank; their values lie in two vectors,
    so that a reduction is two collectives however many there are.
    """

    full_state_update = False
    sums: Tensor
    maxima: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.names: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
        self.add_state("sums", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("maxima", torch.full((), -math.inf, dtype=torch.float64), dist_reduce_fx="max")
        self.mark()

    def update(self, values: Mapping[str, Tensor]) -> None:
        """Add one microbatch's or step's scalars."""
        if not any(self.names):
            self.names = (
                tuple(name for name in values if not name.endswith("_max")),
                tuple(name for name in values if name.endswith("_max")),
            )
        summed, peaked = self.names
        if values.keys() != {*summed, *peaked}:
            changed = sorted(values.keys() ^ {*summed, *peaked})
            raise InvalidArgumentError(
                f"an objective must return the same metrics for every microbatch of a call; {', '.join(changed)} came "
                "or went: return 0 where there is nothing to count"
            )
        if summed:
            self.sums = self.sums + torch.stack([values[name].double() for name in summed])
        if peaked:
            self.maxima = torch.maximum(self.maxima, torch.stack([values[name].double() for name in peaked]))

    def compute(self) -> dict[str, float]:
        """Everything as floats; one transfer to the host."""
        summed, peaked = self.names
        values = torch.cat([self.sums.reshape(-1), self.maxima.reshape(-1)]).tolist() if any(self.names) else []
        return dict(zip(summed, values, strict=False)) | dict(
            zip(peaked, values[len(values) - len(peaked) :], strict=True)
        )

    def reset(self) -> None:
        """Start the next call."""
        super().reset()
        self.names = ((), ())
        self.mark()

    def mark(self) -> None:
        """Remember this moment; `update` makes new tensors, so nothing is copied."""
        self._marked = (self.names, self.sums, self.maxima)

    def rewind(self) -> None:
        """Go back to the moment that was marked."""
        self.names, self.sums, self.maxima = self._marked


@dataclass(slots=True)
class CallTotals:
    """The raw totals of one call.

    Attributes:
        microbatches: what the objective returned.
        mismatch: trainer against sampler, where both hold the same weights.
        steps: what each optimizer step took.
    """

    microbatches: RawTotals = field(default_factory=RawTotals)
    mismatch: RawTotals = field(default_factory=RawTotals)
    steps: RawTotals = field(default_factory=RawTotals)
    _group: Any = None

    def reset(self, device: torch.device, group: Any = None) -> None:
        """Start the next call, on a device; reduced over a process group, None: over all ranks."""
        self._group = group
        for totals in (self.microbatches, self.mismatch, self.steps):
            totals.to(device)
            totals.reset()

    def mark(self) -> None:
        """Remember this moment: a step is complete."""
        for totals in (self.microbatches, self.mismatch, self.steps):
            totals.mark()

    def rewind(self) -> None:
        """Forget the microbatches of a step that was not completed."""
        for totals in (self.microbatches, self.mismatch, self.steps):
            totals.rewind()

    def compute(self) -> dict[str, float]:
        """Public metrics of the call; for all of them two collectives, and one transfer to the host."""
        used = [totals for totals in (self.microbatches, self.mismatch, self.steps) if any(totals.names)]
        if not used:
            return {}
        summed, peaked = ([name for totals in used for name in totals.names[place]] for place in (0, 1))
        sums = torch.cat([totals.sums.reshape(-1)[: len(totals.names[0])] for totals in used])
        maxima = torch.cat([totals.maxima.reshape(-1)[: len(totals.names[1])] for totals in used])
        if ranks.world_size() > 1:
            with ranks.naming_the_lost():
                dist.all_reduce(sums, group=self._group)
                dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=self._group)
        return derive(dict(zip([*summed, *peaked], torch.cat([sums, maxima]).tolist(), strict=True)))


def mismatch(logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Raw sums that compare the trainer's logprobs [R] with the sampler's, over tokens that have both."""
    known = mask & rollout_logprobs.isfinite()
    p = torch.where(known, logprobs.detach(), 0.0).double()
    o = torch.where(known, rollout_logprobs, 0.0).double()
    x, y = torch.where(known, o.exp(), 0.0), torch.where(known, p.exp(), 0.0)
    weight = torch.where(known, (p - o).clamp(-20.0, 20.0).exp(), 0.0)
    return {
        "mismatch_count": known.sum(),
        "mismatch_kl_sum": (o - p).sum(),
        "mismatch_x": x.sum(),
        "mismatch_y": y.sum(),
        "mismatch_xx": (x * x).sum(),
        "mismatch_yy": (y * y).sum(),
        "mismatch_xy": (x * y).sum(),
        "mismatch_weight_sum": weight.sum(),
        "mismatch_weight_square_sum": (weight * weight).sum(),
    }


def derive(raw: Mapping[str, float]) -> dict[str, float]:
    """Public metrics from reduced raw ones; only those whose inputs are there.

    `ratio/ess` is the effective sample size `(sum r)^2 / sum r^2` divided by the number of tokens;
    `mismatch/kl` the mean of o - p; `mismatch/prob_corr` Pearson's correlation of exp(o) and exp(p); `mismatch/ess` the
    effective sample size of the weights exp(p - o), likewise. Where old logprobs are recomputed, this one falls as the
    tokens go stale, and `ratio/ess` does not.
    """
    out: dict[str, float] = {}
    steps = raw.get("step_count", 0.0)
    if steps:
        for part in ("train", "policy", "kl", "entropy"):
            if f"loss_{part}" in raw:
                out[f"loss/{part}"] = raw[f"loss_{part}"] / steps
        if "grad_norm" in raw:  # a service may not tell
            out["loss/grad_norm"] = raw["grad_norm"] / steps
        out["loss/learning_rate"] = raw["learning_rate"] / steps
    tokens = raw.get("token_count", 0.0)
    if tokens and "ratio_sum" in raw:
        out["ratio/mean"] = raw["ratio_sum"] / tokens
        out["ratio/max"] = raw["ratio_max"]
        out["ratio/clip_fraction_low"] = raw["clip_low_count"] / tokens
        out["ratio/clip_fraction_high"] = raw["clip_high_count"] / tokens
        squares = raw["ratio_square_sum"]
        out["ratio/ess"] = raw["ratio_sum"] ** 2 / squares / tokens if squares else 0.0
    count = raw.get("mismatch_count", 0.0)
    if count:
        out["mismatch/kl"] = raw["mismatch_kl_sum"] / count
        out["mismatch/ess"] = raw["mismatch_weight_sum"] ** 2 / raw["mismatch_weight_square_sum"] / count
        mean_x, mean_y = raw["mismatch_x"] / count, raw["mismatch_y"] / count
        variance = (raw["mismatch_xx"] / count - mean_x**2) * (raw["mismatch_yy"] / count - mean_y**2)
        covariance = raw["mismatch_xy"] / count - mean_x * mean_y
        out["mismatch/prob_corr"] = covariance / math.sqrt(variance) if variance > 1e-24 else math.nan
    known = set(_RAW_NAMES)
    out |= {f"objective/{name}": value for name, value in raw.items() if name not in known}
    return out


_RAW_NAMES = (
    *("loss_train", "loss_policy", "loss_kl", "loss_entropy", "step_count", "grad_norm", "learning_rate"),
    *("token_count", "ratio_sum", "ratio_square_sum", "ratio_max", "clip_low_count", "clip_high_count"),
    *(
        "mismatch_count",
        "mismatch_kl_sum",
        "mismatch_x",
        "mismatch_y",
        "mismatch_xx",
        "mismatch_yy",
        "mismatch_xy",
        "mismatch_weight_sum",
        "mismatch_weight_square_sum",
    ),
)
