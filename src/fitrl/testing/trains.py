"""The contract of `Trains`: gradients add up, steps are taken once, saves resume exactly."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import pytest
import torch

from fitrl.data import ranks
from fitrl.errors import FitRLError, NothingAccumulatedError
from fitrl.objective.objective import Objective
from fitrl.protocols.results import OptimStepResult
from fitrl.protocols.verbs import Trains
from fitrl.testing.by_hand import ByHand
from fitrl.testing.opening import Contract, Setup, falling, first_step, microbatches, step_samples, total

TINY_CLIP = 1e-7  # near AdamW's eps, where a clipped gradient makes a smaller step


class TrainsContract(Contract):
    """`open_subject` gives a `Trains`.

    Attributes:
        loss_known_at_once: False where a service computes it in `optim_step`; reading it earlier has to raise then.
        restores_random_state: False where nothing is drawn from this process's generators.
    """

    loss_known_at_once: ClassVar[bool] = True
    restores_random_state: ClassVar[bool] = True

    def test_it_has_the_verbs(self, folder: Any) -> None:
        """The protocol is satisfied, and a keyword that a verb does not take is an error."""
        with self.open_subject(Setup(folder=folder)) as subject:
            untyped: Any = subject
            assert isinstance(subject, Trains)
            with pytest.raises(TypeError):
                untyped.forward_backward(microbatches(1)[0], loss="ppo")
            untyped.clear_gradients()
            with pytest.raises(TypeError):
                untyped.optim_step(lr=1.0)
            assert subject.get_status().step == 0

    # -- gradients ----------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("count", [1, 2, 3])
    def test_microbatches_add_up_to_the_whole_step(self, folder: Any, count: int) -> None:
        """However a step is cut into microbatches and ranks, loss and gradient are those computed by hand."""
        loss, norm = first_step(1)
        with self.open_subject(Setup(folder=folder)) as subject:
            results = [subject.forward_backward(batch) for batch in microbatches(1, count)]
            step = subject.optim_step()
            assert step.accumulated_microbatches == count
            assert total([result.loss for result in results]) == self.near(loss)
            assert step.grad_norm == self.near(norm)

    def test_another_objective_counts_for_its_microbatch_only(self, folder: Any) -> None:
        """An explicit objective is used as it is defined; the one in force stays."""
        expected = [first_step(1, ppo=ppo) for ppo in (True, False)]
        with self.open_subject(Setup(folder=folder)) as subject:
            for objective, (loss, norm) in zip((Objective(ppo=True), None), expected, strict=True):
                result = subject.forward_backward(microbatches(1)[0], objective)
                assert subject.optim_step(learning_rate=0.0).grad_norm == self.near(norm)
                assert total([result.loss]) == self.near(loss)

    def test_forward_backward_accumulates_and_never_steps(self, folder: Any) -> None:
        """The same microbatch twice: the same loss twice, twice the gradient, no step."""
        _, norm = first_step(1)
        with self.open_subject(Setup(folder=folder)) as subject:
            batch = microbatches(1)[0]
            results = []
            for count in (1, 2):
                results.append(subject.forward_backward(batch))
                status = subject.get_status()
                assert (status.step, status.accumulated_microbatches) == (0, count)
            assert subject.optim_step().grad_norm == self.near(2 * norm)
            assert results[0].loss == results[1].loss
            assert all(isinstance(value, float) for result in results for value in result.metrics.values())

    def test_losses_are_known_when_they_are_said_to_be(self, folder: Any) -> None:
        """A loss that is not known yet raises, and is never a made-up number."""
        with self.open_subject(Setup(folder=folder)) as subject:
            result = subject.forward_backward(microbatches(1)[0])
            if self.loss_known_at_once:
                assert isinstance(result.loss, float) and isinstance(result.metrics, dict)
            else:
                for name in ("loss", "metrics"):
                    with pytest.raises(FitRLError):
                        getattr(result, name)
            subject.clear_gradients()

    def test_a_step_clears_what_it_used(self, folder: Any) -> None:
        """The next step's gradient is its own."""
        norms = [first_step(seed)[1] for seed in (1, 2)]
        with self.open_subject(Setup(folder=folder)) as subject:
            for seed, norm in zip((1, 2), norms, strict=True):
                subject.forward_backward(microbatches(seed)[0])
                assert subject.optim_step(learning_rate=0.0).grad_norm == self.near(norm)
                assert subject.get_status().accumulated_microbatches == 0

    def test_clear_gradients_forgets(self, folder: Any) -> None:
        """What was cleared is neither counted nor learned from."""
        _, norm = first_step(2)
        with self.open_subject(Setup(folder=folder)) as subject:
            subject.forward_backward(microbatches(1)[0])
            subject.clear_gradients()
            assert subject.get_status().accumulated_microbatches == 0
            with pytest.raises(NothingAccumulatedError):
                subject.optim_step()
            subject.forward_backward(microbatches(2)[0])
            step = subject.optim_step()
            assert (step.step, step.accumulated_microbatches) == (1, 1)
            assert step.grad_norm == self.near(norm)

    def test_nothing_accumulated_is_an_error(self, folder: Any) -> None:
        """Before the first microbatch and right after a step; neither counts as a step."""
        with self.open_subject(Setup(folder=folder)) as subject:
            with pytest.raises(NothingAccumulatedError):
                subject.optim_step()
            subject.forward_backward(microbatches(1)[0])
            subject.optim_step()
            with pytest.raises(NothingAccumulatedError):
                subject.optim_step()
            assert subject.get_status().step == 1

    # -- steps --------------------------------------------------------------------------------------------------

    def test_the_learning_rate_follows_the_schedule(self, folder: Any) -> None:
        """Each step is counted once and takes its own rate, which the status tells before."""
        with self.open_subject(Setup(folder=folder, lr_schedule=falling)) as subject:
            for number in range(3):
                assert subject.get_status().learning_rate == pytest.approx(1e-3 * falling(number))
                subject.forward_backward(microbatches(1)[0])
                step = subject.optim_step()
                assert step.step == subject.get_status().step == number + 1
                assert step.learning_rate == pytest.approx(1e-3 * falling(number))

    def test_an_explicit_learning_rate_is_final_for_one_step(self, folder: Any) -> None:
        """It takes the scheduled one's place, and the schedule goes on as if it had not."""
        rates = []
        with self.open_subject(Setup(folder=folder, lr_schedule=falling)) as subject:
            for rate in (None, 7e-4, None):
                subject.forward_backward(microbatches(1)[0])
                rates.append(subject.optim_step(learning_rate=rate).learning_rate)
        assert rates == pytest.approx([1e-3, 7e-4, 1e-3 * falling(2)])

    def test_steps_are_those_of_adamw(self, folder: Any) -> None:
        """Four steps with scheduled and explicit rates; every loss is the one that weights moved by hand have."""
        hand = ByHand()
        with self.open_subject(Setup(folder=folder, lr_schedule=falling)) as subject:
            for number, rate in enumerate((None, None, 2e-3, None)):
                used = 1e-3 * falling(number) if rate is None else rate
                loss, norm = hand.learn(step_samples(1 + number % 2), used)
                assert self._learn(subject, 1 + number % 2, rate) == (self.near(loss), self.near(norm))

    def test_the_clip_value_is_honoured(self, folder: Any) -> None:
        """The norm that is told is the one before clipping; the step is the one after it."""
        hand = ByHand(clip=TINY_CLIP)
        with self.open_subject(Setup(folder=folder, gradient_clip_val=TINY_CLIP)) as subject:
            assert subject.get_config().gradient_clip_val == TINY_CLIP
            for _ in range(3):
                loss, norm = hand.learn(step_samples(1), 1e-3)
                assert self._learn(subject, 1) == (self.near(loss), self.near(norm))

    def test_an_exception_leaves_it_usable(self, folder: Any) -> None:
        """An objective that raises costs its microbatches and nothing else."""
        loss, norm = first_step(1)
        with self.open_subject(Setup(folder=folder)) as subject:
            with pytest.raises(Exception):  # noqa: B017 - whatever the objective, or a service on its behalf, raises
                subject.forward_backward(microbatches(2)[0], _Breaks())
                subject.optim_step()
            status = subject.get_status()
            assert (status.step, status.accumulated_microbatches) == (0, 0)
            assert self._learn(subject, 1) == (self.near(loss), self.near(norm))
            assert subject.get_status().step == 1

    # -- saves --------------------------------------------------------------------------------------------------

    def test_saves_resume_exactly(self, folder: Any) -> None:
        """Here and in a subject opened anew: the next steps are, to the last bit, those after the save."""
        setup = Setup(folder=folder, lr_schedule=falling)
        with self.open_subject(setup) as subject:
            for seed in (1, 2):
                self._learn(subject, seed)
            torch.manual_seed(5 + ranks.rank())
            where = subject.save("kept")
            drawn = torch.rand(3)
            expected = [self._step(subject, seed) for seed in (3, 1)]
            assert isinstance(where, str) and [step.step for _, step in expected] == [3, 4]
            subject.forward_backward(microbatches(4)[0])  # a load forgets what was accumulated
            self._load_and_compare(subject, where, drawn, expected)
        with self.open_subject(setup) as again:
            self._load_and_compare(again, where, drawn, expected)

    def test_the_newest_save_is_loaded_unless_one_is_named(self, folder: Any) -> None:
        """`load()` after two saves gives the second, and says where it was."""
        with self.open_subject(Setup(folder=folder)) as subject:
            places = []
            for _ in range(2):
                self._learn(subject, 1)
                places.append(subject.save())
            self._learn(subject, 1)
            assert places[0] != places[1] and subject.load() == places[1]
            assert subject.get_status().step == 2
            subject.load(places[0])
            assert subject.get_status().step == 1

    def test_a_weights_only_save_starts_a_fresh_optimizer(self, folder: Any) -> None:
        """The weights and the step are the saved ones, the schedule stands there, the moments are gone."""
        hand = ByHand()
        with self.open_subject(Setup(folder=folder, lr_schedule=falling)) as subject:
            for number in range(2):
                hand.learn(step_samples(1), 1e-3 * falling(number))
                self._learn(subject, 1)
            where = subject.save("weights", weights_only=True)
            self._learn(subject, 2)
            subject.load(where)
            hand.forget_moments()
            status = subject.get_status()
            assert (status.step, status.learning_rate) == (2, pytest.approx(1e-3 * falling(2)))
            for number in (2, 3):
                loss, norm = hand.learn(step_samples(2), 1e-3 * falling(number))
                assert self._learn(subject, 2) == (self.near(loss), self.near(norm))

    def test_loading_what_is_not_there_is_an_error(self, folder: Any) -> None:
        """A load that finds nothing raises and changes nothing."""
        with self.open_subject(Setup(folder=folder)) as subject:
            with pytest.raises(FitRLError):
                subject.load()
            self._learn(subject, 1)
            assert subject.get_status().step == 1

    # -- what it says of itself ---------------------------------------------------------------------------------

    def test_config_is_static_and_results_are_frozen(self, folder: Any) -> None:
        """The config says what was opened, before a step and after it; nothing that is handed out can be changed."""
        with self.open_subject(Setup(folder=folder)) as subject:
            config = subject.get_config()
            assert config.world_size == ranks.world_size()
            rank = None if self.lora is None else self.lora.rank
            assert (config.base_model, config.lora_rank, config.gradient_clip_val) == ("tiny", rank, None)
            subject.forward_backward(microbatches(1)[0])
            step = subject.optim_step()
            assert subject.get_config() == config
            for told in (config, step, subject.get_status()):
                name = dataclasses.fields(told)[0].name
                with pytest.raises(dataclasses.FrozenInstanceError):
                    setattr(told, name, None)

    # -- what the checks share ----------------------------------------------------------------------------------

    def _step(self, subject: Trains, seed: int, rate: float | None = None) -> tuple[float, OptimStepResult]:
        """One step on this rank's microbatch: the loss over all ranks, and the result."""
        result = subject.forward_backward(microbatches(seed)[0])
        step = subject.optim_step(learning_rate=rate)
        return total([result.loss]), step

    def _learn(self, subject: Trains, seed: int, rate: float | None = None) -> tuple[float, float]:
        """One step: its loss and the gradient's norm, as `ByHand.learn`."""
        loss, step = self._step(subject, seed, rate)
        return loss, step.grad_norm

    def _load_and_compare(
        self, subject: Trains, where: str, drawn: torch.Tensor, expected: list[tuple[float, OptimStepResult]]
    ) -> None:
        torch.manual_seed(99)
        assert subject.load(where) == where
        status = subject.get_status()
        assert (status.step, status.accumulated_microbatches) == (2, 0)
        if self.restores_random_state:
            assert torch.equal(torch.rand(3), drawn)
        assert [self._step(subject, seed) for seed in (3, 1)] == expected


class _Breaks:
    """A custom objective that does not get far."""

    inputs = "logprobs"

    def __call__(self, inputs: Any, /) -> Any:
        raise ArithmeticError("on purpose")
