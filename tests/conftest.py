"""Fixtures of the core's tests: those of all tests, and the bundled policy."""

from __future__ import annotations

# before anything that imports Triton
from isolation import nothing_left_behind, one_thread

# isort: split
import copy

import pytest
from transformers import PreTrainedTokenizerBase

from fitrl.policy.loading import load_policy
from fitrl.policy.policy import Policy

__all__ = ["nothing_left_behind", "one_thread"]


@pytest.fixture(scope="session")
def tiny_policy() -> Policy:
    """The bundled policy, shared by all tests: read it, do not change it."""
    policy = load_policy("tiny")
    policy.network.eval()
    return policy


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_policy: Policy) -> PreTrainedTokenizerBase:
    """The bundled policy's tokenizer, shared by all tests: a byte is a token, and six special ones."""
    return tiny_policy.tokenizer


@pytest.fixture
def fresh_policy(tiny_policy: Policy) -> Policy:
    """A copy of the bundled policy that a test may change."""
    return copy.deepcopy(tiny_policy)
