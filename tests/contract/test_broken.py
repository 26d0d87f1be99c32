"""Each contract can fail: subjects that break one promise each, and the check that has to notice."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

import fitrl
from contract import local
from contract.test_third_party import TestPlain as Keeps
from contract.third_party import Plain
from fitrl.protocols.results import TokenLogprobs
from fitrl.strategies.local import LocalStrategy
from fitrl.testing import Contract, LightningContract, LightningFitRLContract, Setup, SupportsFitRLContract


def notices(contract: Contract, check: str, folder: Any, *arguments: Any) -> None:
    """The check fails, and by what it asserts."""
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        getattr(contract, f"test_{check}")(folder, *arguments)


# -- Trains -----------------------------------------------------------------------------------------------------------


class SwallowsKeywords(Plain):
    def forward_backward(self, batch, objective=None, **ignored):
        return super().forward_backward(batch, objective)


class StepsAtOnce(Plain):
    def forward_backward(self, batch, objective=None):
        result = super().forward_backward(batch, objective)
        self.adam.step()
        return result


class MeanOfMeans(Plain):
    """Each microbatch by its own count of tokens: uneven microbatches are not one step."""

    def forward_backward(self, batch, objective=None):
        batch.loss_inputs.num_tokens = batch.loss_inputs.mask.sum().float()
        return super().forward_backward(batch, objective)


class SumOfMicrobatchesHalved(Plain):
    def optim_step(self, *, learning_rate=None):
        for parameter in self.network.parameters():
            if parameter.grad is not None:
                parameter.grad /= max(1, self.waiting)
        return super().optim_step(learning_rate=learning_rate)


class IgnoresTheObjective(Plain):
    def forward_backward(self, batch, objective=None):
        return super().forward_backward(batch, None)


class KeepsGradientsAfterAStep(Plain):
    def optim_step(self, *, learning_rate=None):
        kept, self.adam.zero_grad = self.adam.zero_grad, lambda: None
        try:
            return super().optim_step(learning_rate=learning_rate)
        finally:
            self.adam.zero_grad = kept


class ClearsTheCountOnly(Plain):
    def clear_gradients(self):
        self.waiting = 0


class StepsOnNothing(Plain):
    def optim_step(self, *, learning_rate=None):
        self.waiting = max(1, self.waiting)
        return super().optim_step(learning_rate=learning_rate)


class IgnoresTheSchedule(Plain):
    def get_status(self):
        return dataclasses.replace(super().get_status(), learning_rate=self.learning_rate)


class CountsTwice(Plain):
    def optim_step(self, *, learning_rate=None):
        self.step += 1
        return super().optim_step(learning_rate=learning_rate)


class IgnoresTheLearningRate(Plain):
    def optim_step(self, *, learning_rate=None):
        return super().optim_step()


class KeepsTheLearningRate(Plain):
    def optim_step(self, *, learning_rate=None):
        self.learning_rate = self.learning_rate if learning_rate is None else learning_rate
        return super().optim_step(learning_rate=learning_rate)


class OnlyTellsTheLearningRate(Plain):
    """An explicit one is told, the scheduled one is used."""

    def optim_step(self, *, learning_rate=None):
        step = super().optim_step()
        return step if learning_rate is None else dataclasses.replace(step, learning_rate=learning_rate)


class StepsTwice(Plain):
    def optim_step(self, *, learning_rate=None):
        step = self.adam.step
        self.adam.step = lambda: (step(), step())
        try:
            return super().optim_step(learning_rate=learning_rate)
        finally:
            self.adam.step = step


class ForgetsMoments(Plain):
    def optim_step(self, *, learning_rate=None):
        self.adam.state.clear()
        return super().optim_step(learning_rate=learning_rate)


class NeverClips(Plain):
    def optim_step(self, *, learning_rate=None):
        kept, self.clip = self.clip, None
        try:
            return super().optim_step(learning_rate=learning_rate)
        finally:
            self.clip = kept


class TellsTheClippedNorm(Plain):
    def optim_step(self, *, learning_rate=None):
        clip_grad_norm_(self.network.parameters(), self.clip or 1e9)
        return super().optim_step(learning_rate=learning_rate)


class CountsWhatRaised(Plain):
    def forward_backward(self, batch, objective=None):
        self.waiting += 1
        result = super().forward_backward(batch, objective)
        self.waiting -= 1
        return result


class SavesNoMoments(Plain):
    def save(self, name=None, path=None, weights_only=False):
        return super().save(name, path, True)


class SavesNoRandomState(Plain):
    def load(self, path=None):
        found = super().load(path)
        torch.manual_seed(1)
        return found


class LoadsBesideWhatWaits(Plain):
    def load(self, path=None):
        waiting = self.waiting
        found = super().load(path)
        self.waiting = waiting
        return found


class LoadsTheFirst(Plain):
    def load(self, path=None):
        return super().load(path or str(min(self.folder.glob("*.pt"))))


class KeepsMoments(Plain):
    """Also of a weights-only save."""

    def load(self, path=None):
        moments = self.adam.state_dict()
        found = super().load(path)
        self.adam.load_state_dict(moments)
        return found


class LoadsAtStepZero(Plain):
    def load(self, path=None):
        found = super().load(path)
        self.step = 0
        return found


class LoadsNothing(Plain):
    def load(self, path=None):
        return path or "nowhere"


class NamesNoClip(Plain):
    def get_config(self):
        return dataclasses.replace(super().get_config(), gradient_clip_val=1.0)


# -- Scores -----------------------------------------------------------------------------------------------------------


class ScoresInBfloat16(Plain):
    def forward(self, batch):
        return TokenLogprobs(logprobs=super().forward(batch).logprobs.bfloat16())


class ScoresRounded(Plain):
    def forward(self, batch):
        return TokenLogprobs(logprobs=super().forward(batch).logprobs.bfloat16().float())


class ScoresInFloat64(Plain):
    def forward(self, batch):
        return TokenLogprobs(logprobs=super().forward(batch).logprobs.double())


class ScoresAtTemperatureOne(Plain):
    def forward(self, batch):
        batch.loss_inputs.temperature = torch.ones_like(batch.loss_inputs.temperature)
        return super().forward(batch)


class ScoresBackwards(Plain):
    def forward(self, batch):
        return TokenLogprobs(logprobs=super().forward(batch).logprobs.flip(0))


class ScoresWithAGradient(Plain):
    def forward(self, batch):
        return TokenLogprobs(logprobs=self.logprobs(batch.model_inputs, batch.loss_inputs))


class ScoresAndClears(Plain):
    def forward(self, batch):
        self.clear_gradients()
        self.waiting = 1
        return super().forward(batch)


# -- ExportsWeights ---------------------------------------------------------------------------------------------------


class ExportsWrapped(Plain):
    def named_weights(self):
        return ((f"module.{name}", tensor) for name, tensor in super().named_weights())


class ExportsAllButOne(Plain):
    def named_weights(self):
        return list(super().named_weights())[:-2]


class ExportsShards(Plain):
    def named_weights(self):
        return ((name, tensor[: len(tensor) // 2]) for name, tensor in super().named_weights())


class ExportsWithGradient(Plain):
    def named_weights(self):
        return self.network.named_parameters()


class ExportsOnce(Plain):
    def named_weights(self):
        weights, self.network.state_dict = list(super().named_weights()), dict
        return weights


class ExportsTheBase(Plain):
    """What it held at its start, whatever was learned since."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.base = [(name, tensor.clone()) for name, tensor in super().named_weights()]

    def named_weights(self):
        return iter(self.base)


NOTICED = [
    (SwallowsKeywords, "it_has_the_verbs"),
    (StepsAtOnce, "forward_backward_accumulates_and_never_steps"),
    (MeanOfMeans, "microbatches_add_up_to_the_whole_step", 3),
    (SumOfMicrobatchesHalved, "microbatches_add_up_to_the_whole_step", 2),
    (IgnoresTheObjective, "another_objective_counts_for_its_microbatch_only"),
    (KeepsGradientsAfterAStep, "a_step_clears_what_it_used"),
    (ClearsTheCountOnly, "clear_gradients_forgets"),
    (StepsOnNothing, "nothing_accumulated_is_an_error"),
    (IgnoresTheSchedule, "the_learning_rate_follows_the_schedule"),
    (CountsTwice, "the_learning_rate_follows_the_schedule"),
    (IgnoresTheLearningRate, "an_explicit_learning_rate_is_final_for_one_step"),
    (KeepsTheLearningRate, "an_explicit_learning_rate_is_final_for_one_step"),
    (OnlyTellsTheLearningRate, "steps_are_those_of_adamw"),
    (StepsTwice, "steps_are_those_of_adamw"),
    (ForgetsMoments, "steps_are_those_of_adamw"),
    (NeverClips, "the_clip_value_is_honoured"),
    (TellsTheClippedNorm, "the_clip_value_is_honoured"),
    (CountsWhatRaised, "an_exception_leaves_it_usable"),
    (SavesNoMoments, "saves_resume_exactly"),
    (SavesNoRandomState, "saves_resume_exactly"),
    (LoadsBesideWhatWaits, "saves_resume_exactly"),
    (LoadsNothing, "saves_resume_exactly"),
    (LoadsTheFirst, "the_newest_save_is_loaded_unless_one_is_named"),
    (KeepsMoments, "a_weights_only_save_starts_a_fresh_optimizer"),
    (LoadsAtStepZero, "a_weights_only_save_starts_a_fresh_optimizer"),
    (LoadsNothing, "loading_what_is_not_there_is_an_error"),
    (NamesNoClip, "config_is_static_and_results_are_frozen"),
    (ScoresInBfloat16, "logprobs_are_float32_in_every_precision", "32-true"),
    (ScoresRounded, "logprobs_are_float32_in_every_precision", "32-true"),
    (ScoresInFloat64, "logprobs_are_float32_in_every_precision", "64-true"),
    (ScoresAtTemperatureOne, "logprobs_are_the_true_ones", "padded"),
    (ScoresBackwards, "logprobs_are_the_true_ones", "packed"),
    (ScoresWithAGradient, "a_score_leaves_nothing_behind"),
    (ScoresAndClears, "scores_follow_the_steps_and_do_not_disturb_them"),
    (ExportsWrapped, "weights_are_complete_under_hf_names"),
    (ExportsAllButOne, "weights_are_complete_under_hf_names"),
    (ExportsShards, "weights_are_complete_under_hf_names"),
    (ExportsWithGradient, "weights_carry_no_gradient_and_can_be_drained_again"),
    (ExportsOnce, "weights_carry_no_gradient_and_can_be_drained_again"),
    (ExportsTheBase, "every_rank_is_handed_the_trained_weights"),
]


@pytest.mark.parametrize(
    ("broken", "check", "arguments"),
    [(broken, check, arguments) for broken, check, *arguments in NOTICED],
    ids=[f"{broken.__name__}-{check}" for broken, check, *_ in NOTICED],
)
def test_broken_verbs_are_noticed(broken, check, arguments, tmp_path) -> None:
    class Broken(Keeps):
        subject = broken

    notices(Broken(), check, tmp_path, *arguments)


# -- SupportsFitRL ----------------------------------------------------------------------------------------------------


class Service:
    """A `SupportsFitRL` that passes everything on; the ones below break it."""

    options: dict[str, Any] = {}

    def __init__(self, setup: Setup) -> None:
        self.trainer = local.new_trainer("fitrl_local", setup, **self.options)

    def fit_rl(
        self,
        model,
        groups,
        *,
        learning_rate: float = 5e-6,
        ppo: bool = False,
        epsilon: float | None = None,
        epsilon_high: float | None = None,
        advantage_balance: float = 0.0,
        scale_rewards: bool = True,
        importance_sampling_level="token",
    ):
        given = {name: value for name, value in locals().items() if name not in ("self", "model", "groups")}
        return self.call(model, groups, given)

    def call(self, model, groups, given):
        return self.trainer.fit_rl(model, groups, **given)


class TakesAnything(Service):
    def fit_rl(self, model, groups, **given):
        given.pop("num_gpus_of_the_moon", None)
        return self.call(model, groups, given)


class OtherDefaults(Service):
    def fit_rl(self, model, groups, *, learning_rate=1e-6, **given):
        return self.call(model, groups, given | {"learning_rate": learning_rate})


class IgnoresEpsilonHigh(Service):
    def call(self, model, groups, given):
        return super().call(model, groups, given | {"epsilon_high": None})


class AlwaysPPO(Service):
    def call(self, model, groups, given):
        return super().call(model, groups, given | {"ppo": True})


class TellsMutably(Service):
    """What can be overwritten by whoever reads it first."""

    def call(self, model, groups, given):
        result = super().call(model, groups, given)
        return type("Result", (), {name: getattr(result, name) for name in dir(result) if not name.startswith("_")})()


class MadeUpStep(Service):
    """A step where there was nothing to learn."""

    def call(self, model, groups, given):
        result = super().call(model, groups, given)
        return dataclasses.replace(result, num_optimizer_steps=1, step=result.step + 1)


class LearningRateOnce(Service):
    """The first call's stays."""

    def call(self, model, groups, given):
        self.rate = getattr(self, "rate", given["learning_rate"] / 2)
        return super().call(model, groups, given | {"learning_rate": self.rate})


class FreshAdamEachCall(Service):
    def call(self, model, groups, given):
        self.trainer.open(model)
        self.trainer.strategy.optimizers[0].state.clear()
        return super().call(model, groups, given)


class OneModelForAll(Service):
    def call(self, model, groups, given):
        self.model = getattr(self, "model", model)
        return super().call(self.model, groups, given)


class NeverClipsCalls(Service):
    def __init__(self, setup: Setup) -> None:
        super().__init__(dataclasses.replace(setup, gradient_clip_val=None))


class DrawsNumbers(Service):
    def call(self, model, groups, given):
        torch.rand(1)
        return super().call(model, groups, given)


class NeverSaves(Service):
    def call(self, model, groups, given):
        return self.trainer.fit_rl(model, groups, save_checkpoint=False, **given)


class LearnsBeforeItRaises(Service):
    def call(self, model, groups, given):
        groups = iter(groups)
        first = [next(groups)]
        super().call(model, first, given)
        return super().call(model, [*first, *groups], given)


BROKEN_CALLS = [
    (TakesAnything, "the_common_arguments_are_typed_keywords"),
    (OtherDefaults, "the_common_arguments_are_typed_keywords"),
    (TakesAnything, "an_unknown_keyword_is_an_error_that_names_the_backend"),
    (IgnoresEpsilonHigh, "every_common_argument_has_an_effect"),
    (AlwaysPPO, "every_common_argument_has_an_effect"),
    (TellsMutably, "the_result_is_typed_and_frozen"),
    (MadeUpStep, "nothing_to_train_is_an_outcome"),
    (LearningRateOnce, "moments_and_schedule_live_on"),
    (FreshAdamEachCall, "moments_and_schedule_live_on"),
    (NeverClipsCalls, "the_clip_value_is_honoured"),
    (DrawsNumbers, "the_callers_random_numbers_are_left_alone"),
    (NeverSaves, "n_calls_and_m_after_reopening_are_n_plus_m"),
    (OneModelForAll, "models_take_turns"),
    (LearnsBeforeItRaises, "an_exception_leaves_it_usable"),
]


class BrokenCalls(SupportsFitRLContract):
    backend = "local"

    def __init__(self, subject: type[Service]) -> None:
        self.subject = subject

    @contextmanager
    def open_subject(self, setup: Setup) -> Iterator[Service]:
        service = self.subject(setup)
        with service.trainer:
            yield service


@pytest.mark.parametrize(
    ("broken", "check"), BROKEN_CALLS, ids=[f"{broken.__name__}-{check}" for broken, check in BROKEN_CALLS]
)
def test_broken_calls_are_noticed(broken, check, tmp_path) -> None:
    notices(BrokenCalls(broken), check, tmp_path)


# -- Lightning --------------------------------------------------------------------------------------------------------


class StepsByItself(LocalStrategy):
    """Past Lightning's hooks and its clipping."""

    def optimizer_step(self, optimizer, closure, model=None, **kwargs):
        loss = closure()
        optimizer.step()
        return loss


class HalvesTheLoss(LocalStrategy):
    def backward(self, closure_loss, optimizer, *args, **kwargs):
        return super().backward(closure_loss / 2, optimizer, *args, **kwargs)


class RestoresNoOptimizer(LocalStrategy):
    def load_optimizer_state_dict(self, checkpoint) -> None:
        pass


class LearnsFromValidation(LocalStrategy):
    def validation_step(self, *args, **kwargs):
        for parameter in self.policy_module.network.parameters() if self.is_live else self.model.parameters():
            parameter.data.mul_(1.01)
        return super().validation_step(*args, **kwargs)


class HidesCallbacks(LocalStrategy):
    def setup(self, trainer) -> None:
        trainer.callbacks.clear()
        super().setup(trainer)


class IgnoresTheSchedulers(LocalStrategy):
    def setup_optimizers(self, trainer) -> None:
        super().setup_optimizers(trainer)
        self.lr_scheduler_configs.clear()


class BrokenUnderLightning(LightningContract, LightningFitRLContract):
    def __init__(self, subject: type[LocalStrategy]) -> None:
        self.subject = subject

    def strategy(self, folder) -> LocalStrategy:
        return self.subject()

    def open_trainer(self, setup: Setup, *callbacks, **options) -> fitrl.LocalTrainer:
        return local.new_trainer(self.subject(), setup, callbacks=list(callbacks), **options)


BROKEN_STRATEGIES = [
    (HidesCallbacks, "callbacks_fire_in_lightnings_order"),
    (HalvesTheLoss, "accumulated_microbatches_are_one_step", 3),
    (StepsByItself, "steps_are_those_of_adamw_with_schedule_and_clipping", 1e-7),
    (IgnoresTheSchedulers, "loggers_and_learning_rate_monitor"),
    (RestoresNoOptimizer, "ckpt_path_resumes_exactly"),
    (LearnsFromValidation, "validation_learns_nothing"),
    (HidesCallbacks, "callbacks_fire_in_every_call"),
    (IgnoresTheSchedulers, "loggers_get_every_call_and_stay_open"),
    (LearnsFromValidation, "validation_between_calls_changes_nothing"),
    (HalvesTheLoss, "microbatches_of_a_call_are_one_step"),
    (HalvesTheLoss, "a_callback_that_raises_leaves_it_usable", "on_train_start"),
]


@pytest.mark.parametrize(
    ("broken", "check", "arguments"),
    [(broken, check, arguments) for broken, check, *arguments in BROKEN_STRATEGIES],
    ids=[f"{broken.__name__}-{check}" for broken, check, *_ in BROKEN_STRATEGIES],
)
def test_broken_strategies_are_noticed(broken, check, arguments, tmp_path) -> None:
    notices(BrokenUnderLightning(broken), check, tmp_path, *arguments)
