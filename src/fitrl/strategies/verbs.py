"""The verbs of strategies that train in this process: `Trains`, `Scores` and `ExportsWeights`.

They are Lightning's own hooks, driven by hand: `forward_backward` is `training_step` and `backward`,
`optim_step` is `optimizer_step` with Lightning's clipping. There is no second code path.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from typing_extensions import override

from fitrl import _compat
from fitrl.data import ranks
from fitrl.data.batch import Batch
from fitrl.errors import CheckpointError, InvalidArgumentError, NothingAccumulatedError
from fitrl.objective.objective import CustomObjective, Objective
from fitrl.policy import checkpoints, pieces, random_state
from fitrl.policy.attention import attention_kernels
from fitrl.policy.lending import own_copy
from fitrl.policy.loading import load_policy, load_weights, trained_state
from fitrl.policy.policy import Policy
from fitrl.policy.sharding import like, whole
from fitrl.protocols.results import (
    ForwardBackwardResult,
    OptimStepResult,
    TokenLogprobs,
    TrainerConfig,
    TrainerStatus,
)
from fitrl.strategies import saving
from fitrl.strategies.saving import moment_of
from fitrl.strategies.schedules import fast_forward
from fitrl.strategies.session import SessionStrategy


class PolicyVerbs(SessionStrategy):
    """`Trains`, `Scores` and `ExportsWeights` on top of a Lightning strategy that trains in this process."""

    ranks_per_data: int = 1
    """Consecutive ranks that work on the same data."""

    copies_in_memory: bool = False
    """Whether the network can be copied as it is; else a copy is loaded anew."""

    evaluates_in_inference_mode: bool = True
    """Whether Lightning may; not where weights are gathered, because those of inference mode cannot be trained on."""

    _accumulated: int = 0

    # -- ranks --------------------------------------------------------------------------------------------------

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        ranks.share_data(self.ranks_per_data)

    @property
    def lent_policy(self) -> Policy:
        """What a sampler in this process reads; whole between `lend_weights` and the next step."""
        module: Any = self.lightning_module
        policy: Policy = module.policy
        return policy

    def copied_policy(self) -> Policy:
        """A policy like the open one with memory of its own, for a sampler, which is handed the weights next."""
        module: Any = self.lightning_module
        policy: Policy = module.policy
        if self.copies_in_memory:
            return own_copy(policy)
        fresh = load_policy(module.model.base_model, module.model.lora, tokenizer=policy.tokenizer)
        fresh.network.requires_grad_(False)
        self.precision_plugin.convert_module(fresh.network).to(self.root_device)
        return fresh

    # -- Lightning's hooks, counted -----------------------------------------------------------------------------

    @override
    def setup(self, trainer: lightning.Trainer) -> None:
        if not self.evaluates_in_inference_mode:
            for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
                loop.inference_mode = False
        super().setup(trainer)

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        with attention_kernels(self.root_device):  # layers that are computed again in backward
            loss = super().backward(closure_loss, optimizer, *args, **kwargs)
        self._accumulated += 1
        return loss

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        self._accumulated = 0
        return output

    @override
    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        self._accumulated = 0

    # -- Trains -------------------------------------------------------------------------------------------------

    def forward_backward(
        self, batch: Batch, objective: Objective | CustomObjective | None = None
    ) -> ForwardBackwardResult:
        """Add the gradient of one microbatch; see `Trains`."""
        module = self.policy_module
        in_force, module.objective = module.objective, module.objective if objective is None else objective
        try:
            batch = self.batch_to_device(batch)
            with ranks.naming_the_lost(), torch.enable_grad():
                output: Any = self.training_step(batch, self._accumulated)
                self.backward(output / module.trainer.accumulate_grad_batches, None)
        except BaseException:
            self.clear_gradients()
            raise
        finally:
            module.objective = in_force
        result = module.last_loss
        assert result is not None  # training_step has just set it
        return ForwardBackwardResult(
            loss=float(result.loss.detach()), metrics={name: float(value) for name, value in result.metrics.items()}
        )

    def optim_step(self, *, learning_rate: float | None = None) -> OptimStepResult:
        """Clip, step, advance the schedule, clear; see `Trains`."""
        module = self.policy_module
        accumulated = self._accumulated
        if not accumulated:
            raise NothingAccumulatedError("optim_step before any forward_backward: there is no gradient to step with")
        optimizer = _compat.raw_optimizer(self)
        scheduled = [group["lr"] for group in optimizer.param_groups]
        if learning_rate is not None:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
        used = float(optimizer.param_groups[0]["lr"])
        nothing = torch.zeros(())
        self.optimizer_step(optimizer, lambda: nothing, module)
        for group, rate in zip(optimizer.param_groups, scheduled, strict=True):
            group["lr"] = rate
        _compat.step_schedulers(self)
        optimizer.zero_grad(set_to_none=True)
        _compat.advance_global_step(module.trainer)
        module.model.step = module.trainer.global_step
        norm = module.last_grad_norm
        return OptimStepResult(
            step=module.trainer.global_step,
            learning_rate=used,
            grad_norm=float(norm) if norm is not None else 0.0,
            accumulated_microbatches=accumulated,
        )

    def clear_gradients(self) -> None:
        """Forget what was accumulated."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self._accumulated = 0

    def save(self, name: str | None = None, path: str | None = None, weights_only: bool = False) -> str:
        """Save to `<run>/checkpoints/<name>` (default: the step, four digits), or to `path`.

        With several ranks all call it. What lies in pieces on them each writes a share of, the rest the first one.

        Raises:
            CheckpointError: it could not be written.
            InvalidArgumentError: both a name and a path, or a name that is no folder name.
        """
        module = self.policy_module
        if name is not None and path is not None:
            raise InvalidArgumentError(f"give a name or a path, not both (name={name!r}, path={path!r})")
        if name is not None and (not name or Path(name).name != name or name.startswith(".")):
            raise InvalidArgumentError(f"name must be a plain folder name, got {name!r}")
        step = module.trainer.global_step
        folder = Path(path) if path is not None else module.model.checkpoints_dir / (name or f"{step:04d}")
        manifest = checkpoints.Manifest(
            step=step,
            base_model=module.model.base_model,
            adapter=module.policy.is_adapter,
            weights_only=weights_only,
        )
        moments = None if weights_only else self.moments()
        saving.write(
            folder,
            manifest,
            module.policy,
            weights=self.whole_weights(),
            state=None if moments is None else self._state(saving.without_pieces(moments)),
            moments={} if moments is None else saving.pieces_of(moments),
        )
        if name is path is None and not weights_only:
            self.saved_step = step
        return str(folder)

    def load(self, path: str | None = None) -> str:
        """Load a checkpoint folder; None: the run's newest whole one.

        Raises:
            CheckpointError: there is none, it is not whole, or it belongs to another kind of policy.
        """
        if path is None:
            found = self.resume()
            if found is None:
                raise CheckpointError(f"{self.policy_module.model.checkpoints_dir} holds no whole checkpoint")
            return found
        ranks.first(lambda: str(checkpoints.verify(Path(path))))
        ranks.together(lambda: self._load(Path(path)))
        return path

    def resume(self) -> str | None:
        """Load the run's newest whole checkpoint, if there is one; those that are not are named in a warning."""
        folder = self.policy_module.model.checkpoints_dir
        found = ranks.first(lambda: str(path) if (path := checkpoints.newest(folder)) is not None else None)
        if found is not None:
            ranks.together(lambda: self._load(Path(found)))
        return found

    def _load(self, folder: Path) -> None:
        """Load a checkpoint that was verified."""
        module = self.policy_module
        manifest = checkpoints.read_manifest(folder)
        if manifest.adapter != module.policy.is_adapter or manifest.base_model != module.model.base_model:
            kind = "adapters" if manifest.adapter else "full weights"
            raise CheckpointError(
                f"{folder} holds {kind} of {manifest.base_model!r}, the open model is {module.model!r}; use the same "
                "lora and base_model, or another name"
            )
        state = None if manifest.weights_only else checkpoints.read_state(folder)
        self.take_weights_back()
        self.load_weights(folder)
        self.clear_gradients()
        if state is None:
            schedules: list[Any] = [config.scheduler for config in self.lr_scheduler_configs]
            rates = [scheduler.base_lrs[0] for scheduler in schedules]
            self.forget_moments()
            for config in self.lr_scheduler_configs:
                fast_forward(config.scheduler, manifest.step)
            for rate in rates:  # the one in force is no part of the optimizer's state
                self.set_learning_rate(rate)
        else:
            self._restore(state, checkpoints.moments_of(folder, manifest))
        _compat.set_global_step(module.trainer, manifest.step)
        module.model.step = self.saved_step = manifest.step

    def get_config(self) -> TrainerConfig:
        """What does not change while the policy lives."""
        module = self.policy_module
        trainer = module.trainer
        return TrainerConfig(
            backend=type(self).__name__,
            base_model=module.model.base_model,
            lora_rank=None if module.model.lora is None else module.model.lora.rank,
            precision=str(trainer.precision),
            world_size=trainer.world_size,
            gradient_clip_val=trainer.gradient_clip_val,
        )

    def get_status(self) -> TrainerStatus:
        """Where the policy stands."""
        module = self.policy_module
        return TrainerStatus(
            step=module.trainer.global_step,
            accumulated_microbatches=self._accumulated,
            learning_rate=self._learning_rate(),
        )

    # -- Scores, ExportsWeights ---------------------------------------------------------------------------------

    def forward(self, batch: Batch) -> TokenLogprobs:
        """Logprobs of the batch's targets, without a gradient."""
        return TokenLogprobs(logprobs=self.score(batch, None).float())

    def score(self, batch: Batch, reference: str | None) -> Tensor:
        """Logprobs [R] on CPU under the policy (None) or a reference policy."""
        module = self.policy_module
        batch = self.batch_to_device(batch)
        with self.precision_plugin.forward_context():
            logprobs = self.inside(
                lambda: module.score(batch) if reference is None else module.reference_score(batch, reference)
            )
        return logprobs.cpu()

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The trained weights under the names of a saved checkpoint."""
        self.take_weights_back()
        yield from self.policy_module.named_weights()

    # -- where weights and moments lie: what a strategy that keeps them elsewhere overrides ----------------------

    def inside(self, call: Callable[[], Tensor]) -> Tensor:
        """Run a call, without a gradient, where it may read all weights."""
        return call()

    def whole_weights(self) -> Iterator[tuple[str, Tensor]] | None:
        """The trained weights, each put together on every rank when its turn comes; None: they never were in pieces."""
        self.take_weights_back()
        held = trained_state(self.policy_module.policy)
        if not any(isinstance(tensor, DTensor) for tensor in held.values()):
            return None
        return ((name, whole(tensor)) for name, tensor in held.items())

    def load_weights(self, folder: Path) -> None:
        """Read a checkpoint's weights into the policy."""
        load_weights(self.policy_module.policy, folder)

    def moments(self) -> dict[str, Any]:
        """The optimizer's state as torch's optimizer of one process would have it; pieces are `DTensor`s."""
        state: dict[str, Any] = _compat.raw_optimizer(self).state_dict()
        return state

    def load_moments(self, state: dict[str, Any], pieces_in: Path | None) -> None:
        """Take an optimizer's state from whole tensors, and from a folder of pieces if there is one; no collective.

        Raises:
            CheckpointError: the folder holds moments of other parameters.
        """
        optimizer = _compat.raw_optimizer(self)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        cut = {
            number: {
                name: like(value, parameters[number]) if isinstance(value, Tensor) else value
                for name, value in moments.items()
            }
            for number, moments in state["state"].items()
        }
        if pieces_in is not None:
            found: dict[str, Tensor] = {}
            for name in pieces.names(pieces_in):
                number, key = moment_of(name, cut)
                found[name] = cut[number][key] = torch.zeros_like(parameters[number].detach())
            pieces.read(pieces_in, found)
        optimizer.load_state_dict(state | {"state": cut})

    def forget_moments(self) -> None:
        """Start a fresh optimizer."""
        self.setup_optimizers(self.policy_module.trainer)

    # -- resumable state ----------------------------------------------------------------------------------------

    def _state(self, moments: dict[str, Any]) -> dict[str, Any]:
        """Everything beside the weights that the next step depends on; primitives and tensors only."""
        module = self.policy_module
        return {
            "optimizer": moments,
            "schedulers": [config.scheduler.state_dict() for config in self.lr_scheduler_configs],
            "precision": self.precision_plugin.state_dict(),
            "rng": [json.loads(text) for text in ranks.collect(json.dumps(random_state.capture(self.root_device)))],
            "reward_history": list(module.reward_history),
        }

    def _restore(self, state: dict[str, Any], moments: Path | None) -> None:
        self.load_moments(state["optimizer"], moments)
        for config, saved in zip(self.lr_scheduler_configs, state["schedulers"], strict=True):
            config.scheduler.load_state_dict(saved)
        self.precision_plugin.load_state_dict(state["precision"])
        # one state for each rank that saved; a job of more ranks uses them again
        random_state.restore(state["rng"][ranks.rank() % len(state["rng"])], self.root_device)
        self.policy_module.reward_history = [(int(step), float(std)) for step, std in state["reward_history"]]
