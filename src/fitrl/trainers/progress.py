"""`RewardProgressBar`: one line for all calls of `fit_rl`, with reward, tokens/s and KL.

Lightning's own bars count the batches of an epoch. A call of `fit_rl` is an epoch of a few microbatches, so they start
anew with every call, leave a line behind each time, and are drawn for the last time before the call's KL and tokens/s
are known; of the metrics they show the reward only.
"""

from __future__ import annotations

import atexit
import sys
from collections.abc import Mapping
from typing import Any

import lightning
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from typing_extensions import override

from fitrl.errors import InvalidArgumentError

SHOWN: Mapping[str, str] = {
    "reward/mean": "reward {:.3f}",
    "throughput/tokens_per_s": "{:,.0f} tokens/s",
    "loss/kl": "kl {:.4f}",
    "mismatch/kl": "mismatch {:.4f}",
}


class RewardProgressBar(ProgressBar):
    """A line on standard error that counts calls of `fit_rl`; it lasts until `trainer.close()`.

    Args:
        total: calls to come, or None.
        completed: calls that an earlier process made.
        shown: metric keys and how to write each; a key that a call does not report is left out.
        console: where to draw; None: standard error.

    Raises:
        InvalidArgumentError: a total that is not positive.

    Example:
        >>> LocalTrainer(devices=1, callbacks=[RewardProgressBar(total=100)])  # doctest: +SKIP
    """

    def __init__(
        self,
        total: int | None = None,
        *,
        completed: int = 0,
        shown: Mapping[str, str] = SHOWN,
        console: Console | None = None,
    ) -> None:
        super().__init__()
        if total is not None and total < 1:
            raise InvalidArgumentError(f"total must be at least 1 or None, got {total}")
        self.total = total
        self.completed = completed
        self.shown = dict(shown)
        self._console = console
        self._drawn: Progress | None = None
        self._line = TaskID(0)
        self._wanted = True

    @override
    def enable(self) -> None:
        self._wanted = True

    @override
    def disable(self) -> None:
        self._wanted = False
        self.close()

    @override
    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if not trainer.is_global_zero:
            self.disable()

    @override
    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.start()

    @override
    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.advance({name: float(value) for name, value in trainer.callback_metrics.items()})

    @override
    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        self.close()

    @override
    def print(self, *args: Any, **kwargs: Any) -> None:
        if self._drawn is not None:
            self._drawn.console.print(*args)

    def start(self) -> None:
        """Show the line; the first call of `fit_rl` does it too."""
        if self._drawn is not None or not self._wanted:
            return
        columns = (
            TextColumn("fit_rl"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}", markup=False),
            TimeElapsedColumn(),
        )
        # what is printed meanwhile goes above the line; unless standard output is a file, where it belongs
        self._drawn = Progress(
            *columns, console=self._console or Console(stderr=True), redirect_stdout=sys.stdout.isatty()
        )
        self._line = self._drawn.add_task("fit_rl", total=self.total, completed=self.completed, numbers="")
        self._drawn.start()
        atexit.register(self.close)  # a terminal whose cursor is hidden would stay so

    def advance(self, metrics: Mapping[str, float]) -> None:
        """Count one call and show its metrics; for calls that had nothing to learn from, which Lightning never sees."""
        self.completed += 1
        self.show(metrics)

    def show(self, metrics: Mapping[str, float]) -> None:
        """Show the metrics of a call that is still under way."""
        if self._drawn is not None:
            self._drawn.update(self._line, completed=self.completed, numbers=self.line(metrics))

    def line(self, metrics: Mapping[str, float]) -> str:
        """The metrics as shown."""
        return "  ".join(text.format(metrics[key]) for key, text in self.shown.items() if key in metrics)

    def close(self) -> None:
        """Leave the line as it is and give the terminal back."""
        if self._drawn is not None:
            self._drawn.stop()
            self._drawn = None
            atexit.unregister(self.close)
