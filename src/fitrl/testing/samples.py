"""Random trajectories near the bundled policy: their old logprobs are its own, a little off."""

from __future__ import annotations

import functools
import importlib.resources
from typing import TYPE_CHECKING

import torch

from fitrl.data.groups import Trajectory, TrajectoryGroup
from fitrl.data.histories import TokenHistory
from fitrl.data.samples import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@functools.cache
def reference_network() -> PreTrainedModel:
    """The bundled network, loaded by transformers alone, in float64: read it, do not change it."""
    from transformers import AutoModelForCausalLM

    folder = importlib.resources.files("fitrl.assets") / "tiny"
    network: PreTrainedModel = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float64)
    network.train(False)
    return network


@torch.no_grad()
def true_logprobs(token_ids: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """[T] float64 logprob of each token after those before it; NaN for the first."""
    logits = reference_network()(token_ids[None]).logits[0, :-1] / temperature
    chosen = logits.log_softmax(-1).gather(1, token_ids[1:, None]).squeeze(1)
    return torch.cat([torch.tensor([torch.nan], dtype=torch.float64), chosen])


def random_history(
    generator: torch.Generator, *, noise: float = 0.2, longest: int = 14, prompt: torch.Tensor | None = None
) -> TokenHistory:
    """Random bytes, perhaps after a prompt, some of them trainable, with the policy's logprobs plus noise."""
    length = int(torch.randint(3, longest, (), generator=generator))
    ids = torch.randint(0, 256, (length,), generator=generator)
    mask = torch.rand(length, generator=generator) < 0.6
    mask[0], mask[-1] = False, True
    if prompt is not None:
        ids, mask = torch.cat([prompt, ids]), torch.cat([torch.zeros_like(prompt, dtype=torch.bool), mask])
        length = len(ids)
    logprobs = true_logprobs(ids) + noise * torch.randn(length, generator=generator, dtype=torch.float64)
    return TokenHistory(
        token_ids=ids,
        mask=mask,
        logprobs=logprobs.clamp(max=0.0).float().masked_fill(~mask, torch.nan),
        temperature=torch.ones(length),
        versions=torch.where(mask, 0, -1),
    )


def make_samples(
    *,
    seed: int,
    num_trajectories: int,
    histories_per_trajectory: tuple[int, ...] = (1,),
    with_reference: bool = False,
    longest: int = 14,
) -> list[Sample]:
    """Samples of uneven lengths with advantages of both signs."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for index in range(num_trajectories):
        count = histories_per_trajectory[index % len(histories_per_trajectory)]
        sample = Sample(
            histories=[random_history(generator, longest=longest) for _ in range(count)],
            advantage=float(torch.randn((), generator=generator)),
        )
        if with_reference:
            sample.reference_logprobs = sample.old_logprobs + 0.1 * torch.randn(
                sample.old_logprobs.shape, generator=generator
            )
        samples.append(sample)
    return samples


def make_groups(
    *, seed: int, num_groups: int = 3, group_size: int = 4, longest: int = 14, prompt: int = 0
) -> list[TrajectoryGroup]:
    """Groups of token histories with rewards that differ, each after a prompt of its own of so many tokens."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(0, 256, (prompt,), generator=generator) if prompt else None for _ in range(num_groups)]
    return [
        TrajectoryGroup(
            [
                Trajectory(
                    token_histories=[random_history(generator, longest=longest, prompt=prompts[number])],
                    reward=float(index % 3) + 0.1 * number,
                )
                for index in range(group_size)
            ]
        )
        for number in range(num_groups)
    ]
