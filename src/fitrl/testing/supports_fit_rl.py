"""The contract of `SupportsFitRL`: typed arguments, a frozen result, and a policy that lives on from call to call."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import pytest
import torch

from fitrl.data import ranks
from fitrl.data.groups import TrajectoryGroup
from fitrl.policy.model import TrainableModel
from fitrl.protocols.results import TrainResult
from fitrl.protocols.verbs import SupportsFitRL
from fitrl.testing.by_hand import ByHand, samples_of
from fitrl.testing.opening import Contract, Setup, falling, step_groups
from fitrl.testing.trains import TINY_CLIP

COMMON = {
    "learning_rate": 5e-6,
    "ppo": False,
    "epsilon": None,
    "epsilon_high": None,
    "advantage_balance": 0.0,
    "scale_rewards": True,
    "importance_sampling_level": "token",
}
# each against what it changes nothing of
EFFECTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ppo": ({"ppo": True}, {}),
    "epsilon": ({"epsilon": 0.01}, {}),
    "epsilon_high": ({"epsilon_high": 0.01}, {}),
    "epsilon of ppo": ({"ppo": True, "epsilon": 0.01}, {"ppo": True}),
    "advantage_balance": ({"advantage_balance": 0.5}, {}),
    "scale_rewards": ({"scale_rewards": False}, {}),
    "sequence": ({"importance_sampling_level": "sequence"}, {}),
    "average": ({"importance_sampling_level": "average"}, {"importance_sampling_level": "sequence"}),
    "geometric": ({"importance_sampling_level": "geometric_average"}, {"importance_sampling_level": "average"}),
}
MACHINE = ("time/", "throughput/", "memory/")  # metrics that differ from run to run


class SupportsFitRLContract(Contract):
    """`open_subject` gives a `SupportsFitRL`; the setup's learning rate is passed to each call.

    Attributes:
        backend: what the message of an unknown keyword has to name.
        exact: False where a service's mathematics are its own, so that its numbers are not compared.
        resumes: whether a subject opened anew takes a model up where a call of an earlier one left it.
        restores_random_state: whether resuming also restores this process's random generators.
        clips: whether `gradient_clip_val` can be given at construction.
        schedules: whether `lr_schedule` can.
    """

    backend: ClassVar[str]
    exact: ClassVar[bool] = True
    resumes: ClassVar[bool] = True
    restores_random_state: ClassVar[bool] = True
    clips: ClassVar[bool] = True
    schedules: ClassVar[bool] = True

    # -- arguments ----------------------------------------------------------------------------------------------

    def test_the_common_arguments_are_typed_keywords(self, folder: Any) -> None:
        """Every one is keyword-only with its default, and nothing is swallowed by `**kwargs`."""
        with self.open_subject(Setup(folder=folder)) as subject:
            assert isinstance(subject, SupportsFitRL)
            found = inspect.signature(subject.fit_rl).parameters
        assert {name: found[name].default for name in COMMON if name in found} == COMMON
        assert all(found[name].kind is inspect.Parameter.KEYWORD_ONLY for name in COMMON)
        assert not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in found.values())

    def test_an_unknown_keyword_is_an_error_that_names_the_backend(self, folder: Any) -> None:
        """It also names the keyword and what the backend takes, and it changes nothing."""
        setup = Setup(folder=folder)
        with self.open_subject(setup) as subject:
            with pytest.raises(TypeError) as caught:
                subject.fit_rl(self.model(setup), step_groups(1), num_gpus_of_the_moon=1)
            for part in (self.backend, "num_gpus_of_the_moon", *COMMON):
                assert part in str(caught.value), str(caught.value)
            assert subject.fit_rl(self.model(setup), step_groups(1)).num_optimizer_steps == 1

    def test_every_common_argument_has_an_effect(self, folder: Any) -> None:
        """With a learning rate of 0 calls see the same weights, so another loss or gradient is the argument's doing."""
        setup = Setup(folder=folder)
        groups = step_groups(1)
        seen: dict[str, tuple[float, float]] = {}
        with self.open_subject(setup) as subject:
            model = self.model(setup)

            def numbers(arguments: dict[str, Any]) -> tuple[float, float]:
                metrics = subject.fit_rl(model, groups, learning_rate=0.0, **arguments).metrics
                return metrics["loss/train"], metrics["loss/grad_norm"]

            for name, (with_it, without) in EFFECTS.items():
                for arguments in (with_it, without):
                    seen.setdefault(str(arguments), numbers(arguments))
                pair = seen[str(with_it)], seen[str(without)]
                assert pair[0] != pytest.approx(pair[1], rel=1e-4), name
        if self.exact:
            loss, norm = ByHand().learn(samples_of(groups), 0.0, ppo=True)
            assert seen["{'ppo': True}"] == (self.near(loss), self.near(norm))

    def test_groups_may_be_any_iterable(self, folder: Any) -> None:
        """A generator is as good as a list."""
        setup = Setup(folder=folder)
        with self.open_subject(setup) as subject:
            assert subject.fit_rl(self.model(setup), iter(step_groups(1))).num_optimizer_steps == 1

    # -- results ------------------------------------------------------------------------------------------------

    def test_the_result_is_typed_and_frozen(self, folder: Any) -> None:
        """A step is counted by the result and by the model alike, metrics are floats, nothing can be set."""
        setup = Setup(folder=folder)
        with self.open_subject(setup) as subject:
            model = self.model(setup)
            result = subject.fit_rl(model, step_groups(1))
        assert isinstance(result, TrainResult)
        assert (result.num_optimizer_steps, result.dropped) == (1, {}) and result.step == model.step > 0
        assert result.metrics and all(type(value) is float for value in result.metrics.values())
        assert result.metrics["objective/exact"] == float(self.exact)
        for name in ("step", "metrics", "num_optimizer_steps", "dropped"):
            with pytest.raises(AttributeError):
                setattr(result, name, None)

    def test_nothing_to_train_is_an_outcome(self, folder: Any) -> None:
        """Flat groups, a group of one and an empty one: no step, no checkpoint, and each is counted."""
        setup = Setup(folder=folder)
        first, second, taught = step_groups(1)
        for trajectory in first:
            trajectory.reward = 1.0
        with self.open_subject(setup) as subject:
            model = self.model(setup)
            nothing = [first, TrajectoryGroup(second.trajectories[:1]), TrajectoryGroup([])]
            result = subject.fit_rl(model, nothing)
            assert (result.num_optimizer_steps, result.step) == (0, model.step)
            assert result.dropped == {"flat_groups": 2, "empty_groups": 1}
            for name in ("checkpoint_path", "artifact_name"):
                assert getattr(result, name, None) is None
            after = subject.fit_rl(model, [taught])
            assert after.num_optimizer_steps == 1 and after.step > result.step

    # -- from call to call --------------------------------------------------------------------------------------

    def test_moments_and_schedule_live_on(self, folder: Any) -> None:
        """Four calls are four steps of one AdamW, each with its scheduled rate, as a loop by hand takes them."""
        setup = Setup(folder=folder, lr_schedule=falling) if self.schedules else Setup(folder=folder)
        hand = ByHand()
        with self.open_subject(setup) as subject:
            model = self.model(setup)
            for number in range(4):
                groups = step_groups(1 + number % 2)
                rate = 1e-3 * setup.lr_schedule(number)
                metrics = subject.fit_rl(model, groups, learning_rate=1e-3).metrics
                assert metrics["loss/learning_rate"] == pytest.approx(rate)
                self._compare(metrics, hand.learn(samples_of(groups), rate))

    def test_the_clip_value_is_honoured(self, folder: Any) -> None:
        """Steps are those of the clipped gradient; the norm that is told is the one before."""
        if not self.clips:
            pytest.skip(f"{type(self).__name__} says that it takes no gradient_clip_val")
        setup, hand = Setup(folder=folder, gradient_clip_val=TINY_CLIP), ByHand(clip=TINY_CLIP)
        with self.open_subject(setup) as subject:
            for _ in range(3):
                metrics = subject.fit_rl(self.model(setup), step_groups(1), learning_rate=1e-3).metrics
                self._compare(metrics, hand.learn(samples_of(step_groups(1)), 1e-3))

    def test_the_callers_random_numbers_are_left_alone(self, folder: Any) -> None:
        """A call draws nothing from the global generator, nor sets it."""
        setup = Setup(folder=folder)
        with self.open_subject(setup) as subject:
            model = self.model(setup)
            subject.fit_rl(model, step_groups(1))
            torch.manual_seed(7)
            before = torch.get_rng_state()
            subject.fit_rl(model, step_groups(2))
            assert torch.equal(before, torch.get_rng_state())

    def test_an_exception_leaves_it_usable(self, folder: Any) -> None:
        """Groups that cannot be learned from, or that raise while they are read, cost nothing but their call."""

        def breaks() -> Any:
            yield step_groups(2)[0]
            raise ArithmeticError("on purpose")

        setup = Setup(folder=folder)
        with self.open_subject(setup) as subject:
            undisturbed, disturbed = self.model(setup, "undisturbed"), self.model(setup, "disturbed")
            expected = [self._call(subject, undisturbed, seed) for seed in (1, 2)]
            found = [self._call(subject, disturbed, 1)]
            bad = step_groups(2)
            bad[1].trajectories[0].reward = float("nan")
            with pytest.raises(ValueError):
                subject.fit_rl(disturbed, bad, learning_rate=1e-3)
            with pytest.raises(ArithmeticError, match="on purpose"):
                subject.fit_rl(disturbed, breaks(), learning_rate=1e-3)
            found.append(self._call(subject, disturbed, 2))
        assert found == expected

    def test_n_calls_and_m_after_reopening_are_n_plus_m(self, folder: Any) -> None:
        """To the last bit: weights, moments, schedule, step, and the caller's random numbers."""
        if not self.resumes:
            pytest.skip(f"{type(self).__name__} says that it does not resume")
        setup = Setup(folder=folder, lr_schedule=falling) if self.schedules else Setup(folder=folder)
        with self.open_subject(setup) as subject:
            torch.manual_seed(5 + ranks.rank())
            whole = [self._calls(subject, self.model(setup, "whole"), pair) for pair in ((1, 2), (3, 1))]
        with self.open_subject(setup) as subject:
            torch.manual_seed(5 + ranks.rank())
            parts = [self._calls(subject, self.model(setup, "parts"), (1, 2))]
        torch.manual_seed(99)
        with self.open_subject(setup) as subject:
            parts.append(self._calls(subject, self.model(setup, "parts"), (3, 1)))
        if not self.restores_random_state:
            for calls in (whole, parts):
                calls[:] = [(metrics, []) for metrics, _ in calls]
        assert parts == whole

    def test_models_take_turns(self, folder: Any) -> None:
        """Each keeps its own weights, moments and step."""
        if not self.resumes:
            pytest.skip(f"{type(self).__name__} says that it does not resume")
        setup = Setup(folder=folder)
        with self.open_subject(setup) as subject:
            alone = [self._call(subject, self.model(setup, "alone"), seed) for seed in (1, 2)]
            first, second = self.model(setup, "first"), self.model(setup, "second")
            turns = [self._call(subject, model, seed) for seed in (1, 2) for model in (first, second)]
        assert turns[::2] == turns[1::2] == alone

    # -- what the checks share ----------------------------------------------------------------------------------

    def _compare(self, metrics: dict[str, float], by_hand: tuple[float, float]) -> None:
        if self.exact:
            assert (metrics["loss/train"], metrics["loss/grad_norm"]) == tuple(map(self.near, by_hand))

    def _call(self, subject: SupportsFitRL, model: TrainableModel, seed: int) -> dict[str, float]:
        """One call's metrics, but for what the machine had to do with them."""
        result = subject.fit_rl(model, step_groups(seed), learning_rate=1e-3)
        metrics = {key: value for key, value in result.metrics.items() if not key.startswith(MACHINE)}
        return metrics | {"step": float(result.step)}

    def _calls(
        self, subject: SupportsFitRL, model: TrainableModel, calls: tuple[int, int]
    ) -> tuple[list[dict[str, float]], list[float]]:
        """Two calls' metrics, and what the caller draws between them: after the state of one is taken up or saved."""
        first = self._call(subject, model, calls[0])
        drawn = torch.rand(2).tolist()
        return [first, self._call(subject, model, calls[1])], drawn
