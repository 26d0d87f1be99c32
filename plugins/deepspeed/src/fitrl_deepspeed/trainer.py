"""`DeepSpeedTrainer`: learn on this machine's devices, or many machines', with DeepSpeed's ZeRO."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from fitrl import AdamWSettings, LocalTrainer, Sampler
from fitrl.errors import InvalidArgumentError, UnsupportedError
from fitrl_deepspeed.settings import ZeroStage, check_precision, loss_scaling
from fitrl_deepspeed.strategy import DeepSpeedRLStrategy

# Lightning's other names of what DeepSpeed has
PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed", "64": "64-true"}


class DeepSpeedTrainer(LocalTrainer):
    """Train with ZeRO, one process for each device, started with `torchrun` or `srun`; a `lightning.Trainer`.

    `fit_rl` takes the arguments of `LocalTrainer` and returns the same result; checkpoints are the same, too.

    Args:
        zero_stage: 1: AdamW's moments in pieces over the ranks; 2: gradients too; 3: weights too.
        offload_optimizer: keep moments and the float32 originals in the host's memory, and step there.
        offload_params: keep the weights in the host's memory, too; stage 3 only.
        settings: further settings by DeepSpeed's names, `{"zero_optimization": {"reduce_bucket_size": 10**8}}` say.
        optimizer: AdamW's settings, but for the learning rate.
        lr_schedule: factor on the learning rate, by optimizer steps taken.
        compile: compile the decoder layers; not in stage 3, where each layer's weights come and go.
        activation_checkpointing: keep only each decoder layer's input for backward, and compute the rest again.
        sampler: a sampler to hand the new weights to, instead of the embedded one.
        **lightning_options: of `lightning.Trainer`: devices, precision, callbacks, logger, gradient_clip_val, ...

    Raises:
        InvalidArgumentError: a setting that is unknown, contradicts an argument, or could have no effect.
        UnsupportedError: what DeepSpeed cannot do.
        MissingDependencyError: DeepSpeed is not installed.

    Example:
        >>> with DeepSpeedTrainer(zero_stage=3, devices=8, precision="bf16-mixed") as trainer:  # doctest: +SKIP
        ...     result = trainer.fit_rl(model, groups, learning_rate=1e-5)
    """

    backend: ClassVar[str] = "deepspeed"

    def __init__(
        self,
        *,
        zero_stage: ZeroStage = 2,
        offload_optimizer: bool = False,
        offload_params: bool = False,
        settings: Mapping[str, Any] | None = None,
        optimizer: AdamWSettings = AdamWSettings(),  # noqa: B008 - frozen
        lr_schedule: Callable[[int], float] | None = None,
        compile: bool = False,
        activation_checkpointing: bool = False,
        sampler: Sampler | None = None,
        **lightning_options: Any,
    ) -> None:
        if optimizer.moments != "float32":
            raise UnsupportedError(
                f"AdamWSettings(moments={optimizer.moments!r}) cannot be cut into pieces: take 'float32'"
            )
        if compile and zero_stage == 3:
            raise UnsupportedError(
                "compile=True with zero_stage=3: each layer's weights come and go inside of what is compiled; take "
                "zero_stage=2, or LocalTrainer(strategy='fitrl_fsdp2')"
            )
        if lightning_options.get("gradient_clip_algorithm") == "value":
            raise InvalidArgumentError("gradient_clip_algorithm='value': DeepSpeed clips by the norm only")
        if (precision := lightning_options.get("precision")) is not None:
            check_precision(PRECISIONS.get(str(precision), str(precision)))
        strategy = DeepSpeedRLStrategy(
            zero_stage=zero_stage,
            offload_optimizer=offload_optimizer,
            offload_params=offload_params,
            settings=settings,
        )
        super().__init__(
            strategy=strategy,
            optimizer=optimizer,
            lr_schedule=lr_schedule,
            compile=compile,
            activation_checkpointing=activation_checkpointing,
            sampler=sampler,
            **lightning_options,
        )
        loss_scaling(strategy.settings, str(self.precision))
