"""`Objective`: what it accepts, what it refuses and how it says so."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from typing import Any

import numpy as np
import pytest
import torch

import fitrl
from fitrl import Objective, PolicyLoss
from fitrl.errors import FitRLError, InvalidArgumentError
from fitrl.objective.objective import CustomObjective, LossInputs

OPTIONS = {
    "ppo": False,
    "epsilon": None,
    "epsilon_high": None,
    "importance_sampling_level": "token",
    "max_negative_advantage_importance_sampling_weight": None,
    "mask_prob_ratio": False,
    "kimi_k2_tau": None,
    "truncated_importance_sampling": None,
    "dual_clip": None,
    "ratio_cap": None,
    "kl_coef": 0.0,
    "kl_estimator": None,
    "kl_in": "loss",
    "entropy_coef": 0.0,
    "loss_aggregation": "token_mean",
    "norm_length": None,
}
NORM = "seq_mean_token_sum_norm"


def test_options_and_defaults() -> None:
    objective = Objective()
    assert {field.name: getattr(objective, field.name) for field in dataclasses.fields(Objective)} == OPTIONS


def test_options_are_keyword_only() -> None:
    kinds = {parameter.kind for parameter in inspect.signature(Objective).parameters.values()}
    assert kinds == {inspect.Parameter.KEYWORD_ONLY}


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match="clip"):
        Objective(clip=0.2)


@pytest.mark.parametrize("name", OPTIONS)
def test_frozen(name: str) -> None:
    objective = Objective()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(objective, name, getattr(objective, name))
    with pytest.raises((AttributeError, TypeError)):
        object.__setattr__(objective, "other", 1)  # slotted: nowhere to put it


def test_equal_options_make_equal_hashable_objectives() -> None:
    assert Objective(ppo=True, epsilon=0.1) == Objective(epsilon=0.1, ppo=True)
    assert len({Objective(), Objective(), Objective(ppo=True)}) == 2
    assert dataclasses.replace(Objective(), ppo=True) == Objective(ppo=True)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ppo": True},
        *({"ppo": ppo, "epsilon": value} for ppo in (True, False) for value in (0.0, 0.2, 1.0)),
        *({"ppo": ppo, "epsilon_high": value} for ppo in (True, False) for value in (0.0, 0.28, 4.0)),
        *({"importance_sampling_level": level} for level in ("token", "sequence", "average", "geometric_average")),
        {"max_negative_advantage_importance_sampling_weight": 2.0},
        {"ppo": True, "max_negative_advantage_importance_sampling_weight": 0.5},
        {"mask_prob_ratio": True},
        {"kimi_k2_tau": 0.1},
        {"kimi_k2_tau": -0.1},
        {"truncated_importance_sampling": 0.5},
        {"truncated_importance_sampling": 2.0},
        {"truncated_importance_sampling": math.inf},  # importance sampling that is not truncated
        {"ppo": True, "dual_clip": 1.01},
        {"ppo": True, "dual_clip": 3.0},
        {"ppo": True, "ratio_cap": 1.21},
        {"ppo": True, "epsilon": 0.1, "ratio_cap": 1.11},
        {"ppo": True, "epsilon": 0.4, "epsilon_high": 0.1, "ratio_cap": 1.2},
        {"ppo": True, "dual_clip": 3.0, "ratio_cap": 4.0},
        {"kl_coef": 0.1},
        {"kl_coef": 0.1, "kl_estimator": "k2"},
        {"kl_coef": 0.1, "kl_estimator": "k3"},
        {"kl_coef": 0.1, "kl_in": "loss"},
        {"kl_coef": 0.1, "kl_in": "advantage"},
        {"kl_coef": 0.1, "kl_in": "advantage", "kl_estimator": "k1"},
        {"entropy_coef": 0.01},
        {"entropy_coef": -0.01},
        *(
            {"loss_aggregation": kind}
            for kind in ("token_mean", "token_sum", "seq_mean_token_mean", "seq_mean_token_sum")
        ),
        {"loss_aggregation": NORM, "norm_length": 512},
        # the defaults, spelled out
        OPTIONS,
    ],
    ids=str,
)
def test_valid(options: dict[str, Any]) -> None:
    objective = Objective(**options)
    for name, value in options.items():
        assert getattr(objective, name) == value


@pytest.mark.parametrize(
    ("options", "words"),
    [
        # out of range
        *(({"epsilon": value}, "epsilon") for value in (-0.1, math.inf, math.nan)),
        *(({"ppo": True, "epsilon": value}, "epsilon") for value in (-0.1, math.inf, math.nan)),
        *(({"epsilon_high": value}, "epsilon_high") for value in (-0.1, math.inf, math.nan)),
        *(
            ({"max_negative_advantage_importance_sampling_weight": value}, "max_negative_advantage")
            for value in (0.0, -1.0, -math.inf, math.nan)
        ),
        *(({"kimi_k2_tau": value}, "kimi_k2_tau") for value in (math.inf, -math.inf, math.nan)),
        *(
            ({"truncated_importance_sampling": value}, "truncated_importance_sampling")
            for value in (0.0, -1.0, -math.inf, math.nan)
        ),
        *(({"ppo": True, "dual_clip": value}, "dual_clip") for value in (1.0, 0.5, 0.0, -3.0, math.nan)),
        *(({"ppo": True, "ratio_cap": value}, "ratio_cap") for value in (1.2, 1.0, 0.0, -3.0, math.nan)),
        ({"ppo": True, "epsilon_high": 0.5, "ratio_cap": 1.4}, r"ratio_cap.*epsilon_high.*1\.5"),
        ({"ppo": True, "epsilon": 0.5, "ratio_cap": 1.4}, r"ratio_cap.*epsilon_high.*1\.5"),
        *(({"kl_coef": value}, "kl_coef") for value in (-0.1, math.inf, math.nan)),
        *(({"entropy_coef": value}, "entropy_coef") for value in (math.inf, -math.inf, math.nan)),
        *(({"loss_aggregation": NORM, "norm_length": value}, "norm_length") for value in (0, -1.0, math.nan, math.inf)),
        # not a choice
        ({"importance_sampling_level": "prompt"}, "importance_sampling_level.*'geometric_average'.*'prompt'"),
        ({"loss_aggregation": "mean"}, "loss_aggregation.*'token_mean'.*'mean'"),
        ({"kl_coef": 0.1, "kl_in": "reward"}, "kl_in.*'advantage'.*'reward'"),
        ({"kl_coef": 0.1, "kl_estimator": "k4"}, "kl_estimator.*'k3'.*'k4'"),
        # of no effect
        ({"dual_clip": 3.0}, "dual_clip=3.0.*CISPO.*ppo=True"),
        ({"ratio_cap": 6.0}, "ratio_cap=6.0.*CISPO.*ppo=True"),
        *(({"kl_estimator": value}, f"kl_estimator='{value}'.*kl_coef") for value in ("k1", "k2", "k3")),
        ({"kl_in": "advantage"}, "kl_in='advantage'.*kl_coef"),
        ({"kl_coef": 0.0, "kl_in": "advantage", "kl_estimator": "k1"}, "kl_in.*kl_coef"),
        *(
            ({"loss_aggregation": kind, "norm_length": 512.0}, f"norm_length=512.0.*'{kind}'.*'{NORM}'")
            for kind in ("token_mean", "token_sum", "seq_mean_token_mean", "seq_mean_token_sum")
        ),
        # pairs that would teach something else
        ({"kl_coef": 0.1, "kl_estimator": "k1"}, "k1 in the loss.*no expected gradient.*kl_estimator"),
        *(
            (
                {"kl_coef": 0.1, "kl_in": "advantage", "kl_estimator": value},
                f"{value} in the advantage.*wrong way.*'k1'",
            )
            for value in ("k2", "k3")
        ),
        # one without the other
        ({"loss_aggregation": NORM}, f"'{NORM}'.*norm_length"),
    ],
    ids=str,
)
def test_invalid(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        Objective(**options)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        # no ratio reaches it
        ({"ppo": True, "dual_clip": math.inf}, "dual_clip"),
        ({"ppo": True, "ratio_cap": math.inf}, "ratio_cap"),
        (
            {"max_negative_advantage_importance_sampling_weight": math.inf},
            "max_negative_advantage_importance_sampling_weight",
        ),
    ],
    ids=str,
)
def test_an_infinite_cap_has_no_effect_so_it_is_refused(options: dict[str, Any], name: str) -> None:
    with pytest.raises(InvalidArgumentError, match=name):
        Objective(**options)


def test_errors_are_also_value_errors() -> None:
    with pytest.raises(ValueError, match="epsilon"):
        Objective(epsilon=-1.0)
    with pytest.raises(FitRLError, match="epsilon"):
        Objective(epsilon=-1.0)


@pytest.mark.parametrize(
    ("options", "window"),
    [
        ({"ppo": True}, (0.8, 1.2)),
        ({"ppo": True, "epsilon": 0.1}, (0.9, 1.1)),
        ({"ppo": True, "epsilon_high": 0.28}, (0.8, 1.28)),
        ({"ppo": True, "epsilon": 0.0}, (1.0, 1.0)),
        ({"ppo": True, "epsilon": 0.1, "epsilon_high": 0.0}, (0.9, 1.0)),
        ({}, (0.0, 5.0)),
        ({"epsilon": 0.1}, (0.9, 5.0)),
        ({"epsilon": 0.0}, (1.0, 5.0)),
        ({"epsilon_high": 0.28}, (0.0, 1.28)),
        ({"epsilon": 0.1, "epsilon_high": 0.28}, (0.9, 1.28)),
    ],
    ids=str,
)
def test_ratio_window(options: dict[str, Any], window: tuple[float, float]) -> None:
    assert Objective(**options).ratio_window == pytest.approx(window)


@pytest.mark.parametrize(
    ("options", "teaches"),
    [
        ({}, False),
        ({"ppo": True, "dual_clip": 3.0}, False),
        ({"ppo": True, "mask_prob_ratio": True}, False),
        ({"truncated_importance_sampling": 2.0}, False),
        ({"kl_coef": 0.1}, True),
        ({"kl_coef": 0.1, "kl_in": "advantage"}, True),
        ({"entropy_coef": 0.1}, True),
        ({"entropy_coef": -0.1}, True),
        ({"kimi_k2_tau": 0.1}, True),
    ],
    ids=str,
)
def test_flat_groups_teach_only_through_kl_entropy_or_tau(options: dict[str, Any], teaches: bool) -> None:
    assert Objective(**options).teaches_without_advantage is teaches


@pytest.mark.parametrize(
    "name", ["Objective", "PolicyLoss", "LossInputs", "CustomObjective", "policy_loss", "fused_linear_policy_loss"]
)
def test_exported(name: str) -> None:
    assert name in fitrl.__all__
    assert hasattr(fitrl, name)


@pytest.mark.parametrize("kind", [PolicyLoss, LossInputs])
def test_data_is_frozen_and_keyword_only(kind: type) -> None:
    with pytest.raises(TypeError):
        kind(1)
    assert all(field.kw_only for field in dataclasses.fields(kind))
    assert kind.__dataclass_params__.frozen


def test_a_custom_objective_is_anything_callable_that_says_what_it_needs() -> None:
    class Mine:
        inputs = "logits"

        def __call__(self, inputs: LossInputs) -> PolicyLoss:
            return PolicyLoss(loss=inputs.advantages.sum())

    assert isinstance(Mine(), CustomObjective)
    assert not isinstance(Objective(), CustomObjective)
    assert not isinstance(len, CustomObjective)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"kimi_k2_tau": 0.0}, "kimi_k2_tau"),
        ({"max_negative_advantage_importance_sampling_weight": 5.0}, "max_negative_advantage"),
        ({"ppo": True, "mask_prob_ratio": True, "ratio_cap": 2.0}, "ratio_cap"),
        ({"ppo": True, "mask_prob_ratio": True, "dual_clip": 1.2}, "dual_clip"),
        ({"ppo": True, "ratio_cap": 2.0, "dual_clip": 2.0}, "dual_clip"),
    ],
)
def test_a_bound_that_never_binds_is_refused(options: dict[str, Any], name: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"{name}.*has no effect"):
        Objective(**options)


@pytest.mark.parametrize("options", [{"epsilon": 1.5}, {"ppo": True, "epsilon": 1.5, "epsilon_high": 0.2}])
def test_a_window_that_starts_below_zero_is_refused(options: dict[str, Any]) -> None:
    """A ratio is above 0 whatever the policy does."""
    with pytest.raises(InvalidArgumentError, match=r"epsilon=1\.5 has no effect"):
        Objective(**options)
    assert Objective(ppo=True, epsilon=1.5).ratio_window == (-0.5, 2.5)  # the window's other end has an effect


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("value", ["0.2", [0.2], 1j])
def test_another_type_names_the_option_and_the_value(name: str, value: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"{name} must be .* got {re.escape(repr(value))}"):
        Objective(**{name: value})


@pytest.mark.parametrize("options", [{"ppo": 1}, {"ppo": None}, {"epsilon": True}, {"kl_coef": None}])
def test_booleans_are_booleans_and_numbers_are_numbers(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match="must be"):
        Objective(**options)
    assert Objective(epsilon=np.float32(0.5), entropy_coef=1).ratio_window == (0.5, 5.0)


def test_loss_inputs_are_what_was_asked_for() -> None:
    zeros = torch.zeros(2)
    names = [f.name for f in dataclasses.fields(LossInputs) if f.name not in ("reference_logprobs", "outputs")]

    def inputs(**outputs: Any) -> LossInputs:
        return LossInputs(**dict.fromkeys(names, zeros), outputs=outputs)

    for name in ("logprobs", "logits", "hidden", "weight"):
        assert getattr(inputs(**{name: zeros}), name) is zeros
        asked = "hidden" if name == "weight" else name
        with pytest.raises(InvalidArgumentError, match=f"{name} without asking.*inputs = '{asked}'"):
            getattr(inputs(), name)
    assert inputs(hidden=zeros).bias is None and inputs(hidden=zeros, bias=zeros).bias is zeros
    with pytest.raises(InvalidArgumentError, match="inputs = 'hidden'"):
        _ = inputs(logprobs=zeros).bias
