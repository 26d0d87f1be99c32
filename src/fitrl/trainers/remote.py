"""`RemoteTrainer`: `fit_rl` where the policy lives on a service; the call is `RLTrainer`'s.

Enters: groups. Leaves: one microbatch per optimizer step, which the strategy submits; the service cuts it as it likes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from fitrl.data.groups import TrajectoryGroup
from fitrl.data.packing import Microbatch, deal, microbatches
from fitrl.data.samples import SampleSet, build_samples
from fitrl.errors import DataError, InvalidArgumentError
from fitrl.policy.model import TrainableModel
from fitrl.policy.optimizers import AdamWSettings
from fitrl.rollout.sampler import Sampler
from fitrl.strategies.remote import RemoteStrategy
from fitrl.trainers.base import RLTrainer
from fitrl.trainers.plan import Plan
from fitrl.trainers.settings import UpdateSettings


class RemoteTrainer(RLTrainer):
    """A trainer whose strategy is a `RemoteStrategy`; subclasses are backends.

    Args:
        strategy: which service, and how it is reached.
        optimizer: AdamW's settings, but for the learning rate.
        lr_schedule: factor on the learning rate, by optimizer steps taken.
        **lightning_options: of `lightning.Trainer`.

    Attributes:
        temperature: the only one that can be learned from; None: any.
    """

    strategy_kind: ClassVar[type[Any]] = RemoteStrategy
    temperature: ClassVar[float | None] = 1.0

    def __init__(
        self,
        *,
        strategy: RemoteStrategy,
        optimizer: AdamWSettings = AdamWSettings(),  # noqa: B008 - frozen
        lr_schedule: Callable[[int], float] | None = None,
        **lightning_options: Any,
    ) -> None:
        for name in ("compile", "activation_checkpointing", "sampler"):
            if name in lightning_options:
                raise InvalidArgumentError(f"{type(self).__name__} takes no {name}: the policy is on a service")
        lightning_options.pop("enable_model_summary", None)
        super().__init__(
            strategy=strategy,
            optimizer=optimizer,
            lr_schedule=lr_schedule,
            compile=False,
            activation_checkpointing=False,
            sampler=None,
            enable_model_summary=False,  # of one placeholder
            **lightning_options,
        )

    @property
    def remote_verbs(self) -> RemoteStrategy:
        """The strategy, typed."""
        assert isinstance(self.strategy, RemoteStrategy)  # checked at construction
        return self.strategy

    def sampler(self, model: TrainableModel, *, own_weights: bool = False) -> Sampler:
        """The service's sampler of a model; see the backend for when it moves to new weights.

        Args:
            model: whose.
            own_weights: a service's sampler has weights of its own in any case.
        """
        self.open(model)
        return self.remote_verbs.newest_sampler()

    def _publish(self) -> None:
        """Nothing: the backend says when its sampler moves to new weights."""

    def _saved(self) -> str | None:
        return self.remote_verbs.newest() if self.global_step else None

    def _resumes_at(self, model: TrainableModel) -> int:
        return self.global_step  # the strategy went back to what the service had saved

    def _read(self, groups: Sequence[TrajectoryGroup], settings: UpdateSettings) -> SampleSet:
        samples = build_samples(
            groups,
            self.remote_verbs.tokenizer,
            scale_rewards=settings.scale_rewards,
            advantage_balance=settings.advantage_balance,
            max_history_tokens=self.remote_verbs.context_length,
            teaches_without_advantage=settings.teaches_without_advantage,
        )
        if not samples.full_support:
            raise DataError(
                f"tokens were sampled with top_p < 1 or top_k, and the backend {self.backend!r} cannot recompute their "
                "logprobs: sample from all tokens, or train with LocalTrainer and precalculate_logprobs=True"
            )
        for sample in samples.flat:
            for history in sample.histories:
                temperatures = set(history.temperature[history.mask].tolist())
                if self.temperature is not None and temperatures - {self.temperature}:
                    raise DataError(
                        f"tokens were sampled with temperature {sorted(temperatures)}, and the backend "
                        f"{self.backend!r} knows their probabilities at {self.temperature} only: sample with "
                        f"temperature={self.temperature}, or train with LocalTrainer"
                    )
        return samples

    def _plan(self, samples: SampleSet, settings: UpdateSettings) -> Plan:
        first_step = self.global_step
        made: list[Microbatch] = []
        for epoch in range(settings.num_epochs):
            for indices in deal(
                len(samples.groups), settings.num_minibatches, seed=settings.seed, step=first_step, epoch=epoch
            ):
                made += microbatches(
                    [sample for index in indices for sample in samples.groups[index]],
                    layout="packed",
                    skip_zero_advantage=settings.skips_zero_advantage,
                    measures_mismatch=not made,
                )
        counts = [(each.num_input_tokens, each.num_positions, each.num_tokens_saved) for each in made]
        return Plan(microbatches=made, accumulate=1, first_step=first_step, kl_mean=None, counts=counts)
