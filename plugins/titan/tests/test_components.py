"""torchtitan's modules hold the weights of transformers' and give their gradients, in float64 and without ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchtitan.models.common import CosSinRoPE
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.qwen3 import qwen3_configs
from torchtitan.models.qwen3.state_dict_adapter import Qwen3StateDictAdapter
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

import fitrl
from fitrl.errors import UnsupportedError
from fitrl.policy.loading import load_tokenizer
from fitrl.policy.packed_row import PackedRow
from fitrl.testing.samples import make_samples
from fitrl_titan.components import TitanNetwork, model_config

OBJECTIVES = [fitrl.Objective(), fitrl.Objective(ppo=True, importance_sampling_level="sequence", entropy_coef=0.01)]


def small(**options: Any) -> Qwen3Config:
    shape: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "vocab_size": 262}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    return Qwen3Config(**(shape | heads | {"max_position_embeddings": 128, "rms_norm_eps": 1e-5} | options))


def made(config: Any) -> Any:
    torch.manual_seed(3)
    model = (LlamaForCausalLM if config.model_type == "llama" else Qwen3ForCausalLM)(config)
    with torch.no_grad():
        for parameter in model.parameters():  # norms are all ones otherwise, and heads too sure of nothing
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture
def exact(monkeypatch) -> None:
    """torchtitan rotates in float32, and transformers' norms are in float32, whatever the model computes in."""

    def rotate(query: Tensor, key: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = table.double().chunk(2, dim=-1)
        return tuple(x * cos + CosSinRoPE._rotate_half(x) * sin for x in (query, key))  # type: ignore[return-value]

    def norm(self: Any, hidden: Tensor) -> Tensor:
        return self.weight * hidden * (hidden.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    monkeypatch.setattr(CosSinRoPE, "apply_rotary_emb", staticmethod(rotate))
    monkeypatch.setattr(Qwen3RMSNorm, "forward", norm)


def loss_of(network: TitanNetwork, batch: fitrl.Batch, objective: fitrl.Objective) -> fitrl.PolicyLoss:
    inputs, targets = batch.model_inputs, batch.loss_inputs
    if inputs.ends is None:
        hidden = network.hidden(inputs.input_ids, None, None)
    else:
        row = PackedRow(inputs)
        hidden = network.hidden(row.input_ids, row.position_ids, row)
    return fitrl.fused_linear_policy_loss(
        hidden.flatten(0, 1)[targets.rows],
        network.head_weight,
        targets.targets,
        targets.old_logprobs,
        targets.advantages,
        targets.mask,
        targets.trajectory_ids,
        objective,
        temperature=targets.temperature,
        rollout_logprobs=targets.rollout_logprobs,
        num_tokens=targets.num_tokens,
        num_sequences=targets.num_sequences,
        exact_logits=True,
    )


@pytest.mark.parametrize("objective", OBJECTIVES, ids=["cispo", "ppo"])
@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_gradients_are_those_of_local_trainer(tmp_path: Path, exact, tied, layout, objective) -> None:
    """The same weights and the same batch, in float64: each weight's gradient under transformers' name."""
    base = tmp_path / "base"
    made(small(tie_word_embeddings=tied)).save_pretrained(base)
    load_tokenizer("tiny").save_pretrained(base)
    [batch] = fitrl.pack(make_samples(seed=1, num_trajectories=6), layout=layout)
    model = fitrl.TrainableModel("local", "titan", str(base), lora=None, root=tmp_path)
    options: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "enable_model_summary": False}
    with fitrl.LocalTrainer(precision="64-true", **options) as trainer:
        expected = trainer.open(model).forward_backward(batch, objective)
        local = trainer.verbs.policy_module.policy.causal_lm
        gradients = {name: parameter.grad for name, parameter in local.named_parameters()}

    network = TitanNetwork(Qwen3ForCausalLM.from_pretrained(base, dtype=torch.float64))
    network.make()
    result = loss_of(network, batch, objective)
    result.loss.backward()
    assert float(result.loss.detach()) == pytest.approx(expected.loss, rel=1e-9)
    assert len(gradients) == len(network.parameters()) == 11 * 3 + 2 + (not tied)
    for (name, gradient), parameter in zip(gradients.items(), network.parameters(), strict=True):
        assert gradient is not None and parameter.grad is not None
        assert float((parameter.grad - gradient).norm() / gradient.norm()) < 1e-9, name


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_weights_go_in_and_out_under_transformers_names(tied) -> None:
    source, other = made(small(tie_word_embeddings=tied)), made(small(tie_word_embeddings=tied))
    expected = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    network = TitanNetwork(source)
    network.make()
    exported = network.hf_state()
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], expected[name]) for name in expected)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    network.load_hf(other.state_dict())
    ids = torch.randint(0, 262, (2, 19), generator=torch.Generator().manual_seed(0))
    hidden = network.hidden(ids, None, None)
    torch.testing.assert_close(hidden @ network.head_weight.T, other(ids).logits, rtol=1e-4, atol=1e-4)


def test_torchtitans_own_debug_model_computes_the_same() -> None:
    """Its stock configuration with SDPA, its stock output head; our export loads into it as it is."""
    stock = qwen3_configs["debugmodel_non_fused_qkv"](attn_backend="flex")
    for layer in stock.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    attention = stock.layers[0].attention
    config = small(
        hidden_size=stock.dim,
        intermediate_size=stock.layers[0].feed_forward.w1.out_features,
        num_hidden_layers=len(stock.layers),
        vocab_size=stock.vocab_size,
        num_attention_heads=attention.n_heads,
        num_key_value_heads=attention.n_kv_heads,
        head_dim=attention.head_dim,
        max_position_embeddings=attention.rope.max_seq_len,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": attention.rope.theta},
    )
    ours = TitanNetwork(made(config))
    ours.make()
    theirs: Any = stock.build()
    theirs.load_state_dict(Qwen3StateDictAdapter(stock, None).from_hf(ours.hf_state()))
    ids = torch.randint(0, stock.vocab_size, (2, 23), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(ids)
        found = ours.hidden(ids, None, None) @ ours.head_weight.T
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (LlamaConfig(), "model_type='qwen3', here it is 'llama'"),
        (small(attention_bias=True), "attention_bias=False"),
        (small(hidden_act="gelu"), "hidden_act='silu', here it is 'gelu'"),
        (small(use_sliding_window=True, sliding_window=8, max_window_layers=0), "use_sliding_window=False"),
        (small(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}), "rope_type='default'"),
    ],
)
def test_a_model_that_it_does_not_know_is_refused_by_what_is_unknown(config, named) -> None:
    with pytest.raises(UnsupportedError, match="LocalTrainer") as raised:
        model_config(config)
    assert named in str(raised.value)
