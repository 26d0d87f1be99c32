"""Base of strategies whose policy lives on a service: Lightning drives, the service computes.

Microbatches wait on the client until the optimizer step submits them together; its answer is waited for while the next
step is made ready. The LightningModule holds one dummy parameter, whose optimizer carries the learning rate and the
moments' decay, so schedules, LearningRateMonitor, accumulation, clipping values and checkpoints (which hold the
service's URI) work as in any other strategy.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from fitrl import _compat
from fitrl.data.batch import Batch
from fitrl.errors import (
    CheckpointError,
    InvalidArgumentError,
    NonFiniteGradientError,
    NothingAccumulatedError,
    SessionError,
    UnsupportedError,
)
from fitrl.objective.objective import CustomObjective, Objective, PolicyLoss
from fitrl.policy.batch_loss import batch_loss
from fitrl.policy.loading import load_tokenizer
from fitrl.policy.metrics import mismatch
from fitrl.policy.module import PolicyModule
from fitrl.protocols.results import ForwardBackwardResult, OptimStepResult, TrainerConfig, TrainerStatus
from fitrl.protocols.verbs import Scores
from fitrl.rollout.sampler import Sampler
from fitrl.strategies.schedules import stand_at
from fitrl.strategies.session import SessionStrategy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteStep:
    """What an optimizer step on the service is asked with."""

    learning_rate: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    grad_clip_norm: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteStepResult:
    """What the service answers.

    Attributes:
        losses: one per microbatch, each its share of the step's loss.
        metrics: raw sums and maxima, one mapping per microbatch.
        grad_norm: before clipping; None if the service does not tell.
        logprobs: [R] of each microbatch's targets, where the service tells them.
        exact: whether the service computed the objective as it is defined, as far as its answer tells.
    """

    losses: Sequence[float]
    metrics: Sequence[Mapping[str, float]]
    grad_norm: float | None = None
    logprobs: Sequence[Tensor] = field(default=())
    exact: bool = True


@dataclass(frozen=True, slots=True)
class _Waiting:
    batch: Batch
    objective: Objective | CustomObjective
    result: ForwardBackwardResult


@dataclass(frozen=True, slots=True)
class _UnderWay:
    """A step that was submitted and not answered yet."""

    microbatches: list[_Waiting]
    learning_rate: float
    answer: Callable[[], RemoteStepResult]


class RemoteStrategy(SessionStrategy, SingleDeviceStrategy):
    """Subclass it and say how to reach the service: `submit`, `remote_save`, `remote_load`, `newest`.

    A subclass that has `forward` (`Scores`) also validates.
    """

    strategy_name = "fitrl_remote"
    policy_is_remote = True

    def __init__(self) -> None:
        super().__init__(device="cpu")
        self._waiting: list[_Waiting] = []
        self._under_way: list[_UnderWay] = []
        self._tokenizers: dict[str, PreTrainedTokenizerBase] = {}

    @abstractmethod
    def submit(
        self, microbatches: Sequence[tuple[Batch, Objective | CustomObjective]], step: RemoteStep
    ) -> Callable[[], RemoteStepResult]:
        """Ask the service to accumulate the microbatches' gradients and to take one optimizer step.

        Raises here only if nothing was asked of the service; the step does not count then.

        Returns:
            what waits for the answer. If that raises, the service may or may not have taken the step: see `lost`.
        """

    @abstractmethod
    def remote_save(self, name: str, weights_only: bool) -> str:
        """Save the service's state; returns its URI."""

    @abstractmethod
    def remote_load(self, uri: str) -> int:
        """Load a saved state; returns the step it was saved at."""

    @abstractmethod
    def newest(self) -> str | None:
        """URI of the model's newest saved state; None before the first."""

    def lost(self) -> int:
        """Go back to the newest saved state, at once or before it is next needed; returns its step.

        Called when an answer did not come, so that nobody knows what the service's state is.
        """
        uri = self.newest()
        if uri is None:
            raise SessionError("the service's state is not known any more, and none was saved: begin a new run")
        return self.remote_load(uri)

    # -- what the policy reads and says -------------------------------------------------------------------------

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer; it is loaded here, its weights are not."""
        name = self.policy_module.model.base_model
        if name not in self._tokenizers:
            self._tokenizers[name] = load_tokenizer(name)
        return self._tokenizers[name]

    @property
    def context_length(self) -> int | None:
        """Longest sequence in tokens; None if the service does not tell."""
        return None

    def newest_sampler(self) -> Sampler:
        """A sampler of the policy as it is now.

        Raises:
            UnsupportedError: the service does not sample.
        """
        raise UnsupportedError(f"{type(self).__name__} cannot sample: pass trajectories that were sampled elsewhere")

    # -- Lightning's hooks --------------------------------------------------------------------------------------

    @override
    def setup_environment(self) -> None:
        """Nothing: on a machine with a GPU Lightning's accelerator would reject the CPU device."""
        self._environment_is_set_up = True

    @override
    def setup(self, trainer: lightning.Trainer) -> None:
        if str(trainer.precision) != "32-true":
            raise InvalidArgumentError(
                f"precision={str(trainer.precision)!r} has no effect with {type(self).__name__}: the service computes "
                "in its own; leave it out"
            )
        if str(getattr(trainer.gradient_clip_algorithm, "value", "norm")) != "norm":
            raise InvalidArgumentError(f"{type(self).__name__} clips the gradient's norm only, not its values")
        super().setup(trainer)

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        """Yes: before it there is no session on the service that could load a state."""
        return True

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        return batch

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Buffer the microbatch; what it will cost is not known yet."""
        self.forward_backward(args[0])
        return torch.zeros(())

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        return closure_loss.detach()

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        output = closure()
        self._submit(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()  # the dummy parameter has no gradient; the schedule wants to see a step
        self._settle(keep=1)  # the step before; this one's answer is waited for while the next is made ready
        return output

    @override
    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        self.clear_gradients()
        if isinstance(exception, Exception):
            with suppress(Exception):  # a step that is lost too has gone back already
                self.wait()
        elif self._under_way:  # Ctrl-C waits for nothing
            self._go_back()

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        self.wait()
        checkpoint["remote_state"] = self.remote_save(f"step-{checkpoint['global_step']}", weights_only=False)
        super().save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        if "remote_state" not in checkpoint:
            raise CheckpointError("this checkpoint holds no URI of a service's state: it was made by a local strategy")
        self.saved_step = self.remote_load(checkpoint["remote_state"])

    def compute_loss(self, batch: Batch, objective: Objective | CustomObjective) -> PolicyLoss:
        """The objective on the policy as it is, without a gradient; for validation."""
        if not isinstance(self, Scores):
            raise UnsupportedError(f"{type(self).__name__} cannot validate: its service computes no logprobs")
        return batch_loss(batch, self.forward(batch).logprobs, objective)

    # -- Trains -------------------------------------------------------------------------------------------------

    @property
    @override
    def policy_module(self) -> PolicyModule:
        module = self.lightning_module
        if not isinstance(module, PolicyModule):
            raise SessionError("no model is open: call trainer.open(model) or trainer.fit_rl(model, groups) first")
        return module

    @override
    def forward_backward(
        self, batch: Batch, objective: Objective | CustomObjective | None = None
    ) -> ForwardBackwardResult:
        """Buffer a microbatch; its loss and metrics are known after `optim_step`."""
        result = ForwardBackwardResult()
        self._waiting.append(_Waiting(batch, self.policy_module.objective if objective is None else objective, result))
        return result

    @override
    def optim_step(self, *, learning_rate: float | None = None) -> OptimStepResult:
        """Submit what was buffered, step, and wait; a norm that the service does not tell is NaN."""
        module, optimizer = self.policy_module, _compat.raw_optimizer(self)
        accumulated = len(self._waiting)
        rate = self._learning_rate() if learning_rate is None else learning_rate
        self._submit(rate)
        grad_norm = self.wait()
        optimizer.step()
        _compat.step_schedulers(self)
        _compat.advance_global_step(module.trainer)
        module.model.step = module.trainer.global_step
        return OptimStepResult(
            step=module.trainer.global_step,
            learning_rate=rate,
            grad_norm=math.nan if grad_norm is None else grad_norm,
            accumulated_microbatches=accumulated,
        )

    @override
    def clear_gradients(self) -> None:
        """Drop what was buffered."""
        self._waiting.clear()

    @override
    def save(self, name: str | None = None, path: str | None = None, weights_only: bool = False) -> str:
        """Save the service's state; returns its URI. A service takes no path."""
        if path is not None:
            raise CheckpointError(f"{type(self).__name__} saves on the service, which takes a name, not path={path!r}")
        self.wait()
        step = self.policy_module.trainer.global_step
        uri = self.remote_save(name or f"step-{step}", weights_only)
        if name is None and not weights_only:
            self.saved_step = step
        return uri

    @override
    def load(self, path: str | None = None) -> str:
        """Load a URI; None: the newest state."""
        uri = path if path is not None else self.newest()
        if uri is None:
            raise CheckpointError(f"{type(self).__name__} has no saved state to load yet")
        self.wait()
        step = self.remote_load(uri)
        self.clear_gradients()
        self._stand_at(step)
        return uri

    @override
    def resume(self) -> str | None:
        """Load the newest state, if there is one."""
        return None if self.newest() is None else self.load()

    @override
    def get_config(self) -> TrainerConfig:
        """What does not change while the policy lives."""
        module = self.policy_module
        return TrainerConfig(
            backend=type(self).__name__,
            base_model=module.model.base_model,
            lora_rank=None if module.model.lora is None else module.model.lora.rank,
            precision="remote",
            world_size=1,
            gradient_clip_val=module.trainer.gradient_clip_val,
        )

    @override
    def get_status(self) -> TrainerStatus:
        """Where the policy stands."""
        return TrainerStatus(
            step=self.policy_module.trainer.global_step,
            accumulated_microbatches=len(self._waiting),
            learning_rate=self._learning_rate(),
        )

    # -- steps under way ----------------------------------------------------------------------------------------

    def wait(self) -> float | None:
        """Wait for every step that was submitted; returns the last one's gradient norm, if the service told it."""
        return self._settle(keep=0)

    def _submit(self, learning_rate: float) -> None:
        """Submit the buffer as one step."""
        if not self._waiting:
            raise NothingAccumulatedError("optim_step before any forward_backward: there is nothing to submit")
        if not (math.isfinite(learning_rate) and learning_rate >= 0):
            raise InvalidArgumentError(f"the learning rate must be a finite number of at least 0, got {learning_rate}")
        settings = self.policy_module.optimizer_settings
        clip = self.policy_module.trainer.gradient_clip_val
        waiting, self._waiting = self._waiting, []
        answer = self.submit(
            [(item.batch, item.objective) for item in waiting],
            RemoteStep(
                learning_rate=learning_rate,
                betas=settings.betas,
                eps=settings.eps,
                weight_decay=settings.weight_decay,
                grad_clip_norm=float(clip) if clip else None,
            ),
        )
        self._under_way.append(_UnderWay(waiting, learning_rate, answer))

    def _settle(self, keep: int) -> float | None:
        """Wait for the oldest answers, until `keep` are under way; settle results, feed the module's metrics."""
        grad_norm = None
        while len(self._under_way) > keep:
            step = self._under_way[0]
            try:
                answer = step.answer()
                self._refuse_non_finite(answer)
            except BaseException:
                self._go_back()
                raise
            self._under_way.pop(0)
            self._take_in(step, answer)
            grad_norm = answer.grad_norm
        return grad_norm

    def _take_in(self, step: _UnderWay, answer: RemoteStepResult) -> None:
        module = self.policy_module
        for item, loss, metrics in zip(step.microbatches, answer.losses, answer.metrics, strict=True):
            item.result.settle(loss, dict(metrics))
            module.totals.microbatches.update({name: torch.tensor(float(value)) for name, value in metrics.items()})
        for item, logprobs in zip(step.microbatches, answer.logprobs, strict=False):
            targets = item.batch.loss_inputs
            if item.batch.measures_mismatch:
                module.totals.mismatch.update(mismatch(logprobs, targets.rollout_logprobs, targets.mask))
        taken = {
            "learning_rate": torch.tensor(step.learning_rate, dtype=torch.float64),
            "step_count": torch.ones(()),
        }
        if answer.grad_norm is not None:
            taken["grad_norm"] = torch.tensor(answer.grad_norm)
        module.totals.steps.update(taken)
        module.is_exact = module.is_exact and answer.exact

    def _refuse_non_finite(self, answer: RemoteStepResult) -> None:
        norm = 0.0 if answer.grad_norm is None else answer.grad_norm
        if not math.isfinite(norm + sum(answer.losses)):
            raise NonFiniteGradientError(
                f"a step's loss or gradient was not finite (loss {sum(answer.losses)}, norm {norm}), so the weights "
                "are not since: go on from the newest saved state, with a lower learning rate or gradient_clip_val"
            )

    def _go_back(self) -> None:
        """Forget the steps under way, and every step since the newest saved state: nobody knows which were taken."""
        self._under_way.clear()
        self.clear_gradients()
        self._stand_at(self.lost())

    def _stand_at(self, step: int) -> None:
        """Put step count and schedule where a saved state left them."""
        module = self.policy_module
        stand_at(module.trainer, step)
        module.model.step = self.saved_step = step
