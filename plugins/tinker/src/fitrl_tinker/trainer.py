"""`TinkerTrainer`: learn on the Tinker service."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from fitrl.data.groups import TrajectoryGroup
from fitrl.errors import InvalidArgumentError, UnsupportedError
from fitrl.objective.objective import ImportanceSamplingLevel, LossAggregation, Objective
from fitrl.policy.model import TrainableModel
from fitrl.policy.optimizers import AdamWSettings
from fitrl.protocols.results import TrainResult
from fitrl.trainers.asynchronous import asynchronous
from fitrl.trainers.remote import RemoteTrainer
from fitrl.trainers.settings import DEFAULT_CHUNK_SIZE, UpdateSettings
from fitrl_tinker.sampler import TinkerSampler
from fitrl_tinker.states import TinkerState
from fitrl_tinker.strategy import DEFAULT_TIMEOUT_S, TinkerStrategy


@dataclass(frozen=True, slots=True, kw_only=True)
class TinkerTrainResult(TrainResult):
    """What `TinkerTrainer.fit_rl` returns.

    Attributes:
        checkpoint_path: `tinker://...` of the saved state; None with `save_checkpoint=False` or without a step.
        deployed: whether the sampler was moved to the new weights.
    """

    checkpoint_path: str | None = None
    deployed: bool = False


class TinkerTrainer(RemoteTrainer):
    """Train LoRA adapters on the Tinker service; a `lightning.Trainer` that holds no weights.

    Args:
        base_url: address; None: TINKER_BASE_URL, else the hosted service.
        api_key: None: TINKER_API_KEY. A server on this machine may go without.
        lora_seed: of the adapters' random half; None: `TrainableModel.lora.seed`.
        timeout: most seconds that any request may take; a large model may take minutes to be loaded.
        optimizer: AdamW's settings, but for the learning rate.
        lr_schedule: factor on the learning rate, by optimizer steps taken.
        **lightning_options: of `lightning.Trainer`: callbacks, logger, gradient_clip_val, ...

    Raises:
        InvalidArgumentError: no API key, one that is none, or an address that would send it unencrypted.

    Example:
        >>> with TinkerTrainer() as trainer:
        ...     groups = rollout(trainer.sampler(model), tasks, reward=my_reward)
        ...     result = trainer.fit_rl(model, groups, learning_rate=1e-5, deploy_checkpoint=True)  # doctest: +SKIP
    """

    backend: ClassVar[str] = "tinker"

    def __init__(
        self,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        lora_seed: int | None = None,
        timeout: float = DEFAULT_TIMEOUT_S,
        optimizer: AdamWSettings = AdamWSettings(),  # noqa: B008 - frozen
        lr_schedule: Callable[[int], float] | None = None,
        **lightning_options: Any,
    ) -> None:
        if "strategy" in lightning_options:
            raise InvalidArgumentError("TinkerTrainer takes no strategy: it makes its own")
        super().__init__(
            strategy=TinkerStrategy(base_url=base_url, api_key=api_key, lora_seed=lora_seed, timeout=timeout),
            optimizer=optimizer,
            lr_schedule=lr_schedule,
            **lightning_options,
        )

    @property
    def tinker_strategy(self) -> TinkerStrategy:
        """The strategy, typed."""
        assert isinstance(self.strategy, TinkerStrategy)  # made at construction
        return self.strategy

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
        save_checkpoint: bool = True,
        deploy_checkpoint: bool = False,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = False,
        verbose: bool = False,
        loss_aggregation: LossAggregation = "token_mean",
        num_minibatches: int = 1,
        num_epochs: int = 1,
        seed: int = 0,
    ) -> TinkerTrainResult:
        """Teach the model from groups: one Lightning epoch of `num_epochs * num_minibatches` optimizer steps.

        Groups whose rewards are all equal teach nothing and are dropped and counted; when nothing is left,
        `num_optimizer_steps` is 0 and nothing changes. If the service fails in the middle, an error says so; the next
        call goes on from the newest saved state, at its step.

        Args:
            model: the policy; opened, and resumed from its newest state, when it is not open yet.
            groups: trajectories with rewards, compared within their group; sampled with temperature 1.
            learning_rate: of AdamW, before `lr_schedule`.
            ppo: PPO's pessimistic clip instead of CISPO.
            epsilon: the ratio window starts at 1 - epsilon; None: 0.2 for PPO, 1.0 for CISPO.
            epsilon_high: the window ends at 1 + epsilon_high; None: epsilon for PPO, 4.0 for CISPO.
            advantage_balance: in [-1, 1]; above 0 negative advantages count less, below 0 positive ones.
            scale_rewards: divide advantages by the group's standard deviation.
            importance_sampling_level: ratio per token, sequence, or an average of both; all but "token", and
                "sequence" with PPO, take a second pass.
            save_checkpoint: save the state on the service, resumable.
            deploy_checkpoint: move the sampler to the new weights. Without it the sampler keeps the older ones.
            train_mlp: whether MLP layers get adapters; fixed at a run's first call.
            train_attn: whether attention layers do.
            train_unembed: whether the output layer does.
            verbose: print a line per call to standard error.
            loss_aggregation: how token losses become one number, see `fitrl.policy_loss`.
            num_minibatches: optimizer steps per epoch; whole groups are dealt to them.
            num_epochs: passes over the groups.
            seed: of the dealing, together with the step and the epoch.

        Raises:
            InvalidArgumentError: a value out of range, a contradiction, or an option that could have no effect.
            UnknownArgumentError: an argument of another backend.
            DataError: groups that cannot be learned from as they are; the message says which trajectory.
            ServiceError: the service failed, or did not answer in time.
        """
        if loss_aggregation == "seq_mean_token_sum_norm":
            raise UnsupportedError(
                "loss_aggregation='seq_mean_token_sum_norm' needs norm_length, which the backend 'tinker' does not "
                "take: use 'seq_mean_token_sum', which differs by that factor, or LocalTrainer"
            )
        settings = UpdateSettings(
            learning_rate=learning_rate,
            objective=Objective(
                ppo=ppo,
                epsilon=epsilon,
                epsilon_high=epsilon_high,
                importance_sampling_level=importance_sampling_level,
                loss_aggregation=loss_aggregation,
            ),
            advantage_balance=advantage_balance,
            scale_rewards=scale_rewards,
            precalculate_logprobs=False,
            allow_training_without_logprobs=False,
            plot_tensors=False,
            scale_learning_rate_by_reward_std_dev=False,
            logprob_calculation_chunk_size=DEFAULT_CHUNK_SIZE,
            save_checkpoint=save_checkpoint,
            verbose=verbose,
            num_minibatches=num_minibatches,
            num_epochs=num_epochs,
            seed=seed,
            reference=None,
            max_tokens_per_microbatch=None,
            num_trajectories_learning_rate_multiplier_power=0.0,
        )
        groups = list(groups)
        self.open(model)
        self.tinker_strategy.train_layers(
            {"train_mlp": train_mlp, "train_attn": train_attn, "train_unembed": train_unembed}
        )
        result, uri = self._call(model, groups, settings)
        if deploy_checkpoint and result.num_optimizer_steps:
            self.tinker_strategy.deploy()
        return TinkerTrainResult(
            step=result.step,
            metrics=result.metrics,
            num_optimizer_steps=result.num_optimizer_steps,
            dropped=result.dropped,
            checkpoint_path=uri,
            deployed=deploy_checkpoint and result.num_optimizer_steps > 0,
        )

    fit_rl_async = asynchronous(fit_rl)

    def sampler(self, model: TrainableModel, *, own_weights: bool = False) -> TinkerSampler:
        """The service's sampler of a model: at first of its newest weights, then of those that were deployed.

        Args:
            model: whose.
            own_weights: a service's sampler has weights of its own in any case.
        """
        self.open(model)
        return self.tinker_strategy.deployed_sampler()

    def deploy(self, model: TrainableModel) -> str | None:
        """Move the sampler to the newest weights; returns their URI, None for the base model."""
        self.open(model)
        return self.tinker_strategy.deploy()

    def states(self, model: TrainableModel) -> list[TinkerState]:
        """What the run has saved on the service and still has, oldest first."""
        self.open(model)
        strategy = self.tinker_strategy
        runs = dict.fromkeys(_run_of(state.uri) for state in strategy.note.states)
        there = {uri for run in runs for uri in strategy.service.states(run)}
        return [state for state in strategy.note.states if state.uri in there]

    def delete_states(
        self, model: TrainableModel, *, best: str | None = None, mode: Literal["max", "min"] = "max"
    ) -> list[TinkerState]:
        """Delete what the run has saved, but for the newest, the best by a logged metric, and what is sampled from.

        Args:
            model: whose run.
            best: a key that `model.log` wrote; the step that it was logged with counts. None: keep the newest only.
            mode: whether the highest or the lowest value is best.

        Returns:
            What was deleted.

        Raises:
            InvalidArgumentError: no step that has a state was logged with this metric; nothing is deleted.
        """
        if mode not in ("max", "min"):
            raise InvalidArgumentError(f"mode must be 'max' or 'min', got {mode!r}")
        self.open(model)
        strategy = self.tinker_strategy
        newest, sampled = strategy.note.newest, strategy.deployed_sampler().path
        keep = {newest.step} if newest is not None else set()
        if best is not None:
            keep.add(_best_step(model, {state.step for state in strategy.note.states}, best, mode))
        doomed = [state for state in strategy.note.states if state.step not in keep and state.uri != sampled]
        for state in doomed:
            strategy.service.delete(state.uri)
            strategy.note.drop(state.uri)
        return doomed


def _run_of(uri: str) -> str:
    """The training run of a URI."""
    return uri.removeprefix("tinker://").split("/")[0]


def _best_step(model: TrainableModel, steps: set[int], best: str, mode: str) -> int:
    """The step, of those that have a state, with the best value of a logged metric."""
    logged: dict[int, float] = {
        entry["step"]: entry["metrics"][best] for entry in model.history() if best in entry["metrics"]
    }
    values = {step: value for step, value in logged.items() if step in steps and value == value}
    if not values:
        raise InvalidArgumentError(f"best={best!r} was not logged at any step that has a state")
    sign = 1 if mode == "max" else -1
    return max(values, key=lambda step: (sign * values[step], step))
