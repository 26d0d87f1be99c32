"""Stage 3 is made without a second copy of the weights: what was loaded is cut in its place, one tensor at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import fitrl
from distributed.launch import environment, standalone

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads the memory of a process as Linux tells it"),
]


@pytest.fixture(scope="module")
def base_model(tmp_path_factory) -> str:
    """A model of 130 MB, of which no tensor is more than 5."""
    tokenizer = fitrl.load_tokenizer("tiny")
    config = Qwen3Config(
        vocab_size=262,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("base")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # as most are: float32 weights would lie in the file's own pages
        Qwen3ForCausalLM(config).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_weights_are_cut_without_a_second_copy(base_model, precision, tmp_path) -> None:
    worker = Path(__file__).parent / "memory_worker.py"
    # memory that is freed is given back, so that what is held can be seen from outside
    variables = environment() | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    variables["CUDA_VISIBLE_DEVICES"] = ""  # DeepSpeed would take a GPU
    job = subprocess.run(
        [*standalone(2), str(worker), base_model, str(tmp_path / "seen"), precision],
        env=variables,
        capture_output=True,
        text=True,
        timeout=300.0,
        check=False,
    )
    assert job.returncode == 0, job.stdout[-2000:] + job.stderr[-4000:]
    for rank in range(2):
        seen = json.loads((tmp_path / f"seen.{rank}").read_text())
        assert seen["weights"] > 20 * seen["largest"] >= 80 * 2**20
        assert seen["more"] < 2 * seen["largest"]
        kept = (0.5 if precision == "32-true" else 0.25) * seen["weights"]
        assert seen["given back"] > 0.9 * (seen["weights"] - kept)
