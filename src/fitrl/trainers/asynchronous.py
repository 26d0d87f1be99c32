"""`fit_rl_async`: the same arguments and result, on a thread of the trainer's own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, TypeVar

_Trainer = TypeVar("_Trainer")
_P = ParamSpec("_P")
_R = TypeVar("_R")


def asynchronous(
    fit_rl: Callable[Concatenate[_Trainer, _P], _R],
) -> Callable[Concatenate[_Trainer, _P], Coroutine[Any, Any, _R]]:
    """Make a method `fit_rl_async` of a class's `fit_rl`, with the same typed arguments and result.

    The event loop stays free, for rollouts say. Calls of one trainer run one after the other, in their order.
    Cancelling one that waits drops it; cancelling one that runs stops it after the optimizer step under way and keeps
    the steps taken.
    """

    async def fit_rl_async(self: _Trainer, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        trainer: Any = self
        result: _R = await trainer.in_worker(functools.partial(trainer.fit_rl, *args, **kwargs))
        return result

    fit_rl_async.__doc__ = f"`fit_rl` without blocking the event loop.\n\n{asynchronous.__doc__}"
    return fit_rl_async
