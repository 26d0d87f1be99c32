"""The contract of a strategy under a stock `lightning.Trainer`: everything that Lightning's users rely on works."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

import lightning
import pytest
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.strategies import Strategy

from fitrl import _compat
from fitrl.policy.module import PolicyModule
from fitrl.testing.by_hand import ByHand
from fitrl.testing.listeners import Hooks, Rows
from fitrl.testing.opening import Contract, Setup, Steps, falling, first_step, step_samples
from fitrl.testing.trains import TINY_CLIP

ONE_STEP = ["on_train_batch_start", "on_before_zero_grad", "on_train_batch_end"]


class LightningContract(Contract):
    """`strategy` gives what is passed to `lightning.Trainer(strategy=...)`: a registered name, or an instance.

    Attributes:
        accelerator: of the trainer.
        validates: False where the policy's loss cannot be had without learning from it.
    """

    accelerator: ClassVar[str] = "cpu"
    validates: ClassVar[bool] = True

    def strategy(self, folder: Path) -> str | Strategy:
        """A fresh strategy, or its name; one for the same folder may find what it saved."""
        raise NotImplementedError(f"{type(self).__name__} has to define strategy(folder)")

    def module(self, setup: Setup) -> PolicyModule:
        """The policy as a LightningModule, at its start."""
        return PolicyModule(
            self.model(setup, "stock"), learning_rate=setup.learning_rate, lr_schedule=setup.lr_schedule
        )

    def trainer(self, setup: Setup, *callbacks: Callback, **options: Any) -> lightning.Trainer:
        """A stock trainer with the strategy."""
        chosen: dict[str, Any] = {
            "accelerator": self.accelerator,
            "devices": int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            "max_epochs": 1,
            "gradient_clip_val": setup.gradient_clip_val,
            "precision": setup.precision,
            "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
            "logger": False,
        }
        strategy = self.strategy(setup.folder)
        return lightning.Trainer(strategy=strategy, callbacks=list(callbacks), **(chosen | options))

    def test_callbacks_fire_in_lightnings_order(self, folder: Path) -> None:
        """Setup, start, each batch and each step, end, teardown."""
        hooks, setup = Hooks(), Setup(folder=folder)
        trainer = self.trainer(setup, hooks)
        trainer.fit(self.module(setup), train_dataloaders=Steps([1, 2]))
        start = ["setup", "on_fit_start", "on_train_start", "on_train_epoch_start"]
        end = ["on_train_epoch_end", "on_train_end", "on_fit_end", "teardown"]
        assert hooks.fired == [*start, *ONE_STEP, *ONE_STEP, *end]
        assert trainer.global_step == 2

    @pytest.mark.parametrize("count", [1, 3])
    def test_accumulated_microbatches_are_one_step(self, folder: Path, count: int) -> None:
        """`accumulate_grad_batches` microbatches on every rank give the step that is computed by hand."""
        loss, norm = first_step(1)
        setup = Setup(folder=folder)
        trainer = self.trainer(setup, accumulate_grad_batches=count)
        trainer.fit(self.module(setup), train_dataloaders=Steps([1], count))
        assert trainer.global_step == 1
        assert self._told(trainer) == (self.near(loss), self.near(norm))

    @pytest.mark.parametrize("clip", [None, TINY_CLIP])
    def test_steps_are_those_of_adamw_with_schedule_and_clipping(self, folder: Path, clip: float | None) -> None:
        """`gradient_clip_val` and a LambdaLR do what they do in any other strategy."""
        hand, rows = ByHand(clip=clip), Rows()
        setup = Setup(folder=folder, lr_schedule=falling, gradient_clip_val=clip)
        trainer = self.trainer(setup, logger=rows, max_epochs=3)
        trainer.fit(self.module(setup), train_dataloaders=Steps([1]))
        assert len(told := rows.having("loss/grad_norm")) == 3
        for number, row in enumerate(told):
            loss, norm = hand.learn(step_samples(1), 1e-3 * falling(number))
            assert (row["loss/train"], row["loss/grad_norm"]) == (self.near(loss), self.near(norm))
        assert trainer.global_step == 3

    def test_loggers_and_learning_rate_monitor(self, folder: Path) -> None:
        """Metrics come at their step, and the monitor sees each step's rate."""
        rows, setup = Rows(), Setup(folder=folder, lr_schedule=falling)
        trainer = self.trainer(setup, LearningRateMonitor("step"), logger=rows, max_epochs=2)
        trainer.fit(self.module(setup), train_dataloaders=Steps([1, 2]))
        if trainer.is_global_zero:
            assert [row["step"] for row in rows.having("loss/train")] == [2, 4]
            rates = [value for row in rows.rows for key, value in row.items() if key.startswith("lr-")]
            assert rates == pytest.approx([1e-3 * falling(number) for number in range(4)])
            assert rows.finalized == 1

    def test_ckpt_path_resumes_exactly(self, folder: Path) -> None:
        """Two epochs, a new trainer with `ckpt_path`, and two more are four epochs, to the last bit."""
        setup = Setup(folder=folder, lr_schedule=falling)
        whole = self._epochs(self.trainer(setup, logger=Rows(), max_epochs=4), setup, None)
        keep = ModelCheckpoint(dirpath=folder / "kept", save_last=True)
        parts = self._epochs(self.trainer(setup, keep, logger=Rows(), max_epochs=2), setup, None)
        again = self.trainer(setup, logger=Rows(), max_epochs=4)
        parts += self._epochs(again, setup, folder / "kept" / "last.ckpt")
        assert again.global_step == 8 and len(whole) == 4
        assert parts == whole

    def test_validation_learns_nothing(self, folder: Path) -> None:
        """`validate` tells the loss of the weights as they are, and the next step is as if it had not been."""
        if not self.validates:
            pytest.skip(f"{type(self).__name__} says that it cannot validate")
        setup, hand = Setup(folder=folder), ByHand()
        loss, _ = first_step(2)
        module = self.module(setup)
        with _compat.evaluating_as_with_nccl():
            [found] = self.trainer(setup).validate(module, dataloaders=Steps([2]), verbose=False)
        assert found["val/loss/train"] == self.near(loss)
        rows = Rows()
        trainer = self.trainer(setup, logger=rows, max_epochs=2)
        trainer.fit(module, train_dataloaders=Steps([1]), val_dataloaders=Steps([2]))  # after every epoch
        assert len(told := rows.having("loss/grad_norm")) == 2
        for row in told:
            expected = hand.learn(step_samples(1), 1e-3)
            assert (row["loss/train"], row["loss/grad_norm"]) == tuple(map(self.near, expected))

    # -- what the checks share ----------------------------------------------------------------------------------

    def _told(self, trainer: lightning.Trainer) -> tuple[float, float]:
        metrics = trainer.callback_metrics
        return float(metrics["loss/train"]), float(metrics["loss/grad_norm"])

    def _epochs(self, trainer: lightning.Trainer, setup: Setup, resume: Path | None) -> list[tuple[float, ...]]:
        """What each epoch of two steps told."""
        trainer.fit(
            self.module(setup), train_dataloaders=Steps([1, 2]), ckpt_path=None if resume is None else str(resume)
        )
        keys = ("step", "loss/train", "loss/grad_norm", "loss/learning_rate")
        rows: Any = trainer.logger
        return [tuple(row[key] for key in keys) for row in rows.having("loss/train")]
