"""From samples to the microbatches of one call: old and reference logprobs, minibatches, packing.

Enters: the call's samples and settings, and a live policy. Leaves: a `Plan`, which Lightning runs as one epoch.
With several ranks every one makes the same microbatches, equally many for each, and keeps its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fitrl.data import ranks
from fitrl.data.batch import Batch
from fitrl.data.packing import deal, pack
from fitrl.data.samples import Sample, SampleSet, num_positions
from fitrl.errors import CheckpointError
from fitrl.policy.module import PolicyModule
from fitrl.strategies.verbs import PolicyVerbs
from fitrl.trainers.settings import Reference, UpdateSettings

_CPU_TOKENS = 8192
_MOST_TOKENS = 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The microbatches of one call.

    Attributes:
        batches: this rank's, in order; every `accumulate` of them make one optimizer step.
        accumulate: microbatches of an optimizer step, fillers included.
        metrics: how much of all ranks' batches is padding, and how many tokens need not be computed again.
    """

    batches: list[Batch]
    accumulate: int
    metrics: dict[str, float]

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the call."""
        return len(self.batches) // self.accumulate


def plan_call(samples: SampleSet, settings: UpdateSettings, verbs: PolicyVerbs) -> Plan:
    """Deal the groups to minibatches and pack each into microbatches, all with equally many."""
    module = verbs.policy_module
    kl_mean = _score(samples, settings, verbs)
    steps: list[list[Batch]] = []
    for epoch in range(settings.num_epochs):
        dealt = deal(
            len(samples.groups),
            settings.num_minibatches,
            seed=settings.seed,
            step=module.trainer.global_step,
            epoch=epoch,
        )
        for indices in dealt:
            chosen = [sample for index in indices for sample in samples.groups[index]]
            steps.append(
                pack(
                    chosen,
                    max_tokens=_max_tokens(chosen, settings, module, verbs.root_device),
                    kl_mean=kl_mean,
                    skip_zero_advantage=settings.skips_zero_advantage,
                    measures_mismatch=not steps,
                    multiple_of=ranks.world_size(),
                    **_layout(module),
                )
            )
    accumulate = math.ceil(max(map(len, steps)) / ranks.world_size())
    for batches in steps:
        batches += [batches[0].filler() for _ in range(accumulate * ranks.world_size() - len(batches))]
    everyone = [batch for batches in steps for batch in batches]
    tokens, positions, saved = (
        sum(getattr(batch, name) for batch in everyone)
        for name in ("num_input_tokens", "num_positions", "num_tokens_saved")
    )
    return Plan(
        batches=[batch for batches in steps for batch in ranks.share_of(batches)],
        accumulate=accumulate,
        metrics={
            "data/padding_fraction": 1.0 - tokens / positions,
            "data/shared_prefix_tokens_saved": float(saved),
        },
    )


def _score(samples: SampleSet, settings: UpdateSettings, verbs: PolicyVerbs) -> float | None:
    """Recompute old logprobs and compute the reference's, before the first step; returns the mean of q - ref."""
    module = verbs.policy_module
    reference = _resolve(settings.reference, module)
    if not settings.precalculate_logprobs and reference is None:
        return None
    module.logprob_chunk_size = settings.logprob_calculation_chunk_size
    flat = samples.flat
    batches = pack(
        flat,
        max_tokens=_max_tokens(flat, settings, module, verbs.root_device),
        multiple_of=ranks.world_size(),
        **_layout(module),
    )
    exact = next(module.policy.network.parameters()).dtype == torch.float64
    dtype = torch.float64 if exact else torch.float32
    if settings.precalculate_logprobs:
        for sample, column in _score_all(batches, flat, lambda batch: verbs.score(batch, None), dtype):
            sample.old_logprobs = column
    if reference is not None:
        for sample, column in _score_all(batches, flat, lambda batch: verbs.score(batch, reference), dtype):
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
    batches: Sequence[Batch], samples: Sequence[Sample], score: Callable[[Batch], Tensor], dtype: torch.dtype
) -> list[tuple[Sample, Tensor]]:
    """Logprobs of every batch's rows, each computed by one rank, as [T] columns; NaN where nothing was predicted."""
    mine = {id(batch) for batch in ranks.share_of(batches)}
    rows = [
        score(batch).double() if id(batch) in mine else torch.zeros(len(batch.loss_inputs.rows), dtype=torch.float64)
        for batch in batches
    ]
    logprobs = ranks.sum_up(torch.cat(rows)).to(dtype)
    columns: list[tuple[Sample, Tensor]] = []
    start = 0
    for index in (index for batch in batches for index in batch.members):
        sample = samples[index]
        column = torch.full(sample.mask.shape, torch.nan, dtype=logprobs.dtype)
        column[sample.mask] = logprobs[start : start + sample.num_trainable_tokens]
        start += sample.num_trainable_tokens
        columns.append((sample, column))
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
        "sparse_attention": policy.skips_hidden_keys,
    }


def _max_tokens(samples: Sequence[Sample], settings: UpdateSettings, module: PolicyModule, device: torch.device) -> int:
    """Positions in a microbatch: as told, else what is likely to fit beside the weights."""
    if settings.max_tokens_per_microbatch is not None:
        return settings.max_tokens_per_microbatch
    longest = max(num_positions(sample.histories, padded=not module.policy.can_pack) for sample in samples)
    if device.type != "cuda":
        return max(longest, _CPU_TOKENS)
    free = torch.cuda.mem_get_info(device)[0] + (
        torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    )
    # activations of a decoder layer: about 34 H two-byte values a token (Korthikanti et al. 2022), doubled for
    # float32 residuals; a few H of them with checkpointing
    values = (4 if module.activation_checkpointing else 68) * module.policy.hidden_size * module.policy.num_layers
    fits = min(int(0.5 * free / (2 * values)), _MOST_TOKENS)
    return max(longest, min(map(int, ranks.collect(str(fits)))))  # every rank makes the same plan
