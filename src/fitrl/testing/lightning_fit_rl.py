"""The contract of a `lightning.Trainer` with `fit_rl`: calls are epochs to callbacks, loggers and validation."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import lightning
import pytest
from lightning.pytorch.callbacks import Callback, LearningRateMonitor

from fitrl.data.groups import TrajectoryGroup
from fitrl.policy.model import TrainableModel
from fitrl.testing.by_hand import ByHand, samples_of
from fitrl.testing.listeners import Hooks, Rows
from fitrl.testing.opening import Contract, Setup, Steps, falling, step_groups, step_samples


class LightningFitRLContract(Contract):
    """`open_trainer` gives a `lightning.Trainer` that has `fit_rl`.

    Attributes:
        microbatches: `fit_rl`'s argument that cuts a step into several microbatches; nothing where there is none.
        validates: False where the policy's loss cannot be had without learning from it.
    """

    microbatches: ClassVar[dict[str, Any]] = {"max_tokens_per_microbatch": 30}
    validates: ClassVar[bool] = True

    def open_trainer(self, setup: Setup, *callbacks: Callback, **options: Any) -> AbstractContextManager[Any]:
        """Open a trainer with these callbacks and options of Lightning's, and close it afterwards."""
        raise NotImplementedError(f"{type(self).__name__} has to define open_trainer(setup, *callbacks, **options)")

    def test_callbacks_fire_in_every_call(self, folder: Any) -> None:
        """Each call is one epoch, whose hooks come in Lightning's order."""
        hooks, setup = Hooks(), Setup(folder=folder)
        epoch = ["setup", "on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start"]
        epoch += ["on_before_zero_grad", "on_train_batch_end"]
        epoch += ["on_train_epoch_end", "on_train_end", "on_fit_end", "teardown"]
        with self.open_trainer(setup, hooks) as trainer:
            is_lightnings = isinstance(trainer, lightning.Trainer)
            assert is_lightnings
            model = self.model(setup)
            for number in (1, 2, 3):
                hooks.fired.clear()
                trainer.fit_rl(model, step_groups(number))
                assert hooks.fired == epoch
                assert (trainer.global_step, trainer.current_epoch) == (number, number)

    def test_loggers_get_every_call_and_stay_open(self, folder: Any) -> None:
        """One row of the result's metrics per call, at its step; the logger is finalized when the trainer closes."""
        rows, setup = Rows(), Setup(folder=folder, lr_schedule=falling)
        with self.open_trainer(setup, LearningRateMonitor("step"), logger=rows) as trainer:
            model, zero = self.model(setup), trainer.is_global_zero
            results = [trainer.fit_rl(model, step_groups(seed), learning_rate=1e-3) for seed in (1, 2, 3)]
            logged = rows.having("loss/train")
            assert [row["step"] for row in logged] == [1, 2, 3] and rows.finalized == 0
            for result, row in zip(results, logged, strict=True):
                assert row["loss/train"] == result.metrics["loss/train"]
            told = float(trainer.callback_metrics["loss/train"])
            assert told == pytest.approx(results[-1].metrics["loss/train"])  # a float32 tensor
        assert rows.finalized == 1
        rates = [value for row in rows.rows for key, value in row.items() if key.startswith("lr-")]
        if zero:
            assert rates == pytest.approx([1e-3 * falling(number) for number in range(3)])

    def test_validation_between_calls_changes_nothing(self, folder: Any) -> None:
        """`validate()` tells the loss of the weights as they are; the next call is as if it had not been."""
        if not self.validates:
            pytest.skip(f"{type(self).__name__} says that it cannot validate")
        hooks, setup = Hooks(), Setup(folder=folder)
        hand = ByHand()
        with self.open_trainer(setup, hooks) as trainer:
            model = self.model(setup)
            for seed in (1, 2, 3):
                groups = step_groups(seed)
                metrics = trainer.fit_rl(model, groups, learning_rate=1e-3).metrics
                self._compare(metrics, hand.learn(samples_of(groups), 1e-3))
                [told] = trainer.validate(dataloaders=Steps([2]), verbose=False)
                expected = hand.forward_backward(step_samples(2))
                hand.network.zero_grad()
                assert told["val/loss/train"] == self.near(expected)
                assert trainer.global_step == seed
            assert hooks.fired.count("on_validation_end") == 3

    def test_microbatches_of_a_call_are_one_step(self, folder: Any) -> None:
        """However a call is cut, it is the step that is computed by hand; accumulating is the call's own business."""
        if not self.microbatches:
            pytest.skip(f"{type(self).__name__} says that its calls are not cut")
        setup, groups = Setup(folder=folder), step_groups(1)
        hooks = Hooks()
        with self.open_trainer(setup, hooks) as trainer:
            metrics = trainer.fit_rl(self.model(setup), groups, **self.microbatches).metrics
            self._compare(metrics, ByHand().learn(samples_of(groups), 0.0))
            assert hooks.fired.count("on_train_batch_end") > 1 and trainer.global_step == 1
            trainer.accumulate_grad_batches = 2
            with pytest.raises(ValueError, match="accumulate_grad_batches"):
                trainer.fit_rl(self.model(setup), groups)
            trainer.accumulate_grad_batches = 1

    @pytest.mark.parametrize("hook", ["on_train_start", "on_train_batch_start", "on_before_zero_grad"])
    def test_a_callback_that_raises_leaves_it_usable(self, folder: Any, hook: str) -> None:
        """Before the step its call changes nothing, and callbacks hear of it; the next call goes on."""
        setup, hooks, hand = Setup(folder=folder), Hooks(), ByHand()
        with self.open_trainer(setup, hooks) as trainer:
            model = self.model(setup)
            self._learn(trainer, model, hand, step_groups(1))
            hooks.raises = hook
            with pytest.raises(ArithmeticError, match="on purpose"):
                trainer.fit_rl(model, step_groups(2), learning_rate=1e-3)
            assert "on_exception" in hooks.fired and trainer.global_step == 1
            for seed in (2, 3):
                self._learn(trainer, model, hand, step_groups(seed))
            assert trainer.global_step == 3

    # -- what the checks share ----------------------------------------------------------------------------------

    def _learn(self, trainer: Any, model: TrainableModel, hand: ByHand, groups: Sequence[TrajectoryGroup]) -> None:
        metrics = trainer.fit_rl(model, groups, learning_rate=1e-3).metrics
        self._compare(metrics, hand.learn(samples_of(groups), 1e-3))

    def _compare(self, metrics: dict[str, float], by_hand: tuple[float, float]) -> None:
        assert (metrics["loss/train"], metrics["loss/grad_norm"]) == tuple(map(self.near, by_hand))
