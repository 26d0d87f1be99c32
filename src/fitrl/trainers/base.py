"""`RLTrainer`: a `lightning.Trainer` that learns from groups; the machinery behind `fit_rl`.

One call, in reading order: open the model (resume its newest checkpoint) -> groups to samples -> old and reference
logprobs -> minibatches and microbatches -> one Lightning epoch -> checkpoint -> result. With several ranks every one
makes the same plan and trains its share of it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from fitrl.data.batch import Feed
from fitrl.data.groups import TrajectoryGroup
from fitrl.data.host import by_one_thread
from fitrl.data.join import join_groups
from fitrl.data.samples import SampleSet, build_samples
from fitrl.errors import (
    DataError,
    NonFiniteGradientError,
    OutOfMemoryError,
    RankLostError,
    SessionError,
)
from fitrl.policy.model import TrainableModel
from fitrl.policy.plots import plot_batches
from fitrl.protocols.results import LocalTrainResult, TrainResult
from fitrl.trainers.interrupts import Stop
from fitrl.trainers.learning_rate import num_trajectories_factor, reward_std_factor
from fitrl.trainers.memory import halve
from fitrl.trainers.plan import Plan, plan_call, plan_rest
from fitrl.trainers.session import SessionTrainer
from fitrl.trainers.settings import UpdateSettings


class RLTrainer(SessionTrainer):
    """A trainer that computes what is learned from groups itself; see `SessionTrainer` for its own arguments."""

    def _update(
        self, model: TrainableModel, groups: Iterable[TrajectoryGroup], settings: UpdateSettings
    ) -> LocalTrainResult:
        """Everything that a local `fit_rl` does once its arguments are checked."""
        result, checkpoint = self._call(model, groups, settings)
        return LocalTrainResult(
            step=result.step,
            metrics=result.metrics,
            num_optimizer_steps=result.num_optimizer_steps,
            dropped=result.dropped,
            checkpoint_path=None if checkpoint is None else Path(checkpoint),
        )

    def _call(
        self, model: TrainableModel, groups: Iterable[TrajectoryGroup], settings: UpdateSettings
    ) -> tuple[TrainResult, str | None]:
        """Everything that `fit_rl` does once its arguments are checked: what every backend tells, and what it saved."""
        return self._one_call(lambda: self._update_alone(model, list(groups), settings))

    def _update_alone(
        self, model: TrainableModel, groups: Sequence[TrajectoryGroup], settings: UpdateSettings
    ) -> tuple[TrainResult, str | None]:
        self._check_limits()
        samples = self._collect(model, groups, settings)
        module = self._require_session().module
        history = [*module.reward_history, (self.global_step, samples.reward_std)]
        before = self.global_step
        checkpoint = None
        metrics = samples.metrics | {"objective/exact": 1.0}
        stop = self._interrupts.agree()
        if samples.groups and not stop:
            self._train(samples, settings, history)
            metrics = module.call_metrics
            start = time.perf_counter()
            if settings.save_checkpoint and self.global_step > before:
                checkpoint = self._save()
            metrics = metrics | {"time/checkpoint_s": time.perf_counter() - start}
        elif not stop:
            module.reward_history = history
        stop = self._interrupts.agree()  # once more: it may have come while the checkpoint was written
        if stop is Stop.SIGNALLED:
            self._say_where_to_resume(self._save())
        result = TrainResult(
            step=self.global_step,
            metrics=metrics,
            num_optimizer_steps=self.global_step - before,
            dropped=samples.dropped,
        )
        if settings.verbose and self.is_global_zero:
            print(f"{self.backend} {_line(result)}", file=sys.stderr)
        return result, checkpoint

    def _collect(self, model: TrainableModel, groups: Sequence[TrajectoryGroup], settings: UpdateSettings) -> SampleSet:
        """Open the model, join the ranks' groups and read them; nothing changes before they are known to be sound."""
        self.open(model)
        if self.verbs.get_status().accumulated_microbatches:
            raise SessionError("gradients of forward_backward are waiting: call optim_step or clear_gradients first")
        with by_one_thread(self.strategy.root_device):
            samples = self._read(join_groups(groups), settings)
        if not samples.full_support and not settings.precalculate_logprobs:
            raise DataError(
                "tokens were sampled with top_p < 1 or top_k, so their logprobs are of another distribution than the "
                "policy's: pass precalculate_logprobs=True, or sample from all tokens"
            )
        return samples

    def _read(self, groups: Sequence[TrajectoryGroup], settings: UpdateSettings) -> SampleSet:
        """Tokens and advantages of the groups, as the open policy reads them."""
        policy = self._require_session().module.policy
        return build_samples(
            groups,
            policy.tokenizer,
            vocabulary_size=policy.vocabulary_size,
            scale_rewards=settings.scale_rewards,
            advantage_balance=settings.advantage_balance,
            max_history_tokens=policy.context_length,
            max_trajectory_tokens=settings.max_tokens_per_microbatch,
            padded=not policy.can_pack,
            teaches_without_advantage=settings.teaches_without_advantage,
            train_unsampled=settings.allow_training_without_logprobs,
        )

    def _plan(self, samples: SampleSet, settings: UpdateSettings) -> Plan:
        """The microbatches of a call."""
        return plan_call(samples, settings, self.local_verbs)

    def _train(self, samples: SampleSet, settings: UpdateSettings, history: list[tuple[int, float]]) -> None:
        """Plan the call, run it as one epoch, hand the new weights to the sampler; leaves `call_metrics`."""
        session = self._require_session()
        module, device = session.module, self.strategy.root_device
        with session.lock:
            start = time.perf_counter()
            with by_one_thread(device):
                plan = self._plan(samples, settings)
            self._check_max_steps(plan.num_steps)
            rate = settings.learning_rate * num_trajectories_factor(
                samples.num_trajectories, settings.num_trajectories_learning_rate_multiplier_power
            )
            if settings.scale_learning_rate_by_reward_std_dev:
                rate *= reward_std_factor(history)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            module.host_metrics = samples.metrics | plan.metrics
            module.objective = settings.objective
            module.clock = (start, samples.metrics["data/num_tokens"] * settings.num_epochs)
            self.verbs.set_learning_rate(rate)
            try:
                plan = self._take_steps(samples, settings, plan)
            except NonFiniteGradientError:
                self._give_up()  # nothing of this may be saved
                raise
            except RankLostError:
                self._release()
                raise
            finally:  # also after an exception: the steps before it were taken, but for those that were given up
                session.model.step = self.global_step if self._session is session else self._resumes_at(session.model)
                self._publish()
        module.reward_history = history
        if settings.plot_tensors:
            path = session.model.run_dir / "plots" / f"{self.global_step:04d}.png"
            plot_batches([microbatch.build() for microbatch in plan.microbatches[: plan.accumulate]], path)

    def _take_steps(self, samples: SampleSet, settings: UpdateSettings, plan: Plan) -> Plan:
        """All steps of a call; after one that did not fit into memory, the rest by smaller microbatches."""
        module = self._require_session().module
        try:
            while True:
                try:
                    try:
                        made = [microbatch.build for microbatch in plan.microbatches]
                        feed = Feed(made, device=self.strategy.root_device)
                        self._run_epoch(module, feed, accumulate=plan.accumulate)
                    finally:
                        if self.verbs.is_live:
                            self.verbs.clear_gradients()  # of a step that a callback stopped in its middle
                    return plan
                except torch.OutOfMemoryError as error:
                    if module.is_updating:
                        self._release()  # as above
                        raise OutOfMemoryError(
                            "the optimizer's step does not fit into the device's memory: "
                            "AdamWSettings(moments='8bit') or 'paged', or LoRA, need less"
                        ) from error
                    tried = max(microbatch.num_positions for microbatch in plan.microbatches)
                    halve(tried, samples.flat, module, error)
                module.goes_on = True
                module.totals.rewind()
                plan = plan_rest(plan, samples, settings, self.local_verbs)
                module.host_metrics = samples.metrics | plan.metrics
        finally:
            module.goes_on = module.is_updating = False


def _line(result: TrainResult) -> str:
    """What `verbose` prints of a call."""
    shown = ("reward/mean", "loss/train", "loss/grad_norm", "mismatch/kl", "throughput/tokens_per_s")
    numbers = "".join(f"  {key} {result.metrics[key]:.4g}" for key in shown if key in result.metrics)
    return f"step {result.step}{numbers}" + (f"  dropped {result.dropped}" if result.dropped else "")
