"""The output head as one weight, with and without adapters on it, and models whose head cannot be taken apart."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import fitrl
from fitrl.data.packing import pack
from fitrl.policy.head import is_linear, weight_and_bias
from fitrl.policy.loading import load_policy
from samples import make_samples


def adapted(*, bias: bool = False, **options) -> nn.Module:
    """A linear head [7, 5] with adapters whose halves are both random."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 7, bias=bias))
    wrapped = get_peft_model(network, LoraConfig(r=2, lora_alpha=3, target_modules=["0"], **options))
    head = wrapped.base_model.model[0]
    with torch.no_grad():
        for up in head.lora_B.values():
            up.weight.normal_()
    return wrapped


@pytest.mark.parametrize("bias", [True, False])
def test_the_weight_includes_the_adapters(bias) -> None:
    network = adapted(bias=bias)
    head = network.base_model.model[0]
    assert is_linear(head)
    hidden = torch.randn(4, 5)
    weight, offset = weight_and_bias(head)
    assert (offset is not None) is bias
    made = torch.nn.functional.linear(hidden, weight, offset)
    wanted = network(hidden)
    assert torch.allclose(made, wanted, atol=1e-6)
    assert not torch.allclose(made, head.base_layer(hidden), atol=1e-2)
    slope = torch.randn_like(made)
    trained = [head.lora_A["default"].weight, head.lora_B["default"].weight]
    ours = torch.autograd.grad((made * slope).sum(), trained, retain_graph=True)
    theirs = torch.autograd.grad((wanted * slope).sum(), trained)
    for left, right in zip(ours, theirs, strict=True):
        assert float(left.abs().max()) > 0 and torch.allclose(left, right, atol=1e-5)


def test_several_adapters_none_and_merged_ones() -> None:
    network = adapted()
    head = network.base_model.model[0]
    network.add_adapter("second", LoraConfig(r=3, lora_alpha=1, target_modules=["0"], use_rslora=True))
    with torch.no_grad():
        head.lora_B["second"].weight.normal_()
    hidden = torch.randn(4, 5)
    for active in ("default", "second", ["default", "second"]):
        network.base_model.set_adapter(active)
        assert torch.allclose(hidden @ weight_and_bias(head)[0].t(), network(hidden), atol=1e-5), active
    with network.disable_adapter():
        assert weight_and_bias(head)[0] is head.base_layer.weight
    network.base_model.merge_adapter()
    assert torch.allclose(hidden @ weight_and_bias(head)[0].t(), network(hidden), atol=1e-5)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True, "bias": True}])
def test_what_is_no_sum_of_two_products_is_not_linear(options) -> None:
    assert not is_linear(adapted(**options).base_model.model[0])


def test_another_layer_is_not_linear() -> None:
    class Scaled(nn.Linear):
        def forward(self, hidden):
            return 2 * super().forward(hidden)

    assert is_linear(nn.Linear(2, 3)) and not is_linear(Scaled(2, 3)) and not is_linear(nn.Identity())


@pytest.fixture
def opened(tmp_path):
    model = fitrl.TrainableModel("head", "tests", "tiny", lora=None, root=tmp_path)
    with fitrl.LocalTrainer(accelerator="cpu", devices=1, enable_model_summary=False) as trainer:
        trainer.open(model)
        yield trainer


@pytest.mark.parametrize(
    "objective",
    [
        fitrl.Objective(),
        fitrl.Objective(ppo=True, importance_sampling_level="sequence", entropy_coef=0.1),
    ],
    ids=["cispo", "sequence"],
)
@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_both_paths_of_the_module_agree(opened, objective, layout) -> None:
    module = opened.verbs.policy_module
    assert module.policy.has_linear_head
    [batch] = pack(make_samples(seed=1, num_trajectories=5), layout=layout)
    found = {}
    for linear in (True, False):
        module.policy.has_linear_head = linear
        scores = module.score(batch)
        result = opened.verbs.forward_backward(batch, objective)
        gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
        opened.verbs.clear_gradients()
        found[linear] = (scores, result, gradients)
    assert torch.allclose(found[True][0], found[False][0], atol=1e-5)
    assert found[True][1].loss == pytest.approx(found[False][1].loss, abs=1e-5)
    assert found[True][1].metrics == pytest.approx(found[False][1].metrics, abs=1e-4)
    assert found[True][2].keys() == found[False][2].keys()
    for name, grad in found[True][2].items():
        assert torch.allclose(grad, found[False][2][name], rtol=1e-3, atol=1e-6), name


def test_logits_that_their_maker_saved_are_not_overwritten(opened, monkeypatch) -> None:
    module = opened.verbs.policy_module
    [batch] = pack(make_samples(seed=1, num_trajectories=3))
    module.policy.has_linear_head = False
    seen = []
    real = fitrl.policy.scoring.logits_logprobs
    monkeypatch.setattr(
        "fitrl.policy.scoring.logits_logprobs",
        lambda *args, **keywords: seen.append(keywords["in_place"]) or real(*args, **keywords),
    )
    opened.verbs.forward_backward(batch)
    opened.verbs.clear_gradients()
    whole = type(module.policy).full_logits_of
    monkeypatch.setattr(type(module.policy), "full_logits_of", lambda self, inputs: torch.tanh(whole(self, inputs)))
    opened.verbs.forward_backward(batch)
    assert seen == [True, False]


def test_the_reason_for_whole_logits_is_logged(tmp_path, tiny_policy, caplog) -> None:
    class Doubled(nn.Linear):
        def forward(self, hidden):
            return 2 * super().forward(hidden)

    network = copy.deepcopy(tiny_policy.causal_lm)
    head = network.get_output_embeddings()
    replaced = Doubled(head.in_features, head.out_features, bias=False)
    replaced.weight = head.weight
    network.set_output_embeddings(replaced)
    policy = copy.copy(tiny_policy)
    policy.network, policy.has_linear_head = network, False
    with caplog.at_level(logging.INFO, logger="fitrl.policy.probing"):
        fitrl.policy.probing.probe(policy)
    assert not policy.has_linear_head
    assert [record for record in caplog.records if "Doubled" in record.getMessage()]
    assert load_policy("tiny").has_linear_head
