"""From samples to the microbatches of one call: old and reference logprobs, minibatches, packing.

Enters: the call's samples and settings, and a live policy. Leaves: a `Plan`, which Lightning runs as one epoch.
With several ranks every one makes the same microbatches, equally many for each, and keeps its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fitrl.data import ranks
from fitrl.data.packing import Microbatch, deal, microbatches, pack
from fitrl.data.samples import Sample, SampleSet
from fitrl.errors import CheckpointError
from fitrl.policy.module import PolicyModule
from fitrl.strategies.verbs import PolicyVerbs
from fitrl.trainers.memory import halve, max_tokens
from fitrl.trainers.settings import Reference, UpdateSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The microbatches of one call.

    Attributes:
        microbatches: this rank's, in order; every `accumulate` of them make one optimizer step.
        accumulate: microbatches of an optimizer step, fillers included.
        first_step: optimizer steps taken before the call; the dealing depends on it.
        kl_mean: mean of q - ref over the call, where there is a reference.
        counts: of each step of the call, over all ranks: input tokens, positions, tokens that need not be computed
            again.
    """

    microbatches: list[Microbatch]
    accumulate: int
    first_step: int
    kl_mean: float | None
    counts: list[tuple[int, int, int]]

    @property
    def num_steps(self) -> int:
        """Optimizer steps of these microbatches."""
        return len(self.microbatches) // self.accumulate

    @property
    def metrics(self) -> dict[str, float]:
        """How much of all ranks' batches is padding, and how many tokens need not be computed again."""
        tokens, positions, saved = map(sum, zip(*self.counts, strict=True))
        return {"data/padding_fraction": 1.0 - tokens / positions, "data/shared_prefix_tokens_saved": float(saved)}


def plan_call(samples: SampleSet, settings: UpdateSettings, verbs: PolicyVerbs) -> Plan:
    """Compute old and reference logprobs, deal the groups to minibatches, pack each into equally many microbatches."""
    kl_mean = _score(samples, settings, verbs)
    return _pack(samples, settings, verbs, verbs.policy_module.trainer.global_step, kl_mean, [])


def plan_rest(plan: Plan, samples: SampleSet, settings: UpdateSettings, verbs: PolicyVerbs) -> Plan:
    """The steps of a call that are still to be taken, packed again for what fits by now."""
    taken = verbs.policy_module.trainer.global_step - plan.first_step
    return _pack(samples, settings, verbs, plan.first_step, plan.kl_mean, plan.counts[:taken])


def _pack(
    samples: SampleSet,
    settings: UpdateSettings,
    verbs: PolicyVerbs,
    first_step: int,
    kl_mean: float | None,
    taken: list[tuple[int, int, int]],
) -> Plan:
    module, device = verbs.policy_module, verbs.root_device
    dealt = [
        indices
        for epoch in range(settings.num_epochs)
        for indices in deal(
            len(samples.groups), settings.num_minibatches, seed=settings.seed, step=first_step, epoch=epoch
        )
    ]
    steps: list[list[Microbatch]] = []
    for number in range(len(taken), len(dealt)):
        chosen = [sample for index in dealt[number] for sample in samples.groups[index]]
        steps.append(
            microbatches(
                chosen,
                max_tokens=max_tokens(chosen, settings.max_tokens_per_microbatch, module, device),
                kl_mean=kl_mean,
                skip_zero_advantage=settings.skips_zero_advantage,
                measures_mismatch=number == 0,
                multiple_of=ranks.num_data_ranks(),
                **_layout(module),
            )
        )
    accumulate = math.ceil(max(map(len, steps)) / ranks.num_data_ranks())
    for step in steps:
        step += [step[0].filler() for _ in range(accumulate * ranks.num_data_ranks() - len(step))]
    return Plan(
        microbatches=[microbatch for step in steps for microbatch in ranks.share_of(step)],
        accumulate=accumulate,
        first_step=first_step,
        kl_mean=kl_mean,
        counts=[*taken, *map(_counts, steps)],
    )


def _counts(step: Sequence[Microbatch]) -> tuple[int, int, int]:
    return (
        sum(microbatch.num_input_tokens for microbatch in step),
        sum(microbatch.num_positions for microbatch in step),
        sum(microbatch.num_tokens_saved for microbatch in step),
    )


def _score(samples: SampleSet, settings: UpdateSettings, verbs: PolicyVerbs) -> float | None:
    """Recompute old logprobs and compute the reference's, before the first step; returns the mean of q - ref."""
    module = verbs.policy_module
    reference = _resolve(settings.reference, module)
    if not settings.precalculate_logprobs and reference is None:
        return None
    module.logprob_chunk_size = settings.logprob_calculation_chunk_size
    flat = samples.flat
    if settings.precalculate_logprobs:
        for sample, column in zip(flat, _score_all(flat, settings, verbs, None), strict=True):
            sample.old_logprobs = column
    if reference is not None:
        for sample, column in zip(flat, _score_all(flat, settings, verbs, reference), strict=True):
            sample.reference_logprobs = column
    if reference is None:
        return None
    gaps = [
        (sample.old_logprobs - sample.reference_logprobs)[sample.mask]
        for sample in flat
        if sample.reference_logprobs is not None
    ]
    return float(torch.cat(gaps).double().mean())


def _score_all(
    samples: Sequence[Sample], settings: UpdateSettings, verbs: PolicyVerbs, reference: str | None
) -> list[Tensor]:
    """Logprobs of every sample as [T] columns; NaN where nothing was predicted. Each batch is computed once."""
    module = verbs.policy_module
    while True:
        batches = pack(
            samples,
            max_tokens=max_tokens(samples, settings.max_tokens_per_microbatch, module, verbs.root_device),
            multiple_of=ranks.num_data_ranks(),
            **_layout(module),
        )
        mine = {id(batch) for batch in ranks.share_of(batches)}
        try:
            rows = [
                verbs.score(batch, reference).double()
                if id(batch) in mine
                else torch.zeros(len(batch.loss_inputs.rows), dtype=torch.float64)
                for batch in batches
            ]
            break
        except torch.OutOfMemoryError as error:
            halve(max(batch.num_positions for batch in batches), samples, module, error)
    exact = next(module.policy.network.parameters()).dtype == torch.float64
    logprobs = ranks.sum_up(torch.cat(rows)).to(torch.float64 if exact else torch.float32)
    columns = [torch.full(sample.mask.shape, torch.nan, dtype=logprobs.dtype) for sample in samples]
    start = 0
    for index in (index for batch in batches for index in batch.members):
        count = samples[index].num_trainable_tokens
        columns[index][samples[index].mask] = logprobs[start : start + count]
        start += count
    return columns


def _resolve(reference: Reference | None, module: PolicyModule) -> str | None:
    """A step or path to its checkpoint folder; "base" stays."""
    if reference is None or reference == "base":
        return None if reference is None else "base"
    steps = module.model.checkpoints_dir
    folder = steps / f"{reference:04d}" if isinstance(reference, int) else Path(reference)
    if not folder.is_dir():
        raise CheckpointError(f"reference={reference!r}: there is no checkpoint folder {folder}")
    return str(folder)


def _layout(module: PolicyModule) -> dict[str, Any]:
    policy = module.policy
    return {
        "layout": "auto" if policy.can_pack else "padded",
        "share_prefixes": policy.can_share,
        "hidden_size": policy.hidden_size,
        "on_gpu": policy.skips_hidden_keys,
    }
