"""`LocalTrainer`: learn on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from lightning.pytorch.strategies import Strategy

from fitrl.data.groups import TrajectoryGroup
from fitrl.objective.objective import (
    CustomObjective,
    ImportanceSamplingLevel,
    KLEstimator,
    KLPlace,
    LossAggregation,
    Objective,
)
from fitrl.policy.model import TrainableModel
from fitrl.policy.optimizers import AdamWSettings
from fitrl.protocols.results import LocalTrainResult
from fitrl.protocols.verbs import PolicyTrainer
from fitrl.rollout.sampler import Sampler
from fitrl.strategies.verbs import PolicyVerbs
from fitrl.trainers.asynchronous import asynchronous
from fitrl.trainers.base import RLTrainer
from fitrl.trainers.settings import DEFAULT_CHUNK_SIZE, Reference, UpdateSettings, choose_objective


class LocalTrainer(RLTrainer):
    """Train in this process, with transformers and PEFT; a `lightning.Trainer`.

    Args:
        strategy: "fitrl_local", one device; started with `torchrun`, one process for each device, "fitrl_ddp" or, with
            the weights in pieces, "fitrl_fsdp2".
        optimizer: AdamW's settings, but for the learning rate; its moments may take 8 bits.
        lr_schedule: factor on the learning rate, by optimizer steps taken.
        compile: compile the decoder layers, one graph for all of them and all batch shapes; the first call takes some
            20 s longer.
        activation_checkpointing: keep only each decoder layer's input for backward, of compiled layers also what
            attention returned, and compute the rest again.
        sampler: a sampler to hand the new weights to, instead of the embedded one.
        **lightning_options: of `lightning.Trainer`: devices, precision, callbacks, logger, gradient_clip_val, ...

    Example:
        >>> with LocalTrainer(devices=1) as trainer:
        ...     groups = rollout(trainer.sampler(model), tasks, reward=my_reward)
        ...     result = trainer.fit_rl(model, groups, learning_rate=1e-5)  # doctest: +SKIP
    """

    backend: ClassVar[str] = "local"

    def __init__(
        self,
        *,
        strategy: str | Strategy = "fitrl_local",
        optimizer: AdamWSettings = AdamWSettings(),  # noqa: B008 - frozen
        lr_schedule: Callable[[int], float] | None = None,
        compile: bool = False,
        activation_checkpointing: bool = False,
        sampler: Sampler | None = None,
        **lightning_options: Any,
    ) -> None:
        super().__init__(
            strategy=strategy,
            optimizer=optimizer,
            lr_schedule=lr_schedule,
            compile=compile,
            activation_checkpointing=activation_checkpointing,
            sampler=sampler,
            **lightning_options,
        )

    def fit_rl(
        self,
        model: TrainableModel,
        groups: Iterable[TrajectoryGroup],
        *,
        learning_rate: float = 5e-6,
        ppo: bool = False,
        epsilon: float | None = None,
        epsilon_high: float | None = None,
        advantage_balance: float = 0.0,
        scale_rewards: bool = True,
        importance_sampling_level: ImportanceSamplingLevel = "token",
        max_negative_advantage_importance_sampling_weight: float | None = None,
        mask_prob_ratio: bool = False,
        kimi_k2_tau: float | None = None,
        precalculate_logprobs: bool = False,
        allow_training_without_logprobs: bool = False,
        plot_tensors: bool = False,
        truncated_importance_sampling: float | None = None,
        scale_learning_rate_by_reward_std_dev: bool = False,
        logprob_calculation_chunk_size: int = DEFAULT_CHUNK_SIZE,
        save_checkpoint: bool = True,
        verbose: bool = False,
        loss_aggregation: LossAggregation = "token_mean",
        num_minibatches: int = 1,
        num_epochs: int = 1,
        seed: int = 0,
        norm_length: float | None = None,
        dual_clip: float | None = None,
        ratio_cap: float | None = None,
        kl_coef: float = 0.0,
        kl_in: KLPlace = "loss",
        kl_estimator: KLEstimator | None = None,
        reference: Reference | None = None,
        entropy_coef: float = 0.0,
        max_tokens_per_microbatch: int | None = None,
        num_trajectories_learning_rate_multiplier_power: float = 0.0,
        objective: CustomObjective | None = None,
    ) -> LocalTrainResult:
        """Teach the model from groups: one Lightning epoch of `num_epochs * num_minibatches` optimizer steps.

        Groups whose rewards are all equal teach nothing and are dropped and counted; when nothing is left,
        `num_optimizer_steps` is 0 and nothing changes.

        Args:
            model: the policy; opened, and resumed from its newest checkpoint, when it is not open yet.
            groups: trajectories with rewards, compared within their group.
            learning_rate: of AdamW, before `lr_schedule` and the two rules below.
            ppo: PPO's pessimistic clip instead of CISPO.
            epsilon: the ratio window starts at 1 - epsilon; None: 0.2 for PPO, 1.0 for CISPO.
            epsilon_high: the window ends at 1 + epsilon_high; None: epsilon for PPO, 4.0 for CISPO.
            advantage_balance: in [-1, 1]; above 0 negative advantages count less, below 0 positive ones.
            scale_rewards: divide advantages by the group's standard deviation.
            importance_sampling_level: ratio per token, sequence, or an average of both.
            max_negative_advantage_importance_sampling_weight: cap of the ratio where the advantage is negative.
            mask_prob_ratio: tokens whose ratio is outside the window teach nothing.
            kimi_k2_tau: subtract tau times the log ratio from the advantage.
            precalculate_logprobs: recompute the old logprobs with the trainer before the first step.
            allow_training_without_logprobs: accept trajectories without rollout logprobs, with ratio 1.
            plot_tensors: write a picture of the first step's packed tensors to `<run>/plots/<step>.png`.
            truncated_importance_sampling: cap of the trainer-versus-sampler weight; needs `precalculate_logprobs`.
            scale_learning_rate_by_reward_std_dev: lower the rate as the rewards' spread falls.
            logprob_calculation_chunk_size: rows of logits at once in passes without a gradient.
            save_checkpoint: save `<run>/checkpoints/<step>/`, resumable, loadable by transformers or PEFT.
            verbose: print a line per call to standard error.
            loss_aggregation: how token losses become one number, see `policy_loss`.
            num_minibatches: optimizer steps per epoch; whole groups are dealt to them.
            num_epochs: passes over the groups.
            seed: of the dealing, together with the step and the epoch.
            norm_length: constant length of "seq_mean_token_sum_norm".
            dual_clip: PPO only, bounds the loss where the advantage is negative.
            ratio_cap: PPO only, caps the ratio of the unclipped branch.
            kl_coef: weight of the KL to `reference`.
            kl_in: "loss" or "advantage".
            kl_estimator: "k1", "k2", "k3"; None: k2 in the loss, k1 in the advantage.
            reference: "base", a step of this run, or a checkpoint folder.
            entropy_coef: weight of the entropy bonus.
            max_tokens_per_microbatch: most positions in a microbatch; longer trajectories are dropped and counted.
                None: what fits.
            num_trajectories_learning_rate_multiplier_power: rate times (trajectories trained on) to this power.
            objective: a custom objective instead of the above.

        Raises:
            InvalidArgumentError: a value out of range, a contradiction, or an option that could have no effect.
            UnknownArgumentError: an argument of another backend.
            DataError: groups that cannot be learned from as they are; the message says which trajectory.
            CheckpointError: the reference or the new checkpoint cannot be read or written.
        """
        settings = UpdateSettings(
            learning_rate=learning_rate,
            objective=choose_objective(
                objective,
                Objective(
                    ppo=ppo,
                    epsilon=epsilon,
                    epsilon_high=epsilon_high,
                    importance_sampling_level=importance_sampling_level,
                    max_negative_advantage_importance_sampling_weight=max_negative_advantage_importance_sampling_weight,
                    mask_prob_ratio=mask_prob_ratio,
                    kimi_k2_tau=kimi_k2_tau,
                    truncated_importance_sampling=truncated_importance_sampling,
                    dual_clip=dual_clip,
                    ratio_cap=ratio_cap,
                    kl_coef=kl_coef,
                    kl_estimator=kl_estimator,
                    kl_in=kl_in,
                    entropy_coef=entropy_coef,
                    loss_aggregation=loss_aggregation,
                    norm_length=norm_length,
                ),
            ),
            advantage_balance=advantage_balance,
            scale_rewards=scale_rewards,
            precalculate_logprobs=precalculate_logprobs,
            allow_training_without_logprobs=allow_training_without_logprobs,
            plot_tensors=plot_tensors,
            scale_learning_rate_by_reward_std_dev=scale_learning_rate_by_reward_std_dev,
            logprob_calculation_chunk_size=logprob_calculation_chunk_size,
            save_checkpoint=save_checkpoint,
            verbose=verbose,
            num_minibatches=num_minibatches,
            num_epochs=num_epochs,
            seed=seed,
            reference=reference,
            max_tokens_per_microbatch=max_tokens_per_microbatch,
            num_trajectories_learning_rate_multiplier_power=num_trajectories_learning_rate_multiplier_power,
        )
        return self._update(model, groups, settings)

    fit_rl_async = asynchronous(fit_rl)

    @property
    def verbs(self) -> PolicyVerbs:
        """The strategy, typed."""
        return self.local_verbs

    def open(self, model: TrainableModel) -> PolicyTrainer:
        """Set a model up for training and return all the verbs; see `SessionTrainer.open`."""
        super().open(model)
        return self.local_verbs
