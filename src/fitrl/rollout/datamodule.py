"""`RolloutDataModule`: rollouts as a Lightning data source, for `trainer.fit(PolicyModule(...), datamodule=...)`."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator, Sequence
from typing import Any

import lightning

from fitrl.data import ranks
from fitrl.data.batch import Batch
from fitrl.data.groups import TrajectoryGroup
from fitrl.data.join import join_groups
from fitrl.data.packing import pack
from fitrl.data.samples import build_samples
from fitrl.errors import DataError, InvalidArgumentError, UnsupportedError
from fitrl.objective.objective import Objective, teaches_without_advantage
from fitrl.policy.lending import own_copy
from fitrl.policy.module import PolicyModule
from fitrl.policy.policy import Policy
from fitrl.rollout.attempts import OnWeightChange
from fitrl.rollout.pipeline import RolloutPipeline
from fitrl.rollout.rollout import Agent, Reward, Task, rollout
from fitrl.rollout.sampler import Sampler
from fitrl.rollout.transformers import TransformersSampler

_MAX_FLAT_DRAWS = 10


class RolloutDataModule(lightning.LightningDataModule):
    """Sample groups with the policy that is being trained, one set of tasks per optimizer step.

    Each optimizer step draws `tasks_per_step` tasks, attempts each `group_size` times, and packs the trainable
    trajectories into as many microbatches as the trainer accumulates.

    Args:
        tasks: to learn from, see `rollout`.
        reward: `reward(task, trajectory) -> float`.
        val_tasks: held-out tasks for validation; none: no validation.
        tasks_per_step: tasks per optimizer step.
        group_size: attempts per task.
        steps_per_epoch: optimizer steps in a Lightning epoch.
        agent: see `rollout`.
        max_new_tokens: longest answer, in tokens.
        temperature: sampling temperature.
        scale_rewards: see `fit_rl`.
        advantage_balance: see `fit_rl`.
        seed: of the drawing of tasks.
        max_steps_off_policy: 0 samples a step's groups when they are asked for, with the policy as it is then. More
            samples them beside the training of earlier steps, with a copy of the weights, at most so many steps
            behind: by a `RolloutPipeline`, kept in memory. Lightning's checkpoints hold which of its groups were
            trained on, so that a fit that is resumed goes on with the others, which are sampled anew.
        max_concurrency: how many attempts run at once beside training; None: all.
        max_resamples_of_flat_groups: of that pipeline, see `RolloutPipeline`; without one, what is flat is drawn again
            by the step.
        on_weight_change: of that pipeline.
        max_retries: of that pipeline.
        attempt_timeout_s: of that pipeline.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        reward: Reward,
        *,
        val_tasks: Sequence[Task] = (),
        tasks_per_step: int = 8,
        group_size: int = 8,
        steps_per_epoch: int = 10,
        agent: Agent | None = None,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        scale_rewards: bool = True,
        advantage_balance: float = 0.0,
        seed: int = 0,
        max_steps_off_policy: int = 0,
        max_concurrency: int | None = None,
        max_resamples_of_flat_groups: int = 0,
        on_weight_change: OnWeightChange = "continue",
        max_retries: int = 2,
        attempt_timeout_s: float | None = 3600.0,
    ) -> None:
        super().__init__()
        if not tasks:
            raise InvalidArgumentError("tasks is empty: there is nothing to attempt")
        for name, value in (
            ("tasks_per_step", tasks_per_step),
            ("group_size", group_size),
            ("steps_per_epoch", steps_per_epoch),
        ):
            if value < 1:
                raise InvalidArgumentError(f"{name} must be at least 1, got {value}")
        if max_steps_off_policy < 0:
            raise InvalidArgumentError(f"max_steps_off_policy must be at least 0, got {max_steps_off_policy}")
        self._beside: dict[str, Any] = {
            "max_concurrency": max_concurrency,
            "max_resamples_of_flat_groups": max_resamples_of_flat_groups,
            "on_weight_change": on_weight_change,
            "max_retries": max_retries,
            "attempt_timeout_s": attempt_timeout_s,
        }
        defaults = inspect.signature(RolloutPipeline).parameters
        given = [name for name, value in self._beside.items() if value != defaults[name].default]
        if max_steps_off_policy == 0 and given:
            raise InvalidArgumentError(f"{' and '.join(given)} have no effect with max_steps_off_policy=0")
        self.tasks = list(tasks)
        self.val_tasks = list(val_tasks)
        self.reward = reward
        self.tasks_per_step = min(tasks_per_step, len(tasks))
        self.group_size = group_size
        self.steps_per_epoch = steps_per_epoch
        self.agent = agent
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.scale_rewards = scale_rewards
        self.advantage_balance = advantage_balance
        self.seed = seed
        self.max_steps_off_policy = max_steps_off_policy
        self._pipeline: RolloutPipeline | None = None
        self._stands: dict[str, Any] = {}  # where the pipeline of an earlier fit ended

    def train_dataloader(self) -> _Rollouts:
        """Microbatches, sampled when they are asked for."""
        return _Rollouts(self, self.tasks, self.steps_per_epoch, train=True)

    def val_dataloader(self) -> Any:
        """One batch of attempts at the held-out tasks; empty without them."""
        return _Rollouts(self, self.val_tasks, 1, train=False) if self.val_tasks else []

    def groups(self, tasks: Sequence[Task], step: int) -> list[TrajectoryGroup]:
        """Attempt tasks with the policy as it is now."""
        self._module()
        assert self.trainer is not None  # a data source is asked by its trainer
        strategy: Any = self.trainer.strategy
        sampler: Sampler
        if _is_remote(strategy):
            sampler = strategy.newest_sampler()
        else:
            # where the weights lie in pieces, each rank samples on its own
            sampler = TransformersSampler(
                self._whole_policy(), version=step, context=strategy.precision_plugin.forward_context
            )
        return rollout(
            sampler,
            tasks,
            reward=self.reward,
            group_size=self.group_size,
            agent=self.agent,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
        )

    def newest_groups(self, step: int) -> list[TrajectoryGroup]:
        """The next groups of the pipeline, after handing it the weights as they are now.

        Raises:
            UnsupportedError: the weights are on a service.
        """
        module = self._module()
        assert self.trainer is not None  # as above
        strategy: Any = self.trainer.strategy
        if _is_remote(strategy):
            raise UnsupportedError(
                "RolloutDataModule(max_steps_off_policy=...) samples with a copy of the weights, which are on a "
                "service: use a RolloutPipeline and fit_rl"
            )
        if self._pipeline is None:
            copied = strategy.copied_policy() if hasattr(strategy, "copied_policy") else own_copy(module.policy)
            sampler = TransformersSampler(
                copied,
                version=-1,  # of no weights yet
                context=strategy.precision_plugin.forward_context,
                own_weights=True,
            )
            self._pipeline = RolloutPipeline(
                sampler,
                self.tasks,
                reward=self.reward,
                group_size=self.group_size,
                groups_per_step=self.tasks_per_step,
                max_steps_off_policy=self.max_steps_off_policy,
                agent=self.agent,
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                **self._beside,
                seed=self.seed,
            )
            self._pipeline.load_state_dict(self._stands)
        if self._pipeline.sampler.version != step:
            if hasattr(strategy, "take_weights_back"):
                strategy.take_weights_back()
            self._pipeline.sampler.update(module.named_weights(), step)
        groups = join_groups(next(self._pipeline))
        module.observe(self._pipeline.metrics())
        return groups

    def teardown(self, stage: str) -> None:
        """End the rollouts that are under way."""
        if self._pipeline is not None and stage == "fit":
            self._stands = self._pipeline.state_dict()
            self._pipeline.close()
            self._pipeline = None

    def state_dict(self) -> dict[str, Any]:
        """Which groups of the pipeline were trained on, for Lightning's checkpoints; nothing without one."""
        return self._stands if self._pipeline is None else self._pipeline.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the others, from the next fit on."""
        self._stands = state_dict

    def on_exception(self, exception: BaseException) -> None:
        """End the rollouts that are under way."""
        self.teardown("fit")

    def batches(self, groups: Sequence[TrajectoryGroup], num_batches: int, *, train: bool) -> list[Batch]:
        """This rank's microbatches of groups; none when nothing in them can teach."""
        module = self._module()
        strategy: Any = self.trainer.strategy if self.trainer is not None else None
        policy = strategy if _is_remote(strategy) else module.policy
        samples = build_samples(
            groups,
            policy.tokenizer,
            vocabulary_size=None if _is_remote(strategy) else policy.vocabulary_size,
            scale_rewards=self.scale_rewards,
            advantage_balance=self.advantage_balance,
            max_history_tokens=policy.context_length,
            teaches_without_advantage=not train or teaches_without_advantage(module.objective),
        )
        prefix = "" if train else "val/"
        module.observe({f"{prefix}{key}": value for key, value in samples.metrics.items()})
        if not samples.groups:
            return []
        batches = pack(
            samples.flat,
            num_batches=num_batches * ranks.num_data_ranks(),
            measures_mismatch=train,
            **_layout(None if _is_remote(strategy) else policy),
        )
        fillers = [batches[0].filler() for _ in range(num_batches * ranks.num_data_ranks() - len(batches))]
        return ranks.share_of(batches + fillers)

    def _whole_policy(self) -> Policy:
        """The policy with its weights put together, until the next step; a collective where they lie in pieces."""
        assert self.trainer is not None  # as above
        strategy: Any = self.trainer.strategy
        if hasattr(strategy, "lend_weights"):
            strategy.lend_weights()
        policy: Policy = getattr(strategy, "lent_policy", None) or self._module().policy
        return policy

    def _module(self) -> PolicyModule:
        module = self.trainer.lightning_module if self.trainer is not None else None
        if not isinstance(module, PolicyModule):
            raise DataError(f"RolloutDataModule samples with a PolicyModule, got {type(module).__name__}")
        objective = module.objective
        if isinstance(objective, Objective) and objective.kl_coef > 0:
            raise InvalidArgumentError("RolloutDataModule computes no reference logprobs; use fit_rl for kl_coef > 0")
        if isinstance(objective, Objective) and objective.truncated_importance_sampling is not None:
            raise InvalidArgumentError(
                "RolloutDataModule recomputes no old logprobs, so truncated_importance_sampling has no effect; use "
                "fit_rl(precalculate_logprobs=True)"
            )
        return module


class _Rollouts:
    """A sized, re-iterable loader that samples one optimizer step at a time."""

    def __init__(self, data: RolloutDataModule, tasks: Sequence[Task], steps: int, *, train: bool) -> None:
        self._data, self._tasks, self._steps, self._train = data, tasks, steps, train

    @property
    def _per_step(self) -> int:
        trainer = self._data.trainer
        return trainer.accumulate_grad_batches if self._train and trainer is not None else 1

    def __len__(self) -> int:
        return self._steps * self._per_step

    def __iter__(self) -> Iterator[Batch]:
        if not self._train:
            yield from self._data.batches(self._data.groups(self._tasks, 0), 1, train=False)
            return
        for _ in range(self._steps):
            yield from self._step()

    def _step(self) -> list[Batch]:
        data = self._data
        assert data.trainer is not None
        step = data.trainer.global_step
        for draw in range(_MAX_FLAT_DRAWS):
            if data.max_steps_off_policy:
                groups = data.newest_groups(step)
            else:
                chosen = random.Random(f"{data.seed}/{step}/{draw}").sample(self._tasks, data.tasks_per_step)
                groups = data.groups(chosen, step)
            batches = data.batches(groups, self._per_step, train=True)
            if batches:
                return batches
        raise DataError(
            f"{_MAX_FLAT_DRAWS} draws of {data.tasks_per_step} tasks gave only groups whose rewards are all equal: the "
            "tasks are too easy or too hard for this policy, or group_size is too small"
        )


def _is_remote(strategy: Any) -> bool:
    """Whether a strategy's policy lives on a service."""
    return bool(getattr(strategy, "policy_is_remote", False))


def _layout(policy: Policy | None) -> dict[str, Any]:
    """How `pack` lays out a batch; a service is sent one history after the other."""
    if policy is None:
        return {"layout": "packed"}
    return {
        "layout": "auto" if policy.can_pack else "padded",
        "share_prefixes": policy.can_share,
        "hidden_size": policy.hidden_size,
        "on_gpu": policy.skips_hidden_keys,
    }
