"""bfloat16 computes, float32 learns: an RL-sized update survives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fitrl
from samples import make_groups

CPU = {"accelerator": "cpu", "devices": 1, "enable_model_summary": False}


def change(root: Any, precision: str) -> torch.Tensor:
    """What 20 steps of AdamW at 5e-6 did to the weights."""
    model = fitrl.TrainableModel("run", "precision", "tiny", lora=None, root=root)
    with fitrl.LocalTrainer(**CPU, precision=precision) as trainer:
        trainer.open(model)
        before = torch.cat([tensor.double().flatten() for _, tensor in trainer.verbs.named_weights()])
        for call in range(20):
            trainer.fit_rl(model, make_groups(seed=call), learning_rate=5e-6, save_checkpoint=False)
        after = torch.cat([tensor.double().flatten() for _, tensor in trainer.verbs.named_weights()])
    return after - before


def test_float32_masters_keep_the_update(tmp_path) -> None:
    exact, ours = change(tmp_path / "a", "32-true"), change(tmp_path / "b", "bf16-mixed")
    assert float(torch.cosine_similarity(ours, exact, dim=0)) >= 0.99
    assert float(ours.norm() / exact.norm()) == pytest.approx(1.0, abs=0.02)


def test_weights_in_16_bits_are_warned_of(tmp_path) -> None:
    with pytest.warns(UserWarning, match="round away most of an RL-sized update"):
        lost = change(tmp_path, "bf16-true")
    assert float((lost != 0).double().mean()) < 0.5  # most weights did not move at all
