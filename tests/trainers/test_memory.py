"""A microbatch that does not fit into memory costs no step and no number: the rest is made smaller."""

from __future__ import annotations

import sys
from typing import Any

import lightning
import pytest
import torch

import fitrl
from fitrl.data.batch import Batch
from fitrl.data.packing import pack
from fitrl.policy.loading import load_policy
from fitrl.policy.module import PolicyModule
from fitrl.policy.policy import Policy
from fitrl.trainers.memory import halve, max_tokens
from samples import make_groups, make_samples

CPU = {"accelerator": "cpu", "devices": 1, "enable_model_summary": False}
ROOM = 40  # positions that the pretended device has room for


class Recorder(lightning.Callback):
    """What every training step was given."""

    def __init__(self) -> None:
        self.positions: list[int] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Batch, index: int) -> None:
        self.positions.append(batch.num_positions)


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let losses and scores of more than `ROOM` positions find no memory; returns the positions that did not fit."""
    refused: list[int] = []
    for name in ("compute_loss", "score"):
        monkeypatch.setattr(PolicyModule, name, _refusing(getattr(PolicyModule, name), refused))
    return refused


def _refusing(method: Any, refused: list[int]) -> Any:
    def tried(self: PolicyModule, batch: Batch, *args: Any, **kwargs: Any) -> Any:
        if batch.num_positions > ROOM:
            refused.append(batch.num_positions)
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")
        return method(self, batch, *args, **kwargs)

    return tried


def learn(root: Any, calls: int = 1, trainer: Any = None, **options: Any) -> tuple[torch.Tensor, Any, Recorder]:
    recorder = Recorder()
    model = fitrl.TrainableModel("run", "memory", "tiny", lora=None, root=root)
    with fitrl.LocalTrainer(**CPU, callbacks=[recorder], **(trainer or {})) as local:
        for call in range(calls):
            result = local.fit_rl(model, make_groups(seed=call), **({"learning_rate": 1e-3, "seed": 1} | options))
        weights = torch.cat([tensor.flatten() for _, tensor in local.verbs.named_weights()])
    return weights, result, recorder


@pytest.mark.parametrize("steps", [{}, {"num_minibatches": 2, "num_epochs": 2}])
@pytest.mark.parametrize("asked", [None, 10_000])
def test_the_rest_of_a_call_is_packed_again(steps: Any, asked: int | None, tmp_path, little_memory: list[int]) -> None:
    weights, result, recorder = learn(tmp_path / "a", max_tokens_per_microbatch=asked, **steps)
    assert little_memory and max(recorder.positions) > ROOM
    assert min(little_memory) > ROOM >= min(recorder.positions)
    little_memory.clear()
    exact, expected, _ = learn(
        tmp_path / "b", max_tokens_per_microbatch=min(ROOM, min(recorder.positions) + 20), **steps
    )
    assert not little_memory
    assert result.num_optimizer_steps == expected.num_optimizer_steps == (4 if steps else 1)
    assert float((weights - exact).norm() / exact.norm()) < 1e-4
    changing = {"data/padding_fraction", "data/shared_prefix_tokens_saved", "throughput/tokens_per_s"}
    for name in expected.metrics.keys() - changing:
        if not name.startswith("time/"):
            assert result.metrics[name] == pytest.approx(expected.metrics[name], rel=1e-4, abs=1e-6), name
    assert result.metrics.keys() == expected.metrics.keys()
    assert result.checkpoint_path is not None


def test_what_did_not_fit_is_not_tried_again(tmp_path, little_memory: list[int]) -> None:
    learn(tmp_path / "a", calls=1)
    once = len(little_memory)
    little_memory.clear()
    learn(tmp_path / "b", calls=4)
    assert len(little_memory) == once


def test_a_step_in_the_middle(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out in the second microbatch of the third step: two steps stand, the third starts again."""
    options = {"num_minibatches": 2, "num_epochs": 2, "max_tokens_per_microbatch": 60}
    exact, expected, plain = learn(tmp_path / "a", **options)
    place = 2 * (len(plain.positions) // 4) + 1
    loss, calls = PolicyModule.compute_loss, []

    def once(self: PolicyModule, batch: Batch, *args: Any) -> Any:
        calls.append(batch)
        if len(calls) == place + 1:
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")
        return loss(self, batch, *args)

    monkeypatch.setattr(PolicyModule, "compute_loss", once)
    weights, result, _ = learn(tmp_path / "b", **options)
    assert len(calls) > len(plain.positions)
    assert result.num_optimizer_steps == 4
    assert float((weights - exact).norm() / exact.norm()) < 1e-4
    for name in ("loss/train", "loss/grad_norm", "ratio/mean", "mismatch/kl"):
        assert result.metrics[name] == pytest.approx(expected.metrics[name], rel=1e-4, abs=1e-6), name


def test_scores_are_packed_again(tmp_path, little_memory: list[int]) -> None:
    options = {"precalculate_logprobs": True, "kl_coef": 0.1, "reference": "base"}
    _, result, _ = learn(tmp_path / "a", calls=2, **options)
    assert little_memory
    little_memory.clear()
    _, expected, _ = learn(tmp_path / "b", calls=2, max_tokens_per_microbatch=ROOM, **options)
    assert not little_memory
    for name in ("loss/train", "loss/kl", "loss/grad_norm", "ratio/mean"):
        assert result.metrics[name] == pytest.approx(expected.metrics[name], rel=1e-3, abs=1e-6), name


def test_a_trajectory_that_is_too_long_says_so_and_the_session_lives(tmp_path, monkeypatch) -> None:
    model = fitrl.TrainableModel("run", "memory", "tiny", lora=None, root=tmp_path)
    with fitrl.LocalTrainer(**CPU) as trainer:
        trainer.fit_rl(model, make_groups(seed=0))
        with monkeypatch.context() as patch:
            patch.setattr(f"{__name__}.ROOM", 1)
            patch.setattr(PolicyModule, "compute_loss", _refusing(PolicyModule.compute_loss, []))
            with pytest.raises(
                fitrl.errors.OutOfMemoryError, match="longest trajectory has .*activation_checkpointing"
            ):
                trainer.fit_rl(model, make_groups(seed=1))
        assert trainer.global_step == 1
        assert trainer.fit_rl(model, make_groups(seed=1)).step == 2


def test_other_ranks_cannot_be_made_to_start_again(tmp_path, monkeypatch) -> None:
    module = PolicyModule(fitrl.TrainableModel("run", "memory", "tiny", lora=None, root=tmp_path))
    module._policy = load_policy("tiny")
    samples = make_samples(seed=1, num_trajectories=8)
    batches = pack(samples, layout="packed")
    halve(batches[0].num_positions, samples, module, MemoryError())
    assert module.most_positions == batches[0].num_positions // 2
    monkeypatch.setattr("fitrl.data.ranks.world_size", lambda: 2)
    with pytest.raises(fitrl.errors.OutOfMemoryError, match=f"max_tokens_per_microbatch={module.most_positions}"):
        halve(batches[0].num_positions, samples, module, MemoryError())


def test_ranks_that_share_a_row_have_room_for_a_longer_one(tmp_path, monkeypatch) -> None:
    """Each holds the activations of its part only, so twice the ranks fit twice the positions."""
    module = PolicyModule(fitrl.TrainableModel("run", "memory", "tiny", lora=None, root=tmp_path))
    module._policy = load_policy("tiny")
    samples = make_samples(seed=1, num_trajectories=8)
    monkeypatch.setattr(PolicyModule, "has_moments", True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ((4 << 30) + (64 << 20), 80 << 30))
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    found = []
    for ranks in (1, 2):
        monkeypatch.setattr(Policy, "ranks_per_row", ranks)
        found.append(max_tokens(samples, None, module, torch.device("cuda")))
    one, two = found
    assert 1000 < one < 30000
    assert two == pytest.approx(2 * one, abs=1)


def test_an_optimizer_that_does_not_fit_loses_no_checkpoint(tmp_path, monkeypatch) -> None:
    """Weights may have been changed in part: nothing of it is saved, the next call goes on from what was."""
    model = fitrl.TrainableModel("run", "memory", "tiny", lora=None, root=tmp_path)
    with fitrl.LocalTrainer(**CPU) as trainer:
        trainer.fit_rl(model, make_groups(seed=0), learning_rate=1e-3)
        kept = {name: tensor.clone() for name, tensor in trainer.verbs.named_weights()}
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules["torch.optim.adam"], "adam", _no_memory)
            with pytest.raises(fitrl.errors.OutOfMemoryError, match="moments='8bit'"):
                trainer.fit_rl(model, make_groups(seed=1))
        trainer.open(model)
        assert trainer.global_step == model.step == 1
        assert all(torch.equal(tensor, kept[name]) for name, tensor in trainer.verbs.named_weights())
        assert trainer.fit_rl(model, make_groups(seed=1)).step == 2


def _no_memory(*args: Any, **kwargs: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory (pretended)")
