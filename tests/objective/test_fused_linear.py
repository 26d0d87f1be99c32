"""The tiled head against `policy_loss` of explicit logits, which autograd differentiates."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fitrl import Objective, PolicyLoss, fused_linear_policy_loss, policy_loss
from fitrl.errors import InvalidArgumentError
from fitrl.objective import linear_head
from fitrl.objective.logprobs import linear_logits, linear_logprobs, logits_logprobs

NAN, INF = math.nan, math.inf
TOKENS, WIDTH, VOCABULARY = 11, 5, 17
OBJECTIVES = {
    "cispo": Objective(),
    "ppo": Objective(ppo=True, importance_sampling_level="average", mask_prob_ratio=True),
    "dual_clip": Objective(ppo=True, dual_clip=1.5, ratio_cap=1.7, loss_aggregation="token_sum"),
    "sequence": Objective(
        ppo=True, importance_sampling_level="sequence", loss_aggregation="seq_mean_token_mean", kimi_k2_tau=0.2
    ),
    "entropy": Objective(entropy_coef=0.3, loss_aggregation="seq_mean_token_sum"),
    "negative_entropy": Objective(entropy_coef=-0.3, epsilon_high=0.2),
    "k2": Objective(kl_coef=0.3, truncated_importance_sampling=1.2),
    "k3": Objective(kl_coef=0.3, kl_estimator="k3", entropy_coef=0.1),
    "k1": Objective(
        kl_coef=0.3, kl_in="advantage", loss_aggregation="seq_mean_token_sum_norm", norm_length=9.0, ppo=True
    ),
    "all": Objective(
        ppo=True,
        importance_sampling_level="geometric_average",
        max_negative_advantage_importance_sampling_weight=1.1,
        kimi_k2_tau=0.1,
        truncated_importance_sampling=1.2,
        dual_clip=1.5,
        ratio_cap=1.7,
        kl_coef=0.2,
        entropy_coef=0.1,
    ),
}


def make_head(
    tokens: int = TOKENS,
    width: int = WIDTH,
    vocabulary: int = VOCABULARY,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """Hidden states and an output head, all leaves with grad."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"hidden": (tokens, width), "weight": (vocabulary, width), "bias": (vocabulary,)}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for name, shape in shapes.items()
    }


def make_batch(
    tokens: int = TOKENS, vocabulary: int = VOCABULARY, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """The rest of a batch: old logprobs near those of a random head, three trajectories, some tokens masked out."""
    generator = torch.Generator().manual_seed(100 + seed)

    def normal(mean: float, std: float) -> Tensor:
        return mean + std * torch.randn(tokens, generator=generator, dtype=torch.float64).to(dtype)

    old = normal(-3.0, 1.0)
    return {
        "targets": torch.randint(vocabulary, (tokens,), generator=generator),
        "old_logprobs": old,
        "advantages": normal(0.0, 1.5),
        "mask": torch.rand(tokens, generator=generator) < 0.8,
        "trajectory_ids": torch.randint(min(3, max(tokens, 1)), (tokens,), generator=generator),
        "rollout_logprobs": old + normal(0.0, 0.3),
        "reference_logprobs": old + normal(0.0, 0.3),
    }


def explicit_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Logprobs and entropies from all the logits at once."""
    logits = hidden @ weight.t()
    if bias is not None:
        logits = logits + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    scale = torch.as_tensor(temperature, dtype=logits.dtype).reshape(-1, 1)
    log_probs = (logits / scale).log_softmax(dim=1)
    entropies = -(log_probs.exp() * log_probs).sum(dim=1)
    return log_probs.gather(1, targets[:, None]).squeeze(1), entropies


def explicit_policy_loss(head: dict[str, Tensor], batch: dict[str, Tensor], **keywords: Any) -> PolicyLoss:
    """`fused_linear_policy_loss` without the tiles."""
    batch = dict(batch)
    options = {name: keywords.pop(name) for name in ("temperature", "softcap") if name in keywords}
    logprobs, entropies = explicit_logprobs(**head, targets=batch.pop("targets"), **options)
    return policy_loss(logprobs, **batch, entropies=entropies, **keywords)


def gradients(loss: Tensor, head: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {name: tensor for name, tensor in head.items() if tensor.requires_grad}
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def assert_close(found: Any, wanted: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def assert_same_as_explicit(head: dict[str, Tensor], batch: dict[str, Tensor], **keywords: Any) -> None:
    """Loss, metrics and all gradients, to 1e-10."""
    rows_per_tile = keywords.pop("rows_per_tile", None)
    wanted = explicit_policy_loss(head, batch, **keywords)
    found = fused_linear_policy_loss(**head, **batch, **keywords, rows_per_tile=rows_per_tile)
    assert found.loss.dtype == wanted.loss.dtype
    assert_close(found.loss, wanted.loss)
    assert_close(gradients(found.loss, head), gradients(wanted.loss, head))
    assert_close(dict(found.metrics), {name: wanted.metrics[name] for name in found.metrics})


@pytest.fixture
def head() -> dict[str, Tensor]:
    return make_head()


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return make_batch()


# -- the same loss and gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("temperature", ["one", "scalar", "tensor", "per_token"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_same_as_explicit_logits(
    head: dict[str, Tensor], batch: dict[str, Tensor], name: str, temperature: str, softcap: float | None
) -> None:
    keywords = {
        "one": {},
        "scalar": {"temperature": 0.7},
        "tensor": {"temperature": torch.tensor(1.3, dtype=torch.float64)},
        "per_token": {"temperature": torch.linspace(0.5, 2.0, TOKENS, dtype=torch.float64)},
    }[temperature]
    for rows_per_tile in (3, None):
        assert_same_as_explicit(
            head, batch, objective=OBJECTIVES[name], softcap=softcap, rows_per_tile=rows_per_tile, **keywords
        )


@pytest.mark.parametrize("rows_per_tile", [*range(1, TOKENS + 1), TOKENS + 5])
def test_any_tile_gives_the_same(head: dict[str, Tensor], batch: dict[str, Tensor], rows_per_tile: int) -> None:
    assert_same_as_explicit(
        head, batch, objective=OBJECTIVES["all"], softcap=3.0, temperature=0.8, rows_per_tile=rows_per_tile
    )


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    tokens=st.integers(1, 9),
    width=st.integers(1, 6),
    vocabulary=st.integers(1, 12),
    rows_per_tile=st.none() | st.integers(1, 10),
    name=st.sampled_from(sorted(OBJECTIVES)),
    temperature=st.floats(0.2, 3.0),
    softcap=st.none() | st.floats(0.5, 50.0),
    with_bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape_gives_the_same(
    tokens: int,
    width: int,
    vocabulary: int,
    rows_per_tile: int | None,
    name: str,
    temperature: float,
    softcap: float | None,
    with_bias: bool,
    seed: int,
) -> None:
    head = make_head(tokens, width, vocabulary, seed=seed)
    if not with_bias:
        del head["bias"]
    assert_same_as_explicit(
        head,
        make_batch(tokens, vocabulary, seed=seed),
        objective=OBJECTIVES[name],
        temperature=temperature,
        softcap=softcap,
        rows_per_tile=rows_per_tile,
    )


def test_global_counts_and_the_calls_kl_mean_are_passed_on(head: dict[str, Tensor], batch: dict[str, Tensor]) -> None:
    counts = {"num_tokens": 50, "num_sequences": 7, "kl_mean": 0.4}
    for objective in OBJECTIVES.values():
        assert_same_as_explicit(head, batch, objective=objective, **counts)


def test_strided_and_expanded_inputs(batch: dict[str, Tensor]) -> None:
    head = make_head()
    strided = {
        "hidden": head["hidden"].detach().t().contiguous().t().requires_grad_(),
        "weight": head["weight"].detach().repeat(1, 2)[:, :WIDTH].detach().requires_grad_(),
        "bias": head["bias"].detach().repeat_interleave(2)[::2].detach().requires_grad_(),
    }
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    for name, tensor in strided.items():
        assert torch.equal(tensor, head[name])
    temperature = torch.tensor([0.6], dtype=torch.float64).expand(TOKENS)
    batch["mask"] = torch.ones(TOKENS, dtype=torch.bool)
    assert_same_as_explicit(strided, batch, objective=OBJECTIVES["entropy"], temperature=temperature, rows_per_tile=4)


def test_integer_temperature(head: dict[str, Tensor], batch: dict[str, Tensor]) -> None:
    assert_same_as_explicit(head, batch, objective=Objective(), temperature=2)
    wanted = fused_linear_policy_loss(**head, **batch, objective=Objective(), temperature=2.0)
    whole = torch.full((TOKENS,), 2)
    found = fused_linear_policy_loss(**head, **batch, objective=Objective(), temperature=whole)
    assert torch.equal(found.loss, wanted.loss)


def test_returns_logprobs_and_entropies_without_grad(head: dict[str, Tensor], batch: dict[str, Tensor]) -> None:
    m = batch["mask"]
    logprobs, entropies = explicit_logprobs(**head, targets=batch["targets"], temperature=0.7)
    for objective, flag, given_back in (
        (Objective(), False, False),
        (Objective(), True, True),
        (Objective(entropy_coef=0.1), False, True),
    ):
        result = fused_linear_policy_loss(
            **head, **batch, objective=objective, temperature=0.7, with_entropies=flag, rows_per_tile=2
        )
        assert result.logprobs is not None
        assert not result.logprobs.requires_grad
        assert_close(result.logprobs[m], logprobs.detach()[m])
        assert (result.entropies is not None) is given_back
        assert ("loss_entropy" in result.metrics) is given_back
        if result.entropies is not None:
            assert not result.entropies.requires_grad
            assert_close(result.entropies[m], entropies.detach()[m])


def test_asking_for_entropies_does_not_change_the_loss(head: dict[str, Tensor], batch: dict[str, Tensor]) -> None:
    results = [
        fused_linear_policy_loss(**head, **batch, objective=OBJECTIVES["ppo"], with_entropies=flag)
        for flag in (False, True)
    ]
    assert torch.equal(results[0].loss, results[1].loss)
    assert_close(gradients(results[0].loss, head), gradients(results[1].loss, head))


# -- autograd -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rows_per_tile", [1, 3, 4])
def test_gradcheck_of_logprobs_and_entropies(rows_per_tile: int, with_bias: bool, softcap: float | None) -> None:
    head = make_head(4, 3, 5, seed=2)
    targets = torch.tensor([0, 4, 2, 2])
    temperature = torch.tensor([1.0, 0.5, 2.0, 0.8], dtype=torch.float64)

    def both(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return linear_logprobs(
            hidden,
            weight,
            targets,
            bias=bias,
            temperature=temperature,
            softcap=softcap,
            rows_per_tile=rows_per_tile,
            with_entropies=True,
        )

    leaves = [head["hidden"], head["weight"], *([head["bias"]] if with_bias else [])]
    assert torch.autograd.gradcheck(both, leaves)
    assert torch.autograd.gradcheck(lambda *args: both(*args)[0], leaves)
    assert torch.autograd.gradcheck(lambda *args: both(*args)[1], leaves)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("rows_per_tile", [2, None])
@pytest.mark.parametrize(
    "options", [{}, {"importance_sampling_level": "geometric_average"}, {"kl_coef": 0.3, "kl_estimator": "k3"}]
)
def test_gradcheck_of_the_loss(options: dict[str, Any], rows_per_tile: int | None, softcap: float | None) -> None:
    head, batch = make_head(5, 3, 6, seed=5), make_batch(5, 6, seed=5)
    batch["mask"] = torch.tensor([True, True, False, True, True])
    batch["old_logprobs"] = explicit_logprobs(**head, targets=batch["targets"], softcap=softcap)[0].detach() + 0.03
    objective = Objective(ppo=True, **options)  # CISPO's gradient is not that of its value

    def loss(*leaves: Tensor) -> Tensor:
        given = dict(zip(head, leaves, strict=True))
        result = fused_linear_policy_loss(
            **given, **batch, objective=objective, rows_per_tile=rows_per_tile, softcap=softcap
        )
        return result.loss * 1.7

    assert torch.autograd.gradcheck(loss, list(head.values()))


def test_gradient_of_the_output_scales_that_of_the_inputs(head: dict[str, Tensor], batch: dict[str, Tensor]) -> None:
    result = fused_linear_policy_loss(**head, **batch, objective=OBJECTIVES["all"], rows_per_tile=4)
    once = torch.autograd.grad(result.loss, list(head.values()), retain_graph=True)
    thrice = torch.autograd.grad(result.loss * 3, list(head.values()), retain_graph=True)
    again = torch.autograd.grad(result.loss, list(head.values()))
    for one, three, other in zip(once, thrice, again, strict=True):
        assert one.any()
        assert_close(three, 3 * one)
        assert torch.equal(other, one)  # backward leaves what it saved as it was


def test_gradients_accumulate_over_microbatches(head: dict[str, Tensor], batch: dict[str, Tensor]) -> None:
    objective = OBJECTIVES["sequence"]
    whole = gradients(fused_linear_policy_loss(**head, **batch, objective=objective).loss, head)
    counts = {
        "num_tokens": batch["mask"].sum(),
        "num_sequences": batch["trajectory_ids"][batch["mask"]].unique().numel(),
    }
    for i in range(3):
        rows = batch["trajectory_ids"] == i
        part = {name: tensor[rows] for name, tensor in batch.items()}
        part["trajectory_ids"] = torch.zeros_like(part["trajectory_ids"])
        share = {**head, "hidden": head["hidden"][rows]}
        fused_linear_policy_loss(**share, **part, objective=objective, **counts).loss.backward()
    assert_close({name: tensor.grad for name, tensor in head.items()}, whole)


@pytest.mark.parametrize("frozen", [("weight",), ("bias",), ("weight", "bias"), ("hidden",), ("hidden", "bias")])
def test_frozen_inputs_get_no_gradient(batch: dict[str, Tensor], frozen: tuple[str, ...]) -> None:
    head = make_head()
    for name in frozen:
        head[name].requires_grad_(False)
    fused_linear_policy_loss(**head, **batch, objective=OBJECTIVES["entropy"], rows_per_tile=4).loss.backward()
    for name in frozen:
        assert head[name].grad is None
    wanted = gradients(explicit_policy_loss(head, batch, objective=OBJECTIVES["entropy"]).loss, head)
    assert_close({name: head[name].grad for name in wanted}, wanted)


def test_nothing_with_grad_makes_a_loss_without(batch: dict[str, Tensor]) -> None:
    head = {name: tensor.detach() for name, tensor in make_head().items()}
    wanted = explicit_policy_loss(head, batch, objective=Objective())
    found = fused_linear_policy_loss(**head, **batch, objective=Objective())
    assert not found.loss.requires_grad
    assert_close(found.loss, wanted.loss)
    with torch.no_grad():
        assert_close(fused_linear_policy_loss(**make_head(), **batch, objective=Objective()).loss, wanted.loss)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_tied_weights_get_both_gradients(batch: dict[str, Tensor], name: str) -> None:
    weight = make_head()["weight"]
    ids = torch.arange(TOKENS) % VOCABULARY

    def hidden() -> Tensor:
        return torch.tanh(weight[ids] * 0.9)

    found = fused_linear_policy_loss(hidden(), weight, **batch, objective=OBJECTIVES[name], rows_per_tile=3)
    wanted = explicit_policy_loss({"hidden": hidden(), "weight": weight}, batch, objective=OBJECTIVES[name])
    assert_close(
        torch.autograd.grad(found.loss, weight),
        torch.autograd.grad(wanted.loss, weight),
    )


def test_second_derivatives_are_refused_not_wrong(head: dict[str, Tensor], batch: dict[str, Tensor]) -> None:
    loss = fused_linear_policy_loss(**head, **batch, objective=Objective()).loss
    (grad,) = torch.autograd.grad(loss, head["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        grad.sum().backward()


# -- masked-out rows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("junk", [NAN, INF, -INF, 1e38])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_masked_out_rows_may_hold_anything(dtype: torch.dtype, junk: float, name: str) -> None:
    batch = make_batch()
    out = ~batch["mask"]
    assert out.any()
    temperature = torch.linspace(0.5, 2.0, TOKENS, dtype=torch.float64)
    results = []
    for dirty in (False, True):
        head, inputs = make_head(dtype=dtype), {key: tensor.clone() for key, tensor in batch.items()}
        if dirty:
            with torch.no_grad():
                head["hidden"][out] = junk
            for tensor in inputs.values():
                if tensor.is_floating_point():
                    tensor[out] = junk
            inputs["targets"][out] = -100  # the ignored label of a cross-entropy
        result = fused_linear_policy_loss(
            **head, **inputs, objective=OBJECTIVES[name], temperature=temperature, rows_per_tile=3
        )
        results.append((result.loss, gradients(result.loss, head)))
    (clean, wanted), (dirty_loss, found) = results
    assert torch.equal(dirty_loss, clean)
    for key in wanted:
        assert torch.equal(found[key], wanted[key]), key
    assert (found["hidden"][out] == 0).all()


@pytest.mark.parametrize("junk", [NAN, INF, -INF, 0.0])
def test_temperature_of_masked_out_rows_may_be_anything(
    head: dict[str, Tensor], batch: dict[str, Tensor], junk: float
) -> None:
    for objective in OBJECTIVES.values():
        results = []
        for value in (1.0, junk):
            temperature = torch.where(batch["mask"], 0.7, torch.tensor(value, dtype=torch.float64))
            result = fused_linear_policy_loss(
                **head, **batch, objective=objective, temperature=temperature, rows_per_tile=3
            )
            results.append((result.loss, gradients(result.loss, head)))
        assert_close(results[1], results[0])


@pytest.mark.parametrize("tokens", [0, 5])
def test_nothing_to_train_on(tokens: int) -> None:
    batch = make_batch(tokens)
    batch["mask"] = torch.zeros(tokens, dtype=torch.bool)
    for objective in OBJECTIVES.values():
        head = make_head(tokens)
        result = fused_linear_policy_loss(**head, **batch, objective=objective)
        assert result.loss == 0
        assert result.logprobs is not None and result.logprobs.shape == (tokens,)
        for name, grad in gradients(result.loss, head).items():
            assert grad.shape == head[name].shape
            assert not grad.any()


# -- dtypes -------------------------------------------------------------------------------------------------------


@pytest.fixture
def wide_head() -> dict[str, Tensor]:
    """A bf16 head whose logits have a spread of a few nats."""
    head = make_head(48, 256, 320, seed=7)
    scale = {"hidden": 1.0, "weight": 0.2, "bias": 1.0}
    return {name: (tensor.detach() * scale[name]).bfloat16().requires_grad_() for name, tensor in head.items()}


def in_float64(head: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().double().requires_grad_() for name, tensor in head.items()}


def test_exact_logits_from_sixteen_bits_are_not_rounded(wide_head: dict[str, Tensor]) -> None:
    targets = make_batch(48, 320)["targets"]
    truth, true_entropies = explicit_logprobs(**in_float64(wide_head), targets=targets, temperature=0.7)
    errors, entropy_errors = {}, {}
    for exact in (True, False):
        logprobs, entropies = linear_logprobs(
            **wide_head, targets=targets, temperature=0.7, exact_logits=exact, with_entropies=True
        )
        assert logprobs.dtype == entropies.dtype == torch.float32
        errors[exact] = (logprobs - truth).abs().max().item()
        entropy_errors[exact] = (entropies - true_entropies).abs().max().item()
    assert errors[True] < 2e-5
    assert entropy_errors[True] < 2e-5
    assert errors[False] < 0.2
    assert errors[True] < errors[False] / 100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("rows_per_tile", [7, None])
def test_sixteen_bit_gradients_are_near_those_of_float64(
    wide_head: dict[str, Tensor], dtype: torch.dtype, exact: bool, rows_per_tile: int | None
) -> None:
    head = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in wide_head.items()}
    batch = make_batch(48, 320)
    batch["old_logprobs"] = torch.full((48,), NAN)
    objective = Objective(entropy_coef=0.1)
    result = fused_linear_policy_loss(
        **head, **batch, objective=objective, exact_logits=exact, rows_per_tile=rows_per_tile
    )
    assert result.loss.dtype == torch.float32
    truth = in_float64(head)
    wanted = gradients(explicit_policy_loss(truth, batch, objective=objective).loss, truth)
    for name, grad in gradients(result.loss, head).items():
        assert grad.dtype == dtype
        difference = (grad.double() - wanted[name]).norm() / wanted[name].norm()
        assert difference < 0.02, name


def test_mixed_dtypes_keep_their_own_gradients(wide_head: dict[str, Tensor]) -> None:
    # bf16 hidden states of an autocast model, float32 master weights
    batch = make_batch(48, 320)
    mixed = {**wide_head, "weight": wide_head["weight"].detach().float().requires_grad_()}
    results = {}
    for name, head in (("mixed", mixed), ("half", wide_head)):
        result = fused_linear_policy_loss(**head, **batch, objective=Objective(), exact_logits=True)
        results[name] = (result.loss, gradients(result.loss, head))
    assert torch.equal(results["mixed"][0], results["half"][0])
    for name, grad in results["mixed"][1].items():
        assert grad.dtype == mixed[name].dtype
        assert torch.equal(grad.to(torch.bfloat16), results["half"][1][name])


def test_float32_agrees_with_float64(batch: dict[str, Tensor]) -> None:
    head = make_head(dtype=torch.float32)
    truth = in_float64(head)
    for objective in OBJECTIVES.values():
        result = fused_linear_policy_loss(**head, **batch, objective=objective, rows_per_tile=4)
        assert result.loss.dtype == result.logprobs.dtype == torch.float32
        wanted = explicit_policy_loss(truth, batch, objective=objective)
        torch.testing.assert_close(result.loss.double(), wanted.loss, rtol=1e-4, atol=1e-5)
        for name, grad in gradients(result.loss, head).items():
            assert grad.dtype == torch.float32
            expected = gradients(explicit_policy_loss(truth, batch, objective=objective).loss, truth)[name]
            torch.testing.assert_close(grad.double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("exact", [True, False])
def test_autocast_computes_as_if_the_inputs_had_sixteen_bits(wide_head: dict[str, Tensor], exact: bool) -> None:
    batch = make_batch(48, 320)
    full = {name: tensor.detach().float().requires_grad_() for name, tensor in wide_head.items()}
    objective = Objective(entropy_coef=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        inside = fused_linear_policy_loss(**full, **batch, objective=objective, exact_logits=exact, rows_per_tile=8)
    outside = fused_linear_policy_loss(**wide_head, **batch, objective=objective, exact_logits=exact, rows_per_tile=8)
    assert inside.loss.dtype == torch.float32
    assert torch.equal(inside.loss, outside.loss)
    found, wanted = gradients(inside.loss, full), gradients(outside.loss, wide_head)
    for name, grad in found.items():
        assert grad.dtype == torch.float32
        assert torch.equal(grad.bfloat16(), wanted[name])


def test_autocast_rounds_float32_and_leaves_float64(wide_head: dict[str, Tensor]) -> None:
    targets = make_batch(48, 320)["targets"]
    head = {name: tensor.detach().float() * 1.001 for name, tensor in wide_head.items()}
    plain, _ = linear_logprobs(**head, targets=targets)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, _ = linear_logprobs(**head, targets=targets)
        double, _ = linear_logprobs(**in_float64(head), targets=targets)
    truth, _ = explicit_logprobs(**in_float64(head), targets=targets)
    assert_close(double, truth)
    assert (plain - truth).abs().max() < 1e-4
    assert (rounded - truth).abs().max() > 1e-3
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert torch.equal(linear_logprobs(**head, targets=targets)[0], plain)


def test_extreme_logits_stay_finite() -> None:
    head = make_head(4, 3, 6, dtype=torch.float32)
    hidden, weight = head["hidden"] * 1e3, head["weight"] * 1e3
    logprobs, entropies = linear_logprobs(hidden, weight, torch.tensor([0, 1, 2, 3]), with_entropies=True)
    assert logprobs.isfinite().all()
    assert (logprobs <= 0).all()
    assert entropies.isfinite().all()
    (logprobs.sum() + entropies.sum()).backward()
    for leaf in (head["hidden"], head["weight"]):
        assert leaf.grad.isfinite().all()


# -- memory -------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Notes the most elements that any operation returned, and the shapes of what is no view of the inputs."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.elements = 0
        self.shapes: set[tuple[int, ...]] = set()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in inputs}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.numel())
                if leaf.untyped_storage().data_ptr() not in self.known:
                    self.shapes.add(tuple(leaf.shape))
        return result


@contextmanager
def saved_elements() -> Iterator[list[int]]:
    """Collect the sizes of all tensors saved for backward."""
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield sizes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", ["cispo", "entropy"])
def test_only_one_tile_of_logits_exists(dtype: torch.dtype, exact: bool, name: str) -> None:
    tokens, width, vocabulary, rows = 64, 4, 128, 8  # rows of logits start at multiples of 64
    head, batch = make_head(tokens, width, vocabulary, dtype=dtype), make_batch(tokens, vocabulary)
    del batch["reference_logprobs"]
    with Largest() as largest, saved_elements() as saved:
        result = fused_linear_policy_loss(
            **head,
            **batch,
            objective=OBJECTIVES[name],
            softcap=5.0,
            exact_logits=exact,
            rows_per_tile=rows,
        )
        result.loss.backward()
    assert largest.elements == rows * vocabulary
    assert max(saved) == vocabulary * width
    assert all(tensor.grad is not None for tensor in head.values())


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_no_memory_for_the_gradient_of_a_frozen_input(frozen: str, batch: dict[str, Tensor]) -> None:
    shapes = {}
    for trained in (True, False):
        head = make_head()
        head[frozen].requires_grad_(trained)
        with Largest(*head.values()) as largest:
            loss = fused_linear_policy_loss(**head, **batch, objective=Objective(), rows_per_tile=2).loss
            loss.backward()
        shapes[trained] = largest.shapes
    shape = {"hidden": (TOKENS, WIDTH), "weight": (VOCABULARY, WIDTH), "bias": (VOCABULARY,)}[frozen]
    assert shape in shapes[True]
    assert shape not in shapes[False]


def test_the_memory_test_sees_explicit_logits(head: dict[str, Tensor], batch: dict[str, Tensor]) -> None:
    with Largest() as largest, saved_elements() as saved:
        explicit_policy_loss(head, batch, objective=Objective()).loss.backward()
    assert largest.elements == max(saved) == TOKENS * VOCABULARY


def test_default_tile_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(linear_head._TILE_BYTES, "cpu", 8 * 200)
    for vocabulary, elements in ((64, 192), (320, 320)):
        head, batch = make_head(64, 2, vocabulary), make_batch(64, vocabulary)
        batch["mask"] = torch.ones(64, dtype=torch.bool)
        head["weight"].requires_grad_(False)
        with Largest() as largest:
            fused_linear_policy_loss(**head, **batch, objective=Objective()).loss.backward()
        assert largest.elements == max(elements, vocabulary * 2)  # the tile, or the weight seen transposed


def test_tiles_are_cut_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def sizes(rows: int, rows_per_tile: int | None, allowed: int) -> int:
        monkeypatch.setitem(linear_head._TILE_BYTES, "cpu", allowed * 40)
        return linear_head.in_tiles(
            lambda size: seen.append(size) or size,  # type: ignore[func-returns-value]
            rows=rows,
            rows_per_tile=rows_per_tile,
            vocabulary=10,
            itemsize=4,
            device=torch.device("cpu"),
        )

    assert sizes(16384, None, 10000) == 8192  # two tiles, not one of 10000 and a rest
    assert sizes(900, None, 1000) == 900
    assert sizes(1001, None, 1000) == 512  # a multiple of 128
    assert sizes(16384, 10000, 10) == 10000  # what was asked for
    assert sizes(5, 10000, 10) == 5
    assert sizes(0, None, 10) == 1


def test_out_of_memory_halves_the_tiles_and_remembers(
    head: dict[str, Tensor], batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(linear_head, "_FITTING", {})
    largest, tried = 3, []
    real = linear_head.LinearHead.logits

    def logits(self: Any, tile: slice) -> Tensor:
        rows = tile.stop - tile.start
        tried.append(rows)
        if rows > largest:
            raise torch.OutOfMemoryError("no memory for that many rows")
        return real(self, tile)

    monkeypatch.setattr(linear_head.LinearHead, "logits", logits)
    wanted = {name: explicit_policy_loss(head, batch, objective=OBJECTIVES[name]) for name in ("ppo", "cispo")}
    for name in ("cispo", "ppo"):  # tiles on their own, and all rows at once, which become two passes by tiles
        result = fused_linear_policy_loss(**head, **batch, objective=OBJECTIVES[name])
        assert_close(result.loss, wanted[name].loss)
        assert_close(gradients(result.loss, head), gradients(wanted[name].loss, head))
        if name == "cispo":
            assert "out of memory" in caplog.text
            assert max(tried) == int(batch["mask"].sum())
            tried.clear()
    assert max(tried) <= largest  # remembered: never again that many
    largest = 0
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        fused_linear_policy_loss(**head, **batch, objective=Objective())


# -- rows that are left out ---------------------------------------------------------------------------------------


def rows_computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collects how many rows each head sees."""
    seen: list[int] = []
    real = linear_head.LinearHead.__init__

    def init(self: Any, hidden: Tensor, *args: Any, **keywords: Any) -> None:
        seen.append(len(hidden))
        real(self, hidden, *args, **keywords)

    monkeypatch.setattr(linear_head.LinearHead, "__init__", init)
    return seen


@pytest.mark.parametrize("name", OBJECTIVES)
def test_rows_without_a_gradient_never_reach_the_head(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = OBJECTIVES[name]
    batch = make_batch(40, seed=3)
    batch["trajectory_ids"] = torch.arange(40) // 5
    batch["advantages"][batch["trajectory_ids"] % 2 == 0] = 0.0
    batch["advantages"][5:7] = 0.0  # a part of a trajectory only
    if not objective.kl_coef:
        del batch["reference_logprobs"]
    head = make_head(40)
    m, a = batch["mask"], batch["advantages"]
    needed = m
    if not objective.teaches_without_advantage:
        by_sequence = objective.importance_sampling_level != "token"
        needed = m & ((batch["trajectory_ids"] % 2 == 1) if by_sequence else (a != 0))
        assert needed.sum() < m.sum()
    wanted = explicit_policy_loss(head, batch, objective=objective)
    expected = gradients(wanted.loss, head)
    seen = rows_computed(monkeypatch)
    for rows_per_tile in (None, 7):
        found = fused_linear_policy_loss(**head, **batch, objective=objective, rows_per_tile=rows_per_tile)
        assert_close(found.loss, wanted.loss)
        assert_close(gradients(found.loss, head), expected)
        assert set(seen) == {int(needed.sum())}
        assert torch.equal(found.logprobs.isnan(), ~needed)
        assert int(found.metrics["token_count"]) == int(needed.sum())


def test_rows_chosen_before_are_all_computed(
    head: dict[str, Tensor], batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = explicit_policy_loss(head, batch, objective=Objective())
    seen = rows_computed(monkeypatch)
    with torch.no_grad():
        head["hidden"][~batch["mask"]] = NAN
    batch["targets"][~batch["mask"]] = -100
    found = fused_linear_policy_loss(**head, **batch, objective=Objective(), leave_out=False)
    assert seen == [TOKENS]
    assert_close(found.loss, wanted.loss)
    assert torch.equal(found.logprobs.isnan(), ~batch["mask"])
    grads = gradients(found.loss, head)
    assert all(grad.isfinite().all() for grad in grads.values())
    assert_close(dict(found.metrics), {key: wanted.metrics[key] for key in found.metrics})


def test_metrics_that_were_asked_for_keep_rows_of_advantage_zero(
    head: dict[str, Tensor], batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch["advantages"].zero_()
    for options in ({"with_entropies": True}, {}):
        seen = rows_computed(monkeypatch)
        found = fused_linear_policy_loss(**head, **batch, **options, objective=Objective())
        assert set(seen) == {int(batch["mask"].sum())}  # reference logprobs were given
        wanted = explicit_policy_loss(head, batch, objective=Objective())
        assert_close(dict(found.metrics), {key: wanted.metrics[key] for key in found.metrics})


# -- heads that cannot be taken apart -----------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [None, [0, 3, 4, 9]])
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("temperature", [0.7, None])
def test_logits_logprobs(rows: list[int] | None, in_place: bool, temperature: float | None) -> None:
    generator = torch.Generator().manual_seed(4)
    leaf = torch.randn(10, VOCABULARY, generator=generator, dtype=torch.float64).requires_grad_()
    index = None if rows is None else torch.tensor(rows)
    count = 10 if rows is None else len(rows)
    targets = torch.randint(VOCABULARY, (count,), generator=generator)
    scale = torch.linspace(0.5, 2.0, count, dtype=torch.float64) if temperature is None else temperature
    factors = torch.randn(2, count, generator=generator, dtype=torch.float64)
    logprobs, entropies = logits_logprobs(
        leaf * 1.5, targets, temperature=scale, rows=index, with_entropies=True, in_place=in_place
    )
    (found,) = torch.autograd.grad((factors[0] * logprobs + factors[1] * entropies).sum(), leaf)
    logits = leaf * 1.5 if index is None else (leaf * 1.5)[index]
    log_probs = (logits / torch.as_tensor(scale, dtype=torch.float64).reshape(-1, 1)).log_softmax(dim=1)
    wanted = log_probs.gather(1, targets[:, None]).squeeze(1)
    wanted_entropies = -(log_probs.exp() * log_probs).sum(dim=1)
    assert_close(logprobs, wanted)
    assert_close(entropies, wanted_entropies)
    (expected,) = torch.autograd.grad((factors[0] * wanted + factors[1] * wanted_entropies).sum(), leaf)
    assert_close(found, expected)


def test_gradcheck_of_logits_logprobs() -> None:
    logits = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets = torch.tensor([0, 4, 2])

    def both(logits: Tensor) -> Any:
        return logits_logprobs(logits, targets, temperature=0.6, rows=torch.tensor([3, 0, 1]), with_entropies=True)

    assert torch.autograd.gradcheck(both, [logits])


# -- logits for samplers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_logits_are_not_rounded(dtype: torch.dtype, softcap: float | None, with_bias: bool) -> None:
    head = make_head(9, 64, 33, dtype=dtype)
    if not with_bias:
        del head["bias"]
    wide = in_float64(head)
    truth = wide["hidden"] @ wide["weight"].t() + wide.get("bias", 0.0)
    if softcap is not None:
        truth = softcap * torch.tanh(truth / softcap)
    with torch.no_grad():
        found = linear_logits(**head, softcap=softcap)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), truth.detach(), rtol=1e-5, atol=1e-4)


# -- what does not fit --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden": torch.zeros(TOKENS)}, "hidden"),
        ({"hidden": torch.zeros(WIDTH)}, "hidden"),
        ({"hidden": torch.zeros(1, WIDTH)}, "hidden|targets"),
        ({"hidden": torch.zeros(1, TOKENS, WIDTH)}, "hidden"),
        ({"hidden": torch.zeros(TOKENS, WIDTH + 1)}, r"hidden.*\(11, 6\).*\(17, 5\)"),
        ({"hidden": torch.zeros(TOKENS, 1)}, "hidden"),
        ({"hidden": torch.zeros(TOKENS, WIDTH, dtype=torch.int64)}, "floating point.*int64"),
        ({"weight": torch.zeros(VOCABULARY)}, "weight"),
        ({"weight": torch.zeros(VOCABULARY, WIDTH - 1)}, "weight"),
        ({"weight": torch.zeros(VOCABULARY, WIDTH, dtype=torch.int64)}, "floating point.*int64"),
        ({"targets": torch.zeros(TOKENS - 1, dtype=torch.int64)}, "targets"),
        ({"targets": torch.zeros(1, dtype=torch.int64)}, "targets"),
        ({"targets": torch.tensor(3)}, "targets"),
        ({"targets": torch.zeros(TOKENS, 1, dtype=torch.int64)}, "targets"),
        ({"targets": torch.zeros(TOKENS, dtype=torch.int32)}, "targets.*int32"),
        ({"targets": torch.zeros(TOKENS)}, "targets.*float32"),
        ({"bias": torch.zeros(VOCABULARY + 1)}, "bias"),
        ({"bias": torch.zeros(1)}, "bias"),
        ({"temperature": torch.ones(TOKENS + 1)}, "temperature"),
        ({"temperature": torch.ones(1)}, "temperature"),
        ({"temperature": torch.ones(TOKENS, 1)}, "temperature"),
        ({"rows_per_tile": 0}, "rows_per_tile.*0"),
        ({"rows_per_tile": -3}, "rows_per_tile.*-3"),
        ({"targets": torch.full((TOKENS,), VOCABULARY)}, r"targets\[\d+\] is 17.*17 tokens"),
        ({"targets": torch.full((TOKENS,), -1)}, r"targets\[\d+\] is -1"),
        ({"softcap": 0.0}, "softcap.*0.0"),
        ({"softcap": -1.0}, "softcap.*-1.0"),
        ({"temperature": 0.0}, "temperature.*0.0"),
        ({"temperature": -1.0}, "temperature.*-1.0"),
        ({"temperature": torch.ones(TOKENS, requires_grad=True)}, "temperature requires grad"),
        ({"bias": torch.zeros(VOCABULARY, dtype=torch.int64)}, "bias.*int64"),
        ({"weight": torch.zeros(VOCABULARY, WIDTH, device="meta")}, "weight is on meta"),
        ({"bias": torch.zeros(VOCABULARY, device="meta")}, "bias is on meta"),
        ({"targets": torch.zeros(TOKENS, dtype=torch.int64, device="meta")}, "targets are on meta"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("whole", [True, False])
def test_what_does_not_fit_is_named(changes: dict[str, Any], words: str, whole: bool) -> None:
    head = {name: tensor.detach().float() for name, tensor in make_head().items()}
    if whole:
        with pytest.raises(InvalidArgumentError, match=words):
            fused_linear_policy_loss(**{**head, **make_batch(), **changes}, objective=Objective())
    else:
        with pytest.raises(InvalidArgumentError, match=words):
            linear_logprobs(**{**head, "targets": make_batch()["targets"], **changes})


@pytest.mark.parametrize(
    "name",
    ["old_logprobs", "advantages", "mask", "trajectory_ids", "rollout_logprobs", "reference_logprobs"],
)
def test_wrong_shapes_of_the_rest_are_named(head: dict[str, Tensor], batch: dict[str, Tensor], name: str) -> None:
    for wrong in (batch[name][:3], batch[name][:1], batch[name][0], batch[name][:, None]):
        with pytest.raises(InvalidArgumentError, match=name):
            fused_linear_policy_loss(**head, **{**batch, name: wrong}, objective=Objective())


@pytest.mark.parametrize("name", ["old_logprobs", "advantages", "rollout_logprobs", "reference_logprobs"])
def test_what_gets_no_gradient_must_not_ask_for_one(
    head: dict[str, Tensor], batch: dict[str, Tensor], name: str
) -> None:
    batch[name].requires_grad_()
    with pytest.raises(InvalidArgumentError, match=f"{name} requires grad"):
        fused_linear_policy_loss(**head, **batch, objective=Objective())


@pytest.mark.parametrize("name", ["old_logprobs", "advantages", "trajectory_ids", "rollout_logprobs"])
def test_other_devices_are_named(head: dict[str, Tensor], batch: dict[str, Tensor], name: str) -> None:
    batch[name] = batch[name].to("meta")
    with pytest.raises(InvalidArgumentError, match=f"{name} is on meta"):
        fused_linear_policy_loss(**head, **batch, objective=Objective())


def test_trajectory_ids_are_int64(head: dict[str, Tensor], batch: dict[str, Tensor]) -> None:
    batch["trajectory_ids"] = batch["trajectory_ids"].int()
    with pytest.raises(InvalidArgumentError, match="trajectory_ids.*int32"):
        fused_linear_policy_loss(**head, **batch, objective=Objective())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"logits": torch.zeros(3)}, r"logits must be \[N, V\]"),
        ({"logits": torch.zeros(3, 4, dtype=torch.int64)}, "int64"),
        ({"targets": torch.zeros(2, dtype=torch.int64)}, "targets"),
        ({"targets": torch.full((3,), 4)}, r"targets\[0\] is 4"),
        ({"temperature": torch.ones(2)}, "temperature"),
        ({"rows": torch.tensor([1, 0])}, "targets"),
        ({"rows": torch.tensor([1, 0, 2], dtype=torch.int32)}, "rows.*int32"),
        ({"rows": torch.tensor([[1, 0, 2]])}, r"rows.*\(1, 3\)"),
    ],
)
def test_logits_that_do_not_fit(changes: dict[str, Any], words: str) -> None:
    given = {"logits": torch.zeros(3, 4), "targets": torch.zeros(3, dtype=torch.int64), **changes}
    with pytest.raises(InvalidArgumentError, match=words):
        logits_logprobs(**given)


# -- in company ---------------------------------------------------------------------------------------------------


def test_beside_a_compiled_layer(head: dict[str, Tensor], batch: dict[str, Tensor]) -> None:
    layer = torch.nn.Linear(WIDTH, WIDTH).double()
    compiled = torch.compile(layer, backend="aot_eager")
    grads = []
    for module in (layer, compiled):
        loss = fused_linear_policy_loss(
            **{**head, "hidden": torch.tanh(module(head["hidden"]))}, **batch, objective=OBJECTIVES["all"]
        ).loss
        grads.append(torch.autograd.grad(loss, [*layer.parameters(), *head.values()]))
    assert_close(grads[1], grads[0])


def test_under_ddp(batch: dict[str, Tensor], tmp_path: Any) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(WIDTH, WIDTH).double()
            self.weight = torch.nn.Parameter(make_head()["weight"].detach())

        def forward(self, inputs: Tensor) -> Tensor:
            hidden = self.layer(inputs)
            result = fused_linear_policy_loss(hidden, self.weight, **batch, objective=Objective(), rows_per_tile=4)
            return result.loss

    model, inputs = Model(), make_head()["hidden"].detach()
    wanted = torch.autograd.grad(model(inputs), list(model.parameters()))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        ddp = torch.nn.parallel.DistributedDataParallel(model)
        for _ in range(2):
            ddp(inputs).backward()  # a weight without a gradient would be an error in the second
        assert_close([p.grad / 2 for p in model.parameters()], list(wanted))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        ({"truncated_importance_sampling": 2.0}, "rollout_logprobs"),
        ({"kl_coef": 0.1}, "reference_logprobs"),
    ],
)
def test_missing_inputs_are_named(
    head: dict[str, Tensor], batch: dict[str, Tensor], options: dict[str, Any], missing: str
) -> None:
    del batch[missing]
    with pytest.raises(InvalidArgumentError, match=missing):
        fused_linear_policy_loss(**head, **batch, objective=Objective(**options))
