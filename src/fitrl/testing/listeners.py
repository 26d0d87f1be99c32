"""A callback that notes which hooks fired, and a logger that keeps its rows, on every rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from typing_extensions import override

HOOKS = (
    *("setup", "on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start"),
    *("on_before_zero_grad", "on_train_batch_end", "on_train_epoch_end", "on_train_end", "on_fit_end", "teardown"),
    *("on_validation_start", "on_validation_end", "on_exception"),
)


class Hooks(Callback):
    """Notes each hook in `fired`; one named in `raises` raises an ArithmeticError once."""

    def __init__(self) -> None:
        self.fired: list[str] = []
        self.raises: str | None = None
        for name in HOOKS:
            setattr(self, name, self._noting(name))

    def _noting(self, name: str) -> Callable[..., None]:
        def note(*args: Any, **kwargs: Any) -> None:
            self.fired.append(name)
            if name == self.raises:
                self.raises = None
                raise ArithmeticError(f"{name}, on purpose")

        return note


class Rows(Logger):
    """Keeps what is logged in `rows`, each with its step, and counts how often it was finalized."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []
        self.finalized = 0

    @property
    @override
    def name(self) -> str:
        return "rows"

    @property
    @override
    def version(self) -> int:
        return 0

    @override
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.rows.append({key: float(value) for key, value in metrics.items()} | {"step": -1 if step is None else step})

    @override
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    @override
    def finalize(self, status: str) -> None:
        self.finalized += 1

    def having(self, key: str) -> list[dict[str, float]]:
        """The rows with a metric."""
        return [row for row in self.rows if key in row]
