"""What a session keeps and hands out: locks, unsaved steps, samplers, calls that end early."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

import fitrl
from fitrl.demo import TASKS, correct
from fitrl.errors import GroupError, InvalidArgumentError, RunLockedError, SamplerError
from samples import make_groups

CPU = {"accelerator": "cpu", "devices": 1, "enable_model_summary": False}


@pytest.fixture
def model(tmp_path) -> fitrl.TrainableModel:
    return fitrl.TrainableModel("adder", "tests", "tiny", lora=None, root=tmp_path)


def digest(weights) -> str:
    sha = hashlib.sha256()
    for name, tensor in weights:
        sha.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return sha.hexdigest()


# -- one trainer per run ----------------------------------------------------------------------------------------------


def test_a_second_trainer_is_refused_and_told_who_has_the_run(model) -> None:
    with fitrl.LocalTrainer(**CPU) as first, fitrl.LocalTrainer(**CPU) as second:
        first.open(model)
        with pytest.raises(RunLockedError, match=f"process {os.getpid()}"):
            second.fit_rl(model, make_groups(seed=1))
        assert not second.verbs.is_live
        first.close()
        assert second.fit_rl(model, make_groups(seed=1)).step == 1


def test_taking_up_another_model_frees_the_first(model, tmp_path) -> None:
    other = fitrl.TrainableModel("other", "tests", "tiny", lora=None, root=tmp_path)
    with fitrl.LocalTrainer(**CPU) as first, fitrl.LocalTrainer(**CPU) as second:
        first.open(model)
        first.open(other)
        second.open(model)


def test_the_lock_does_not_outlive_a_crash(model) -> None:
    script = (
        "import os, fitrl, pathlib\n"
        "from fitrl.policy.lock import RunLock\n"
        f"lock = RunLock(pathlib.Path({str(model.run_dir)!r}))\n"
        "print(os.getpid(), flush=True)\n"
        "import signal; os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == -9
    assert json.loads((model.run_dir / "holder.json").read_text())["process"] == int(done.stdout)
    with fitrl.LocalTrainer(**CPU) as trainer:
        trainer.open(model)
        assert json.loads((model.run_dir / "holder.json").read_text())["process"] == os.getpid()


def test_what_a_crash_left_is_cleared_when_the_run_is_opened(model) -> None:
    with fitrl.LocalTrainer(**CPU) as trainer:
        trainer.fit_rl(model, make_groups(seed=1), learning_rate=1e-3)
    half = model.checkpoints_dir / ".0002-0123abcd.tmp"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    with fitrl.LocalTrainer(**CPU) as trainer:
        trainer.open(model)
        assert sorted(path.name for path in model.checkpoints_dir.iterdir()) == ["0001"]
        assert trainer.global_step == 1


# -- resumed exactly --------------------------------------------------------------------------------------------------


def loop(trainer, model, until: int) -> list[float]:
    """Rollouts and tasks drawn from the global generators, as a user's loop draws them."""
    rewards = []
    trainer.open(model)
    while model.step < until:
        tasks = random.sample(TASKS, 6) + [TASKS[int(np.random.randint(100))]]
        groups = fitrl.rollout(trainer.sampler(model), tasks, reward=correct, group_size=4, max_new_tokens=4)
        result = trainer.fit_rl(
            model, groups, learning_rate=1e-3, num_minibatches=2, scale_learning_rate_by_reward_std_dev=True
        )
        rewards.append(result.metrics["reward/mean"])
    return rewards


@pytest.mark.parametrize("lora", [None, fitrl.LoraSettings(rank=2)], ids=["full", "lora"])
def test_n_steps_a_new_trainer_and_m_steps_are_n_plus_m_steps(lora, tmp_path) -> None:
    def start() -> None:
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)

    options = {**CPU, "lr_schedule": lambda step: 1 / (1 + step), "gradient_clip_val": 0.5}
    whole = fitrl.TrainableModel("whole", "tests", "tiny", lora=lora, root=tmp_path)
    parts = fitrl.TrainableModel("parts", "tests", "tiny", lora=lora, root=tmp_path)
    start()
    with fitrl.LocalTrainer(**options) as trainer:
        rewards = loop(trainer, whole, 8)
        expected = digest(trainer.verbs.named_weights())
        expected_state = trainer.verbs._state(trainer.verbs.moments())
    start()
    with fitrl.LocalTrainer(**options) as trainer:
        resumed = loop(trainer, parts, 4)
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    parts = fitrl.TrainableModel("parts", "tests", "tiny", lora=lora, root=tmp_path)
    with fitrl.LocalTrainer(**options) as trainer:
        resumed += loop(trainer, parts, 8)
        assert digest(trainer.verbs.named_weights()) == expected
        state = trainer.verbs._state(trainer.verbs.moments())
    assert resumed == rewards
    for key in ("rng", "reward_history"):
        assert state[key] == expected_state[key]
    ours, theirs = (found["optimizer"]["state"] for found in (state, expected_state))
    assert all(torch.equal(ours[i][name], theirs[i][name]) for i in theirs for name in theirs[i])
    assert [s["_last_lr"] for s in state["schedulers"]] == [s["_last_lr"] for s in expected_state["schedulers"]]


def test_a_damaged_newest_checkpoint_is_passed_over(model, caplog) -> None:
    with fitrl.LocalTrainer(**CPU) as trainer:
        for seed in (1, 2):
            trainer.fit_rl(model, make_groups(seed=seed), learning_rate=1e-3)
    weights = model.checkpoints_dir / "0002" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # the right size, one bit off
    weights.write_bytes(content)
    with fitrl.LocalTrainer(**CPU) as trainer, caplog.at_level("WARNING"):
        trainer.open(model)
        assert trainer.global_step == 1
        assert "0002" in caplog.text and "model.safetensors" in caplog.text
        assert trainer.fit_rl(model, make_groups(seed=2), learning_rate=1e-3).step == 2
    with fitrl.LocalTrainer(**CPU) as trainer:
        trainer.open(model)
        assert trainer.global_step == 2


def test_steps_after_an_older_state_was_loaded_are_kept(model, tmp_path) -> None:
    other = fitrl.TrainableModel("other", "tests", "tiny", lora=None, root=tmp_path)
    with fitrl.LocalTrainer(**CPU) as trainer:
        for seed in (1, 2, 3):
            trainer.fit_rl(model, make_groups(seed=seed), learning_rate=1e-3)
        trainer.verbs.load(str(model.checkpoints_dir / "0001"))
        for seed in (4, 5):
            trainer.fit_rl(model, make_groups(seed=seed), learning_rate=1e-3, save_checkpoint=False)
        branch = digest(trainer.verbs.named_weights())
        trainer.open(other)
        trainer.open(model)
        assert digest(trainer.verbs.named_weights()) == branch


# -- retention --------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(model) -> fitrl.TrainableModel:
    """Four steps with made-up rewards, and a checkpoint under a name."""
    with fitrl.LocalTrainer(**CPU) as trainer:
        for seed, reward in ((1, 0.1), (2, 0.9), (3, float("nan")), (4, 0.5)):
            result = trainer.fit_rl(model, make_groups(seed=seed), learning_rate=1e-3)
            model.log(metrics={"reward/mean": reward, "loss": -reward}, step=result.step)
        trainer.verbs.save(name="mine")
    return model


def kept(model) -> list[str]:
    return sorted(path.name for path in model.checkpoints_dir.iterdir())


def test_newest_and_best_are_kept(run) -> None:
    deleted = run.delete_checkpoints(best="reward/mean")
    assert [path.name for path in deleted] == ["0001", "0003"]
    assert kept(run) == ["0002", "0004", "mine"]
    assert run.delete_checkpoints(best="reward/mean") == []


def test_lowest_may_be_best(run) -> None:
    run.delete_checkpoints(best="loss", mode="min")
    assert kept(run) == ["0002", "0004", "mine"]


def test_without_a_metric_the_newest_is_kept(run) -> None:
    run.delete_checkpoints()
    assert kept(run) == ["0004", "mine"]
    with fitrl.LocalTrainer(**CPU) as trainer:
        trainer.open(run)
        assert trainer.global_step == 4


def test_an_unknown_metric_deletes_nothing(run) -> None:
    with pytest.raises(InvalidArgumentError, match=r"'accuracy' was not logged.*loss, reward/mean"):
        run.delete_checkpoints(best="accuracy")
    with pytest.raises(InvalidArgumentError, match="mode"):
        run.delete_checkpoints(best="loss", mode="most")
    assert len(kept(run)) == 5


def test_a_damaged_newest_checkpoint_does_not_cost_the_whole_ones(run, caplog) -> None:
    weights = run.checkpoints_dir / "0004" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    run.delete_checkpoints()
    assert "0003" in kept(run)
    assert "0004" in caplog.text


def test_an_export_of_the_weights_does_not_shadow_the_exact_state(model) -> None:
    with fitrl.LocalTrainer(**CPU) as trainer:
        trainer.fit_rl(model, make_groups(seed=1), learning_rate=1e-3)
        trainer.verbs.save(name="export", weights_only=True)
    with fitrl.LocalTrainer(**CPU) as trainer:
        trainer.open(model)
        assert trainer.strategy.optimizers[0].state


def test_nothing_to_delete(model) -> None:
    assert model.delete_checkpoints() == []


# -- samplers of one's own --------------------------------------------------------------------------------------------


class Listener:
    """A sampler that only remembers what it was handed."""

    def __init__(self) -> None:
        self.version = -1
        self.weights = ""

    async def sample(self, prompt_ids, **settings):
        raise NotImplementedError

    def update(self, weights, version) -> None:
        self.weights, self.version = digest(weights), version


def test_a_given_sampler_always_has_the_open_policy(model, tmp_path) -> None:
    class Boom(lightning.Callback):
        armed = False

        def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
            if self.armed and batch_idx == 1:
                raise RuntimeError("boom")

    other = fitrl.TrainableModel("other", "tests", "tiny", lora=None, root=tmp_path)
    sampler, boom = Listener(), Boom()
    with fitrl.LocalTrainer(**CPU, sampler=sampler, callbacks=[boom]) as trainer:

        def is_current() -> bool:
            return (sampler.version, sampler.weights) == (trainer.global_step, digest(trainer.verbs.named_weights()))

        assert trainer.sampler(model) is sampler and is_current()
        trainer.fit_rl(model, make_groups(seed=1), learning_rate=1e-3)
        assert sampler.version == 1 and is_current()
        trainer.open(other)
        assert sampler.version == 0 and is_current()
        trainer.open(model)
        assert sampler.version == 1 and is_current()
        boom.armed = True
        with pytest.raises(RuntimeError, match="boom"):
            trainer.fit_rl(model, make_groups(seed=2), learning_rate=1e-3, num_minibatches=2)
        assert sampler.version == 2 and is_current()


class Samples(lightning.Callback):
    """Samples in the middle of a call: with the trainer's sampler, one that it had before, or in a notebook's way."""

    def __init__(self, how: str, model: fitrl.TrainableModel) -> None:
        self.how, self.model, self.sampler, self.armed = how, model, None, True

    def on_train_batch_end(self, trainer, *rest) -> None:
        if not self.armed:
            return
        sampler = trainer.sampler(self.model) if self.how == "asked" else self.sampler

        def sample() -> None:
            fitrl.rollout(sampler, TASKS[:1], reward=correct, group_size=1, max_new_tokens=2)

        async def notebook() -> None:
            sample()

        asyncio.run(notebook()) if self.how == "in a loop" else sample()


@pytest.mark.parametrize("how", ["asked", "kept", "in a loop"])
def test_a_callback_that_samples_in_the_middle_of_a_call_is_told_so(how, model) -> None:
    samples = Samples(how, model)
    with fitrl.LocalTrainer(**CPU, callbacks=[samples]) as trainer:
        samples.sampler = trainer.sampler(model)
        with pytest.raises((SamplerError, GroupError), match="sample between calls, or give LocalTrainer"):
            trainer.fit_rl(model, make_groups(seed=1))
        samples.armed = False
        assert trainer.fit_rl(model, make_groups(seed=1)).num_optimizer_steps == 1
        assert fitrl.rollout(trainer.sampler(model), TASKS[:1], reward=correct, group_size=1, max_new_tokens=2)


def test_another_thread_that_samples_in_the_middle_of_a_call_waits_for_its_end(model) -> None:
    class Starts(lightning.Callback):
        job = None

        def on_train_batch_start(self, trainer, *rest) -> None:
            if self.job is None:
                self.job = pool.submit(sample, trainer)
                asked.wait(30.0)

    def sample(trainer) -> int:
        sampler = trainer.sampler(model)  # made in the middle of the call
        asked.set()
        [group] = fitrl.rollout(sampler, TASKS[:1], reward=correct, group_size=1, max_new_tokens=2)
        [trajectory] = group.trajectories
        return trajectory.messages_and_choices[-1].version

    asked, starts = threading.Event(), Starts()
    with ThreadPoolExecutor(1) as pool, fitrl.LocalTrainer(**CPU, callbacks=[starts]) as trainer:
        trainer.fit_rl(model, make_groups(seed=1), num_minibatches=2)
        assert starts.job.result(30.0) == 2


# -- calls that end early ---------------------------------------------------------------------------------------------


def test_a_callback_that_stops_in_the_middle_of_a_step_leaves_no_fake_checkpoint(model) -> None:
    class Stop(lightning.Callback):
        armed = True

        def on_train_batch_end(self, trainer, *rest) -> None:
            trainer.should_stop |= self.armed

    stop = Stop()
    with fitrl.LocalTrainer(**CPU, callbacks=[stop]) as trainer:
        result = trainer.fit_rl(model, make_groups(seed=1), max_tokens_per_microbatch=30)
        assert (result.num_optimizer_steps, result.checkpoint_path, model.checkpoints()) == (0, None, [])
        stop.armed = False
        assert trainer.fit_rl(model, make_groups(seed=1)).num_optimizer_steps == 1


@pytest.mark.parametrize("limit", [{"limit_train_batches": 1}, {"fast_dev_run": True}, {"overfit_batches": 1}])
def test_limits_that_leave_out_microbatches_are_refused(limit, model) -> None:
    with (
        fitrl.LocalTrainer(**CPU, **limit) as trainer,
        pytest.raises(InvalidArgumentError, match="would leave out microbatches"),
    ):
        trainer.fit_rl(model, make_groups(seed=1))


def test_what_validation_told_can_be_monitored(model, tmp_path) -> None:
    best = ModelCheckpoint(dirpath=tmp_path / "best", monitor="val/reward/mean", mode="max")
    stop = EarlyStopping(monitor="val/reward/mean", mode="max", patience=1, min_delta=10.0)
    data = fitrl.RolloutDataModule(TASKS, correct, val_tasks=TASKS[:4], max_new_tokens=4)
    with fitrl.LocalTrainer(**CPU, callbacks=[best, stop]) as trainer:
        trainer.open(model)
        for seed in (1, 2):
            [told] = trainer.validate(datamodule=data, verbose=False)
            trainer.fit_rl(model, make_groups(seed=seed), learning_rate=1e-4)
            assert float(trainer.callback_metrics["val/reward/mean"]) == pytest.approx(told["val/reward/mean"])
        assert trainer.should_stop  # nothing got better by ten
    assert best.best_model_path
