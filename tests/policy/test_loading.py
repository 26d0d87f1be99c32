"""Loading: what comes out equals what transformers and PEFT make of the same files."""

import copy
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Cohere2Config, Gemma2Config, GPT2Config, GraniteConfig

import fitrl
from fitrl.data.packing import pack
from fitrl.errors import InvalidArgumentError, MissingDependencyError, ModelNotFoundError
from fitrl.policy import loading
from fitrl.policy.loading import LoraSettings, load_policy, load_tokenizer, load_weights, save_weights
from fitrl.policy.module import PolicyModule
from samples import make_samples, reference_network

IDS = torch.tensor([list(b"3+4=")])
SMALL = {
    "vocab_size": 262,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 261,
    "eos_token_id": 260,
    "bos_token_id": None,
}


def folder_of(config, tmp_path, tokenizer):
    """A random model of another family, with the bundled tokenizer beside it."""
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config)
    folder = tmp_path / type(config).__name__
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_tiny_is_what_transformers_loads(tiny_policy) -> None:
    with torch.no_grad():
        ours = tiny_policy.full_logits(IDS).logits
        theirs = reference_network()(IDS).logits
    assert float((ours - theirs).abs().max()) < 1e-4
    assert tiny_policy.has_linear_head and tiny_policy.can_pack and not tiny_policy.is_adapter
    assert (tiny_policy.context_length, tiny_policy.hidden_size, tiny_policy.stop_ids) == (512, 96, frozenset({260}))
    with torch.no_grad():
        apart = tiny_policy.logits(tiny_policy.hidden(IDS).last_hidden_state[0])
    assert torch.allclose(apart, ours[0], atol=1e-5)


FAMILIES = {
    "granite": (GraniteConfig(**SMALL, logits_scaling=4.0), False),
    "cohere": (Cohere2Config(**SMALL, logit_scale=0.25), False),
    "gemma2": (Gemma2Config(**SMALL, final_logit_softcapping=0.5, attn_logit_softcapping=None), True),
    "gpt2": (GPT2Config(vocab_size=262, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=260), True),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_score_as_transformers_does(family, tmp_path, tiny_tokenizer) -> None:
    """Scaled, capped and plain heads: the logprobs are those of the model's own logits, whatever way is taken."""
    config, linear = FAMILIES[family]
    folder = folder_of(copy.deepcopy(config), tmp_path, tiny_tokenizer)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    samples = make_samples(seed=1, num_trajectories=4)
    for sample in samples:
        for history in sample.histories:
            history.temperature.fill_(0.7)
    model = fitrl.TrainableModel("family", "tests", folder, lora=None, root=tmp_path)
    with fitrl.LocalTrainer(accelerator="cpu", devices=1, enable_model_summary=False) as trainer:
        verbs = trainer.open(model)
        policy = trainer.verbs.policy_module.policy
        assert policy.has_linear_head == linear
        for layout in ("padded", "packed") if policy.can_pack else ("padded",):
            scored = verbs.forward(pack(samples, layout=layout)[0]).logprobs
            truth = []
            for history in (history for sample in samples for history in sample.histories):
                with torch.no_grad():
                    logits = plain(history.token_ids[None], use_cache=False).logits[0, :-1] / 0.7
                chosen = logits.log_softmax(-1).gather(1, history.token_ids[1:, None]).squeeze(1)
                truth.append(chosen[history.mask[1:]])
            assert float((scored - torch.cat(truth)).abs().max()) < 1e-4, layout
        assert trainer.verbs.forward_backward(pack(samples)[0]).loss != 0.0


def test_dropout_is_off(tmp_path, tiny_tokenizer) -> None:
    config = GPT2Config(vocab_size=262, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=260)
    assert config.resid_pdrop > 0
    policy = load_policy(folder_of(config, tmp_path, tiny_tokenizer))
    policy.network.train()
    qwen = AutoConfig.from_pretrained(load_policy("tiny").causal_lm.config.name_or_path)
    qwen.attention_dropout = 0.5
    other = load_policy(folder_of(qwen, tmp_path, tiny_tokenizer))
    other.network.train()
    for network in (policy, other):
        with torch.no_grad():
            assert torch.equal(network.full_logits(IDS).logits, network.full_logits(IDS).logits)


def test_what_cannot_be_found(tmp_path, monkeypatch) -> None:
    with pytest.raises(ModelNotFoundError, match="no such folder"):
        load_policy(str(tmp_path / "nothing"))
    with pytest.raises(ModelNotFoundError, match="no such GGUF file"):
        load_policy(str(tmp_path / "model.gguf"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'fitrl\[gguf\]'"):
        load_policy(str(tmp_path / "model.gguf"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for load in (load_policy, load_tokenizer):
        with pytest.raises(ModelNotFoundError, match="nobody/nothing.*neither 'tiny', nor a folder"):
            load("nobody/nothing")


def test_an_empty_folder_is_an_error_that_says_so(tmp_path) -> None:
    with pytest.raises(ModelNotFoundError, match="cannot be loaded"):
        load_policy(str(tmp_path))


def test_gguf_files_are_dequantized(tmp_path, monkeypatch) -> None:
    """No GGUF file is small enough to ship: what transformers is asked for, and what is done to what it gives."""
    seen = {}
    real = AutoModelForCausalLM.from_pretrained

    class Quantizer:
        def remove_quantization_config(self, network) -> None:
            seen["removed"] = network

    def from_pretrained(folder, **options):
        seen.update(options, folder=folder)
        network = real(loading._resolve("tiny")[0], dtype=torch.float32)
        network.hf_quantizer = Quantizer()
        return network

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    load_policy(str(tmp_path / "m.gguf"), tokenizer=load_tokenizer("tiny"))
    assert (seen["folder"], seen["gguf_file"], seen["dtype"]) == (str(tmp_path), "m.gguf", torch.float32)
    assert "quantization_config" not in seen or seen["quantization_config"].dequantize
    assert "removed" in seen


def test_adapters_start_as_the_base_and_repeat(tiny_policy) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, again = load_policy("tiny", LoraSettings(rank=4)), load_policy("tiny", LoraSettings(rank=4))
    other = load_policy("tiny", LoraSettings(rank=4, seed=1))
    assert torch.equal(before, torch.get_rng_state())
    with torch.no_grad():
        assert torch.allclose(first.full_logits(IDS).logits, tiny_policy.full_logits(IDS).logits, atol=1e-5)
    states = [
        {name: value for name, value in policy.network.state_dict().items() if "lora_A" in name}
        for policy in (first, again, other)
    ]
    assert states[0] and all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])
    trainable = [name for name, parameter in first.network.named_parameters() if parameter.requires_grad]
    assert trainable and all("lora_" in name for name in trainable)


def test_an_adapter_on_the_head_is_never_ignored(tmp_path) -> None:
    lora = LoraSettings(rank=2, target_modules=("lm_head", "q_proj"))
    model = fitrl.TrainableModel("head", "tests", "tiny", lora=lora, root=tmp_path)
    with fitrl.LocalTrainer(accelerator="cpu", devices=1, enable_model_summary=False) as trainer:
        trainer.open(model)
        module = trainer.verbs.policy_module
        assert isinstance(module, PolicyModule) and not module.policy.has_linear_head
        trainer.verbs.forward_backward(pack(make_samples(seed=1, num_trajectories=3))[0])
        gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        assert any("lm_head" in name and float(grad.abs().max()) > 0 for name, grad in gradients.items())


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=3)])
def test_weights_make_a_round_trip(lora, tmp_path) -> None:
    policy = load_policy("tiny", lora)
    with torch.no_grad():
        for parameter in policy.network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
        expected = policy.full_logits(IDS).logits
    save_weights(policy, tmp_path)
    fresh = load_policy("tiny", lora)
    load_weights(fresh, tmp_path)
    with torch.no_grad():
        assert torch.equal(fresh.full_logits(IDS).logits, expected)
        assert torch.equal(load_policy("tiny", lora, weights=tmp_path).full_logits(IDS).logits, expected)


def test_weights_of_another_model_are_refused(tmp_path, tiny_tokenizer) -> None:
    other = load_policy(folder_of(GraniteConfig(**SMALL), tmp_path, tiny_tokenizer))
    save_weights(other, tmp_path / "other")
    with pytest.raises((InvalidArgumentError, RuntimeError)):
        load_weights(load_policy("tiny"), tmp_path / "other")
