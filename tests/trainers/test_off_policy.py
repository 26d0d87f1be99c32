"""Stale groups under the decoupled objective: old logprobs by the trainer, weighed against those of the sampler."""

from __future__ import annotations

import copy

import lightning
import pytest
import torch

import fitrl
from fitrl.demo import TASKS, correct

CAP = 1.2


class Gradients(lightning.Callback):
    """Keeps the gradient of the last step."""

    def __init__(self) -> None:
        self.kept: dict[str, torch.Tensor] = {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        named = pl_module.policy.network.named_parameters()
        self.kept = {name: parameter.grad.clone() for name, parameter in named}


def test_stale_tokens_are_weighed_by_trainer_over_sampler_up_to_a_cap(tmp_path) -> None:
    model = fitrl.TrainableModel("stale", "off-policy", "tiny", lora=None, root=tmp_path)
    gradients = Gradients()
    with fitrl.LocalTrainer(
        accelerator="cpu", devices=1, enable_model_summary=False, callbacks=[gradients], precision="64-true"
    ) as trainer:
        options = {"reward": correct, "group_size": 6, "max_new_tokens": 4}
        sampler = trainer.sampler(model)
        stale = fitrl.rollout(sampler, TASKS[:12], seed=1, **options)
        for seed in range(3):
            trainer.fit_rl(model, fitrl.rollout(sampler, TASKS[30:60], seed=seed, **options), learning_rate=2e-3)
        network = copy.deepcopy(trainer.open(model).policy_module.policy.network).double()
        result = trainer.fit_rl(
            model, stale, learning_rate=1e-4, precalculate_logprobs=True, truncated_importance_sampling=CAP
        )

    loss, gaps, weights = torch.zeros((), dtype=torch.float64), [], []
    for group in stale:
        rewards = torch.tensor(group.rewards, dtype=torch.float64)
        if len(set(group.rewards)) < 2:
            continue
        advantages = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-6)
        for trajectory, advantage in zip(group, advantages, strict=True):
            [said] = trajectory.completions()
            ids = torch.tensor([*said.prompt_ids, *said.token_ids])
            logits = network(ids[None]).logits[0, len(said.prompt_ids) - 1 : -1]
            logprobs = logits.log_softmax(-1).gather(1, ids[len(said.prompt_ids) :, None]).squeeze(1)
            old = torch.tensor(said.logprobs, dtype=torch.float64)
            weight = (logprobs.detach() - old).exp().clamp(max=CAP)
            weights += weight.tolist()
            gaps += (old - logprobs.detach()).tolist()
            loss = loss - (weight * advantage * logprobs).sum()  # the ratio to the trainer's own old logprobs is 1
    (loss / len(gaps)).backward()
    assert CAP in weights and min(weights) < 0.9  # some are capped, some are weighed down
    assert result.metrics["ratio/mean"] == pytest.approx(1.0, abs=1e-6)
    assert result.metrics["ratio/ess"] == pytest.approx(1.0, abs=1e-6)
    assert result.metrics["mismatch/kl"] == pytest.approx(sum(gaps) / len(gaps), abs=1e-5)
    assert abs(result.metrics["mismatch/kl"]) > 1e-3
    whole = torch.tensor(gaps).neg().exp()
    assert result.metrics["mismatch/ess"] == pytest.approx(
        float(whole.sum() ** 2 / (whole**2).sum() / len(gaps)), abs=1e-5
    )
    assert result.metrics["mismatch/ess"] < 0.99
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None
        scale = float(parameter.grad.abs().max()) or 1.0
        assert float((gradients.kept[name] - parameter.grad).abs().max()) < 1e-5 * scale, name
