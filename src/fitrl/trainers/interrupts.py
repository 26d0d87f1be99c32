"""Ctrl-C, SIGTERM and cancellation: the optimizer step under way is finished, then the call stops.

Between calls one process leaves at once, by an exception, so that `with trainer` saves; a rank of several waits for
the next call, where all of them agree, because one that leaves would keep the others waiting. Once a rank has died
there is nothing to agree on: see `fitrl.data.lifeline`.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import FrameType
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from fitrl.data import ranks


class Stop(IntEnum):
    """Why a call stops before its end."""

    NO = 0
    CANCELLED = 1
    SIGNALLED = 2


class Interrupts(Callback):
    """Turns the first signal into a stop between two optimizer steps; a second one stops at once.

    With several ranks all stop after the same step, whichever of them was told to. Handlers of the user's own are
    replaced during calls only.

    Attributes:
        signals: those that ask for a stop; a scheduler may have one of its own.
        received: the signal that asked for the stop.
        cancelled: set by another thread to ask for it; of the call that is running.
        stop: what the ranks have agreed on, as of the last step.
    """

    def __init__(self) -> None:
        self.signals = [signal.SIGINT, signal.SIGTERM]
        self.received: signal.Signals | None = None
        self.cancelled: threading.Event | None = None
        self.stop = Stop.NO
        self._before: dict[signal.Signals, Any] | None = None  # handlers to give back after the call that runs
        self._watched: dict[signal.Signals, Any] = {}

    def watch(self) -> None:
        """Handle signals between calls, too, from now on; for a session."""
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread gets signals, and sets handlers
        for number in self.signals:
            if number is signal.SIGINT and ranks.world_size() == 1:
                continue  # Python's own handler is right
            handler = self._handler(number)
            if handler in (signal.SIG_DFL, signal.default_int_handler):
                self._watched[number] = handler
                self._set_handler(number, self._handle)

    def unwatch(self) -> None:
        """Give the handlers back; not once a rank has died: a launcher's SIGTERM would cut the report of it short."""
        if threading.current_thread() is not threading.main_thread() or ranks.lost() is not None:
            return  # the session's end on the main thread does it
        for number, handler in self._watched.items():
            if self._handler(number) == self._handle:
                self._set_handler(number, handler)
        self._watched.clear()

    def take(self) -> BaseException | None:
        """The exception that a signal asks for, once; None without a signal."""
        received, self.received = self.received, None
        if received is None:
            return None
        return KeyboardInterrupt() if received is signal.SIGINT else SystemExit(128 + received)

    def agree(self) -> Stop:
        """Whether this process or another rank was told to stop; a collective."""
        told = Stop.CANCELLED if self.cancelled is not None and self.cancelled.is_set() else Stop.NO
        self.stop = Stop(ranks.highest(Stop.SIGNALLED if self.received is not None else told))
        return self.stop

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Handle signals during a call; the handlers from before come back after it."""
        self.stop = Stop.NO
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._before = {number: signal.getsignal(number) for number in self.signals}
        self._install()
        try:
            yield
        finally:
            before, self._before = self._before, None
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Take SIGTERM back from Lightning, whose handler leaves the process with nothing saved."""
        if self._before is not None:
            self._install()

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Stop after this step, if anyone was told to; after the last one the call itself asks."""
        done = batch_idx + 1
        is_between = done % trainer.accumulate_grad_batches == 0 and done < trainer.num_training_batches
        if is_between and self.agree():
            trainer.should_stop = True

    def _handler(self, number: signal.Signals) -> Any:
        """The handler outside of calls."""
        return signal.getsignal(number) if self._before is None else self._before[number]

    def _set_handler(self, number: signal.Signals, handler: Any) -> None:
        if self._before is None:
            signal.signal(number, handler)
        else:
            self._before[number] = handler

    def _install(self) -> None:
        for number in self.signals:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if ranks.lost() is not None:  # no step will end any more; a checkpoint that is being written may
            if ranks.is_overdue():
                raise ranks.lost_error()
            return
        if self._before is None and ranks.world_size() == 1:
            raise SystemExit(128 + number)
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        note = f"\nfitrl: {self.received.name}: stopping after the optimizer step under way; once more stops at once\n"
        os.write(2, note.encode())  # print may be under way in the code that was interrupted
