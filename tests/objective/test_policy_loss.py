"""`policy_loss` against a scalar implementation, and its gradient against difference quotients."""

from __future__ import annotations

import importlib.util
import itertools
import math
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fitrl import Objective, PolicyLoss, policy_loss
from fitrl.errors import InvalidArgumentError


def _sibling(name: str) -> Any:
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


oracle = _sibling("oracle")

NAN, INF = math.nan, math.inf
LEVELS = ("token", "sequence", "average", "geometric_average")
AGGREGATIONS = (
    {"loss_aggregation": "token_mean"},
    {"loss_aggregation": "token_sum"},
    {"loss_aggregation": "seq_mean_token_mean"},
    {"loss_aggregation": "seq_mean_token_sum"},
    {"loss_aggregation": "seq_mean_token_sum_norm", "norm_length": 7.0},
)
# windows narrow enough for a batch of a few tokens to lie on both sides; ratio_cap > window > dual_clip
SURROGATES = {
    "cispo": {"epsilon": 0.3, "epsilon_high": 0.4},
    "cispo_default": {},
    "ppo": {"ppo": True},
    "ppo_asymmetric": {"ppo": True, "epsilon": 0.2, "epsilon_high": 0.28},
    "ppo_dual_clip": {"ppo": True, "dual_clip": 1.15},
    "ppo_ratio_cap": {"ppo": True, "ratio_cap": 1.6},
    "ppo_both": {"ppo": True, "dual_clip": 1.5, "ratio_cap": 1.7},
}
KL_TERMS = (
    {},
    {"kl_coef": 0.3},
    {"kl_coef": 0.3, "kl_estimator": "k3"},
    {"kl_coef": 0.3, "kl_in": "advantage"},
)
# every option at once, as far as they go together
FULL = {
    "importance_sampling_level": "average",
    "max_negative_advantage_importance_sampling_weight": 1.1,
    "kimi_k2_tau": 0.15,
    "truncated_importance_sampling": 1.2,
    "entropy_coef": 0.05,
}
FULL_OBJECTIVES = [
    {**surrogate, **FULL, **kl, **aggregation}
    for surrogate in (SURROGATES["cispo"], SURROGATES["ppo_both"])
    for kl in KL_TERMS[1:]
    for aggregation in AGGREGATIONS
]


@dataclass
class Case:
    """A batch in plain floats; every token also has a rollout and a reference logprob and an entropy."""

    p: list[float]
    q: list[float]
    a: list[float]
    mask: list[bool]
    ids: list[int]
    o: list[float]
    ref: list[float]
    h: list[float]

    def inputs(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """Tensors by name; logprobs and entropies are leaves."""
        floats = {
            "logprobs": self.p,
            "old_logprobs": self.q,
            "advantages": self.a,
            "rollout_logprobs": self.o,
            "reference_logprobs": self.ref,
            "entropies": self.h,
        }
        tensors = {name: torch.tensor(values, dtype=dtype) for name, values in floats.items()}
        tensors["logprobs"].requires_grad_()
        tensors["entropies"].requires_grad_()
        ids = torch.tensor(self.ids, dtype=torch.int64)
        return tensors | {"mask": torch.tensor(self.mask, dtype=torch.bool), "trajectory_ids": ids}

    def expected(self, options: dict, **keywords: Any) -> Any:
        return oracle.policy_loss(*self._oracle_args(options), **self._oracle_keywords(options), **keywords)

    def expected_gradient(self, options: dict) -> tuple[list[float | None], list[float]]:
        return oracle.gradient(*self._oracle_args(options), **self._oracle_keywords(options))

    def _oracle_args(self, options: dict) -> tuple[Any, ...]:
        return self.p, self.q, self.a, self.mask, self.ids, options

    def _oracle_keywords(self, options: dict) -> dict[str, Any]:
        return {"o": self.o, "ref": self.ref, "entropies": self.h}


def random_case(seed: int, tokens: int = 6, *, spread: float = 0.5) -> Case:
    rng = random.Random(seed)
    p = [rng.uniform(-3.0, -0.1) for _ in range(tokens)]
    q = [x + rng.gauss(0.0, spread) for x in p]
    return Case(
        p=p,
        q=q,
        a=[rng.choice((-1, 1)) * rng.uniform(0.2, 2.0) for _ in p],
        mask=[rng.random() < 0.85 for _ in p],
        ids=[rng.randrange(3) for _ in p],
        o=[x + rng.gauss(0.0, 0.4) for x in q],
        ref=[x + rng.gauss(0.0, 0.4) for x in p],
        h=[rng.uniform(0.0, 2.0) for _ in p],
    )


def run(inputs: dict[str, Tensor], options: dict | Objective, **keywords: Any) -> PolicyLoss:
    objective = options if isinstance(options, Objective) else Objective(**options)
    return policy_loss(**inputs, objective=objective, **keywords)


def gradients(inputs: dict[str, Tensor], result: PolicyLoss) -> tuple[Tensor, Tensor]:
    by = (inputs["logprobs"], inputs["entropies"])
    return torch.autograd.grad(result.loss, by, allow_unused=True, materialize_grads=True)


def check(case: Case, options: dict) -> tuple[int, int]:
    """Compare value, metrics and gradient with the oracle; how many logprob gradients were compared, of how many."""
    inputs = case.inputs()
    result, expected = run(inputs, options), case.expected(options)
    assert result.loss.item() == pytest.approx(expected.loss, rel=1e-9, abs=1e-9), options
    metrics = {name: value.item() for name, value in result.metrics.items()}
    assert metrics["loss_policy"] == pytest.approx(expected.policy, rel=1e-9, abs=1e-9), options
    if options.get("kl_coef") and options.get("kl_in") != "advantage":
        assert metrics["loss_kl"] == pytest.approx(expected.kl, rel=1e-9, abs=1e-9), options
    by_logprob, by_entropy = gradients(inputs, result)
    slopes, entropy_slopes = case.expected_gradient(options)
    smooth = [t for t, slope in enumerate(slopes) if slope is not None]
    found, wanted = by_logprob[smooth].tolist(), [slopes[t] for t in smooth]
    assert found == pytest.approx(wanted, rel=1e-6, abs=1e-7), options
    assert by_entropy.tolist() == pytest.approx(entropy_slopes, rel=1e-9, abs=1e-9), options
    return len(smooth), len(slopes)


# -- the definition -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_every_combination_of_options(surrogate: str, level: str) -> None:
    counter = itertools.count()
    compared = total = 0
    for cap, masked, tau, truncated, kl, entropy in itertools.product(
        ({}, {"max_negative_advantage_importance_sampling_weight": 1.1}),
        ({}, {"mask_prob_ratio": True}),
        ({}, {"kimi_k2_tau": 0.2}),
        ({}, {"truncated_importance_sampling": 1.2}),
        KL_TERMS,
        ({}, {"entropy_coef": 0.05}),
    ):
        if masked and "ratio_cap" in SURROGATES[surrogate]:
            continue  # a kept ratio is inside the window, so below the cap
        n = next(counter)
        options = {
            **SURROGATES[surrogate],
            "importance_sampling_level": level,
            **cap,
            **masked,
            **tau,
            **truncated,
            **kl,
            **entropy,
            **AGGREGATIONS[n % len(AGGREGATIONS)],
        }
        smooth, tokens = check(random_case(1000 * len(surrogate) + n), options)
        compared, total = compared + smooth, total + tokens
    assert compared > 0.98 * total


@st.composite
def objectives(draw: st.DrawFn) -> dict[str, Any]:
    """Options of a valid objective, all of them free."""
    options: dict[str, Any] = {"importance_sampling_level": draw(st.sampled_from(LEVELS))}
    positive = st.floats(0.05, 1.0)
    ppo = options["ppo"] = draw(st.booleans())
    for name in ("epsilon", "epsilon_high"):
        if draw(st.booleans()):
            options[name] = draw(positive)
    high = oracle.window_of(options)[1]
    if draw(st.booleans()):
        options["max_negative_advantage_importance_sampling_weight"] = draw(st.floats(0.3, 0.95)) * high
    options["mask_prob_ratio"] = draw(st.booleans())
    if draw(st.booleans()):
        options["kimi_k2_tau"] = draw(st.floats(-0.5, 0.5).filter(bool))
    if draw(st.booleans()):
        options["truncated_importance_sampling"] = draw(st.floats(1.0, 3.0))
    if ppo and draw(st.booleans()):
        options["dual_clip"] = 1.0 + (high - 1.0) * draw(st.floats(0.1, 0.9))
    if ppo and not options["mask_prob_ratio"] and draw(st.booleans()):
        options["ratio_cap"] = high * draw(st.floats(1.05, 2.0))
    options |= draw(st.sampled_from(KL_TERMS))
    if "kl_coef" in options:
        options["kl_coef"] = draw(positive)
    if draw(st.booleans()):
        options["entropy_coef"] = draw(st.floats(-0.5, 0.5).filter(bool))
    return options | draw(st.sampled_from(AGGREGATIONS))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A batch of a few tokens; some old and rollout logprobs are unknown, some log ratios far out."""
    tokens = draw(st.integers(0, 6))
    each = st.lists(st.floats(-1.0, 1.0), min_size=tokens, max_size=tokens)
    p = [-2.0 + 1.9 * x for x in draw(each)]
    far = draw(st.sampled_from((0.5, 2.0, 30.0)))
    q = [x + far * y for x, y in zip(p, draw(each), strict=True)]
    unknown = st.lists(st.integers(0, 4), min_size=tokens, max_size=tokens)
    return Case(
        p=p,
        q=[NAN if flag == 0 else x for x, flag in zip(q, draw(unknown), strict=True)],
        a=[2 * x for x in draw(each)],
        mask=[bool(flag) for flag in draw(unknown)],
        ids=draw(st.lists(st.integers(0, max(tokens - 1, 0)), min_size=tokens, max_size=tokens)),
        o=[NAN if flag == 0 else x + far * y for x, y, flag in zip(q, draw(each), draw(unknown), strict=True)],
        ref=[x + far * y for x, y in zip(p, draw(each), strict=True)],
        h=[1 + x for x in draw(each)],
    )


@settings(max_examples=600, deadline=None, derandomize=True, database=None)
@given(case=cases(), options=objectives())
def test_value_is_the_oracles(case: Case, options: dict) -> None:
    result, expected = run(case.inputs(), options), case.expected(options)
    assert result.loss.dtype == torch.float64
    assert result.loss.item() == pytest.approx(expected.loss, rel=1e-9, abs=1e-9)


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(case=cases(), options=objectives())
def test_gradient_is_the_difference_quotient(case: Case, options: dict) -> None:
    inputs = case.inputs()
    result = run(inputs, options)
    by_logprob, by_entropy = gradients(inputs, result)
    slopes, entropy_slopes = case.expected_gradient(options)
    scale = max(1.0, abs(result.loss.item()))  # a difference quotient of a large loss has a large rounding error
    for found, wanted in zip(by_logprob.tolist(), slopes, strict=True):
        if wanted is not None:
            assert found == pytest.approx(wanted, rel=1e-6, abs=1e-7 * scale)
    assert by_entropy.tolist() == pytest.approx(entropy_slopes, rel=1e-9, abs=1e-9 * scale)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    data=st.data(),
    options=objectives(),
    dtype=st.sampled_from((torch.float32, torch.float64)),
    size=st.sampled_from((1.0, 30.0, 1e4)),
)
def test_finite_inputs_never_make_nan(data: st.DataObject, options: dict, dtype: torch.dtype, size: float) -> None:
    tokens = data.draw(st.integers(0, 5))
    each = st.lists(st.floats(-1.0, 1.0), min_size=tokens, max_size=tokens)
    logprobs = [[-size * abs(x) for x in data.draw(each)] for _ in range(4)]
    case = Case(
        p=logprobs[0],
        q=logprobs[1],
        a=[100 * x for x in data.draw(each)],
        mask=data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)),
        ids=data.draw(st.lists(st.integers(0, max(tokens - 1, 0)), min_size=tokens, max_size=tokens)),
        o=logprobs[2],
        ref=logprobs[3],
        h=[12 * abs(x) for x in data.draw(each)],
    )
    inputs = case.inputs(dtype)
    result = run(inputs, options)
    for value in (result.loss, *gradients(inputs, result), *result.metrics.values()):
        assert value.isfinite().all()


# -- worked by hand -----------------------------------------------------------------------------------------------


def one_token(ratio: float, advantage: float, options: dict, **keywords: Tensor) -> tuple[float, float]:
    """Loss and slope of a batch of one token whose old logprob is -1."""
    p = torch.tensor([-1.0 + math.log(ratio)], dtype=torch.float64, requires_grad=True)
    result = policy_loss(
        p,
        torch.tensor([-1.0], dtype=torch.float64),
        torch.tensor([advantage], dtype=torch.float64),
        torch.tensor([True]),
        torch.tensor([0]),
        Objective(**options),
        **keywords,
    )
    (slope,) = torch.autograd.grad(result.loss, p)
    return result.loss.item(), slope.item()


@pytest.mark.parametrize(
    ("options", "ratio", "advantage", "loss", "slope"),
    [
        # PPO's default window is [0.8, 1.2]
        ({}, 1.1, 2.0, -2.2, -2.2),
        ({}, 1.5, 2.0, -2.4, 0.0),
        ({}, 0.5, 2.0, -1.0, -1.0),
        ({}, 1.5, -2.0, 3.0, 3.0),
        ({}, 0.5, -2.0, 1.6, 0.0),
        # epsilon_high defaults to epsilon, and stands alone
        ({"epsilon": 0.4}, 1.35, 2.0, -2.7, -2.7),
        ({"epsilon": 0.4}, 1.5, 2.0, -2.8, 0.0),
        ({"epsilon_high": 0.4}, 1.35, 2.0, -2.7, -2.7),
        ({"epsilon_high": 0.4}, 0.7, -2.0, 1.6, 0.0),
        # dual clip bounds the loss of a negative advantage
        ({"dual_clip": 3.0}, 2.5, -2.0, 5.0, 5.0),
        ({"dual_clip": 3.0}, 4.0, -2.0, 6.0, 0.0),
        ({"dual_clip": 3.0}, 4.0, 2.0, -2.4, 0.0),
        # ratio_cap holds the unclipped branch
        ({"ratio_cap": 1.5}, 1.4, -2.0, 2.8, 2.8),
        ({"ratio_cap": 1.5}, 4.0, -2.0, 3.0, 0.0),
        ({"ratio_cap": 1.5}, 4.0, 2.0, -2.4, 0.0),
        # the cap of negative advantages touches only those
        ({"max_negative_advantage_importance_sampling_weight": 1.1}, 4.0, -2.0, 2.2, 0.0),
        ({"max_negative_advantage_importance_sampling_weight": 1.1}, 1.15, 2.0, -2.3, -2.3),
        # outside the open window: nothing, also on the side that PPO would not clip
        ({"mask_prob_ratio": True}, 1.5, -2.0, 0.0, 0.0),
        ({"mask_prob_ratio": True}, 0.5, 2.0, 0.0, 0.0),
        ({"mask_prob_ratio": True}, 1.1, 2.0, -2.2, -2.2),
    ],
)
def test_ppo_by_hand(options: dict, ratio: float, advantage: float, loss: float, slope: float) -> None:
    assert one_token(ratio, advantage, {"ppo": True, **options}) == pytest.approx((loss, slope), abs=1e-12)


@pytest.mark.parametrize(
    ("options", "ratio", "weight"),
    [
        # CISPO's default window is [0, 5]; each side defaults on its own
        ({}, 4.9, 4.9),
        ({}, 6.0, 5.0),
        ({}, 1e-6, 1e-6),
        ({"epsilon": 0.3}, 0.5, 0.7),
        ({"epsilon": 0.3}, 4.9, 4.9),
        ({"epsilon_high": 0.3}, 2.0, 1.3),
        ({"epsilon_high": 0.3}, 0.1, 0.1),
        ({"mask_prob_ratio": True}, 6.0, 0.0),
        ({"mask_prob_ratio": True}, 4.9, 4.9),
    ],
)
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_cispo_by_hand(options: dict, ratio: float, weight: float, advantage: float) -> None:
    p = -1.0 + math.log(ratio)
    expected = (-weight * advantage * p, -weight * advantage)
    assert one_token(ratio, advantage, options) == pytest.approx(expected, abs=1e-12)


def test_defaults_are_cispo_at_token_level_over_all_tokens() -> None:
    case = random_case(3, tokens=12, spread=2.0)
    spelled = {
        "ppo": False,
        "epsilon": 1.0,
        "epsilon_high": 4.0,
        "importance_sampling_level": "token",
        "loss_aggregation": "token_mean",
    }
    inputs = case.inputs()
    assert run(inputs, {}).loss == run(inputs, spelled).loss
    assert Objective(ppo=True).ratio_window == (0.8, 1.2)
    assert Objective().ratio_window == (0.0, 5.0)


def test_mask_prob_ratio_keeps_the_open_window_only() -> None:
    for epsilon_high, kept in ((1.0, False), (1.0 + 1e-9, True)):
        loss, _ = one_token(2.0, 1.0, {"mask_prob_ratio": True, "epsilon_high": epsilon_high, "epsilon": 0.5})
        assert bool(loss) is kept
    loss, slope = one_token(1.0, 1.0, {"mask_prob_ratio": True, "epsilon": 0.0})
    assert (loss, slope) == (0.0, 0.0)


def test_masks_and_truncation_leave_kl_and_entropy_alone() -> None:
    # one token far out of the window: the policy term is gone, the others are whole
    options = {"kl_coef": 0.5, "entropy_coef": 0.1, "mask_prob_ratio": True, "truncated_importance_sampling": 1.0}
    keywords = {
        "reference_logprobs": torch.tensor([-1.5], dtype=torch.float64),
        "rollout_logprobs": torch.tensor([3.0], dtype=torch.float64),
        "entropies": torch.tensor([0.7], dtype=torch.float64),
    }
    p = -1.0 + math.log(8.0)
    expected = (0.5 * (p + 1.5) ** 2 / 2 - 0.1 * 0.7, 0.5 * (p + 1.5))
    assert one_token(8.0, 2.0, options, **keywords) == pytest.approx(expected, abs=1e-12)


def test_dual_clip_follows_the_advantage_after_kl_and_tau() -> None:
    # tau turns a positive advantage negative, so the dual clip applies to it
    options = {"ppo": True, "dual_clip": 3.0, "kimi_k2_tau": 2.0}
    advantage = 1.0 - 2.0 * math.log(8.0)
    assert one_token(8.0, 1.0, options) == pytest.approx((-3.0 * advantage, 0.0), abs=1e-12)


def test_negative_advantage_cap_looks_at_the_advantage_before_tau() -> None:
    options = {"ppo": True, "kimi_k2_tau": 2.0, "max_negative_advantage_importance_sampling_weight": 1.1}
    advantage = 1.0 - 2.0 * math.log(8.0)
    assert one_token(8.0, 1.0, options) == pytest.approx((-8.0 * advantage, -8.0 * advantage), rel=1e-12)


def test_truncated_importance_sampling_by_hand() -> None:
    for rollout, weight in ((-1.0 - math.log(1.5), 1.5), (-1.0 + math.log(4.0), 0.25), (-9.0, 2.0)):
        loss, slope = one_token(
            1.1,
            2.0,
            {"ppo": True, "truncated_importance_sampling": 2.0},
            rollout_logprobs=torch.tensor([rollout], dtype=torch.float64),
        )
        assert (loss, slope) == pytest.approx((-2.2 * weight, -2.2 * weight), rel=1e-12)


@pytest.mark.parametrize("unknown", [NAN, INF, -INF])
@pytest.mark.parametrize("cap", [0.5, 2.0])
def test_truncation_leaves_a_token_without_rollout_logprob_alone(unknown: float, cap: float) -> None:
    o = torch.tensor([unknown], dtype=torch.float64)
    found = one_token(1.1, 2.0, {"ppo": True, "truncated_importance_sampling": cap}, rollout_logprobs=o)
    assert found == pytest.approx((-2.2, -2.2), rel=1e-12)


@pytest.mark.parametrize(
    ("aggregation", "options", "loss"),
    [
        # two trajectories of 1 and 3 tokens, every token's loss is -its advantage
        ("token_mean", {}, -(4.0 + 1.0 + 2.0 + 6.0) / 4),
        ("token_sum", {}, -13.0),
        ("seq_mean_token_mean", {}, -(4.0 + 9.0 / 3) / 2),
        ("seq_mean_token_sum", {}, -13.0 / 2),
        ("seq_mean_token_sum_norm", {"norm_length": 10.0}, -13.0 / 20),
    ],
)
def test_aggregation_by_hand(aggregation: str, options: dict, loss: float) -> None:
    result = policy_loss(
        torch.full((6,), -1.0),
        torch.full((6,), -1.0),
        torch.tensor([4.0, 1.0, 50.0, 2.0, 6.0, 50.0]),
        torch.tensor([1, 1, 0, 1, 1, 0]),
        torch.tensor([0, 2, 2, 2, 2, 3]),  # a trajectory without a trainable token is not counted
        Objective(ppo=True, loss_aggregation=aggregation, **options),
    )
    assert result.loss.item() == pytest.approx(loss, rel=1e-6)


def test_k3_and_k2_agree_near_the_reference_and_k3_is_never_negative() -> None:
    for gap in (-1.0, -1e-3, 1e-3, 1.0):
        values = []
        for estimator in ("k2", "k3"):
            ref = torch.tensor([-1.0 + gap], dtype=torch.float64)
            options = {"kl_coef": 1.0, "kl_estimator": estimator}
            values.append(one_token(1.0, 0.0, options, reference_logprobs=ref))
        (k2, k2_slope), (k3, k3_slope) = values
        assert k3 >= 0.0
        assert (k2, k2_slope) == pytest.approx((gap**2 / 2, -gap), rel=1e-12)
        assert (k3, k3_slope) == pytest.approx((math.exp(gap) - gap - 1, 1 - math.exp(gap)), rel=1e-9)


# -- stop-gradients, unknown logprobs, clamps ---------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("ppo", [True, False])
def test_nan_old_logprob_is_the_policy_now(ppo: bool, level: str) -> None:
    case = random_case(11, tokens=8)
    unknown = Case(**{**vars(case), "q": [NAN] * 8})
    known = Case(**{**vars(case), "q": list(case.p)})
    options = {"ppo": ppo, "importance_sampling_level": level, "truncated_importance_sampling": 1.3}
    options |= {"kl_coef": 0.1, "kl_in": "advantage", "kimi_k2_tau": 0.1}
    results = []
    for variant in (unknown, known):
        inputs = variant.inputs()
        result = run(inputs, options)
        results.append((result.loss, *gradients(inputs, result)))
        assert result.metrics["ratio_max"] == 1.0
        assert result.metrics["ratio_sum"] == sum(case.mask)
    for found, wanted in zip(*results, strict=True):
        assert torch.equal(found, wanted)
    assert results[0][1].abs().sum() > 0


@pytest.mark.parametrize("gap", [20.5, 50.0, 1e4, -20.5, -50.0, -1e4])
def test_log_ratio_is_clamped_to_20(gap: float) -> None:
    ratio = math.exp(math.copysign(20.0, gap))
    p = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    for level in LEVELS:
        options = {"ppo": True, "ratio_cap": 1e12, "importance_sampling_level": level}
        for advantage in (-1.0, 1.0):
            result = policy_loss(
                p,
                torch.tensor([-1.0 - gap], dtype=torch.float64),
                torch.tensor([advantage], dtype=torch.float64),
                torch.tensor([True]),
                torch.tensor([0]),
                Objective(**options),
            )
            clipped = min(max(ratio, 0.8), 1.2)
            expected = -min(ratio * advantage, clipped * advantage)
            assert result.loss.item() == pytest.approx(expected, rel=1e-12)
            assert torch.autograd.grad(result.loss, p)[0].item() == 0.0
            assert result.metrics["ratio_max"].item() == pytest.approx(ratio, rel=1e-12)


def test_truncation_weight_is_clamped_to_20() -> None:
    weights = []
    for rollout in (-60.0, 60.0):
        options = {"ppo": True, "truncated_importance_sampling": 1e12}
        o = torch.tensor([rollout], dtype=torch.float64)
        weights.append(-one_token(1.0, 1.0, options, rollout_logprobs=o)[0])
    assert weights == pytest.approx([math.exp(20.0), math.exp(-20.0)], rel=1e-12)


@pytest.mark.parametrize("gap", [60.0, -60.0])
def test_k3_is_clamped_to_20(gap: float) -> None:
    ref = torch.tensor([-1.0 + gap], dtype=torch.float64)
    loss, slope = one_token(1.0, 0.0, {"kl_coef": 1.0, "kl_estimator": "k3"}, reference_logprobs=ref)
    bound = math.copysign(20.0, gap)
    assert (loss, slope) == pytest.approx((math.exp(bound) - bound - 1, 0.0), rel=1e-12)


def test_truncation_weight_and_metrics_get_no_gradient() -> None:
    case = random_case(5, tokens=8)
    for options in FULL_OBJECTIVES:
        inputs = case.inputs()
        inputs["rollout_logprobs"].requires_grad_()
        result = run(inputs, options)
        (by_rollout,) = torch.autograd.grad(
            result.loss, inputs["rollout_logprobs"], allow_unused=True, materialize_grads=True
        )
        assert not by_rollout.any()
        assert not any(value.requires_grad for value in result.metrics.values())


def test_kl_in_the_advantage_has_mean_zero_and_takes_the_calls_mean() -> None:
    case = random_case(7, tokens=9)
    case.a = [0.0] * 9
    options = {"ppo": True, "kl_coef": 0.5, "kl_in": "advantage", "epsilon": 5.0, "loss_aggregation": "token_sum"}
    case.q = list(case.p)  # ratio 1: the loss is minus the sum of the advantages
    assert run(case.inputs(), options).loss.item() == pytest.approx(0.0, abs=1e-12)
    shifted = run(case.inputs(), options, kl_mean=0.25).loss.item()
    assert shifted == pytest.approx(case.expected(options, kl_mean=0.25).loss, rel=1e-9)
    tensor = run(case.inputs(), options, kl_mean=torch.tensor(0.25)).loss.item()
    assert tensor == pytest.approx(shifted, rel=1e-12)


# -- masked-out tokens --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", FULL_OBJECTIVES, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("junk", [INF, -INF, NAN, 1e38])
def test_masked_out_tokens_add_exactly_zero(options: dict, junk: float) -> None:
    case = random_case(21, tokens=10)
    case.mask = [True, False, True, True, False, True, False, True, True, False]
    clean, dirty = case.inputs(), case.inputs()
    out = ~clean["mask"]
    for tensor in dirty.values():
        if tensor.is_floating_point():
            with torch.no_grad():
                tensor[out] = junk
    results = [run(inputs, options) for inputs in (clean, dirty)]
    assert torch.equal(results[0].loss, results[1].loss)
    for name, value in results[0].metrics.items():
        assert torch.equal(value, results[1].metrics[name]), name
    for found, wanted in zip(gradients(dirty, results[1]), gradients(clean, results[0]), strict=True):
        assert torch.equal(found, wanted)
        assert (found[out] == 0).all()
    kept = {name: tensor.detach()[~out] for name, tensor in clean.items()}
    assert run(kept, options).loss.item() == pytest.approx(results[0].loss.item(), rel=1e-12)


@pytest.mark.parametrize("junk", [INF, -INF, NAN])
def test_each_input_alone_may_hold_anything_where_masked_out(junk: float) -> None:
    case = random_case(22, tokens=7)
    case.mask = [True, False, True, True, False, True, True]
    for options in (*FULL_OBJECTIVES[::5], {"ppo": True}, {}):
        reference = run(case.inputs(), options).loss
        for name, tensor in case.inputs().items():
            if not tensor.is_floating_point():
                continue
            inputs = case.inputs()
            with torch.no_grad():
                inputs[name][~inputs["mask"]] = junk
            result = run(inputs, options)
            assert torch.equal(result.loss, reference), name
            assert all(grad.isfinite().all() for grad in gradients(inputs, result)), name


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_mask_may_be_bool_or_numbers(dtype: torch.dtype) -> None:
    inputs = random_case(23, tokens=9).inputs()
    wanted = run(inputs, {"ppo": True}).loss
    assert torch.equal(run(inputs | {"mask": inputs["mask"].to(dtype)}, {"ppo": True}).loss, wanted)


# -- batches ------------------------------------------------------------------------------------------------------


@pytest.fixture
def trajectories() -> Case:
    """Five trajectories of unequal length, one of them without a trainable token."""
    case = random_case(31, tokens=23)
    case.ids = [0] * 7 + [1] * 2 + [2] * 3 + [3] * 10 + [4]
    case.mask = [t % 6 != 1 and not 9 <= t < 12 for t in range(23)]
    return case


@pytest.mark.parametrize("options", FULL_OBJECTIVES, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("parts", [((0, 1), (2, 3, 4)), ((3,), (2,), (0,), (4,), (1,))])
def test_microbatches_add_up_to_the_batch(
    trajectories: Case, options: dict, parts: tuple[tuple[int, ...], ...]
) -> None:
    whole = trajectories.inputs()
    m = whole["mask"]
    result = run(whole, options)
    grad, entropy_grad = gradients(whole, result)
    counts = {
        "num_tokens": m.sum(),
        "num_sequences": torch.tensor(len(set(whole["trajectory_ids"][m].tolist()))),
        "kl_mean": (whole["old_logprobs"] - whole["reference_logprobs"])[m].mean(),
    }
    loss, sums = 0.0, dict.fromkeys(result.metrics, 0.0)
    for part in parts:
        rows = torch.cat([(whole["trajectory_ids"] == i).nonzero().squeeze(1) for i in part])
        inputs = {name: tensor.detach()[rows].clone() for name, tensor in whole.items()}
        inputs["trajectory_ids"] = torch.cat(
            [torch.full(((whole["trajectory_ids"] == i).sum(),), k) for k, i in enumerate(part)]
        )
        for name in ("logprobs", "entropies"):
            inputs[name].requires_grad_()
        share = run(inputs, options, **counts)
        loss += share.loss.item()
        found, found_entropy = gradients(inputs, share)
        torch.testing.assert_close(found, grad[rows], rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(found_entropy, entropy_grad[rows], rtol=1e-12, atol=1e-15)
        for name, value in share.metrics.items():
            combine = max if name.endswith("_max") else float.__add__
            sums[name] = combine(sums[name], float(value))
    assert loss == pytest.approx(result.loss.item(), rel=1e-12)
    assert sums == pytest.approx({name: float(value) for name, value in result.metrics.items()}, rel=1e-12)


def test_order_of_tokens_and_names_of_trajectories_do_not_matter(trajectories: Case) -> None:
    inputs = trajectories.inputs()
    order = torch.randperm(23, generator=torch.Generator().manual_seed(0))
    names = torch.tensor([22, 3, 0, 7, 11])
    for options in FULL_OBJECTIVES:
        shuffled = {name: tensor.detach()[order] for name, tensor in inputs.items()}
        shuffled["trajectory_ids"] = names[shuffled["trajectory_ids"]]
        found, wanted = run(shuffled, options).loss.item(), run(inputs, options).loss.item()
        assert found == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("aggregation", AGGREGATIONS, ids=lambda a: a["loss_aggregation"])
@pytest.mark.parametrize("as_tensor", [True, False])
def test_global_counts_divide(aggregation: dict, as_tensor: bool) -> None:
    case = random_case(33, tokens=9)
    counts: dict[str, Any] = {"num_tokens": 40, "num_sequences": 6}
    expected = case.expected(aggregation, **counts).loss
    if as_tensor:
        counts = {name: torch.tensor(count) for name, count in counts.items()}
    assert run(case.inputs(), aggregation, **counts).loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("tokens", [0, 4])
@pytest.mark.parametrize("options", FULL_OBJECTIVES, ids=lambda o: "-".join(map(str, o.values())))
def test_nothing_to_train_on_is_zero_with_a_gradient_of_zero(tokens: int, options: dict) -> None:
    case = random_case(41, tokens=tokens)
    case.mask = [False] * tokens
    for counts in ({}, {"num_tokens": 10.0, "num_sequences": 2.0}, {"num_tokens": 0, "num_sequences": 0}):
        inputs = case.inputs()
        result = run(inputs, options, **counts)
        assert result.loss == 0.0
        for grad in gradients(inputs, result):
            assert grad.shape == (tokens,)
            assert (grad == 0).all()
        assert all(value == 0 for value in result.metrics.values())


# -- metrics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("surrogate", ["cispo", "ppo"])
def test_metrics_are_raw_sums_of_the_ratios(surrogate: str, level: str) -> None:
    case = random_case(51, tokens=20, spread=2.0)  # far enough that whole trajectories leave the window
    options = {**SURROGATES[surrogate], "importance_sampling_level": level, "entropy_coef": 0.1, "kl_coef": 0.1}
    result, expected = run(case.inputs(), options), case.expected(options)
    (low, high), ratios = expected.window, expected.ratios
    assert {name: value.item() for name, value in result.metrics.items()} == pytest.approx(
        {
            "loss_train": expected.loss,
            "loss_policy": expected.policy,
            "loss_kl": expected.kl,
            "loss_entropy": expected.entropy,
            "token_count": len(ratios),
            "ratio_sum": sum(ratios),
            "ratio_square_sum": sum(r * r for r in ratios),
            "ratio_max": max(ratios),
            "clip_low_count": sum(r < low for r in ratios),
            "clip_high_count": sum(r > high for r in ratios),
        },
        rel=1e-9,
    )
    assert all(value.dim() == 0 for value in result.metrics.values())


def test_kl_and_entropy_are_measured_wherever_their_inputs_are_given() -> None:
    case = random_case(52, tokens=6)
    case.mask = [True] * 6
    metrics = run(case.inputs(), {}).metrics
    assert metrics["loss_entropy"].item() == pytest.approx(sum(case.h) / 6)
    assert metrics["loss_kl"].item() == pytest.approx(sum(q - ref for q, ref in zip(case.q, case.ref, strict=True)) / 6)
    inputs = case.inputs()
    for name in ("entropies", "reference_logprobs", "rollout_logprobs"):
        del inputs[name]
    assert {"loss_kl", "loss_entropy"}.isdisjoint(run(inputs, {}).metrics)


# -- dtypes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", FULL_OBJECTIVES, ids=lambda o: "-".join(map(str, o.values())))
def test_float32_agrees_with_float64(options: dict) -> None:
    case = random_case(61, tokens=12)
    results = {}
    for dtype in (torch.float32, torch.float64):
        inputs = case.inputs(dtype)
        result = run(inputs, options)
        assert result.loss.dtype == dtype
        results[dtype] = (result.loss, *gradients(inputs, result))
        assert results[dtype][1].dtype == dtype
    for narrow, wide in zip(results[torch.float32], results[torch.float64], strict=True):
        torch.testing.assert_close(narrow.double(), wide, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_computed_in_float32(dtype: torch.dtype) -> None:
    case = random_case(62, tokens=12)
    for options in FULL_OBJECTIVES[::4]:
        narrow = case.inputs(dtype)
        wide = {name: t.float() if t.is_floating_point() else t for name, t in narrow.items()}
        result = run(narrow, options)
        assert result.loss.dtype == torch.float32
        assert torch.equal(result.loss, run(wide, options).loss)
        assert gradients(narrow, result)[0].dtype == dtype


def test_logprobs_alone_decide_the_dtype() -> None:
    wide, narrow = random_case(63).inputs(), random_case(63).inputs(torch.float32)
    for options in FULL_OBJECTIVES:
        mixed = run(wide | {"logprobs": narrow["logprobs"]}, options)
        assert mixed.loss.dtype == torch.float32
        assert run(narrow | {"logprobs": wide["logprobs"]}, options).loss.dtype == torch.float64


def test_float32_stays_float32_under_float64_counts() -> None:
    inputs = random_case(64).inputs(torch.float32)
    counts = {name: torch.tensor(4.0, dtype=torch.float64) for name in ("num_tokens", "num_sequences", "kl_mean")}
    for options in FULL_OBJECTIVES:
        assert run(inputs, options, **counts).loss.dtype == torch.float32


# -- what does not fit --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "old_logprobs",
        "advantages",
        "mask",
        "trajectory_ids",
        "rollout_logprobs",
        "reference_logprobs",
        "entropies",
    ],
)
def test_wrong_shapes_are_named(name: str) -> None:
    def others() -> Iterator[Tensor]:
        tensor = random_case(71, tokens=4).inputs()[name].detach()
        yield tensor[:3]
        yield tensor[:1]  # would broadcast
        yield tensor[0]
        yield tensor[:, None]
        yield tensor[None]

    for wrong in others():
        with pytest.raises(InvalidArgumentError, match=rf"{name}.*\(4,\)"):
            run(random_case(71, tokens=4).inputs() | {name: wrong}, {})


@pytest.mark.parametrize("shape", [(), (1, 4), (4, 1)])
def test_logprobs_must_be_flat(shape: tuple[int, ...]) -> None:
    inputs = {name: torch.zeros(shape) for name in ("logprobs", "old_logprobs", "advantages")}
    inputs |= {"mask": torch.ones(shape), "trajectory_ids": torch.zeros(shape, dtype=torch.int64)}
    with pytest.raises(InvalidArgumentError, match="logprobs"):
        run(inputs, {})


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        ({"truncated_importance_sampling": 2.0}, "rollout_logprobs"),
        ({"kl_coef": 0.1}, "reference_logprobs"),
        ({"kl_coef": 0.1, "kl_in": "advantage"}, "reference_logprobs"),
        ({"entropy_coef": 0.1}, "entropies"),
        ({"entropy_coef": -0.1}, "entropies"),
    ],
)
def test_missing_inputs_are_named_with_the_option_that_needs_them(options: dict, missing: str) -> None:
    inputs = random_case(72).inputs()
    run(inputs, options)
    del inputs[missing]
    with pytest.raises(InvalidArgumentError, match=rf"{next(iter(options))}.*{missing}"):
        run(inputs, options)
    with pytest.raises(InvalidArgumentError, match=missing):
        run(inputs | {missing: None}, options)
