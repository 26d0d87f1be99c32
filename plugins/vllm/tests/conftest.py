"""Fixtures of the plugin's tests: small policies that vLLM's CPU kernels take, and a stand-in for its server."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fitrl
from isolation import nothing_left_behind, one_thread  # of the core's tests, whose folder is on the path

sys.path.insert(0, str(Path(__file__).parent))
from vllm_cases import teach_calling
from vllm_stand_in import StandIn

__all__ = ["nothing_left_behind", "one_thread"]


def small_policy(folder: Path, *, tied: bool) -> Path:
    """A random Qwen3 with the bundled policy's tokenizer; vLLM has no CPU attention for that one's head size."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = fitrl.load_tokenizer("tiny")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=272,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        initializer_range=0.1,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tied(tmp_path_factory) -> Path:
    return small_policy(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="session")
def untied(tmp_path_factory) -> Path:
    return small_policy(tmp_path_factory.mktemp("untied"), tied=False)


@pytest.fixture(scope="session")
def calling(tmp_path_factory) -> Path:
    """A policy that has learned to call a tool."""
    folder = small_policy(tmp_path_factory.mktemp("calling"), tied=False)
    teach_calling(folder)
    return folder


@pytest.fixture
def server(untied) -> Iterator[StandIn]:
    with StandIn(untied) as server:
        yield server
