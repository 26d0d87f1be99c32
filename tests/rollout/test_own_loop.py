"""An event loop on a thread of its own: asked from elsewhere, closed, opened again."""

from __future__ import annotations

import asyncio
import threading

import pytest

from fitrl.rollout.own_loop import OwnLoop


async def where() -> str:
    return threading.current_thread().name


async def nothing() -> None:
    pass


def test_it_runs_on_its_own_thread_and_opens_again() -> None:
    loop = OwnLoop("own")
    loop.close(nothing)  # it never started
    for _ in range(2):
        assert loop.wait_for(where()) == "own"
        loop.close(nothing)
    assert not [thread for thread in threading.enumerate() if thread.name == "own"]


def test_closing_cancels_what_is_under_way_before_the_last_call() -> None:
    loop, told = OwnLoop("own"), []
    started = threading.Event()

    async def forever() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            told.append("cancelled")
            raise

    async def last() -> None:
        told.append("last")

    waiting = loop.spawn(forever())
    started.wait()
    loop.close(last)
    assert told == ["cancelled", "last"] and waiting.cancelled()


def test_an_error_reaches_whoever_waits() -> None:
    async def fails() -> None:
        raise ArithmeticError("on purpose")

    loop = OwnLoop("own")
    with pytest.raises(ArithmeticError, match="on purpose"):
        loop.wait_for(fails())
    loop.close(nothing)
