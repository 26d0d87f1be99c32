"""Ctrl-C, SIGTERM and cancellation during a call: the optimizer step under way is finished, then the call stops."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from fitrl.data import ranks

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts(Callback):
    """Turns the first signal into a stop between two optimizer steps; a second one stops at once.

    With several ranks all stop after the same step, whichever of them was told to.

    Attributes:
        received: the signal that asked for the stop.
        cancelled: set by another thread to ask for it; of the call that is running.
        agreed: whether any rank was told to stop, as of the last step.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.cancelled: threading.Event | None = None
        self.agreed = False
        self._listening = False

    def agree(self) -> bool:
        """Whether this process or another rank was told to stop; a collective."""
        told = self.received is not None or (self.cancelled is not None and self.cancelled.is_set())
        self.agreed = ranks.agree(told)
        return self.agreed

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Handle signals during a call; the handlers from before come back after it."""
        self.received, self.agreed = None, False
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread gets signals
            return
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        self._listening = True
        self._install()
        try:
            yield
        finally:
            self._listening = False
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Take SIGTERM back from Lightning, whose handler leaves the process with nothing saved."""
        if self._listening:
            self._install()

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Stop after this step, if anyone was told to."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and self.agree():
            trainer.should_stop = True

    def _install(self) -> None:
        for number in _SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        note = f"\nfitrl: {self.received.name}: stopping after the optimizer step under way; once more stops at once\n"
        os.write(2, note.encode())  # print may be under way in the code that was interrupted
