"""Fixtures of the plugin's tests: small policies that vLLM's CPU kernels take, and a stand-in for its server."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from isolation import nothing_left_behind, one_thread  # of the core's tests, whose folder is on the path

sys.path.insert(0, str(Path(__file__).parent))
from vllm_cases import small_policy, teach_calling
from vllm_stand_in import StandIn

__all__ = ["nothing_left_behind", "one_thread"]


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
