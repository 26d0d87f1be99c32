"""`Mesh`: processes on this machine with one actor each, asked one by one or together; nothing else calls Monarch.

Enters: a verb and its arguments. Leaves: what each process answered, or an error that names the process. Monarch's
adverbs stay in here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Sequence
from typing import Any

import monarch.actor
from monarch.actor import Actor, this_host

from fitrl.errors import RankError, RankLostError
from fitrl_titan.actors.answers import Answer

_log = logging.getLogger(__name__)
_NAME = "fitrl_"
_live: set[Mesh] = set()


class StuckError(RankError):
    """A process failed, and others wait for it in a collective."""


class Mesh:
    """Processes of one kind of actor.

    Args:
        kind: of actor; its endpoint `ask(verb, arguments)` returns an `Answer`.
        arguments: of its constructor, the same for all.
        size: how many.
        name: what one of them is called in messages: "rank", "sampler".
        grace_s: how long the others may still work once one has failed.
    """

    def __init__(self, kind: type[Actor], *arguments: Any, size: int, name: str, grace_s: float) -> None:
        self._name, self._grace = name, grace_s
        _live.add(self)
        _keep_the_controller()
        self._processes = this_host().spawn_procs(per_host={"ranks": size}, name=f"{_NAME}{name}")
        actors = self._processes.spawn(f"{_NAME}{name}", kind, *arguments)
        self._actors: list[Any] = [actors.slice(ranks=number) for number in range(size)]

    def __len__(self) -> int:
        return len(self._actors)

    async def ask_one(self, number: int, verb: str, *arguments: Any) -> Any:
        """Call one actor.

        Raises:
            RankLostError: its process has died.
            Exception: what the call raised there.
        """
        try:
            found: Answer = await self._actors[number].ask.call_one(verb, arguments)
        except monarch.actor.ActorError as error:
            raise RankError(f"{self._name} {number} of {len(self)} could not answer {verb}: {error}") from error
        except Exception as error:  # of supervision
            raise self._lost(number, error) from error
        if found.error is not None:
            found.error.add_note(f"raised by {self._name} {number} of {len(self)}:\n{found.told}")
            raise found.error
        return found.value

    async def ask(self, verb: str, arguments: Sequence[tuple[Any, ...]] | tuple[()] = ()) -> list[Any]:
        """Call all actors at once; returns what each one answered.

        Args:
            verb: what.
            arguments: of each; none: of none.

        Raises:
            RankLostError: a process has died.
            StuckError: one failed, and others do not come back.
            RankError: some failed; it names the first one.
            Exception: what all of them raised.
        """
        given = arguments or [()] * len(self)
        calls: list[asyncio.Future[Any]] = [
            asyncio.ensure_future(self.ask_one(number, verb, *given[number])) for number in range(len(self))
        ]
        try:
            waiting = set(calls)
            while waiting:
                has_failed = any(call.done() and call.exception() is not None for call in calls)
                done, waiting = await asyncio.wait(
                    waiting, timeout=self._grace if has_failed else None, return_when=asyncio.FIRST_COMPLETED
                )
                if not done:
                    break
                for call in done:
                    if isinstance(lost := call.exception(), RankLostError):
                        raise lost
            errors = {n: error for n, call in enumerate(calls) if call.done() and (error := call.exception())}
            if errors:
                raise self._told(verb, errors, len(waiting))
            return [call.result() for call in calls]
        finally:
            for call in calls:
                call.cancel()
                call.add_done_callback(_seen)

    def _told(self, verb: str, errors: dict[int, BaseException], waiting: int) -> BaseException:
        first = next(iter(errors.values()))
        if len(errors) == len(self) and len({type(error) for error in errors.values()}) == 1:
            return first
        raised = [f"{self._name} {n} of {len(self)}: {type(error).__name__}: {error}" for n, error in errors.items()]
        message = f"{verb} failed on {'; '.join(raised)}"
        kind = StuckError if waiting else RankError
        found = kind(f"{message}; {waiting} more did not come back" if waiting else message)
        found.__cause__ = first
        return found

    def _lost(self, number: int, error: Exception) -> RankLostError:
        lines = [line for each in str(error).splitlines() if (line := each.strip(" '\")"))]
        return RankLostError(f"{self._name} {number} of {len(self)} has died: {lines[-1] if lines else error!r}")

    async def stop(self) -> None:
        """End the processes, those that hang in a collective, too."""
        try:
            await self._processes.stop()
        except Exception as error:  # of processes that have ended by themselves
            _log.debug("stopping %s: %s", self._name, error)
        _live.discard(self)


async def gather(*calls: Awaitable[Any]) -> list[Any]:
    """Wait for all of them, then raise what the first raised that did."""
    found = await asyncio.gather(*calls, return_exceptions=True)
    for each in found:
        if isinstance(each, BaseException):
            raise each
    return found


def _seen(call: asyncio.Future[Any]) -> None:
    """Look at a call's error, so that asyncio does not report one that nobody waits for any more."""
    if not call.cancelled():
        call.exception()


def _keep_the_controller() -> None:
    """Let a dead process of ours raise where it is called, where Monarch would end the program."""
    before: Any = monarch.actor.unhandled_fault_hook
    if getattr(before, "is_of_fitrl", False):
        return

    def note(failure: Any) -> None:
        # the processes' logger is named after nobody
        if _live and failure.mesh_name.startswith((_NAME, "logger")):
            _log.warning("%s", failure)
            return
        before(failure)

    note.is_of_fitrl = True  # type: ignore[attr-defined]
    monarch.actor.unhandled_fault_hook = note
