"""Raw totals and the public metrics derived from them, against numpy over all tokens at once."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fitrl import Objective, policy_loss
from fitrl.errors import InvalidArgumentError
from fitrl.policy.metrics import CallTotals, RawTotals, derive, mismatch

POLICY_METRICS = {
    "loss/train",
    "loss/policy",
    "loss/kl",
    "loss/entropy",
    "loss/grad_norm",
    "loss/learning_rate",
    "ratio/mean",
    "ratio/max",
    "ratio/clip_fraction_low",
    "ratio/clip_fraction_high",
    "ratio/ess",
    "mismatch/kl",
    "mismatch/ess",
    "mismatch/prob_corr",
}


def scalars(**values: float) -> dict[str, Tensor]:
    return {name: torch.tensor(value) for name, value in values.items()}


def raw_ratios(ratios: np.ndarray, low: float = 0.8, high: float = 1.2) -> dict[str, float]:
    """What the objective sums of some tokens' ratios."""
    return {
        "token_count": float(ratios.size),
        "ratio_sum": float(ratios.sum()),
        "ratio_square_sum": float((ratios**2).sum()),
        "ratio_max": float(ratios.max(initial=0.0)),
        "clip_low_count": float((ratios < low).sum()),
        "clip_high_count": float((ratios > high).sum()),
    }


# -- totals -------------------------------------------------------------------------------------------------------


def test_sums_add_and_maxima_do_not() -> None:
    totals = RawTotals()
    totals.update(scalars(a=1.0, top_max=3.0, b=-2.0))
    totals.update(scalars(a=0.5, top_max=-7.0, b=1.0))
    totals.update(scalars(b=4.0, a=0.0, top_max=2.0))  # in any order
    assert totals.compute() == {"a": 1.5, "b": 3.0, "top_max": 3.0}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (scalars(a=1.0, b=2.0), {"a": 2.0, "b": 4.0}),
        (scalars(a_max=-1.0, b_max=2.0), {"a_max": -1.0, "b_max": 2.0}),
        (scalars(max=1.0, maximum=2.0), {"max": 2.0, "maximum": 4.0}),  # only a suffix "_max" is a maximum
    ],
)
def test_only_sums_or_only_maxima(values: dict[str, Tensor], expected: dict[str, float]) -> None:
    totals = RawTotals()
    totals.update(values)
    totals.update(values)
    assert totals.compute() == expected


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_nothing_seen_is_nothing() -> None:
    assert RawTotals().compute() == {}


def test_reset_starts_anew_with_other_names() -> None:
    totals = RawTotals()
    totals.update(scalars(a=1.0, a_max=9.0))
    totals.reset()
    totals.update(scalars(b=2.0, b_max=-3.0))
    assert totals.compute() == {"b": 2.0, "b_max": -3.0}


def test_compute_may_be_asked_again() -> None:
    totals = RawTotals()
    totals.update(scalars(a=1.0))
    assert totals.compute() == {"a": 1.0}
    totals.update(scalars(a=1.0))
    assert totals.compute() == totals.compute() == {"a": 2.0}


@pytest.mark.parametrize("first", [{"a": 1.0, "b": 1.0}, {"a": 1.0, "b_max": 1.0}])
def test_a_metric_that_comes_or_goes_is_an_error(first) -> None:
    """One that came later would be missing from the sums without a trace."""
    for one, other in ((first, {"a": 1.0}), ({"a": 1.0}, first)):
        totals = RawTotals()
        totals.update(scalars(**one))
        with pytest.raises(InvalidArgumentError, match="the same metrics for every microbatch.*; b"):
            totals.update(scalars(**other))


def test_sums_are_float64_whatever_comes_in() -> None:
    totals = RawTotals()
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
        totals.update({"big": torch.ones((), dtype=dtype), "top_max": torch.ones((), dtype=dtype)})
    totals.update({"big": torch.tensor(2.0**40, dtype=torch.float32), "top_max": torch.tensor(0.5)})
    assert totals.compute() == {"big": 2.0**40 + 4, "top_max": 1.0}


def test_totals_hold_no_graph() -> None:
    totals = RawTotals()
    leaf = torch.ones(3, requires_grad=True)
    result = policy_loss(
        leaf, leaf.detach(), leaf.detach(), leaf.detach(), torch.zeros(3, dtype=torch.int64), Objective()
    )
    totals.update(result.metrics)
    assert not totals.sums.requires_grad
    assert not totals.maxima.requires_grad


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(
    ranks=st.lists(
        st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)), min_size=1, max_size=4),
        min_size=1,
        max_size=4,
    )
)
def test_ranks_reduce_to_one(ranks: list[list[tuple[float, float]]]) -> None:
    metrics = []
    for updates in ranks:
        totals = RawTotals()
        for a, b in updates:
            totals.update({"a": torch.tensor(a, dtype=torch.float64), "b_max": torch.tensor(b, dtype=torch.float64)})
        metrics.append(totals)
    merged = copy.deepcopy(metrics[0])
    for other in metrics[1:]:
        merged.merge_state(other)
    merged.names = metrics[0].names
    everything = [pair for updates in ranks for pair in updates]
    assert merged.compute() == pytest.approx(
        {"a": math.fsum(a for a, _ in everything), "b_max": max(b for _, b in everything)}, abs=1e-9
    )


def test_gathered_states_reduce_as_torchmetrics_does_it() -> None:
    ranks = [RawTotals(), RawTotals()]
    for totals, a, b in zip(ranks, (1.0, 2.0), (7.0, 3.0), strict=True):
        totals.update(scalars(a=a, b_max=b))
    gathered = {name: torch.stack([rank.metric_state[name] for rank in ranks]) for name in ("sums", "maxima")}
    for name, reduce in ranks[0]._reductions.items():
        setattr(ranks[0], name, reduce(gathered[name]))
    assert ranks[0].compute() == {"a": 3.0, "b_max": 7.0}


def test_reduction_is_one_collective_for_sums_and_one_for_maxima() -> None:
    totals = RawTotals()
    totals.update(scalars(**{f"s{i}": 1.0 for i in range(10)}, **{f"m{i}_max": 1.0 for i in range(3)}))
    assert {name: tuple(state.shape) for name, state in totals.metric_state.items()} == {
        "sums": (10,),
        "maxima": (3,),
    }


# -- public metrics -----------------------------------------------------------------------------------------------


def test_losses_are_means_over_optimizer_steps() -> None:
    raw = {"loss_train": 6.0, "loss_policy": 3.0, "loss_kl": 1.5, "loss_entropy": 9.0}
    raw |= {"step_count": 3.0, "grad_norm": 12.0, "learning_rate": 3e-6}
    assert derive(raw) == pytest.approx(
        {
            "loss/train": 2.0,
            "loss/policy": 1.0,
            "loss/kl": 0.5,
            "loss/entropy": 3.0,
            "loss/grad_norm": 4.0,
            "loss/learning_rate": 1e-6,
        }
    )


def test_only_what_was_measured_is_there() -> None:
    assert derive({}) == {}
    assert derive({"token_count": 3.0}) == {}  # a custom objective that counts its tokens
    raw = {"loss_train": 1.0, "loss_policy": 1.0, "step_count": 1.0, "grad_norm": 1.0, "learning_rate": 1.0}
    assert set(derive(raw)) == {"loss/train", "loss/policy", "loss/grad_norm", "loss/learning_rate"}
    assert set(derive(raw_ratios(np.ones(3)))) == {name for name in POLICY_METRICS if name.startswith("ratio/")}


def test_no_tokens_no_steps_no_overlap_are_no_metrics() -> None:
    raw: dict[str, float] = raw_ratios(np.zeros(0)) | {"step_count": 0.0, "loss_train": 0.0}
    raw |= {"grad_norm": 0.0, "learning_rate": 0.0}
    none = torch.zeros(0)
    raw |= {name: float(value) for name, value in mismatch(none, none, none.bool()).items()}
    assert derive(raw) == {}


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=30).map(np.array))
def test_ratios_are_numpys(ratios: np.ndarray) -> None:
    found = derive(raw_ratios(ratios))
    weights = ratios / ratios.sum()
    assert found == pytest.approx(
        {
            "ratio/mean": np.mean(ratios),
            "ratio/max": np.max(ratios),
            "ratio/clip_fraction_low": np.mean(ratios < 0.8),
            "ratio/clip_fraction_high": np.mean(ratios > 1.2),
            "ratio/ess": 1.0 / np.sum(weights**2) / ratios.size,  # Kish's effective sample size
        },
        rel=1e-9,
    )
    assert 1.0 / ratios.size - 1e-9 <= found["ratio/ess"] <= 1.0 + 1e-9


def test_ess_is_one_for_equal_ratios_and_one_over_n_for_one_that_counts() -> None:
    assert derive(raw_ratios(np.full(7, 3.0)))["ratio/ess"] == pytest.approx(1.0)
    assert derive(raw_ratios(np.array([0.0, 0.0, 5.0, 0.0])))["ratio/ess"] == pytest.approx(0.25)
    assert derive(raw_ratios(np.zeros(4)))["ratio/ess"] == 0.0


@pytest.mark.parametrize("microbatches", [1, 2, 5])
def test_ratios_do_not_depend_on_the_microbatches(microbatches: int) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = 20
    old = -torch.rand(tokens, generator=generator, dtype=torch.float64)
    new = old + 0.5 * torch.randn(tokens, generator=generator, dtype=torch.float64)
    mask = torch.rand(tokens, generator=generator) < 0.7
    totals = RawTotals()
    for rows in torch.arange(tokens).chunk(microbatches):
        result = policy_loss(
            new[rows],
            old[rows],
            torch.ones(len(rows)),
            mask[rows],
            torch.zeros(len(rows), dtype=torch.int64),
            Objective(ppo=True),
            num_tokens=int(mask.sum()),
        )
        totals.update(result.metrics)
    ratios = (new - old)[mask].exp().numpy()
    found = derive(totals.compute() | {"step_count": 1.0, "grad_norm": 0.0, "learning_rate": 0.0})
    assert found["ratio/mean"] == pytest.approx(ratios.mean())
    assert found["ratio/max"] == pytest.approx(ratios.max())
    assert found["ratio/ess"] == pytest.approx(ratios.sum() ** 2 / (ratios**2).sum() / ratios.size)
    assert found["ratio/clip_fraction_low"] == pytest.approx((ratios < 0.8).mean())
    assert found["ratio/clip_fraction_high"] == pytest.approx((ratios > 1.2).mean())
    assert found["loss/train"] == pytest.approx(-np.minimum(ratios, 1.2).mean())


def test_unknown_raw_names_are_the_objectives_own() -> None:
    raw = raw_ratios(np.ones(2)) | {"my_score": 4.0, "worst_max": 2.0}
    found = derive(raw)
    assert {name: value for name, value in found.items() if not name.startswith("ratio/")} == {
        "objective/my_score": 4.0,
        "objective/worst_max": 2.0,
    }


def test_every_raw_name_of_the_library_has_a_public_one() -> None:
    ones = torch.full((4,), -1.0)
    objective = Objective(kl_coef=0.1, entropy_coef=0.1)
    inputs = {"rollout_logprobs": ones, "reference_logprobs": ones, "entropies": ones}
    result = policy_loss(ones, ones, ones, torch.ones(4), torch.zeros(4, dtype=torch.int64), objective, **inputs)
    raw = {name: float(value) for name, value in result.metrics.items()}
    raw |= {name: float(value) for name, value in mismatch(ones, ones, torch.ones(4).bool()).items()}
    found = derive(raw | {"step_count": 1.0, "grad_norm": 1.0, "learning_rate": 1.0})
    assert set(found) == POLICY_METRICS


# -- trainer against sampler --------------------------------------------------------------------------------------


def derived_mismatch(p: Any, o: Any, mask: Any) -> dict[str, float]:
    raw = mismatch(torch.as_tensor(p), torch.as_tensor(o), torch.as_tensor(mask))
    assert not any(value.requires_grad for value in raw.values())
    return derive({name: float(value) for name, value in raw.items()})


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 10_000), st.integers(3, 40), st.floats(0.01, 1.0))
def test_mismatch_is_numpys(seed: int, tokens: int, noise: float) -> None:
    rng = np.random.default_rng(seed)
    o = -rng.exponential(1.0, tokens)
    p = np.minimum(o + noise * rng.normal(size=tokens), 0.0)
    mask = rng.random(tokens) < 0.8
    o[rng.random(tokens) < 0.1] = np.nan  # a token that the sampler gave no logprob for
    known = mask & np.isfinite(o)
    found = derived_mismatch(p, o, mask)
    if known.sum() == 0:
        assert found == {}
        return
    assert found["mismatch/kl"] == pytest.approx(np.mean(o[known] - p[known]), rel=1e-9, abs=1e-12)
    weights = np.exp(p[known] - o[known])
    assert found["mismatch/ess"] == pytest.approx(weights.sum() ** 2 / (weights**2).sum() / known.sum(), rel=1e-9)
    x, y = np.exp(o[known]), np.exp(p[known])
    if known.sum() > 2 and x.std() * y.std() > 1e-6:
        assert found["mismatch/prob_corr"] == pytest.approx(np.corrcoef(x, y)[0, 1], rel=1e-6, abs=1e-8)


def test_mismatch_of_the_same_policy_is_none() -> None:
    logprobs = torch.tensor([-0.1, -1.0, -3.0])
    assert derived_mismatch(logprobs, logprobs, [True] * 3) == pytest.approx(
        {"mismatch/kl": 0.0, "mismatch/prob_corr": 1.0, "mismatch/ess": 1.0}
    )


def test_correlation_has_a_sign() -> None:
    o = torch.tensor([0.2, 0.4, 0.6]).log()
    p = torch.tensor([0.6, 0.4, 0.2]).log()
    assert derived_mismatch(p, o, [True] * 3)["mismatch/prob_corr"] == pytest.approx(-1.0)


def test_correlation_with_a_constant_is_unknown_not_an_error() -> None:
    for o, p in (([-1.0] * 5, [-0.1, -0.2, -0.3, -0.4, -0.5]), ([-1.0] * 5, [-1.0] * 5), ([-0.3], [-0.7])):
        found = derived_mismatch(o, p, [True] * len(o))
        assert math.isnan(found["mismatch/prob_corr"])
        assert found["mismatch/kl"] == pytest.approx(np.mean(np.subtract(p, o)))


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_mismatch_looks_only_at_tokens_that_both_know(junk: float) -> None:
    p, o = torch.tensor([-0.1, -1.0, -3.0, -0.7]), torch.tensor([-0.2, -0.8, -3.5, -0.7])
    wanted = derived_mismatch(p[:3], o[:3], [True] * 3)
    p[3] = junk
    assert derived_mismatch(p, o, [True, True, True, False]) == pytest.approx(wanted)
    o[3] = junk
    assert derived_mismatch(p, o, [True, True, True, False]) == pytest.approx(wanted)
    p[3] = -0.7
    assert derived_mismatch(p, o, [True] * 4) == pytest.approx(wanted)


def test_mismatch_of_float32_is_summed_in_float64() -> None:
    rng = np.random.default_rng(0)
    o = (-rng.exponential(1.0, 20_000)).astype(np.float32)
    p = (o + 1e-3 * rng.normal(size=o.size)).astype(np.float32)
    found = derived_mismatch(p, o, np.ones(o.size, bool))
    x, y = np.exp(o.astype(np.float64)), np.exp(p.astype(np.float64))
    assert found["mismatch/prob_corr"] == pytest.approx(np.corrcoef(x, y)[0, 1], rel=1e-9)
    assert found["mismatch/kl"] == pytest.approx(np.mean(o.astype(np.float64) - p), rel=1e-9)


# -- a call -------------------------------------------------------------------------------------------------------


def test_a_call_joins_its_totals_and_starts_anew() -> None:
    call = CallTotals()
    assert call.compute() == {}
    for _ in range(2):
        call.microbatches.update({"loss_train": torch.tensor(1.5), "loss_policy": torch.tensor(1.0)})
        call.steps.update(scalars(grad_norm=2.0, learning_rate=0.5, step_count=1.0))
    call.mismatch.update(mismatch(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -2.0]), torch.ones(2).bool()))
    wanted = {"loss/train": 1.5, "loss/policy": 1.0, "loss/grad_norm": 2.0, "loss/learning_rate": 0.5}
    wanted |= {"mismatch/kl": -0.25, "mismatch/prob_corr": 1.0}
    wanted["mismatch/ess"] = (math.exp(0.5) + 1) ** 2 / (math.exp(1.0) + 1) / 2
    assert call.compute() == pytest.approx(wanted)
    call.reset(torch.device("cpu"))
    assert call.compute() == {}


def test_calls_do_not_share_totals() -> None:
    one, other = CallTotals(), CallTotals()
    one.steps.update(scalars(grad_norm=2.0, learning_rate=0.5, step_count=1.0))
    assert other.compute() == {}
