"""The gradient of an optimizer step does not depend on whether its histories share what they have in common."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fitrl
from exact import real_float64
from fitrl.data.batch import Batch
from fitrl.data.packing import pack
from fitrl.data.samples import Sample
from fitrl.objective.objective import Objective
from fitrl.policy.loading import LoraSettings, load_policy
from fitrl.policy.module import PolicyModule
from helpers import sample, token_history
from trees import trees

AGGREGATIONS = ("token_mean", "token_sum", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm")
LEVELS = ("token", "sequence", "average", "geometric_average")


@functools.cache
def _module(adapters: bool) -> PolicyModule:
    """The bundled policy in float64, all its parameters somewhere else than at their start."""
    model = fitrl.TrainableModel("sharing", "tests", "tiny", lora=LoraSettings() if adapters else None)
    module = PolicyModule(model)
    policy = load_policy("tiny", model.lora)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    module._policy, module.network = policy, policy.network.double()
    return module


def gradient_of(batches: list[Batch], objective: Objective, adapters: bool = False) -> tuple[Tensor, dict[str, Any]]:
    """Gradient of a step's loss, and the metrics of its microbatches, summed."""
    module = _module(adapters)
    parameters = [p for p in module.policy.network.parameters() if p.requires_grad]
    total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    metrics: dict[str, Any] = {}
    with real_float64():
        for batch in batches:
            result = module.compute_loss(batch, objective)
            gradients = torch.autograd.grad(result.loss, parameters, allow_unused=True)
            filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
            total += torch.cat([gradient.flatten() for gradient in filled])
            for name, value in result.metrics.items():
                old = metrics.get(name, 0.0)
                metrics[name] = max(old, float(value)) if "max" in name else old + float(value)
    return total, metrics


def near(samples: list[Sample]) -> list[Sample]:
    """Old logprobs a little off the policy's own, so that ratios are what they are in training."""
    noise, module = torch.Generator().manual_seed(1), _module(False)
    for one in samples:
        [batch] = pack([one], layout="padded")
        with real_float64():
            own = module.score(batch)
        one.old_logprobs[one.mask] = own.float() + 0.3 * torch.randn(one.num_trainable_tokens, generator=noise)
        one.reference_logprobs = one.old_logprobs - 0.1
    return samples


@given(
    trees(max_trajectories=5),
    st.sampled_from(AGGREGATIONS),
    st.sampled_from(LEVELS),
    st.booleans(),
    st.booleans(),
    st.integers(1, 3),
)
@settings(max_examples=60)
def test_the_gradient_is_that_of_separate_histories(
    samples: list[Sample], aggregation: Any, level: Any, ppo: bool, adapters: bool, num_batches: int
) -> None:
    samples = near(samples)
    objective = Objective(
        ppo=ppo,
        importance_sampling_level=level,
        loss_aggregation=aggregation,
        norm_length=7.0 if aggregation.endswith("norm") else None,
        kl_coef=0.1,
        entropy_coef=0.01,
    )
    apart, told_apart = gradient_of(pack(samples, layout="padded"), objective, adapters)
    scale = max(float(apart.abs().max()), 1.0)

    shared, told = gradient_of(pack(samples, layout="shared", num_batches=num_batches), objective, adapters)

    assert float((shared - apart).abs().max()) <= 1e-10 * scale
    assert told.keys() == told_apart.keys()
    for name, value in told.items():
        assert value == pytest.approx(told_apart[name], rel=1e-9, abs=1e-9), name


@pytest.mark.parametrize("has_linear_head", [True, False])
def test_what_is_trained_may_be_shared(has_linear_head: bool, monkeypatch: Any) -> None:
    """One completion twice with advantages of both signs, two first tokens at one place, a turn that goes on."""
    monkeypatch.setattr(_module(False).policy, "has_linear_head", has_linear_head)
    prompt = [9, 8, 7]
    samples = [
        sample(token_history([*prompt, 5, 6, 4], [0, 0, 0, 1, 1, 1]), advantage=1.0),
        sample(token_history([*prompt, 5, 6, 4], [0, 0, 0, 1, 1, 1], temperature=0.7), advantage=-2.0),
        sample(token_history([*prompt, 6, 6], [0, 0, 0, 1, 1]), advantage=0.5),
        sample(
            token_history([*prompt, 5, 6, 4], [0, 0, 0, 1, 1, 1]),
            token_history([*prompt, 5, 6, 4, 30, 31, 5, 6], [0] * 8 + [1, 1]),
            advantage=0.25,
        ),
    ]
    for one in samples:
        one.old_logprobs = one.old_logprobs - 4.5
    [shared] = pack(samples, layout="shared")
    assert shared.num_positions == 3 + 2 + 4 + 1
    assert len(set(shared.loss_inputs.rows.tolist())) < len(shared.loss_inputs.rows)

    for objective in (Objective(), Objective(ppo=True, importance_sampling_level="sequence")):
        apart, _ = gradient_of(pack(samples, layout="padded"), objective)
        together, _ = gradient_of([shared], objective)
        assert float(apart.abs().max()) > 1e-3
        assert float((together - apart).abs().max()) <= 1e-10 * max(1.0, float(apart.abs().max()))


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("how", ["checkpointing", "compile"])
def test_layers_that_are_computed_again_or_compiled_see_the_same(adapters: bool, how: str, monkeypatch: Any) -> None:
    stem = [9, 8, 7, 6, 5]
    samples = [
        sample(token_history([*stem, *[i] * (i + 1)], [0] * 5 + [1] * (i + 1)), advantage=i - 1.5) for i in range(5)
    ]
    [batch] = pack(samples, layout="shared")
    plain, _ = gradient_of([batch], Objective(), adapters)
    module = _module(adapters)
    kept = module.policy.network
    monkeypatch.setattr(module.policy, "network", network := copy.deepcopy(kept).train())
    if how == "checkpointing":
        any_network: Any = network
        any_network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if adapters:
            any_network.enable_input_require_grads()
    else:
        for layer in module.policy.causal_lm.base_model.layers:
            layer.compile(dynamic=True, backend="aot_eager")
    again, _ = gradient_of([batch], Objective(), adapters)
    assert float((again - plain).abs().max()) <= 1e-10
    torch._dynamo.reset()
