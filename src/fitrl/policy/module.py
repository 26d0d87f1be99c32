"""`PolicyModule`: the LightningModule that holds the policy and the objective.

Enters: `Batch` microbatches. Leaves: gradients of the objective, logprobs, metrics. It trains under `fit_rl`'s
strategies and under a stock `lightning.Trainer` alike: it undoes Lightning's division by the accumulation and the
mean over ranks, because the batch carries the global denominators.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fitrl.data.batch import Batch
from fitrl.errors import InvalidArgumentError, NonFiniteGradientError, UnsupportedError
from fitrl.objective.linear_head import most_rows
from fitrl.objective.objective import CustomObjective, Objective, PolicyLoss
from fitrl.policy.layers import compile_layers, narrow_frozen_layers, recompute_layers
from fitrl.policy.loading import load_policy, trained_state
from fitrl.policy.metrics import CallTotals, mismatch
from fitrl.policy.model import TrainableModel
from fitrl.policy.optimizers import AdamWSettings, adamw
from fitrl.policy.policy import Policy
from fitrl.policy.scoring import logprobs_of, loss_of
from fitrl.policy.sharding import clip_by_norm, gradient_norm, whole

# most rows of logits at a time where memory is to be spared
_SPARED_ROWS = 2048


class PolicyModule(lightning.LightningModule):
    """A policy and its objective.

    Args:
        model: what to train.
        objective: the loss; None: `Objective()`, CISPO at token level.
        learning_rate: of AdamW.
        optimizer: the other settings of AdamW.
        lr_schedule: factor on the learning rate, by optimizer steps taken.
        compile: compile each decoder layer.
        activation_checkpointing: keep only each decoder layer's input, and compute the rest again in backward; the
            head then holds at most half as many logits at a time.
    """

    def __init__(
        self,
        model: TrainableModel,
        *,
        objective: Objective | CustomObjective | None = None,
        learning_rate: float = 5e-6,
        optimizer: AdamWSettings = AdamWSettings(),  # noqa: B008 - frozen
        lr_schedule: Callable[[int], float] | None = None,
        compile: bool = False,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.objective: Objective | CustomObjective = Objective() if objective is None else objective
        self.learning_rate = learning_rate
        self.optimizer_settings = optimizer
        self.lr_schedule = lr_schedule
        self.logprob_chunk_size = 1024
        self.reward_history: list[tuple[int, float]] = []
        self.call_metrics: dict[str, float] = {}
        self.host_metrics: dict[str, float] = {}
        self.validated: dict[str, Tensor] = {}  # what the last validation told, for callbacks that monitor it
        self.clock: tuple[float, float] | None = None  # start of the running call, tokens that it learns from
        self._observed: list[dict[str, float]] = []
        self.last_grad_norm: Tensor | None = None
        self._broken_at: Tensor | None = None  # the first step whose gradient was not finite; inf: none was
        self.last_loss: PolicyLoss | None = None
        self.is_exact = True  # whether the running call's objective was computed as it is defined; a service may not
        self.goes_on = False  # whether the next epoch is the rest of a call
        self.is_updating = False  # whether the optimizer is changing the weights
        self.totals = CallTotals()
        self.held_out = CallTotals()  # of a validation
        self.network: nn.Module | None = None
        self.placeholder: nn.Parameter | None = None
        self.compiles = compile
        self.most_positions: int | None = None  # in a microbatch, once one with more did not fit
        self.activation_checkpointing = activation_checkpointing
        self._policy: Policy | None = None
        self._reference: tuple[object, Policy] | None = None

    # -- the policy ---------------------------------------------------------------------------------------------

    @property
    def policy(self) -> Policy:
        """The live policy; loaded by `configure_model`."""
        if self._policy is None:
            raise UnsupportedError("the policy is not loaded yet: it is when a trainer sets the module up")
        return self._policy

    def configure_model(self) -> None:
        """Load the policy once, however often Lightning asks; nothing where it lives on a service."""
        if self._policy is not None:
            return
        if getattr(self.trainer.strategy, "policy_is_remote", False):
            self.placeholder = nn.Parameter(torch.zeros(()))
            return
        policy = load_policy(self.model.base_model, self.model.lora)
        precision = str(self.trainer.precision)
        if precision in ("bf16-true", "16-true"):
            rank_zero_warn(
                f"precision={precision!r} keeps the trained weights in 16 bits, which round away most of an RL-sized "
                "update: take 'bf16-mixed', which computes in bfloat16 on float32 weights"
            )
        shard = getattr(self.trainer.strategy, "shard", None)
        if shard is None and precision in ("bf16-mixed", "16-mixed"):
            narrow_frozen_layers(policy, torch.bfloat16 if precision == "bf16-mixed" else torch.float16)
        makes_layers = getattr(self.trainer.strategy, "makes_layers", False)  # of its own, and compiles those
        if self.activation_checkpointing and not makes_layers:
            recompute_layers(policy, keep_attention=self.compiles)
        if self.compiles and not makes_layers:
            compile_layers(policy)
        if shard is not None:
            moments = self.optimizer_settings.moments
            policy = shard(policy, precision=precision, moments=moments, compiles=self.compiles)
        self._policy, self.network = policy, policy.network.train()

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The trained weights under the names of a saved checkpoint: all of them, or the adapters'."""
        for name, tensor in trained_state(self.policy).items():
            yield name, whole(tensor.detach())

    # -- loss and logprobs --------------------------------------------------------------------------------------

    def forward(self, call: Callable[[], Any]) -> Any:
        """Run a call inside of whatever a strategy has wrapped around this module, so that it may read all weights."""
        return call()

    def compute_loss(self, batch: Batch, objective: Objective | CustomObjective | None = None) -> PolicyLoss:
        """Loss of one microbatch under the objective in force, or another one."""
        objective = self.objective if objective is None else objective
        if self.placeholder is not None:
            strategy: Any = self.trainer.strategy
            told: PolicyLoss = strategy.compute_loss(batch, objective)
            return told
        rows_per_tile = None
        if self.activation_checkpointing:
            usual = most_rows(self.policy.vocabulary_size, torch.float32.itemsize, batch.loss_inputs.rows.device)
            rows_per_tile = max(1, min(_SPARED_ROWS, usual // 2))
        return loss_of(self.policy, batch, objective, rows_per_tile=rows_per_tile)

    @torch.no_grad()
    def score(self, batch: Batch, policy: Policy | None = None) -> Tensor:
        """Float32 logprobs [R] of the batch's targets, no grad, `logprob_chunk_size` rows of logits at a time."""
        return logprobs_of(policy or self.policy, batch, rows_per_tile=self.logprob_chunk_size)

    def reference_score(self, batch: Batch, reference: str) -> Tensor:
        """Logprobs [R] of the batch's targets under the reference policy: "base", or a checkpoint folder."""
        if reference == "base" and self.policy.is_adapter:
            network: Any = self.network
            with network.disable_adapter():
                return self.score(batch)
        key = (reference, () if reference == "base" else _files(Path(reference)))
        if self._reference is None or self._reference[0] != key:
            self._reference = None  # free the old one first
            policy = load_policy(
                self.model.base_model,
                weights=None if reference == "base" else Path(reference),
                tokenizer=self.policy.tokenizer,
            )
            if policy.vocabulary_size < self.policy.vocabulary_size:
                raise InvalidArgumentError(
                    f"reference={reference!r} reads {policy.vocabulary_size} token ids, the policy "
                    f"{self.policy.vocabulary_size}: take a checkpoint of the same base_model"
                )
            policy.network.requires_grad_(False).eval()
            # in the policy's own precision: else rounding would look like a distance from the reference
            self.trainer.precision_plugin.convert_module(policy.network).to(self.device)
            self._reference = (key, policy)
        return self.score(batch, self._reference[1])

    def observe(self, metrics: dict[str, float]) -> None:
        """Take host-side metrics of the running epoch; of several their mean is told, of maxima the highest."""
        self._observed.append(metrics)
        keys = dict.fromkeys(key for seen in self._observed for key in seen)
        self.host_metrics = {}
        for key in keys:
            values = [seen[key] for seen in self._observed if key in seen]
            self.host_metrics[key] = max(values) if key.endswith("_max") else sum(values) / len(values)

    @property
    def has_moments(self) -> bool:
        """Whether the optimizer has taken a step, and so holds its memory."""
        optimizers: Any = self.trainer.optimizers
        return bool(optimizers) and bool(optimizers[0].state)

    @property
    def num_data_ranks(self) -> int:
        """Ranks, or groups of ranks, that each have data of their own, and over which gradients are averaged."""
        return self.trainer.world_size if self.device_mesh is None else self.device_mesh["data_parallel"].size()

    @property
    def _data_group(self) -> Any:
        return None if self.device_mesh is None else self.device_mesh["data_parallel"].get_group()

    # -- Lightning's hooks --------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int = 0) -> Tensor:
        """The microbatch's share of the loss of the whole optimizer step, times what Lightning divides by later."""
        result = self.compute_loss(batch)
        self.totals.microbatches.update(result.metrics)
        if batch.measures_mismatch and result.logprobs is not None:
            targets = batch.loss_inputs
            self.totals.mismatch.update(mismatch(result.logprobs, targets.rollout_logprobs, targets.mask))
        self.last_loss = result
        return result.loss * (self.trainer.accumulate_grad_batches * self.num_data_ranks)

    def on_validation_epoch_start(self) -> None:
        """Forget what the last validation collected."""
        self.held_out.reset(self.device, self._data_group)

    def validation_step(self, batch: Batch, batch_idx: int = 0) -> None:
        """Collect the objective's raw metrics on held-out trajectories, without learning from them."""
        result = self.compute_loss(batch)
        self.held_out.microbatches.update(result.metrics)
        targets = batch.loss_inputs
        zero = torch.zeros_like(targets.num_tokens)
        # the batch's share of the trajectories that its denominators count: the whole of them is one step
        share = targets.mask.sum() / targets.num_tokens
        self.held_out.steps.update({"step_count": share, "grad_norm": zero, "learning_rate": zero})

    def on_validation_epoch_end(self) -> None:
        """Reduce and log the objective's metrics, and what the data module observed of its held-out rollouts."""
        derived = self.held_out.compute()
        for of_training in ("loss/grad_norm", "loss/learning_rate"):
            derived.pop(of_training, None)
        told = {key: value for key, value in self.host_metrics.items() if key.startswith("val/")}
        self.log_dict({f"val/{key}": value for key, value in derived.items()} | told, sync_dist=True)
        self.host_metrics = {key: value for key, value in self.host_metrics.items() if key not in told}
        self._observed = [seen for seen in self._observed if not told.keys() & seen.keys()]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Measure the gradient before it is clipped, unless the strategy does."""
        used = float(optimizer.param_groups[0]["lr"])
        if not (math.isfinite(used) and used >= 0):
            raise InvalidArgumentError(
                f"the learning rate after {self.trainer.global_step} steps is {used}: lr_schedule must return a finite "
                "number of at least 0"
            )
        if not getattr(self.trainer.strategy, "notes_steps", False):
            self.note_step(gradient_norm(_gradients(optimizer)), used)
        self.is_updating = True

    def note_step(self, grad_norm: Tensor, used: float) -> None:
        """Note what one optimizer step is taken with, for the metrics of the call.

        A strategy whose gradients are not in `.grad` sets `notes_steps` and calls this itself, once for each step.

        Args:
            grad_norm: of the whole gradient, before it is clipped; the same on every rank.
            used: the learning rate.
        """
        self.last_grad_norm = norm = grad_norm.detach()
        share = 1.0 / self.num_data_ranks  # every rank takes the step, and what they tell is summed
        rate = torch.tensor(used * share, dtype=torch.float64)
        broken_at = torch.where(norm.isfinite(), torch.inf, self.trainer.global_step + 1.0)
        self._broken_at = broken_at if self._broken_at is None else torch.minimum(self._broken_at, broken_at)
        self.totals.steps.update(
            {
                "grad_norm": norm * share,
                "learning_rate": rate.to(norm.device, non_blocking=True),
                "step_count": torch.full_like(norm, share),
            }
        )
        self.totals.mark()

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as Lightning does; by norm also where gradients lie in pieces over meshes that differ."""
        grads = _gradients(optimizer)
        by_norm = gradient_clip_val is not None and gradient_clip_algorithm != "value"
        if by_norm and gradient_clip_val and any(isinstance(grad, DTensor) for grad in grads):
            assert self.last_grad_norm is not None  # measured just before
            clip_by_norm(grads, gradient_clip_val, self.last_grad_norm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_train_batch_end(self, *args: Any) -> None:
        """Tell the model which step it stands at."""
        self.is_updating = False
        self.model.step = self.trainer.global_step

    def on_train_epoch_start(self) -> None:
        """Forget the last call's raw metrics, but for those of a call that is run again from a step in its middle."""
        if not self.goes_on:
            self.totals.reset(self.device, self._data_group)
            self.is_exact = True
            self._broken_at = None
        if self.clock is not None and "reward/mean" in self.host_metrics:
            # Lightning's bars are drawn for the last time before the end of the epoch, where the others are known
            self.trainer.progress_bar_metrics["reward/mean"] = self.host_metrics["reward/mean"]

    def on_train_epoch_end(self) -> None:
        """Reduce the raw metrics, derive the public ones, hand them to callbacks, progress bar and loggers.

        Raises:
            NonFiniteGradientError: a step was taken with a gradient that is not finite.
        """
        if self.placeholder is not None:
            strategy: Any = self.trainer.strategy
            strategy.wait()  # for the last step's answer, before its numbers are told
        self._refuse_non_finite_gradients()
        self.call_metrics = self.host_metrics | self.totals.compute() | {"objective/exact": float(self.is_exact)}
        if self.clock is not None:  # after the totals, which wait for the device
            start, tokens = self.clock
            self.clock = None
            seconds = time.perf_counter() - start
            self.call_metrics |= {"time/train_s": seconds, "throughput/tokens_per_s": tokens / seconds}
            if self.device.type == "cuda":
                self.call_metrics["memory/peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        self._observed.clear()
        # these are Python floats that are reduced already; Module.log would make a metric object of each, every call
        trainer = self.trainer
        trainer.callback_metrics.update(self.validated)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in self.call_metrics.items()})
        shown = ("reward/mean", "loss/train", "mismatch/kl", "throughput/tokens_per_s")
        trainer.progress_bar_metrics.update(
            {name: self.call_metrics[name] for name in shown if name in self.call_metrics}
        )
        for logger in trainer.loggers:
            logger.log_metrics(self.call_metrics, step=trainer.global_step)
        self.model.told.note(trainer.loggers, self.call_metrics, trainer.global_step)

    def _refuse_non_finite_gradients(self) -> None:
        """Look once at what all steps noted, when the device is waited for anyway."""
        scales = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        if self._broken_at is None or scales or getattr(self.trainer.strategy, "skips_overflow", False):
            return  # a gradient scaler skips such steps by itself
        if math.isfinite(step := float(self._broken_at)):
            raise NonFiniteGradientError(
                f"the gradient of step {step:.0f} was not finite, so the weights are not since: go on from the newest "
                "checkpoint, as fit_rl does by itself, with a lower learning rate or gradient_clip_val"
            )

    def configure_optimizers(self) -> Any:
        """AdamW, and the schedule as a factor on its learning rate."""
        parameters = [self.placeholder] if self.placeholder is not None else self.policy.trained_parameters
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        optimizer = adamw(parameters, self.optimizer_settings, self.learning_rate, unscales=scaler is not None)
        schedule = self.lr_schedule or _constant
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def _constant(step: int) -> float:
    return 1.0


def _files(folder: Path) -> tuple[tuple[str, int, int, int], ...]:
    """What tells a folder from the same folder written again."""
    stats = [(path.name, path.stat()) for path in sorted(folder.iterdir())]
    return tuple((name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
