"""The bundled policy trained by plain torch: what a subject's numbers are compared with.

Enters: samples or groups. Leaves: loss, gradient's norm, weights, in float64, written from the objective's text: one
history at a time, no packing, no microbatches, no ranks, no Lightning.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fitrl.data.groups import TrajectoryGroup
from fitrl.data.samples import Sample
from fitrl.testing.samples import reference_network


class ByHand:
    """Full weights under AdamW with its usual constants and no weight decay.

    Args:
        clip: largest norm of a gradient; None: any.
    """

    def __init__(self, clip: float | None = None) -> None:
        self.network = copy.deepcopy(reference_network()).train()
        self._clip = math.inf if clip is None else clip
        self.forget_moments()

    def forget_moments(self) -> None:
        """Start a fresh optimizer."""
        self._optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
        )

    def logprobs(self, sample: Sample) -> Tensor:
        """Float64 logprobs of the sample's trainable tokens in order."""
        columns = []
        for history in sample.histories:
            logits = self.network(history.token_ids[None]).logits[0, :-1] / history.temperature[1:, None]
            chosen = logits.log_softmax(-1).gather(1, history.token_ids[1:, None]).squeeze(1)
            columns.append(chosen[history.mask[1:]])
        return torch.cat(columns)

    def forward_backward(self, samples: Sequence[Sample], *, ppo: bool = False) -> float:
        """Add the gradient of a whole optimizer step; returns its loss.

        CISPO at token level, ratios bounded by 5, or PPO with epsilon 0.2; the mean over all tokens.
        """
        count = sum(sample.num_trainable_tokens for sample in samples)
        total = 0.0
        for sample in samples:
            p = self.logprobs(sample)
            ratio, advantage = (p - sample.old_logprobs[sample.mask].double()).exp(), sample.advantage
            if ppo:
                values = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            else:
                values = -ratio.clamp(0.0, 5.0).detach() * advantage * p
            loss = values.sum() / count
            torch.autograd.backward(loss)
            total += float(loss.detach())
        return total

    def optim_step(self, learning_rate: float) -> float:
        """Clip, step, clear; returns the gradient's norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self._clip)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(norm)

    def learn(self, samples: Sequence[Sample], learning_rate: float, *, ppo: bool = False) -> tuple[float, float]:
        """One optimizer step: its loss and the gradient's norm."""
        loss = self.forward_backward(samples, ppo=ppo)
        return loss, self.optim_step(learning_rate)


def samples_of(groups: Sequence[TrajectoryGroup]) -> list[Sample]:
    """Rewards to advantages: each less its group's mean, divided by the group's standard deviation."""
    samples = []
    for group in groups:
        rewards = torch.tensor(group.rewards, dtype=torch.float64)
        advantages = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-6)
        samples += [
            Sample(histories=list(trajectory.token_histories), advantage=float(advantage))
            for trajectory, advantage in zip(group, advantages, strict=True)
        ]
    return samples
