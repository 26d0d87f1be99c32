"""Fixtures of the plugin's tests: those of the core's own, and a service that stands in for the hosted one."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from isolation import nothing_left_behind, one_thread  # of the core's tests, whose folder is on the path

sys.path.insert(0, str(Path(__file__).parent))  # for stand_in, which the plugin's tests share

from stand_in import KEY, StandIn  # noqa: E402

__all__ = ["nothing_left_behind", "one_thread"]


@pytest.fixture
def service(tmp_path, monkeypatch) -> Iterator[StandIn]:
    """A service without a model yet, reached with the key that the environment holds."""
    monkeypatch.setenv("TINKER_API_KEY", KEY)
    monkeypatch.delenv("TINKER_BASE_URL", raising=False)
    with StandIn.at(tmp_path).installed() as service:
        yield service


@pytest.fixture(autouse=True)
def the_sdk_is_quiet() -> Iterator[None]:
    """Leave no handler on the SDK's logger."""
    before = list(logging.getLogger("tinker").handlers)
    yield
    logging.getLogger("tinker").handlers[:] = before
