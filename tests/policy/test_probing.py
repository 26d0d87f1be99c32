"""What a model allows is found out: families that pack and share, and those that must not."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma2Config,
    Gemma3TextConfig,
    GPTJConfig,
    GptOssConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from exact import real_float64
from fitrl.data.packing import pack
from fitrl.data.samples import Sample
from fitrl.errors import InvalidArgumentError
from fitrl.policy import attention
from fitrl.policy.policy import Policy
from fitrl.policy.probing import probe
from helpers import sample, token_history

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
NO_HEAD_DIM = {name: value for name, value in SMALL.items() if name != "head_dim"}

# windows of 5 positions: narrower than the histories below; layers with and without
PACKING = {
    "qwen2": Qwen2Config(**NO_HEAD_DIM, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": Qwen3Config(**SMALL),
    "qwen3 of experts": Qwen3MoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "llama": LlamaConfig(**SMALL),
    "mistral": MistralConfig(**SMALL, sliding_window=5),
    "gemma2": Gemma2Config(**SMALL, sliding_window=5, attn_logit_softcapping=1.5),
    "gemma3": Gemma3TextConfig(**SMALL, sliding_window=5, layer_types=["sliding_attention", "full_attention"]),
    "opt": OPTConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32
    ),
}
NOT_PACKING = {
    "mamba, a state": MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2),
    "lfm2, convolutions between attention": Lfm2Config(**NO_HEAD_DIM, layer_types=["conv", "full_attention"]),
    "gpt-oss, attention sinks": GptOssConfig(**SMALL, num_local_experts=4, sliding_window=5),
    "gpt-j, attention of its own": GPTJConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
}


def policy_of(config: Any) -> Policy:
    """A random policy, its weights large enough that what it should not see would show."""
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
            parameter.requires_grad_(True)
    policy = Policy(network=network, tokenizer=None)  # type: ignore[arg-type]
    policy.softcap = getattr(config, "final_logit_softcapping", None)
    probe(policy)
    return policy


def branching() -> list[Sample]:
    """Histories that share 7 and 9 tokens, and one that shares none."""
    stem = [5, 9, 4, 7, 3, 8, 6]
    ids = [[*stem, 11, 12, 13, 14, 15], [*stem, 11, 12, 20, 21], [*stem, 30], [40, 41, 42, 43, 44, 45, 46, 47]]
    return [sample(token_history(one, [0] + [1] * (len(one) - 1))) for one in ids]


def weighted_logits(policy: Policy, samples: list[Sample], layout: Any) -> tuple[Tensor, list[Tensor]]:
    """Logits of all predictors, and the gradient of a weighted sum of them."""
    [batch] = pack(samples, layout=layout)
    assert batch.layout == layout
    logits = policy.full_logits_of(batch.model_inputs).flatten(0, 1)[batch.loss_inputs.rows]
    weight = torch.cos(torch.arange(logits.numel(), dtype=torch.float64)).view(logits.shape)
    parameters = [p for p in policy.network.parameters() if p.requires_grad]
    gradients = torch.autograd.grad((logits * weight).sum(), parameters, allow_unused=True)
    return logits.detach(), [torch.zeros(()) if gradient is None else gradient for gradient in gradients]


@pytest.mark.parametrize("family", PACKING)
def test_packed_and_shared_rows_are_what_padded_ones_are(family: str) -> None:
    policy = policy_of(PACKING[family])
    assert (policy.can_pack, policy.can_share) == (True, True)
    policy.network.double()
    policy.causal_lm.set_experts_implementation("eager")  # the other one has no float64
    with real_float64():
        logits, gradients = weighted_logits(policy, branching(), "padded")
        size = max(float(gradient.abs().max()) for gradient in gradients)
        assert size > 0
        for layout in ("packed", "shared"):
            ours, our_gradients = weighted_logits(policy, branching(), layout)
            assert float((ours - logits).abs().max()) < 1e-10
            for left, right in zip(our_gradients, gradients, strict=True):
                assert float((left - right).abs().max()) < 1e-10 * max(size, 1.0)


def test_another_default_device_changes_nothing() -> None:
    """Lightning makes the accelerator the default while a model is loaded; batches are packed on the host."""
    policy = policy_of(PACKING["qwen3"])
    policy.can_pack = policy.can_share = False
    with torch.device("meta"):
        probe(policy)
    assert policy.can_pack and policy.can_share and policy.has_linear_head


def test_a_soft_cap_of_attention_is_never_dropped() -> None:
    """Some versions of transformers give Gemma 2 an attention that ignores it."""
    with torch.no_grad():
        capped, loose = (
            policy_of(Gemma2Config(**SMALL, attn_logit_softcapping=cap))
            .full_logits(torch.tensor([[3, 4, 5, 6]]))
            .logits
            for cap in (0.01, 100.0)
        )
    assert float((capped - loose).abs().max()) > 1e-3


@pytest.mark.parametrize("family", NOT_PACKING)
def test_models_that_cannot_pack_are_padded_and_keep_their_attention(family: str, caplog: Any) -> None:
    caplog.set_level(logging.INFO, logger="fitrl")
    policy = policy_of(NOT_PACKING[family])
    assert (policy.can_pack, policy.can_share) == (False, False)
    assert not policy.causal_lm.config._attn_implementation.startswith("fitrl")
    said = [record.message for record in caplog.records if "batches are padded" in record.message]
    assert said == [f"{type(policy.network).__name__}: sequences in one row are not kept apart, so batches are padded"]
    with torch.no_grad():
        for layout in ("packed", "shared"):
            [batch] = pack(branching(), layout=layout)  # type: ignore[arg-type]
            with pytest.raises(InvalidArgumentError, match="layout='padded'"):
                policy.full_logits_of(batch.model_inputs)
        [batch] = pack(branching(), layout="padded")
        policy.full_logits_of(batch.model_inputs)


def test_a_window_that_attention_does_not_get_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wider than any history that a probe could afford: so it is narrowed while probing, and wide again after."""
    config = MistralConfig(**SMALL, sliding_window=4096)
    assert policy_of(config).can_pack
    attend = attention.attend
    monkeypatch.setattr(attention, "attend", lambda *heads, window, **options: attend(*heads, **options))
    policy = policy_of(config)
    assert not policy.can_pack
    assert policy.causal_lm.config.sliding_window == 4096


def test_a_model_may_pack_and_not_share(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """Positions counted along the row, say, are right only where no branch lies between."""
    caplog.set_level(logging.INFO, logger="fitrl")
    run_batch = Policy._run_batch

    def along_the_row(self: Policy, network: Any, inputs: Any) -> Any:
        if inputs.crossings is not None:
            inputs.position_ids = torch.arange(inputs.input_ids.shape[1])[None]
        return run_batch(self, network, inputs)

    monkeypatch.setattr(Policy, "_run_batch", along_the_row)
    policy = policy_of(LlamaConfig(**SMALL))
    assert (policy.can_pack, policy.can_share) == (True, False)
    assert "each holds its own" in caplog.text
    [batch] = pack(branching(), layout="shared")
    monkeypatch.undo()
    with pytest.raises(InvalidArgumentError, match="share a prefix: use pack.*layout='packed' or 'padded'"):
        policy.full_logits_of(batch.model_inputs)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_everything_but_packed_rows_goes_to_the_stock_attention(family: str) -> None:
    """Padding, masks and a cache: bit for bit what the model computes by itself."""
    policy = policy_of(PACKING[family])
    assert policy.causal_lm.config._attn_implementation.startswith("fitrl_")
    plain = copy.deepcopy(policy.network)
    assert attention.read_packed_rows(plain)  # once more changes nothing
    attention.read_no_packed_rows(plain)
    ids = torch.tensor([[3, 4, 5, 6, 7, 8, 9], [3, 9, 9, 2, 2, 2, 2]])
    mask = torch.tensor([[1] * 7, [0] * 3 + [1] * 4])
    with torch.no_grad():
        for options in ({}, {"attention_mask": mask}):
            left, right = (network(ids, use_cache=False, **options).logits for network in (policy.network, plain))
            assert torch.equal(left, right)
        steps = []
        for network in (policy.network, plain):
            cache = DynamicCache(config=network.config)
            network(ids[:, :5], past_key_values=cache, use_cache=True)
            steps.append(network(ids[:, 5:6], past_key_values=cache, use_cache=True).logits)
        assert torch.equal(*steps)


def test_our_attention_is_not_written_into_a_saved_configuration(tmp_path: Any) -> None:
    policy = policy_of(PACKING["llama"])
    policy.causal_lm.save_pretrained(tmp_path)
    assert "fitrl" not in (tmp_path / "config.json").read_text()
