"""A job of ranks says which rank failed and how, and always ends."""

from __future__ import annotations

import textwrap

import pytest

from fitrl.testing import run_on_ranks

pytestmark = pytest.mark.slow
START = """
    import os
    import torch
    import torch.distributed as dist

    def test_first():
        dist.init_process_group("gloo")
"""


def file(tmp_path, text: str) -> str:
    path = tmp_path / "test_ranks.py"
    path.write_text(textwrap.dedent(START) + textwrap.dedent(text))
    return str(path)


def test_one_rank_that_fails_ends_those_that_wait_for_it(tmp_path) -> None:
    checks = """
    def test_second():
        assert os.environ["RANK"] != "1", "only here"
        dist.barrier()

    def test_third():
        dist.destroy_process_group()
    """
    with pytest.raises(AssertionError) as caught:
        run_on_ranks(file(tmp_path, checks), timeout=120.0)
    [_, told] = str(caught.value).split("---- rank 1 ----")
    assert "AssertionError: only here" in told and "stopping after 1 failures" in told


def test_ranks_that_never_end_are_ended(tmp_path) -> None:
    checks = """
    def test_second():
        dist.recv(torch.zeros(1), 1 - int(os.environ["RANK"]))  # each waits for the other
    """
    with pytest.raises(AssertionError, match="no end after 6 s"):
        run_on_ranks(file(tmp_path, checks), timeout=6.0)


def test_a_rank_that_crashes_has_the_last_word(tmp_path) -> None:
    checks = """
    import faulthandler

    def test_second():
        if os.environ["RANK"] == "0":
            faulthandler._sigsegv()
        dist.barrier()
    """
    with pytest.raises(AssertionError, match="exit status 1") as caught:
        run_on_ranks(file(tmp_path, checks), timeout=120.0)
    [*_, told] = str(caught.value).split("---- rank ")
    assert told.startswith("0 ----") and "in test_second" in told
