"""Several processes as one: what the ranks of a `torchrun` job tell each other, as text.

Every function is a collective: all ranks call it, in the same order. With one process each returns at once. Rollouts
have a group of their own: they may run on one thread beside a call of `fit_rl` on another, and two threads of a rank
have no order.

Under tensor parallel consecutive ranks work on the same data: `share_data`. They count as one where data is dealt and
where what came of it is summed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fitrl.data.lifeline import Lifeline
from fitrl.errors import FitRLError, RankError, RankLostError

_T = TypeVar("_T")
_rollouts: dist.ProcessGroup | None = None
_lifeline: Lifeline | None = None
_sharing = 1  # consecutive ranks with the same data
_SHORT = 256  # bytes that go in one collective
_NEWS_S = 2.0  # a connection that breaks is heard of in milliseconds, on a busy machine later


def connect() -> None:
    """Make what the ranks need beside the group that a strategy made; once, and again at no cost."""
    global _rollouts, _lifeline
    if world_size() > 1 and _rollouts is None:
        _rollouts = dist.new_group(backend="gloo")
        _lifeline = together(lambda: Lifeline(rank(), collect, os.environ.get("MASTER_ADDR", "127.0.0.1")))


def lost() -> str | None:
    """Which rank has died, and how, as a sentence; None while all are there, as far as is known."""
    return None if _lifeline is None else _lifeline.lost


def is_overdue() -> bool:
    """Whether a rank has died so long ago that this one should have ended."""
    return _lifeline is not None and _lifeline.is_overdue


@contextmanager
def naming_the_lost() -> Iterator[None]:
    """Say which rank has died where a collective says something about a connection.

    Raises:
        RankLostError: in place of what was raised, if a rank has died.
    """
    try:
        yield
    except RuntimeError as error:  # gloo's and NCCL's are
        if _lifeline is None or isinstance(error, FitRLError) or _lifeline.lost_within(_NEWS_S) is None:
            raise
        raise lost_error() from error


def lost_error() -> RankLostError:
    """What to raise once a rank has died."""
    return RankLostError(
        f"{lost()}: start the job again, on as many ranks as you like; it goes on from its newest checkpoint"
    )


def world_size() -> int:
    """Processes of the job; 1 before a trainer has connected them."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def share_data(size: int) -> None:
    """Have each `size` consecutive ranks work on the same data."""
    global _sharing
    _sharing = size


def num_data_ranks() -> int:
    """Ranks with data of their own; those that share it count as one."""
    return max(1, world_size() // _sharing)


@naming_the_lost()
def collect(text: str, *, of_rollouts: bool = False) -> list[str]:
    """Everyone's text, by rank; over the rollouts' own group if asked for."""
    if world_size() == 1:
        return [text]
    group = _rollouts if of_rollouts else None
    device = torch.device("cpu") if group is not None else _device()

    def gather(content: bytes) -> list[bytes]:
        """Everyone's, of one length."""
        own = torch.frombuffer(bytearray(content), dtype=torch.uint8).to(device)
        parts = own.new_empty(world_size(), len(content))
        dist.all_gather(list(parts), own, group=group)
        return [bytes(part) for part in parts.cpu().numpy()]

    content = text.encode()
    start = gather(_padded(len(content).to_bytes(8) + content, _SHORT))  # most have room beside their length
    first = [(int.from_bytes(one[:8]), one[8:]) for one in start]
    longest = max(size for size, _ in first)
    rest = gather(_padded(content[_SHORT - 8 :], longest + 8 - _SHORT)) if longest > _SHORT - 8 else [b""] * len(first)
    return [(start + more)[:size].decode() for (size, start), more in zip(first, rest, strict=True)]


def _padded(content: bytes, length: int) -> bytes:
    return content[:length].ljust(length, b"\0")


@naming_the_lost()
def highest(number: int) -> int:
    """The highest number that any rank says."""
    if world_size() == 1:
        return number
    said = torch.tensor([number], device=_device())
    dist.all_reduce(said, op=dist.ReduceOp.MAX)
    return int(said.item())


@naming_the_lost()
def sum_up(values: Tensor) -> Tensor:
    """Sum of everyone's tensor [N], on the CPU; of those that share their data the first one's counts."""
    if world_size() == 1:
        return values
    total = (values if rank() % _sharing == 0 else torch.zeros_like(values)).to(_device())
    dist.all_reduce(total)
    return total.cpu()


def first(work: Callable[[], _T]) -> _T:
    """Let rank 0 do something and tell the others what came out of it, as JSON; an error is raised by all.

    Raises:
        RankError: on the other ranks, where rank 0 raised.
    """
    if world_size() == 1:
        return work()
    outcome: dict[str, Any] = {}
    failure: BaseException | None = None
    if rank() == 0:
        try:
            outcome = {"result": work()}
        except Exception as error:
            failure, outcome = error, {"error": f"{type(error).__name__}: {error}"}
    answer = json.loads(collect(json.dumps(outcome))[0])
    if failure is not None:
        raise failure
    if "error" in answer:
        raise RankError(f"rank 0: {answer['error']}")
    result: _T = answer["result"]
    return result


def settle(failure: Exception | None, *, of_rollouts: bool = False) -> None:
    """Compare how something went on every rank, so that none waits for one that failed.

    Raises:
        RankError: it went well here and failed elsewhere. Where it failed, the failure itself is raised.
    """

    def outcome() -> str:
        if failure is not None:
            raise failure
        return ""

    exchange(outcome, of_rollouts=of_rollouts)


def exchange(work: Callable[[], str], *, of_rollouts: bool = False) -> list[str]:
    """Do something on every rank, and tell all what came of it; where it fails on one, all raise, see `settle`.

    One collective less than `together` and `collect`.
    """
    failure: Exception | None = None
    try:
        text = "=" + work()
    except Exception as error:
        failure, text = error, f"{type(error).__name__}: {error}"
    said = collect(text, of_rollouts=of_rollouts)
    if failure is not None:
        raise failure
    if others := [f"rank {number}: {one}" for number, one in enumerate(said) if not one.startswith("=")]:
        raise RankError("; ".join(others))
    return [one[1:] for one in said]


def together(work: Callable[[], _T]) -> _T:
    """Do something on every rank; where it fails on one, all raise, see `settle`."""
    try:
        result = work()
    except Exception as error:
        settle(error)
        raise
    settle(None)
    return result


def share_of(items: Sequence[_T], *, of_rollouts: bool = False) -> list[_T]:
    """This rank's items: those of its data, or of its rollouts, which each rank makes alone."""
    if of_rollouts:
        return list(items[rank() :: world_size()])
    return list(items[rank() // _sharing :: num_data_ranks()])


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
