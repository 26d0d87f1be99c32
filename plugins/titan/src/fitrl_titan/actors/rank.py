"""`TrainerRank`: a process that has one rank of a trainer.

Enters: verbs of `PolicyTrainer`. Leaves: what the trainer answered.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from monarch.actor import Actor, current_rank, endpoint
from torch import Tensor

from fitrl.data import ranks
from fitrl.errors import CheckpointError, SessionError
from fitrl.protocols.verbs import PolicyTrainer
from fitrl_titan.actors.answers import Answer, answer

_VERBS = frozenset(
    {
        *("forward_backward", "optim_step", "clear_gradients", "save", "load", "get_config", "get_status", "forward"),
        *(
            "find_port",
            "open",
            "close",
            "begin_export",
            "next_weights",
        ),  # of this class, under a name with an underscore
    }
)
_CHANGES = ("optim_step", "load")


class TrainerRank(Actor):
    """One rank.

    Args:
        opening: makes the trainer, in the process of each rank, and opens its model.
        size: number of ranks.
    """

    def __init__(self, opening: Callable[[], AbstractContextManager[PolicyTrainer]], size: int) -> None:
        self._opening = opening
        self._rank, self._size = current_rank().rank, size
        self._context: AbstractContextManager[PolicyTrainer] | None = None
        self._trainer: PolicyTrainer | None = None
        self._export: Iterator[tuple[str, Tensor]] | None = None

    @endpoint
    def ask(self, verb: str, arguments: tuple[Any, ...]) -> Answer:
        """Do what is asked."""
        return answer(lambda: self._do(verb, arguments))

    def _do(self, verb: str, arguments: tuple[Any, ...]) -> Any:
        if verb not in _VERBS:
            raise SessionError(f"a trainer has no verb {verb!r}")
        if verb in _CHANGES:
            self._export = None
        own = getattr(self, f"_{verb}", None)
        if own is not None:
            return own(*arguments)
        if self._trainer is None:
            raise SessionError("the trainer is not open")
        positional, named = arguments
        return getattr(self._trainer, verb)(*positional, **named)

    def _find_port(self) -> int:
        """Find a port where the ranks may meet."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return int(free.getsockname()[1])

    def _open(self, port: int, resumes: bool) -> int:
        """Be a rank of a job as `torchrun` starts them, and open the trainer; returns how many have data of their own.

        Args:
            port: where the ranks meet.
            resumes: whether to load the newest checkpoint, if there is one.
        """
        rank, size = str(self._rank), str(self._size)
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        os.environ |= {"GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ["TORCHELASTIC_RUN_ID"] = "fitrl"
        if self._size > 1 and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)
        self._context = self._opening()
        self._trainer = self._context.__enter__()
        if resumes:
            with contextlib.suppress(CheckpointError):  # none was saved yet
                self._trainer.load()
        return ranks.num_data_ranks()

    def _close(self) -> None:
        """Close the trainer."""
        context, self._context, self._trainer, self._export = self._context, None, None, None
        if context is not None:
            context.__exit__(None, None, None)

    def _begin_export(self) -> None:
        """Start handing the weights out."""
        if self._trainer is None:
            raise SessionError("the trainer is not open")
        self._export = self._trainer.named_weights()

    def _next_weights(self, most_bytes: int) -> list[tuple[str, Tensor]]:
        """Hand out the next ones, so many bytes at once or one that is larger; from the first rank only."""
        if self._export is None:
            raise SessionError("a step was taken, or a checkpoint loaded, before all weights were handed out")
        chunk: list[tuple[str, Tensor]] = []
        size = 0
        for name, tensor in self._export:
            size += tensor.nbytes
            chunk.append((name, tensor.detach().cpu().contiguous() if self._rank == 0 else tensor.new_empty(0)))
            if size >= most_bytes:
                break
        return chunk if self._rank == 0 else []
