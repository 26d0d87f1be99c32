"""`fitrl_fsdp2` with `tensor_parallel_size=2` against one process: on two ranks, and on four with two data shares."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import fitrl
from distributed.ddp_worker import ACCELERATOR, AFTER_A_STEP
from distributed.launch import outputs, standalone, start, torchrun
from distributed.tensor_parallel_worker import CASES, LORA
from fitrl.errors import InvalidArgumentError, UnsupportedError
from fitrl.policy.tensor_parallel import parallelize
from fitrl.strategies.fsdp2 import FSDP2Strategy
from samples import make_groups

RANKS = ("two.0", "two.1")
# of gradients' norms and sums: matrices that are multiplied in bfloat16 or float32, in parts
TOLERANCE = {"bfloat16": 5e-2, "offloaded": 1e-4}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    """A small Llama with biases, fewer key heads than query heads, and a head of its own."""
    tokenizer = fitrl.load_tokenizer("tiny")
    config = LlamaConfig(
        vocab_size=262,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = LlamaForCausalLM(config)
        for parameter in network.parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("llama")
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def seen(tmp_path_factory, llama) -> dict[str, Any]:
    """What one process and each of two ranks saw, all from one run of each."""
    folder = tmp_path_factory.mktemp("tp")
    alone = start([sys.executable], "tensor_parallel_worker.py", str(folder / "one"), llama)
    outputs(alone, start(standalone(2), "tensor_parallel_worker.py", str(folder / "two"), llama), timeout=400.0)
    return {name: json.loads((folder / name).read_text()) for name in ("one", *RANKS)} | {"folder": folder}


@pytest.fixture(scope="module")
def on_four(seen, llama) -> list[dict[str, Any]]:
    """What each of four ranks saw, two of data by two of each layer; it goes on from what two had saved."""
    if ACCELERATOR == "gpu" and torch.cuda.device_count() < 4:
        pytest.skip(f"four ranks need four GPUs, here are {torch.cuda.device_count()}")
    folder = seen["folder"]
    ranks = torchrun(
        "tensor_parallel_worker.py", str(folder / "four"), llama, str(folder / "two.runs"), ranks=4, timeout=400.0
    )
    assert ranks.returncode == 0, ranks.stderr
    return [json.loads((folder / f"four.{rank}").read_text()) for rank in range(4)]


def texts(groups: list[str]) -> list[list[list[int]]]:
    return [
        [item["messages_and_choices"][-1]["completion"]["token_ids"] for item in json.loads(group)["trajectories"]]
        for group in groups
    ]


def assert_same_gradients(ours: list[list[float]], expected: list[list[float]], tolerance: float = 1e-8) -> None:
    assert len(ours) == len(expected)
    for step, (found, others) in enumerate(zip(ours, expected, strict=True)):
        rel = max(tolerance, AFTER_A_STEP) if step else tolerance
        assert found == pytest.approx(others, rel=rel, abs=rel * others[0] if rel > 1e-8 else 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_gradients_and_metrics_are_those_of_one_process(seen, case) -> None:
    one, first, second = (seen[name]["train"][case] for name in ("one", *RANKS))
    assert first["gradients"] == second["gradients"] and first["metrics"] == second["metrics"]
    tolerance = TOLERANCE.get(case, 1e-8)
    last = 1 if tolerance > 1e-8 else None  # Adam makes more of last bits
    assert_same_gradients(first["gradients"][:last], one["gradients"][:last], tolerance)
    for ours, expected in zip(first["metrics"][:last], one["metrics"][:last], strict=True):
        assert ours.keys() == expected.keys()
        for key, value in expected.items():
            assert ours[key] == pytest.approx(value, rel=max(tolerance, 1e-6), abs=max(tolerance, 1e-9)), key


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_each_rank_holds_half_and_is_told_all(seen, case) -> None:
    one, first, second = (seen[name]["train"][case] for name in ("one", *RANKS))
    assert first["in pieces"] and second["in pieces"]
    assert max(first["own"], second["own"]) < 0.52 * first["all"]
    assert first["names"] == second["names"] == one["names"]
    assert first["digest"] == second["digest"]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["full", "adapters, recomputed"])
def test_one_norm_over_gradients_in_one_piece_and_in_pieces_over_two_meshes(seen, case) -> None:
    for found, expected, clipped in seen["two.0"]["train"][case]["mixed"]:
        assert found == pytest.approx(expected, rel=1e-10) and found > 1.0
        assert clipped == pytest.approx(0.25, rel=1e-5)


@pytest.mark.slow
def test_only_statistics_and_hidden_states_cross(seen) -> None:
    """No logits, of which a microbatch has 262 for each row, and no head."""
    rows, hidden = 60, 96
    assert 0 < seen["two.0"]["train"]["full"]["largest"] <= rows * hidden


@pytest.mark.slow
@pytest.mark.parametrize("case", ["full", "llama, entropy"])
def test_transformers_loads_what_was_saved(seen, case) -> None:
    one, two = (
        AutoModelForCausalLM.from_pretrained(seen[name]["train"][case]["checkpoint"], dtype=torch.float64)
        for name in ("one", "two.0")
    )
    expected = one.state_dict()
    assert two.state_dict().keys() == expected.keys()
    for name, tensor in two.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_every_rank_samples_with_whole_weights(seen) -> None:
    one, first, second = (seen[name]["sampled"] for name in ("one", *RANKS))
    assert first["groups"] == second["groups"]
    assert texts(first["groups"]) == texts(one["groups"])
    for kind in ("full", "adapters"):
        assert_same_gradients(first[f"gradients, {kind}"], one[f"gradients, {kind}"])
        assert first[f"by hand, {kind}"] == pytest.approx(one[f"by hand, {kind}"], rel=AFTER_A_STEP)
        assert first[f"logprobs, {kind}"] == pytest.approx(one[f"logprobs, {kind}"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "adapters"])
def test_resumed_it_goes_on_as_one_process_would(seen, kind) -> None:
    one, first, second = (seen[name]["resumed"][kind] for name in ("one", *RANKS))
    assert len(first["gradients"]) == 3 and first["digest"] == second["digest"]
    assert_same_gradients(first["gradients"], one["gradients"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "adapters"])
def test_one_process_goes_on_from_what_two_saved(seen, kind) -> None:
    root = Path(seen["two.0"]["resumed"][kind]["checkpoint"]).parents[3]
    model = fitrl.TrainableModel(f"resume-{kind}", "tp", "tiny", lora=None if kind == "full" else LORA, root=root)
    with fitrl.LocalTrainer(
        accelerator="cpu", devices=1, precision="64-true", gradient_clip_val=0.5, enable_model_summary=False
    ) as trainer:
        result = trainer.fit_rl(model, make_groups(seed=4), learning_rate=1e-3, save_checkpoint=False)
    assert result.step == 4
    assert result.metrics["loss/grad_norm"] == pytest.approx(seen["one"]["continued"][kind], rel=AFTER_A_STEP)


@pytest.mark.slow
def test_what_cannot_be_computed_together_is_refused(seen) -> None:
    for name in RANKS:
        refused = seen[name]["refused"]
        for case in ("adapters on the head", "hidden", "compiled"):
            assert refused[case].startswith("UnsupportedError") and "tensor_parallel_size=1" in refused[case]
        assert refused["size"].startswith("InvalidArgumentError")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "adapters"])
def test_two_of_data_by_two_of_each_layer(seen, on_four, kind) -> None:
    """Four ranks are as one process from the start, and go on from the checkpoint of two."""
    case = "full" if kind == "full" else "adapters, recomputed"
    for rank in on_four:
        ours, expected = rank["train"][case], seen["one"]["train"][case]
        assert_same_gradients(ours["gradients"], expected["gradients"])
        assert ours["own"] < 0.26 * ours["all"]
        assert ours["names"] == expected["names"] and ours["digest"] == on_four[0]["train"][case]["digest"]
        for metrics, wanted in zip(ours["metrics"], expected["metrics"], strict=True):
            for key, value in wanted.items():
                assert metrics[key] == pytest.approx(value, rel=1e-6, abs=1e-9), key
        assert rank["continued"][kind] == pytest.approx(seen["one"]["continued"][kind], rel=AFTER_A_STEP)


class FakeMesh:
    """As much of a device mesh as is looked at before anything is cut."""

    def __init__(self, size: int) -> None:
        self._size = size

    def size(self) -> int:
        return self._size


def test_other_architectures_and_sizes_are_refused(tiny_policy) -> None:
    with pytest.raises(UnsupportedError, match="num_attention_heads=4"):
        parallelize(tiny_policy, FakeMesh(3))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="num_key_value_heads=2"):
        parallelize(tiny_policy, FakeMesh(4))  # type: ignore[arg-type]
    config = tiny_policy.causal_lm.config
    before, config.model_type = config.model_type, "gpt2"
    try:
        with pytest.raises(UnsupportedError, match="llama, qwen3, not of 'gpt2'.*tensor_parallel_size=1"):
            parallelize(tiny_policy, FakeMesh(2))  # type: ignore[arg-type]
    finally:
        config.model_type = before


def test_a_size_that_does_not_divide_the_ranks_is_refused() -> None:
    strategy = FSDP2Strategy(tensor_parallel_size=2)
    strategy.parallel_devices, strategy.num_nodes = [torch.device("cpu")] * 3, 1
    with pytest.raises(InvalidArgumentError, match="tensor_parallel_size=2 does not divide the 3 ranks"):
        strategy.setup_environment()
