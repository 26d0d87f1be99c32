"""`TitanTrainer`: learn on this machine's devices, or many machines', with torchtitan's models and parallel plans."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from fitrl import AdamWSettings, LocalTrainer, Sampler
from fitrl.errors import InvalidArgumentError
from fitrl_titan.strategy import TitanStrategy, check_precision


class TitanTrainer(LocalTrainer):
    """Train in torchtitan's modules, one process for each device, started with `torchrun` or `srun`.

    A `lightning.Trainer`. `fit_rl` takes the arguments of `LocalTrainer` and returns the same result; checkpoints are
    the same, too. Full weights of Qwen3's dense models: pass `lora=None` to `TrainableModel`.

    Args:
        data_parallel_size: groups of ranks with data of their own; None: as many as the ranks make.
        tensor_parallel_size: ranks that share every matrix; neighbours, which should be of one machine.
        context_parallel_size: ranks that share every row.
        activation_checkpointing: True: keep only each decoder layer's input for backward, and compute the rest again;
            "selective": also keep what torchtitan finds costly to compute again.
        compile: compile the decoder layers; with tensor parallel that needs torch 2.13, and no activation
            checkpointing.
        reshard_after_forward: see `FSDP2Strategy`; so is the next.
        sync_every_microbatch: whether gradients are summed after each microbatch, or once for an optimizer step.
        optimizer: AdamW's settings, but for the learning rate.
        lr_schedule: factor on the learning rate, by optimizer steps taken.
        sampler: a sampler to hand the new weights to, instead of the embedded one.
        **lightning_options: of `lightning.Trainer`: devices, precision ("32-true" or "bf16-mixed"), callbacks, logger,
            gradient_clip_val, ...

    Raises:
        UnsupportedError: a precision that torchtitan's modules do not compute in.
        InvalidArgumentError: sizes that do not make the job's ranks, or another `strategy`.
        MissingDependencyError: torchtitan is not installed.

    Example:
        >>> with TitanTrainer(tensor_parallel_size=2, devices=8, precision="bf16-mixed") as trainer:  # doctest: +SKIP
        ...     result = trainer.fit_rl(model, groups, learning_rate=1e-5)
    """

    backend: ClassVar[str] = "titan"

    def __init__(
        self,
        *,
        data_parallel_size: int | None = None,
        tensor_parallel_size: int = 1,
        context_parallel_size: int = 1,
        activation_checkpointing: bool | Literal["selective"] = False,
        compile: bool = False,
        reshard_after_forward: bool | None = None,
        sync_every_microbatch: bool | None = None,
        optimizer: AdamWSettings = AdamWSettings(),  # noqa: B008 - frozen
        lr_schedule: Callable[[int], float] | None = None,
        sampler: Sampler | None = None,
        **lightning_options: Any,
    ) -> None:
        if activation_checkpointing not in (True, False, "selective"):
            raise InvalidArgumentError(
                f"activation_checkpointing must be True, False or 'selective', got {activation_checkpointing!r}"
            )
        check_precision(str(lightning_options.get("precision") or "32-true"))  # Lightning has words of its own for it
        strategy = TitanStrategy(
            data_parallel_size=data_parallel_size,
            tensor_parallel_size=tensor_parallel_size,
            context_parallel_size=context_parallel_size,
            selective_checkpointing=activation_checkpointing == "selective",
            reshard_after_forward=reshard_after_forward,
            sync_every_microbatch=sync_every_microbatch,
        )
        super().__init__(
            strategy=strategy,
            optimizer=optimizer,
            lr_schedule=lr_schedule,
            compile=compile,
            activation_checkpointing=bool(activation_checkpointing),
            sampler=sampler,
            **lightning_options,
        )
