"""Loading: what comes out equals what transformers and PEFT make of the same files."""

import copy
import random
import re
import sys
from pathlib import Path

import gguf
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Cohere2Config,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    MambaConfig,
    OPTConfig,
    Qwen2Config,
)

import fitrl
from fitrl.data.packing import pack
from fitrl.errors import FitRLError, InvalidArgumentError, MissingDependencyError, ModelNotFoundError
from fitrl.policy.loading import LoraSettings, load_policy, load_tokenizer, load_weights, save_weights
from fitrl.policy.module import PolicyModule
from samples import make_samples, reference_network

IDS = torch.tensor([list(b"3+4=")])
TINY = Path(fitrl.__file__).parent / "assets" / "tiny"
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
GPT2 = {"vocab_size": 262, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "eos_token_id": 260}


def folder_of(config, tmp_path, tokenizer) -> str:
    """A random model of another family, with the bundled tokenizer beside it."""
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config)
    folder = tmp_path / type(config).__name__
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def logits_of(policy_or_network, ids=IDS) -> torch.Tensor:
    run = getattr(policy_or_network, "full_logits", policy_or_network)
    with torch.no_grad():
        return run(ids).logits


def moved(policy, seed=0):
    """The policy after something like training: everything trainable is elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return policy


# -- base models ------------------------------------------------------------------------------------------------------


def test_tiny_is_what_transformers_loads(tiny_policy) -> None:
    ours = logits_of(tiny_policy)
    assert float((ours - logits_of(reference_network())).abs().max()) < 1e-4
    assert torch.equal(ours, logits_of(AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()))
    assert tiny_policy.has_linear_head and tiny_policy.can_pack and tiny_policy.can_share and not tiny_policy.is_adapter
    assert (tiny_policy.context_length, tiny_policy.hidden_size, tiny_policy.stop_ids) == (512, 96, frozenset({260}))
    assert tiny_policy.num_layers == 4
    with torch.no_grad():
        apart = tiny_policy.logits(tiny_policy.hidden(IDS).last_hidden_state[0])
    assert torch.allclose(apart, ours[0], atol=1e-5)


def test_a_local_folder(tmp_path, tiny_policy, tiny_tokenizer, monkeypatch) -> None:
    moved(policy := copy.deepcopy(tiny_policy))
    policy.network.to(torch.bfloat16).save_pretrained(tmp_path / "mine")
    tiny_tokenizer.save_pretrained(tmp_path / "mine")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "mine", dtype=torch.float32).eval()
    loaded = load_policy(str(tmp_path / "mine"))
    assert {parameter.dtype for parameter in loaded.network.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in loaded.network.parameters())
    assert torch.equal(logits_of(loaded), logits_of(plain))
    monkeypatch.chdir(tmp_path)
    for spelled in ("mine", "./mine"):
        assert torch.equal(logits_of(load_policy(spelled)), logits_of(plain))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_tokenizer("~/mine").encode("3+4=") == list(b"3+4=")


def test_dropout_is_off(tmp_path, tiny_tokenizer) -> None:
    config = GPT2Config(**GPT2)
    assert config.resid_pdrop > 0 and config.attn_pdrop > 0
    dropping = load_policy(folder_of(config, tmp_path, tiny_tokenizer))
    qwen = AutoConfig.from_pretrained(TINY)
    qwen.attention_dropout = 0.1
    qwen_folder = folder_of(qwen, tmp_path, tiny_tokenizer)
    raw = AutoModelForCausalLM.from_pretrained(qwen_folder).train()
    assert not torch.equal(logits_of(raw), logits_of(raw))  # transformers itself would drop
    for policy in (dropping, load_policy(qwen_folder), load_policy(qwen_folder, LoraSettings())):
        policy.network.train()
        assert torch.equal(logits_of(policy), logits_of(policy))


# -- GGUF -------------------------------------------------------------------------------------------------------------


def write_gguf(path, network, tokenizer, quantization=None) -> None:
    """A Qwen2 model as llama.cpp's converter would write it."""
    config = network.config
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] * 6)
    writer.add_eos_token_id(260)
    writer.add_pad_token_id(261)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, tensor in network.state_dict().items():
        data = tensor.numpy()
        if name != "lm_head.weight":  # tied
            as_blocks = quantization is not None and data.ndim == 2
            writer.add_tensor(
                names.get_name(name, try_suffixes=(".weight", ".bias")),
                gguf.quantize(data, quantization) if as_blocks else data,
                raw_dtype=quantization if as_blocks else None,
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("quantization", [None, "Q8_0", "Q4_0"])
def test_a_gguf_file_is_its_dequantized_weights(quantization, tmp_path, tiny_tokenizer) -> None:
    settings = SMALL | {"intermediate_size": 64}
    del settings["head_dim"]
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(Qwen2Config(**settings, tie_word_embeddings=True)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # biases and norms too
    kind = quantization and gguf.GGMLQuantizationType[quantization]
    write_gguf(tmp_path / "model.gguf", network, tiny_tokenizer, kind)
    if kind is not None:
        before = logits_of(network)
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.ndim == 2:
                    blocks = gguf.quantize(parameter.numpy(), kind)
                    parameter.copy_(torch.from_numpy(gguf.dequantize(blocks, kind).reshape(parameter.shape)))
        assert float((logits_of(network) - before).abs().max()) > 1e-3
    policy = load_policy(str(tmp_path / "model.gguf"))
    assert float((logits_of(policy) - logits_of(network)).abs().max()) < 1e-5
    assert all(p.requires_grad and p.dtype == torch.float32 for p in policy.network.parameters())
    assert policy.has_linear_head and policy.can_pack
    assert (policy.context_length, policy.stop_ids) == (64, frozenset({260}))
    text = "3+4= é\n<|user|>"
    assert policy.tokenizer.encode(text) == tiny_tokenizer.encode(text)
    assert policy.tokenizer.chat_template == tiny_tokenizer.chat_template
    # it trains and is saved like any other
    save_weights(moved(policy), tmp_path / "saved")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(logits_of(plain), logits_of(policy))
    assert load_policy(str(tmp_path / "model.gguf"), LoraSettings(rank=2)).is_adapter


# -- what cannot be loaded --------------------------------------------------------------------------------------------


def test_what_cannot_be_found(tmp_path, monkeypatch) -> None:
    for load in (load_policy, load_tokenizer):
        with pytest.raises(ModelNotFoundError, match="nothing': no such folder"):
            load(str(tmp_path / "nothing"))
        for relative in ("./nothing", "../nothing", "~/nothing-of-this-name"):
            with pytest.raises(ModelNotFoundError, match=f"{re.escape(relative)}': no such folder"):
                load(relative)
        with pytest.raises(ModelNotFoundError, match="model.gguf': no such GGUF file"):
            load(str(tmp_path / "model.gguf"))
    assert issubclass(ModelNotFoundError, FileNotFoundError)
    # without this, huggingface_hub tries each of two files six times: 46 s where there is no network
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for load in (load_policy, load_tokenizer):
        with pytest.raises(ModelNotFoundError, match="nobody/nothing.*neither 'tiny', nor a folder or GGUF file"):
            load("nobody/nothing")


def test_a_gguf_file_without_the_gguf_package(tmp_path, monkeypatch) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    for load in (load_policy, load_tokenizer):
        with pytest.raises(MissingDependencyError, match=r"pip install 'fitrl\[gguf\]'"):
            load(str(tmp_path / "model.gguf"))
    assert issubclass(MissingDependencyError, ImportError)


def test_an_empty_folder(tmp_path) -> None:
    for load in (load_policy, load_tokenizer):
        with pytest.raises(ModelNotFoundError, match="cannot be loaded"):
            load(str(tmp_path))


@pytest.mark.parametrize("content", [b"GGUF", b"GGUF" + bytes(60), b"no such thing at all, but long enough to read"])
def test_a_gguf_file_that_is_none(content, tmp_path) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ModelNotFoundError, match="model.gguf"):
        load_policy(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize("broken", ["weights", "config", "tokenizer"])
def test_a_broken_folder(broken, tmp_path, tiny_policy) -> None:
    folder = tmp_path / "broken"
    save_weights(tiny_policy, folder)
    if broken == "weights":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:5000])
    elif broken == "config":
        (folder / "config.json").write_text("{")
    else:
        for file in folder.glob("tokenizer*"):  # transformers makes an empty tokenizer of nothing
            file.unlink()
    with pytest.raises(ModelNotFoundError, match="broken"):
        load_policy(str(folder))


# -- other families ---------------------------------------------------------------------------------------------------

# family -> configuration, whether its head is linear, whether sequences in one row stay apart
FAMILIES = {
    "granite": (GraniteConfig(**SMALL, logits_scaling=4.0), False, True),
    "cohere": (Cohere2Config(**SMALL, logit_scale=0.25), False, True),
    "gemma2": (Gemma2Config(**SMALL, final_logit_softcapping=0.5), True, True),
    "gpt2": (GPT2Config(**GPT2), True, True),
    "opt": (
        OPTConfig(
            **{name: value for name, value in SMALL.items() if name not in ("intermediate_size", "head_dim")},
            ffn_dim=48,
            word_embed_proj_dim=32,
        ),
        True,
        True,
    ),
    "mamba": (MambaConfig(vocab_size=262, hidden_size=32, num_hidden_layers=2, eos_token_id=260), True, False),
}


class TimesAdvantage:
    """A loss whose gradient transformers can give as well: the advantages' mean over logprobs."""

    inputs = "logprobs"

    def __call__(self, inputs: fitrl.LossInputs, /) -> fitrl.PolicyLoss:
        masked = torch.where(inputs.mask, inputs.logprobs, 0.0)
        return fitrl.PolicyLoss(loss=-(masked * inputs.advantages).sum() / inputs.num_tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_score_and_learn_as_in_transformers(family, tmp_path, tiny_tokenizer) -> None:
    """Scaled, capped and plain heads, positions and none: logprobs and gradient are those of the model itself."""
    config, linear, packs = FAMILIES[family]
    folder = folder_of(copy.deepcopy(config), tmp_path, tiny_tokenizer)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    samples = make_samples(seed=1, num_trajectories=4)
    truth, loss = [], 0.0
    for sample in samples:
        for history in sample.histories:
            history.temperature.fill_(0.7)
            logits = plain(history.token_ids[None], use_cache=False).logits[0, :-1] / 0.7
            chosen = logits.log_softmax(-1).gather(1, history.token_ids[1:, None]).squeeze(1)
            truth.append(chosen[history.mask[1:]])
            loss = loss - truth[-1].sum() * sample.advantage
    (loss / sum(map(len, truth))).backward()
    model = fitrl.TrainableModel("family", "tests", folder, lora=None, root=tmp_path)
    with fitrl.LocalTrainer(accelerator="cpu", devices=1, enable_model_summary=False) as trainer:
        trainer.open(model)
        module = trainer.verbs.policy_module
        assert (module.policy.has_linear_head, module.policy.can_pack) == (linear, packs)
        for layout in ("padded", "packed", "shared") if packs else ("padded",):
            [batch] = pack(samples, layout=layout)
            module.logprob_chunk_size = 7
            assert float((module.score(batch) - torch.cat(truth).detach()).abs().max()) < 1e-4, layout
            trainer.verbs.forward_backward(batch, TimesAdvantage())
            ours, theirs = (
                {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
                for network in (module.policy.network, plain)
            )
            assert ours.keys() == theirs.keys()
            for name, grad in theirs.items():
                assert torch.allclose(ours[name].double(), grad, rtol=1e-3, atol=1e-5), f"{layout} {name}"
            trainer.verbs.clear_gradients()


def test_a_soft_cap_is_part_of_the_linear_head(tmp_path, tiny_tokenizer) -> None:
    policy = load_policy(folder_of(copy.deepcopy(FAMILIES["gemma2"][0]), tmp_path, tiny_tokenizer))
    with torch.no_grad():
        hidden = policy.hidden(IDS).last_hidden_state[0]
        apart = policy.logits(hidden)
    uncapped = hidden @ policy.head[0].T
    whole = logits_of(policy)[0]
    assert policy.softcap == 0.5 and float((uncapped - whole).abs().max()) > 0.05  # the cap matters here
    assert torch.allclose(apart, whole, atol=1e-6)


# -- adapters ---------------------------------------------------------------------------------------------------------


def test_adapters_start_as_the_base_and_repeat(tiny_policy) -> None:
    torch.manual_seed(1)
    before, python_before = torch.get_rng_state(), random.getstate()
    first, again = load_policy("tiny", LoraSettings(rank=4)), load_policy("tiny", LoraSettings(rank=4))
    other = load_policy("tiny", LoraSettings(rank=4, seed=1))
    assert torch.equal(before, torch.get_rng_state()) and python_before == random.getstate()
    assert torch.allclose(logits_of(first), logits_of(tiny_policy), atol=1e-5)
    states = [
        {name: value for name, value in policy.network.state_dict().items() if "lora_A" in name}
        for policy in (first, again, other)
    ]
    assert states[0] and all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])
    trainable = [name for name, parameter in first.network.named_parameters() if parameter.requires_grad]
    assert trainable and all("lora_" in name for name in trainable)
    assert not any("lm_head" in name or "embed_tokens" in name for name in trainable)
    assert first.is_adapter and first.has_linear_head and first.can_pack


def test_adapter_settings_reach_peft() -> None:
    policy = load_policy("tiny", LoraSettings(rank=3, alpha=12, target_modules=("q_proj", "down_proj")))
    adapted = {name.split(".")[-2] for name, _ in policy.network.named_modules() if name.endswith(".lora_A")}
    assert adapted == {"q_proj", "down_proj"}
    layer = policy.causal_lm.model.layers[0].self_attn.q_proj
    assert layer.lora_A["default"].weight.shape == (3, 96) and layer.scaling["default"] == 4.0


def test_bad_adapter_settings() -> None:
    for wrong in ({"rank": 0}, {"rank": -1}, {"alpha": 0}):
        with pytest.raises(InvalidArgumentError, match="must be at least 1"):
            LoraSettings(**wrong)
    with pytest.raises(InvalidArgumentError, match="nonsense"):
        load_policy("tiny", LoraSettings(target_modules=("nonsense",)))


@pytest.fixture
def head_adapters(tmp_path):
    """The bundled policy with adapters on its head, open in a trainer."""
    lora = LoraSettings(rank=2, target_modules=("lm_head", "q_proj"))
    model = fitrl.TrainableModel("head", "tests", "tiny", lora=lora, root=tmp_path)
    with fitrl.LocalTrainer(accelerator="cpu", devices=1, enable_model_summary=False) as trainer:
        trainer.open(model)
        yield trainer


def test_an_adapter_on_the_head_is_never_ignored(head_adapters) -> None:
    module = head_adapters.verbs.policy_module
    assert isinstance(module, PolicyModule) and module.policy.has_linear_head
    [batch] = pack(make_samples(seed=1, num_trajectories=3))
    before = module.score(batch)
    head = module.policy.causal_lm.lm_head
    with torch.no_grad():  # adapters start as nothing
        head.lora_B["default"].weight.normal_(std=0.1)
    after = module.score(batch)
    assert float((before - after).abs().max()) > 0.01
    gradients = {}
    for linear in (True, False):  # by the head's weight, and by what PEFT's layer computes
        module.policy.has_linear_head = linear
        assert torch.allclose(module.score(batch), after, atol=1e-5)
        head_adapters.verbs.forward_backward(batch)
        gradients[linear] = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
        head_adapters.verbs.clear_gradients()
    assert gradients[True].keys() == gradients[False].keys()
    assert {name.split(".")[-3] for name in gradients[True] if "lm_head" in name} == {"lora_A", "lora_B"}
    for name, grad in gradients[True].items():
        assert float(grad.abs().max()) > 0 or "layers" in name, name  # the others' halves that start as 0 hide theirs
        assert torch.allclose(grad, gradients[False][name], rtol=1e-3, atol=1e-6), name
    with module.network.disable_adapter():
        assert module.policy.head[0] is head.base_layer.weight


# -- saved weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=3)])
def test_weights_make_a_round_trip(lora, tmp_path) -> None:
    policy = moved(load_policy("tiny", lora))
    expected = logits_of(policy)
    save_weights(policy, tmp_path)
    fresh = load_policy("tiny", lora)
    assert not torch.allclose(logits_of(fresh), expected)
    load_weights(fresh, tmp_path)
    assert torch.equal(logits_of(fresh), expected)
    resumed = load_policy("tiny", lora, weights=tmp_path)
    assert torch.equal(logits_of(resumed), expected)
    for again in (fresh, resumed):
        trainable = {name for name, parameter in again.network.named_parameters() if parameter.requires_grad}
        assert trainable == {name for name, parameter in policy.network.named_parameters() if parameter.requires_grad}


def test_saved_weights_are_a_transformers_folder(tmp_path) -> None:
    policy = moved(load_policy("tiny"))
    save_weights(policy, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert plain.dtype == torch.float32 and torch.equal(logits_of(plain), logits_of(policy))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    talk = [{"role": "user", "content": "3+4="}]
    said = tokenizer.apply_chat_template(talk, add_generation_prompt=True)
    assert dict(said) == dict(policy.tokenizer.apply_chat_template(talk, add_generation_prompt=True))
    assert plain.generation_config.eos_token_id == 260
    assert torch.equal(logits_of(load_policy(str(tmp_path))), logits_of(policy))


@pytest.mark.parametrize("targets", ["all-linear", ("lm_head", "q_proj")])
def test_saved_adapters_are_a_peft_folder(targets, tmp_path, tiny_policy) -> None:
    policy = moved(load_policy("tiny", LoraSettings(rank=3, target_modules=targets)))
    save_weights(policy, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    assert torch.equal(logits_of(plain), logits_of(policy))
    assert not torch.allclose(logits_of(policy), logits_of(tiny_policy), atol=1e-3)
    assert AutoTokenizer.from_pretrained(tmp_path).encode("3+4=") == list(b"3+4=")


@pytest.mark.parametrize("targets", [None, "all-linear", ("lm_head", "q_proj")])
def test_exported_weights_have_the_names_of_the_saved_ones(targets, tmp_path) -> None:
    lora = None if targets is None else LoraSettings(rank=2, target_modules=targets)
    model = fitrl.TrainableModel("names", "tests", "tiny", lora=lora, root=tmp_path)
    with fitrl.LocalTrainer(accelerator="cpu", devices=1, enable_model_summary=False) as trainer:
        verbs = trainer.open(model)
        exported = dict(verbs.named_weights())
        saved = load_file(next(Path(verbs.save()).glob("*.safetensors")))
        exported.pop("lm_head.weight", None)  # tied: a transformers folder holds it once
        assert exported.keys() == saved.keys()
        assert all(torch.equal(exported[name], saved[name]) for name in saved)


def test_saving_and_exporting_adapters_never_ask_the_model_hub(tmp_path, monkeypatch) -> None:
    """PEFT would look there whether the vocabulary was resized: 46 s, with every export, without a network."""
    asked = []
    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", lambda *what: asked.append(what))
    model = fitrl.TrainableModel("hub", "tests", "tiny", root=tmp_path)
    with fitrl.LocalTrainer(accelerator="cpu", devices=1, enable_model_summary=False) as trainer:
        verbs = trainer.open(model)
        for config in trainer.verbs.policy_module.policy.network.peft_config.values():
            config.base_model_name_or_path = "nobody/nothing"
        verbs.save()
        assert not asked
        list(verbs.named_weights())
        assert not asked


def test_a_reference_policy_keeps_saved_adapters_frozen(tmp_path) -> None:
    policy = moved(load_policy("tiny", LoraSettings(rank=3)))
    save_weights(policy, tmp_path)
    reference = load_policy("tiny", weights=tmp_path, tokenizer=policy.tokenizer)
    assert torch.equal(logits_of(reference), logits_of(policy))
    assert not any(parameter.requires_grad for parameter in reference.network.parameters())


LORA = LoraSettings(rank=4)
ON_QUERIES = LoraSettings(rank=4, target_modules=("q_proj",))


@pytest.mark.parametrize(
    ("saved", "opened"),
    [(None, LORA), (LORA, None), (LORA, LoraSettings(rank=8)), (LORA, ON_QUERIES), (ON_QUERIES, LORA)],
    ids=["full into adapters", "adapters into full", "another rank", "more adapters", "fewer adapters"],
)
def test_weights_of_another_policy_are_refused(saved, opened, tmp_path) -> None:
    save_weights(load_policy("tiny", saved), tmp_path)
    with pytest.raises(FitRLError, match=tmp_path.name):
        load_weights(load_policy("tiny", opened), tmp_path)


def test_weights_of_another_family_are_refused(tmp_path, tiny_tokenizer) -> None:
    other = load_policy(folder_of(GraniteConfig(**SMALL), tmp_path, tiny_tokenizer))
    save_weights(other, tmp_path / "other")
    with pytest.raises(FitRLError, match="other"):
        load_weights(load_policy("tiny"), tmp_path / "other")


@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize("content", [None, b"cut short"])
def test_weights_that_are_missing_or_cut_short(lora, content, tmp_path) -> None:
    policy = load_policy("tiny", lora)
    save_weights(policy, tmp_path)
    [file] = tmp_path.glob("*.safetensors")
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    before = logits_of(policy)
    with pytest.raises(FitRLError, match=tmp_path.name):
        load_weights(policy, tmp_path)
    assert torch.equal(logits_of(policy), before)


# -- devices ----------------------------------------------------------------------------------------------------------


class Elsewhere(TorchFunctionMode):
    """As a default device that rounds and draws in a way of its own: what no device is named for is made there."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[int] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is torch.empty and kwargs.get("device") is None:
            self.made.add(out.data_ptr())
        elif func is torch.arange and kwargs.get("device") is None and out.is_floating_point():
            return torch.nextafter(out, torch.full_like(out, torch.inf))
        elif func in (torch.nn.init.kaiming_uniform_, torch.Tensor.uniform_) and out.data_ptr() in self.made:
            with torch.no_grad():
                out.neg_()
        return out


def everything_in(policy) -> dict[str, torch.Tensor]:
    return dict(policy.network.named_parameters()) | dict(policy.network.named_buffers())


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=4)])
def test_a_policy_is_the_same_on_whatever_device_it_is_loaded(lora) -> None:
    """One device loads it where it trains, FSDP2 on the host: frequencies and adapters must not tell them apart."""
    with Elsewhere():
        assert not torch.equal(torch.arange(3, dtype=torch.float32), torch.arange(3.0, device="cpu"))
        elsewhere = load_policy("tiny", lora)
    on_host = everything_in(load_policy("tiny", lora))
    assert any("inv_freq" in name for name in on_host)
    for name, tensor in everything_in(elsewhere).items():
        assert torch.equal(tensor, on_host[name]), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("lora", [None, LoraSettings(rank=4)])
def test_a_policy_is_the_same_on_a_gpu(lora) -> None:
    with torch.device("cuda"):
        there = everything_in(load_policy("tiny", lora))
    on_host = everything_in(load_policy("tiny", lora))
    for name, tensor in there.items():
        assert tensor.device.type == "cuda"
        assert torch.equal(tensor.cpu(), on_host[name]), name
