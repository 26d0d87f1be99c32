"""`ServerlessSession`: a `lightning.Trainer` with one model open at a service: taken up, sampled from, let go.

Enters: a `TrainableModel`. Leaves: its run at the service, its sampler, its checkpoints. One is open at most.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from fitrl import BackendTrainer, Sampler, TrainableModel, TrajectoryGroup
from fitrl.errors import CheckpointError, SessionError
from fitrl.strategies.schedules import stand_at
from fitrl_serverless import wire
from fitrl_serverless.lightning_options import check_options
from fitrl_serverless.module import ServerlessModule
from fitrl_serverless.results import ServerlessTrainResult
from fitrl_serverless.run import Run
from fitrl_serverless.sampler import ServerlessSampler
from fitrl_serverless.settings import ServiceSettings
from fitrl_serverless.strategy import ServerlessStrategy

_R = TypeVar("_R")


class ServerlessSession(BackendTrainer):
    """A Lightning trainer that keeps one model open at a service; see `ServerlessTrainer` for its arguments."""

    def __init__(
        self,
        *,
        settings: ServiceSettings,
        lr_schedule: Callable[[int], float] | None = None,
        **lightning_options: Any,
    ) -> None:
        check_options(lightning_options)
        lightning_options |= {"accelerator": "cpu", "devices": 1}  # of the client, which computes nothing
        if lightning_options.get("enable_model_summary") is None:
            lightning_options["enable_model_summary"] = False  # there is no model here
        super().__init__(strategy=ServerlessStrategy(settings), **lightning_options)
        self.picked_up: ServerlessTrainResult | None = None
        self._lr_schedule = lr_schedule
        self._module: ServerlessModule | None = None
        self._served: ServerlessSampler | None = None
        self._picked_up_call: str | None = None
        self._warned = False

    @property
    def service_strategy(self) -> ServerlessStrategy:
        """The strategy, typed."""
        assert isinstance(self.strategy, ServerlessStrategy)  # made at construction
        return self.strategy

    @abstractmethod
    def _pick_up(self, run: Run) -> None:
        """Wait for the job of an earlier process."""

    # -- the model that is open ---------------------------------------------------------------------------------

    def open(self, model: TrainableModel) -> None:
        """Open a model at the service, and wait for the job that an earlier process left there; `fit_rl` does both.

        Raises:
            RunLockedError: another trainer has this run open.
            ServiceError: the service cannot be used, or refuses the model.
        """
        run = self._open(model)
        if run.pending is not None and not self._busy.locked():
            self._heeding_signals(lambda: self._pick_up(run))

    def sampler(self, model: TrainableModel, *, own_weights: bool = False) -> Sampler:
        """The sampler of a model's newest step, which the service serves.

        Args:
            model: whose.
            own_weights: a service's sampler has weights of its own in any case.
        """
        self.open(model)
        run = self._require_run()
        if self._served is None:
            self._served = ServerlessSampler(
                run.service,
                run.artifact,
                base_model=model.base_model,
                version=run.step,
                timeout_s=self.service_strategy.settings.sample_timeout_s,
            )
        return self._served

    def forget(self, model: TrainableModel) -> None:
        """Drop the job that this model has under way, whatever becomes of it at the service."""
        open_run = self.service_strategy.run
        if open_run is not None and open_run.model.key == model.key:
            open_run.forget()
        else:
            Run.forget_in(model)

    def close(self) -> None:
        """Let the model go and close the connections; checkpoints are the service's, and nothing is lost."""
        self._end_worker()
        self._release()
        self.service_strategy.service.connection.close()
        self._close_listeners()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # -- checkpoints --------------------------------------------------------------------------------------------

    def checkpoints(self, model: TrainableModel) -> list[wire.Checkpoint]:
        """The steps that the service keeps of a model, oldest first, each with its metrics."""
        run = self._open(model)
        return run.service.connection.wait(run.service.checkpoints(run.remote.id))

    def delete_checkpoints(self, model: TrainableModel, steps: Sequence[int]) -> list[int]:
        """Delete the checkpoints of these steps; returns those that there were.

        Raises:
            ConflictError: the newest is among them, which the service trains on from.
        """
        run = self._open(model)
        deleted = run.service.connection.wait(run.service.delete_checkpoints(run.remote.id, list(steps)))
        return [step for step in steps if step not in deleted.not_found_steps]

    def download_checkpoint(
        self, model: TrainableModel, step: int | None = None, *, folder: str | Path | None = None
    ) -> Path:
        """Fetch a checkpoint that transformers, or PEFT, loads as it is.

        Args:
            model: whose.
            step: None: the newest.
            folder: that is made; None: `<run>/checkpoints-of-service/<step>`.

        Returns:
            The folder, whole or not there at all.

        Raises:
            CheckpointError: the folder is there already, or cannot be written.
            NotFoundError: there is no such step; another service than `fitrl serve` may have no such call.
        """
        run = self._open(model)
        at = run.step if step is None else step
        target = Path(folder) if folder is not None else run.folder / "checkpoints-of-service" / f"{at:04d}"
        if target.exists():
            raise CheckpointError(f"{target} is there already: delete it, or pass another folder")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        except OSError as error:
            raise CheckpointError(f"{target} cannot be made: {error}") from error
        try:
            run.service.connection.wait(run.service.download_checkpoint(run.remote.id, at, unfinished))
            unfinished.rename(target)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        return target

    def log(self, model: TrainableModel, groups: Iterable[TrajectoryGroup], *, split: str = "train") -> None:
        """Keep groups with the model on the service; `model.log` keeps them here."""
        run = self._open(model)
        run.service.connection.wait(run.service.log(run.remote.id, wire.groups_to_wire(groups), split))

    # -- inside ---------------------------------------------------------------------------------------------------

    def _heeding_signals(self, work: Callable[[], _R]) -> _R:
        """`_one_call`, whose signal is raised after it also where the job had ended before it could be cancelled."""

        def run() -> _R:
            result = work()
            self._interrupts.agree()
            return result

        return self._one_call(run)

    def _open(self, model: TrainableModel) -> Run:
        """The run of a model; another one is let go first."""
        run = self.service_strategy.run
        if run is not None and run.model.key == model.key:
            if run.model is not model:
                if (run.model.base_model, run.model.lora) != (model.base_model, model.lora):
                    raise SessionError(f"{run.model!r} is open and {model!r} is the same run with other settings")
                model.step = run.step
                run.model = model
                if self._module is not None:
                    self._module.model = model
            return run
        if self._busy.locked() and self._busy_thread != threading.get_ident():
            raise SessionError(f"a call of fit_rl is under way, {model!r} cannot be opened before it ends")
        self._release()
        settings = self.service_strategy.settings
        run = Run(self.service_strategy.service, model, settings.entity, settings.total_timeout_s)
        self.service_strategy.take(run)
        if not run.about.is_exact and not self._warned:
            self._warned = True
            warnings.warn(
                f"the service at {settings.url} is not fitrl's: its mathematics are its own, and objective/exact is 0",
                RuntimeWarning,
                stacklevel=4,
            )
        self._interrupts.watch()
        self._hold_loggers()
        stand_at(self, run.step)
        return run

    def _module_of(self, run: Run) -> ServerlessModule:
        if self._module is None:
            self._module = ServerlessModule(run.model, lr_schedule=self._lr_schedule)
        return self._module

    def _require_run(self) -> Run:
        run = self.service_strategy.run
        if run is None:
            raise SessionError("no model is open: call trainer.open(model) first")
        return run

    def _release(self) -> None:
        if self._served is not None:
            self._served.close()
        if (run := self.service_strategy.run) is not None:
            run.close()
        self.service_strategy.take(None)
        self._module = self._served = self.picked_up = self._picked_up_call = None
        self._interrupts.unwatch()
