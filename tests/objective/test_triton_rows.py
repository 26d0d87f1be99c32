"""The Triton kernels against their torch twins: in Triton's interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fitrl import Objective, PolicyLoss, fused_linear_policy_loss, policy_loss
from fitrl.objective import rows
from fitrl.objective.logprobs import linear_logprobs, logits_logprobs
from fitrl.objective.rows import RowShape, RowStatistics

COMPILED = torch.cuda.is_available()
DEVICE = "cuda" if COMPILED else "cpu"
NAN, INF = math.nan, math.inf
# of a 16-bit number that was rounded once more or less
ROUNDING = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2e-6}


@pytest.fixture(autouse=True)
def on_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send every tensor to the kernels, CPU tensors too."""
    monkeypatch.setattr(rows, "_on_gpu", lambda tensor: True)


class OnTwins:
    """Within it, everything is done by the twins."""

    def __enter__(self) -> None:
        self._before = rows._on_gpu
        rows._on_gpu = lambda tensor: False  # type: ignore[assignment]

    def __exit__(self, *_: Any) -> None:
        rows._on_gpu = self._before


@pytest.fixture
def twins() -> OnTwins:
    return OnTwins()


def make_logits(
    count: int, vocabulary: int, dtype: torch.dtype, *, spread: float = 3.0, seed: int = 0, padding: int = 64
) -> Tensor:
    """Logits [count, vocabulary] whose rows start at multiples of `padding` elements, as a head makes them."""
    generator = torch.Generator().manual_seed(seed)
    width = -(-vocabulary // padding) * padding
    whole = torch.full((count, width), NAN, dtype=dtype, device=DEVICE)
    values = torch.randn(count, vocabulary, generator=generator, dtype=torch.float64) * spread
    whole[:, :vocabulary] = values.to(DEVICE, dtype)
    return whole[:, :vocabulary]


def copied(logits: Tensor) -> Tensor:
    """A copy with the same strides, as a head's buffer has them."""
    whole = torch.full((len(logits), logits.stride(0)), NAN, dtype=logits.dtype, device=DEVICE)
    whole[:, : logits.shape[1]] = logits
    return whole[:, : logits.shape[1]]


def make_shape(
    count: int, vocabulary: int, *, seed: int = 0, bias: bool = False, softcap: float | None = None, same: bool = False
) -> RowShape:
    generator = torch.Generator().manual_seed(1000 + seed)
    temperature = 0.4 + 2.0 * torch.rand(1 if same else count, generator=generator)
    return RowShape(
        targets=torch.randint(vocabulary, (count,), generator=generator).to(DEVICE),
        temperature=temperature.to(DEVICE).expand(count),
        bias=torch.randn(vocabulary, generator=generator).to(DEVICE) if bias else None,
        softcap=softcap,
    )


def off(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference by norm of what is wanted."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30))


# -- each kernel ------------------------------------------------------------------------------------------------------

SHAPES = st.tuples(st.integers(1, 5), st.sampled_from([1, 2, 17, 64, 300, 2048, 5003]))
CASES = {
    "shape": SHAPES,
    "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    "bias": st.booleans(),
    "softcap": st.none() | st.sampled_from([2.0, 30.0]),
    "same": st.booleans(),
    "spread": st.sampled_from([0.1, 3.0, 20.0]),
    "seed": st.integers(0, 1000),
}


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(**CASES, with_entropies=st.booleans())
def test_statistics(
    shape: tuple[int, int],
    dtype: torch.dtype,
    bias: bool,
    softcap: float | None,
    same: bool,
    spread: float,
    seed: int,
    with_entropies: bool,
) -> None:
    logits = make_logits(*shape, dtype, spread=spread, seed=seed)
    how = make_shape(*shape, seed=seed, bias=bias, softcap=softcap, same=same)
    before = logits.clone()
    found = rows.statistics(logits, how, with_entropies=with_entropies)
    with OnTwins():
        wanted = rows.statistics(logits, how, with_entropies=with_entropies)
    assert torch.equal(logits, before)
    torch.testing.assert_close(found.lse, wanted.lse, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.logprobs, wanted.logprobs, rtol=1e-5, atol=1e-4)
    assert (found.entropies is None) is not with_entropies
    if found.entropies is not None:
        torch.testing.assert_close(found.entropies, wanted.entropies, rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(**CASES, narrow=st.booleans())
def test_one_sweep(
    shape: tuple[int, int],
    dtype: torch.dtype,
    bias: bool,
    softcap: float | None,
    same: bool,
    spread: float,
    seed: int,
    narrow: bool,
) -> None:
    dtype = torch.float32 if narrow or dtype == torch.float16 else dtype
    result = torch.bfloat16 if narrow else dtype
    logits = make_logits(*shape, dtype, spread=spread, seed=seed)
    how = make_shape(*shape, seed=seed, bias=bias, softcap=softcap, same=same)
    source = copied(logits)
    found, values, units = rows.swept_(source, how, result)
    assert values.dtype == result and values.data_ptr() == source.data_ptr()
    with OnTwins():
        wanted, true_values, true_units = rows.swept_(copied(logits).double(), double(how), torch.float64)
    torch.testing.assert_close(found.logprobs.double(), wanted.logprobs, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.lse.double(), wanted.lse, rtol=1e-5, atol=1e-4)
    gradient, true = values.double() * units.double()[:, None], true_values * true_units[:, None]
    for row in range(len(logits)):  # of each row, however small: 1 - p of a sure token is not rounded away
        if float(true[row].abs().max()) > 1e-30:
            assert off(gradient[row], true[row]) < ROUNDING[result] + 1e-4, row
    assert (gradient.isfinite()).all()


def double(shape: RowShape) -> RowShape:
    return RowShape(
        targets=shape.targets,
        temperature=shape.temperature.double(),
        bias=None if shape.bias is None else shape.bias.double(),
        softcap=shape.softcap,
    )


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(**CASES, narrow=st.booleans(), with_entropies=st.booleans())
def test_gradients(
    shape: tuple[int, int],
    dtype: torch.dtype,
    bias: bool,
    softcap: float | None,
    same: bool,
    spread: float,
    seed: int,
    narrow: bool,
    with_entropies: bool,
) -> None:
    dtype = torch.float32 if narrow else dtype
    result = torch.bfloat16 if narrow else dtype
    logits = make_logits(*shape, dtype, spread=spread, seed=seed)
    how = make_shape(*shape, seed=seed, bias=bias, softcap=softcap, same=same)
    slopes = torch.randn(2, shape[0], generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    slopes[:, 0] = 0.0
    logits[0, 0] = NAN  # a row without derivatives may hold anything
    found = rows.statistics(logits, how, with_entropies=with_entropies)
    source = copied(logits)
    d_entropies = slopes[1] if with_entropies else None
    gradient = rows.gradients_(source, how, found, slopes[0], d_entropies, result)
    assert gradient.dtype == result and gradient.data_ptr() == source.data_ptr()
    with OnTwins():
        wanted = rows.gradients_(copied(logits), how, found, slopes[0], d_entropies, torch.float32)
    assert not gradient[0].any()
    assert gradient.isfinite().all()
    assert float((gradient.float() - wanted).abs().max()) <= ROUNDING[result] * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("height", [35.0, 60.0, 200.0])
def test_a_logit_far_above_the_target_makes_a_new_shift(dtype: torch.dtype, height: float, twins: OnTwins) -> None:
    logits = make_logits(4, 5003, dtype)
    how = make_shape(4, 5003)
    how.targets[:] = 7
    how.temperature = torch.ones(4, device=DEVICE)
    logits[0, 4999] = height  # in the last step: all that was written before is scaled
    logits[1, 0] = height  # in the first one
    logits[2, 2100], logits[2, 4200] = height, 2 * height  # twice
    found, values, units = rows.swept_(copied(logits), how, dtype)
    with twins:
        wanted, true_values, true_units = rows.swept_(copied(logits).double(), double(how), torch.float64)
    torch.testing.assert_close(found.logprobs.double(), wanted.logprobs, rtol=1e-5, atol=1e-4)
    gradient, true = values.double() * units.double()[:, None], true_values * true_units[:, None]
    assert off(gradient, true) < ROUNDING[dtype]
    assert float(gradient[0, 4999]) == pytest.approx(float(true[0, 4999]), rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sure_token_keeps_its_small_gradient(dtype: torch.dtype) -> None:
    logits = torch.zeros(1, 64, dtype=dtype, device=DEVICE)
    logits[0, 5] = 16.0  # p = 1 - 7e-6
    how = RowShape(targets=torch.tensor([5], device=DEVICE), temperature=torch.ones(1, device=DEVICE))
    _, values, units = rows.swept_(logits, how, dtype)
    assert float(values[0, 5] * -units[0]) == pytest.approx(-63 / (63 + math.exp(16.0)), rel=1e-2)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_logits_of_minus_infinity_have_probability_zero(softcap: float | None, twins: OnTwins) -> None:
    logits = make_logits(3, 300, torch.float32)
    how = make_shape(3, 300, softcap=softcap)
    how.targets[:] = 1
    how.bias = torch.zeros(300, device=DEVICE)
    how.bias[200:] = -INF
    found, values, units = rows.swept_(copied(logits), how, torch.float32)
    statistics = rows.statistics(logits, how, with_entropies=True)
    with twins:
        wanted = rows.statistics(
            logits[:, :200],
            RowShape(targets=how.targets, temperature=how.temperature, softcap=softcap),
            with_entropies=True,
        )
    if softcap is None:  # a soft cap makes a finite number of it
        for name in ("lse", "logprobs", "entropies"):
            torch.testing.assert_close(getattr(statistics, name), getattr(wanted, name), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.logprobs, wanted.logprobs, rtol=1e-5, atol=1e-5)
        assert not values[:, 200:].any()
    assert values.isfinite().all() and units.isfinite().all()


@pytest.mark.parametrize("target", [-1, -100, 300, 2**40])
def test_a_target_out_of_range_is_nan_and_touches_nothing_else(target: int) -> None:
    logits = make_logits(3, 300, torch.float32)
    how = make_shape(3, 300)
    how.targets[1] = target
    assert torch.equal(rows.statistics(logits, how).logprobs.isnan(), torch.tensor([False, True, False], device=DEVICE))
    found, values, _ = rows.swept_(copied(logits), how, torch.float32)
    assert torch.equal(found.logprobs.isnan(), torch.tensor([False, True, False], device=DEVICE))
    assert values[[0, 2]].isfinite().all()


def test_chosen_rows(twins: OnTwins) -> None:
    logits = make_logits(9, 300, torch.bfloat16)
    how, index = make_shape(4, 300), torch.tensor([8, 0, 3, 5], device=DEVICE)
    found = rows.statistics(logits, how, with_entropies=True, rows=index)
    with twins:
        wanted = rows.statistics(logits, how, with_entropies=True, rows=index)
    for name in ("lse", "logprobs", "entropies"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("factor", [1.0, 0.5, -3.0, 0.0])
@pytest.mark.parametrize("size", [0, 1, 5000, 70000])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16,) * 2, (torch.float32,) * 2])
def test_scaling(dtypes: tuple[torch.dtype, torch.dtype], size: int, factor: float) -> None:
    source = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtypes[0])
    wanted = (source.float() * factor).to(dtypes[1])
    found = rows.scaled(source, torch.tensor(factor, device=DEVICE), dtypes[1])
    assert found.dtype == dtypes[1]
    torch.testing.assert_close(found, wanted, rtol=ROUNDING[dtypes[1]], atol=0.0)  # the interpreter rounds down
    assert not size or (found.data_ptr() == source.data_ptr()) is (dtypes[0] == dtypes[1])


# -- all together -----------------------------------------------------------------------------------------------------


def explicit(
    head: dict[str, Tensor], targets: Tensor, temperature: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Logprobs and entropies from float64 logits."""
    logits = head["hidden"] @ head["weight"].t() + head.get("bias", 0.0)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_probs = (logits / temperature[:, None]).log_softmax(dim=1)
    entropies = -(log_probs.exp() * log_probs).sum(dim=1)
    return log_probs.gather(1, targets[:, None]).squeeze(1), entropies


@st.composite
def objectives(draw: st.DrawFn) -> Objective:
    """Any objective that its own checks let through."""
    ppo = draw(st.booleans())
    options: dict[str, Any] = {
        "ppo": ppo,
        "importance_sampling_level": draw(
            st.sampled_from(["token", "token", "sequence", "average", "geometric_average"])
        ),
        "loss_aggregation": draw(
            st.sampled_from(
                ["token_mean", "token_sum", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"]
            )
        ),
        "kimi_k2_tau": draw(st.none() | st.just(0.2)),
        "truncated_importance_sampling": draw(st.none() | st.just(1.3)),
        "entropy_coef": draw(st.sampled_from([0.0, 0.0, 0.2, -0.1])),
        "mask_prob_ratio": draw(st.booleans()),
    }
    if options["loss_aggregation"] == "seq_mean_token_sum_norm":
        options["norm_length"] = 9.0
    kl = draw(st.sampled_from([None, "k2", "k3", "k1"]))
    if kl is not None:
        options |= {"kl_coef": 0.3, "kl_estimator": kl, "kl_in": "advantage" if kl == "k1" else "loss"}
    if ppo and draw(st.booleans()):
        options["dual_clip"] = 1.1
    if ppo and not options["mask_prob_ratio"] and draw(st.booleans()):
        options["ratio_cap"] = 1.7
    return Objective(**options)


@settings(max_examples=60 if not COMPILED else 200, deadline=None, derandomize=True, database=None)
@given(
    objective=objectives(),
    tokens=st.integers(1, 12),
    vocabulary=st.sampled_from([3, 64, 300]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    exact=st.booleans(),
    rows_per_tile=st.none() | st.integers(1, 13),
    softcap=st.none() | st.just(4.0),
    bias=st.booleans(),
    frozen=st.booleans(),
    leave_out=st.booleans(),
    factor=st.sampled_from([1.0, 0.25, 1024.0]),
    seed=st.integers(0, 1000),
)
def test_any_objective_shape_and_dtype(
    objective: Objective,
    tokens: int,
    vocabulary: int,
    dtype: torch.dtype,
    exact: bool,
    rows_per_tile: int | None,
    softcap: float | None,
    bias: bool,
    frozen: bool,
    leave_out: bool,
    factor: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)

    width = 16
    head = {"hidden": normal(tokens, width), "weight": normal(vocabulary, width) * 0.5}
    if bias:
        head["bias"] = normal(vocabulary)
    head = {name: tensor.to(dtype).requires_grad_() for name, tensor in head.items()}
    head["weight"].requires_grad_(not frozen)
    truth = {name: tensor.detach().double().requires_grad_(tensor.requires_grad) for name, tensor in head.items()}
    targets = torch.randint(vocabulary, (tokens,), generator=generator).to(DEVICE)
    temperature = (0.5 + torch.rand(tokens, generator=generator, dtype=torch.float64)).to(DEVICE)
    logprobs, entropies = explicit(truth, targets, temperature, softcap)
    # ratios well inside the window or well outside of it, so that no rounding moves one across its border
    apart = torch.tensor([0.0, 0.0, 0.09, -0.09, 0.9, -0.9], dtype=torch.float64).to(DEVICE)
    old = logprobs.detach() + apart[torch.randint(6, (tokens,), generator=generator).to(DEVICE)]
    if objective.importance_sampling_level != "token":
        old = logprobs.detach() + 0.05
    inputs = {
        "old_logprobs": old,
        "advantages": normal(tokens) * (torch.rand(tokens, generator=generator) < 0.8).to(DEVICE),
        "mask": (torch.rand(tokens, generator=generator) < 0.8).to(DEVICE),
        "trajectory_ids": torch.randint(min(3, tokens), (tokens,), generator=generator).to(DEVICE),
        "rollout_logprobs": old + 0.1 * normal(tokens),
        "reference_logprobs": old + 0.1 * normal(tokens),
    }
    needs_entropy = objective.entropy_coef != 0
    wanted: PolicyLoss = policy_loss(
        logprobs, **inputs, objective=objective, entropies=entropies if needs_entropy else None
    )
    with torch.no_grad():
        head["hidden"][~inputs["mask"]] = NAN
    found = fused_linear_policy_loss(
        **head,
        targets=targets,
        **inputs,
        objective=objective,
        temperature=temperature.float(),
        softcap=softcap,
        exact_logits=exact,
        rows_per_tile=rows_per_tile,
        leave_out=leave_out,
    )
    tight = dtype == torch.float32
    accurate = tight or exact
    m = inputs["mask"] & ~found.logprobs.isnan()
    assert float((found.logprobs.double() - logprobs.detach())[m].abs().sum()) <= (1e-3 if accurate else 0.3) * tokens
    scale = float(wanted.loss.detach().abs()) + float(wanted.metrics["loss_policy"].abs())
    assert float(found.loss) == pytest.approx(float(wanted.loss), abs=(1e-4 if accurate else 0.1) * max(1.0, scale))
    leaves = [name for name in head if head[name].requires_grad]
    ours = torch.autograd.grad(found.loss * factor, [head[name] for name in leaves])
    theirs = torch.autograd.grad(wanted.loss * factor, [truth[name] for name in leaves])
    for name, left, right in zip(leaves, ours, theirs, strict=True):
        assert left.dtype == dtype and left.isfinite().all()
        # a tiny gradient is a difference of large ones
        allowed = (1e-4 if tight else 0.02 if exact else 0.15) * max(float(right.norm()), 0.02 * factor)
        assert float((left.double() - right).norm()) <= allowed, name


@pytest.mark.parametrize("vocabulary", [5003, 129920])
def test_large_vocabularies(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 32, generator=generator).to(DEVICE, torch.bfloat16).requires_grad_()
    weight = (torch.randn(vocabulary, 32, generator=generator) * 0.5).to(DEVICE, torch.bfloat16).requires_grad_()
    targets = torch.tensor([0, vocabulary - 1, 1234], device=DEVICE)
    factors = torch.tensor([1.0, -0.5, 2.0], device=DEVICE)
    logprobs, _ = linear_logprobs(hidden, weight, targets, exact_logits=True)
    grads = torch.autograd.grad((logprobs * factors).sum(), [hidden, weight])
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    wanted = (wide[0] @ wide[1].t()).log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(logprobs.double(), wanted, rtol=0, atol=1e-4)
    for found, true in zip(grads, torch.autograd.grad((wanted * factors).sum(), wide), strict=True):
        assert off(found, true) < 6e-3


def test_float16_does_not_underflow() -> None:
    generator = torch.Generator().manual_seed(1)
    tokens, vocabulary = 64, 4096
    head = {
        "hidden": torch.randn(tokens, 32, generator=generator),
        "weight": torch.randn(vocabulary, 32, generator=generator) * 0.1,
    }
    half = {name: tensor.to(DEVICE, torch.float16).requires_grad_() for name, tensor in head.items()}
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in half.items()}
    inputs = {
        "old_logprobs": torch.full((tokens,), NAN, device=DEVICE),
        "advantages": torch.ones(tokens, device=DEVICE),
        "mask": torch.ones(tokens, dtype=torch.bool, device=DEVICE),
        "trajectory_ids": torch.zeros(tokens, dtype=torch.int64, device=DEVICE),
    }
    targets = torch.arange(tokens, device=DEVICE) % 8
    # p / N is about 2e-4 / 1e6, far below the smallest float16; a gradient scaler brings the result back into its range
    counts = {"num_tokens": 1e6, "objective": Objective()}
    for rows_per_tile in (None, 24):
        found = fused_linear_policy_loss(**half, targets=targets, **inputs, **counts, rows_per_tile=rows_per_tile)
        ours = torch.autograd.grad(found.loss * 2.0**16, list(half.values()))
        logprobs, _ = explicit(wide, targets, torch.ones(tokens, dtype=torch.float64, device=DEVICE), None)
        wanted = policy_loss(logprobs, **inputs, **counts).loss
        theirs = torch.autograd.grad(wanted * 2.0**16, list(wide.values()))
        for left, right in zip(ours, theirs, strict=True):
            assert off(left, right) < 0.01
            untouched = right[8:]  # rows of the weight that are no targets: only p in their gradients
            if len(left) == vocabulary:
                assert off(left[8:], untouched) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_given_are_overwritten_once(dtype: torch.dtype) -> None:
    source = make_logits(6, 320, dtype)
    leaf = source.clone().requires_grad_()
    logits = leaf * 1.0
    index = torch.tensor([4, 1, 2], device=DEVICE)
    targets = torch.tensor([3, 0, 319], device=DEVICE)
    logprobs, _ = logits_logprobs(logits, targets, rows=index, temperature=0.8, in_place=True)
    factors = torch.tensor([1.0, -2.0, 0.5], device=DEVICE)
    (found,) = torch.autograd.grad((logprobs * factors).sum(), leaf, retain_graph=True)
    wide = source.double().requires_grad_()
    truth = (wide[index] / 0.8).log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    (wanted,) = torch.autograd.grad((truth * factors).sum(), wide)
    assert off(found, wanted) < ROUNDING[dtype]
    assert not found[[0, 3, 5]].any()
    with pytest.raises(RuntimeError, match="inplace operation"):  # the logits are gone, and that is said
        torch.autograd.grad((logprobs * factors).sum(), leaf)


def test_who_saved_the_logits_is_told() -> None:
    leaf = make_logits(3, 64, torch.float32).clone().requires_grad_()
    logprobs, _ = logits_logprobs(torch.tanh(leaf), torch.tensor([1, 2, 3], device=DEVICE), in_place=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        logprobs.sum().backward()


@pytest.fixture(params=[True, False], ids=["mask on the host", "rows chosen before"])
def without_waiting(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    mask = torch.arange(48) % 3 > 0
    yield {"mask": mask} if request.param else {"mask": mask.to(DEVICE), "leave_out": False}


@pytest.mark.skipif(not COMPILED, reason="needs a GPU")
@pytest.mark.parametrize(
    "options", [{"ppo": True}, {"importance_sampling_level": "sequence", "entropy_coef": 0.1}, {"kl_coef": 0.1}]
)
def test_nothing_waits_for_the_device(options: dict[str, Any], without_waiting: dict[str, Any]) -> None:
    hidden = torch.randn(48, 64, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(512, 64, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    old = torch.full((48,), -6.0, device=DEVICE)
    inputs = {
        "targets": torch.arange(48, device=DEVICE),
        "old_logprobs": old,
        "advantages": torch.ones(48, device=DEVICE),
        "trajectory_ids": torch.arange(48, device=DEVICE) // 6,
        "reference_logprobs": old if "kl_coef" in options else None,
    }

    def step(rows_per_tile: int | None) -> None:
        result = fused_linear_policy_loss(
            hidden, weight, **inputs, **without_waiting, objective=Objective(**options), rows_per_tile=rows_per_tile
        )
        (result.loss * 3).backward()

    for rows_per_tile in (None, 10):
        step(rows_per_tile)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(rows_per_tile)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_twin_is_another_path(twins: OnTwins) -> None:
    logits = make_logits(2, 40, torch.float32)
    assert rows._kernels(logits) is not None
    assert rows._kernels(logits.double()) is None
    with twins:
        assert rows._kernels(logits) is None
    assert isinstance(rows.statistics(logits, make_shape(2, 40)), RowStatistics)
