"""`fit_rl` shares prompts by itself: the same steps, fewer tokens, and a metric that says how many."""

from __future__ import annotations

from typing import Any

import lightning
import pytest
import torch

import fitrl
from fitrl.data.batch import Batch
from fitrl.policy import loading
from samples import make_groups

PROMPT, GROUPS, SIZE = 30, 3, 4


class Keep(lightning.Callback):
    """Keep the microbatches, and the gradient of each step."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.gradients: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.gradients.append(torch.cat([p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]))


def train(tmp_path: Any, **arguments: Any) -> tuple[Keep, fitrl.LocalTrainResult]:
    keep = Keep()
    model = fitrl.TrainableModel("prefixes", "tests", "tiny", lora=None, root=tmp_path)
    with fitrl.LocalTrainer(
        accelerator="cpu", devices=1, enable_model_summary=False, precision="64-true", callbacks=[keep]
    ) as trainer:
        groups = make_groups(seed=1, num_groups=GROUPS, group_size=SIZE, prompt=PROMPT)
        return keep, trainer.fit_rl(model, groups, learning_rate=1e-3, save_checkpoint=False, **arguments)


def without_sharing(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = loading.probe
    monkeypatch.setattr(loading, "probe", lambda policy: (probe(policy), setattr(policy, "can_share", False)))


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_epochs": 2, "importance_sampling_level": "sequence"},
        {"max_tokens_per_microbatch": 70, "num_minibatches": 2, "loss_aggregation": "seq_mean_token_mean"},
        {"precalculate_logprobs": True, "kl_coef": 0.1, "reference": "base", "max_tokens_per_microbatch": 90},
    ],
    ids=["epochs", "microbatches", "scored"],
)
def test_the_steps_are_those_without_sharing(arguments: Any, tmp_path: Any, monkeypatch: Any) -> None:
    shared, result = train(tmp_path / "shared", **arguments)
    without_sharing(monkeypatch)
    apart, plain = train(tmp_path / "apart", **arguments)

    assert result.metrics["data/shared_prefix_tokens_saved"] > 0
    assert plain.metrics["data/shared_prefix_tokens_saved"] == 0
    assert sum(batch.num_positions for batch in shared.batches) < sum(batch.num_positions for batch in apart.batches)
    assert result.num_optimizer_steps == plain.num_optimizer_steps == len(shared.gradients)
    for left, right in zip(shared.gradients, apart.gradients, strict=True):
        # norms round to float32, whatever the precision
        assert float((left - right).norm()) < 1e-6 * float(right.norm())
    for name in ("loss/train", "loss/grad_norm", "ratio/mean", "ratio/ess"):
        assert result.metrics[name] == pytest.approx(plain.metrics[name], rel=1e-5), name


def test_the_metric_counts_every_token_that_was_not_computed_again(tmp_path: Any) -> None:
    keep, result = train(tmp_path, num_epochs=2)

    inputs = [
        tuple(history.token_ids[:-1].tolist())
        for group in make_groups(seed=1, num_groups=GROUPS, group_size=SIZE, prompt=PROMPT)
        for trajectory in group
        for history in trajectory.token_histories
    ]
    once = len({ids[: length + 1] for ids in inputs for length in range(len(ids))})
    assert sum(map(len, inputs)) - once >= GROUPS * (SIZE - 1) * PROMPT  # two answers may begin alike
    assert {batch.layout for batch in keep.batches} == {"shared"}
    assert [batch.num_input_tokens for batch in keep.batches] == [once, once]
    assert result.metrics["data/shared_prefix_tokens_saved"] == 2 * (sum(map(len, inputs)) - once)
    assert result.metrics["data/padding_fraction"] == 0.0


def test_microbatches_count_shared_positions_once_and_keep_groups_together(tmp_path: Any) -> None:
    """A prompt of 30 and four answers of up to 13 fit into 90; apart, two of its four attempts would."""
    keep, result = train(tmp_path, max_tokens_per_microbatch=90)

    assert all(batch.num_positions <= 90 for batch in keep.batches)
    assert len(keep.batches) == GROUPS and "overlong_trajectories" not in result.dropped
    assert result.metrics["data/shared_prefix_tokens_saved"] >= GROUPS * (SIZE - 1) * PROMPT


def test_a_data_module_shares_as_well(tmp_path: Any) -> None:
    from fitrl.demo import TASKS, correct

    keep = Keep()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=1,
        callbacks=[keep],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = fitrl.TrainableModel("data", "tests", "tiny", lora=None, root=tmp_path)
    data = fitrl.RolloutDataModule(TASKS, correct, tasks_per_step=12, group_size=8, max_new_tokens=4)
    trainer.fit(fitrl.PolicyModule(model), datamodule=data)
    assert keep.batches[0].layout == "shared"
    assert torch.isfinite(keep.gradients[0]).all()
