"""`ServerlessStrategy`: one Lightning batch is one training job on a service.

A batch is a `Call`, of `make_call(groups, ...)`. It is submitted at the optimizer's step, after the hooks that may
still stop it, and the step ends with the job. `ServerlessTrainer` does all that; under a stock trainer it is
`lightning.Trainer(strategy="fitrl_serverless").fit(ServerlessModule(model), fitrl.Feed(calls))`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from fitrl.errors import CheckpointError, InvalidArgumentError, SessionError
from fitrl.strategies.schedules import fast_forward, set_base_rate, stand_at
from fitrl_serverless.calls import Call
from fitrl_serverless.client.jobs import JobOutcome
from fitrl_serverless.client.service import Service
from fitrl_serverless.module import ServerlessModule
from fitrl_serverless.run import Run
from fitrl_serverless.settings import ServiceSettings


class PickUp:
    """A batch without groups: the job that an earlier process submitted."""


class ServerlessStrategy(SingleDeviceStrategy):
    """Train on a service; nothing is computed here.

    Args:
        settings: how to reach the service; None: the environment says.

    Raises:
        InvalidArgumentError: no address or no key.
    """

    strategy_name = "fitrl_serverless"

    def __init__(self, settings: ServiceSettings | None = None) -> None:
        super().__init__(device="cpu")
        self.settings = settings if settings is not None else ServiceSettings.read()
        self.service = Service(self.settings.connect())
        self.run: Run | None = None
        self.stops: Callable[[], bool] = _never
        self.outcome: JobOutcome | None = None
        self._keeps_run = False
        self._call: Call | PickUp | None = None

    @property
    def module(self) -> ServerlessModule:
        """The module that is trained."""
        module = self.lightning_module
        if not isinstance(module, ServerlessModule):
            raise InvalidArgumentError(
                f"{type(self).__name__} trains a ServerlessModule, got {type(module).__name__}: the policy is not here"
            )
        return module

    def take(self, run: Run | None) -> None:
        """Use this run from now on, whoever opened it, and leave it to them to close it."""
        self.run, self._keeps_run = run, run is not None

    # -- Lightning's hooks --------------------------------------------------------------------------------------

    @override
    def setup_environment(self) -> None:
        """Nothing: on a machine with a GPU Lightning's accelerator would reject the CPU device."""

    @override
    def setup(self, trainer: lightning.Trainer) -> None:
        super().setup(trainer)
        module = self.module
        if trainer.accumulate_grad_batches != 1 or trainer.gradient_clip_val:
            raise InvalidArgumentError(
                f"accumulate_grad_batches={trainer.accumulate_grad_batches}, gradient_clip_val="
                f"{trainer.gradient_clip_val}: a job is one step of the service, which takes neither; leave them out"
            )
        if self.run is None:
            self.run = Run(self.service, module.model, self.settings.entity, self.settings.total_timeout_s)
        for config in self.lr_scheduler_configs:
            fast_forward(config.scheduler, trainer.global_step)
        set_base_rate(self, module.learning_rate)

    @override
    def teardown(self) -> None:
        if not self._keeps_run and self.run is not None:
            self.run.close()
            self.run = None
            self.service.connection.close()
        super().teardown()

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        return batch

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Keep the call until the optimizer's step."""
        call = args[0]
        if not isinstance(call, Call | PickUp):
            raise InvalidArgumentError(f"a batch of {type(self).__name__} is a Call, got {type(call).__name__}")
        self._call = call
        return torch.zeros(())

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        return closure_loss.detach()

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Submit the call, and wait for the service to have trained on it."""
        output = closure()
        call, run, module = self._call, self.run, self.module
        if call is None or run is None:
            raise SessionError("there is no call to submit")
        self._call = None
        given = call if isinstance(call, Call) else None
        if given is not None and given.config.learning_rate is not None:
            set_base_rate(self, given.config.learning_rate)
        rate = float(optimizer.param_groups[0]["lr"])
        self.outcome = run.train(given, rate, tell=module.hear, stops=self.stops)
        # Lightning counts this step: it has to arrive where the service stands
        stand_at(module.trainer, max(run.step - 1, 0))
        optimizer.step()
        module.call_metrics = self.outcome.metrics | {"objective/exact": float(run.about.is_exact)}
        return output

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        """Yes: whether a checkpoint can be gone on from is known once the model is open."""
        return True

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Save the artifact's name: the service has the weights."""
        if self.run is None:
            raise SessionError("no model is open")
        checkpoint["artifact_name"] = str(self.run.artifact(self.run.step))
        super().save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Accept the step at which the service stands: it trains on from its newest one and cannot go back."""
        stands = None if self.run is None else str(self.run.artifact(self.run.step))
        if checkpoint.get("artifact_name") != stands:
            raise CheckpointError(
                f"this checkpoint is of {checkpoint.get('artifact_name')}, and the service stands at {stands}: it "
                "trains on from its newest step only"
            )


def _never() -> bool:
    return False
