"""DeepSpeed's configuration, from typed arguments and a checked mapping of further settings.

Enters: what a user says at construction. Leaves: the dictionary that DeepSpeed reads. Taken are settings that change
how a step is computed and what it costs, not which step it is; each other one is refused by name.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch

from fitrl.errors import InvalidArgumentError, MissingDependencyError

ZeroStage = Literal[1, 2, 3]

# what is decided elsewhere, and where
_ELSEWHERE = {
    "train_batch_size": "fit_rl cuts each call into microbatches itself",
    "train_micro_batch_size_per_gpu": "fit_rl cuts each call into microbatches itself",
    "gradient_accumulation_steps": "fit_rl accumulates as many microbatches as a step has",
    "managed_gradient_accumulation": "fit_rl accumulates as many microbatches as a step has",
    "gradient_clipping": "pass gradient_clip_val to the trainer",
    "optimizer": "pass optimizer=AdamWSettings(...) to the trainer",
    "scheduler": "pass lr_schedule to the trainer",
    "bf16": "pass precision='bf16-mixed' to the trainer",
    "torch_autocast": "pass precision='bf16-mixed' to the trainer",
    "amp": "pass precision='16-mixed' to the trainer",
    "fp16.enabled": "pass precision='16-mixed' to the trainer",
    "activation_checkpointing": "pass activation_checkpointing=True to the trainer",
    "compile": "pass compile=True to the trainer",
    "zero_optimization.stage": "pass zero_stage",
    "zero_optimization.offload_optimizer": "pass offload_optimizer=True",
    "zero_optimization.offload_param": "pass offload_params=True",
    "zero_optimization.cpu_offload": "pass offload_optimizer=True",
    "zero_optimization.cpu_offload_param": "pass offload_params=True",
    "checkpoint": "checkpoints are fitrl's, in whole tensors",
}
_TOP = (
    *("communication_data_type", "fp16", "gradient_predivide_factor", "memory_breakdown", "prescale_gradients"),
    *("wall_clock_breakdown", "zero_optimization"),
)
_ZERO = (
    *("allgather_bucket_size", "allgather_partitions", "contiguous_gradients", "overlap_comm", "reduce_bucket_size"),
    *("reduce_scatter", "use_multi_rank_bucket_allreduce"),
)
_ZERO_3 = (
    *("log_trace_cache_warnings", "stage3_max_live_parameters", "stage3_max_reuse_distance"),
    *("stage3_model_persistence_threshold", "stage3_param_persistence_threshold", "stage3_prefetch_bucket_size"),
    "sub_group_size",
)
_FP16 = ("hysteresis", "initial_scale_power", "loss_scale", "loss_scale_window", "min_loss_scale")


def deepspeed_config(
    zero_stage: int, *, offload_optimizer: bool, offload_params: bool, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Build DeepSpeed's configuration but for precision and clipping, which are the trainer's.

    Raises:
        InvalidArgumentError: an unknown setting, one that is decided elsewhere, one that could have no effect, or a
            value that DeepSpeed refuses.
        MissingDependencyError: DeepSpeed is not installed.
    """
    if type(zero_stage) is not int or zero_stage not in get_args(ZeroStage):
        raise InvalidArgumentError(
            f"zero_stage must be 1 (moments in pieces), 2 (gradients too) or 3 (weights too), got {zero_stage!r}"
        )
    for name, value in (("offload_optimizer", offload_optimizer), ("offload_params", offload_params)):
        if not isinstance(value, bool):
            raise InvalidArgumentError(f"{name} must be True or False, got {value!r}")
    if offload_params and zero_stage != 3:
        raise InvalidArgumentError(
            f"offload_params=True needs zero_stage=3, which alone has the weights in pieces; got {zero_stage}"
        )
    _check_names(settings, zero_stage)
    zero = dict(settings.get("zero_optimization", {})) | {"stage": zero_stage}
    on_host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if offload_optimizer:
        zero["offload_optimizer"] = dict(on_host)
    if offload_params:
        zero["offload_param"] = dict(on_host)
    config = {
        # gradients are added up and summed over the ranks in float32, whatever the weights are multiplied in
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        **{name: value for name, value in settings.items() if name != "fp16"},
        "zero_optimization": zero,
        "managed_gradient_accumulation": False,  # a step ends when it is taken, after any number of microbatches
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW needs no compiler on the machine that it runs on
    }
    _check_values(config, settings.get("fp16", {}))
    return config


def loss_scaling(settings: Mapping[str, Any], precision: str) -> dict[str, Any]:
    """What was said of the loss scaling, if the precision has one.

    Raises:
        InvalidArgumentError: it has none.
    """
    found = dict(settings.get("fp16", {}))
    if found and precision != "16-mixed":
        raise InvalidArgumentError(f"settings['fp16']={found!r} has no effect with precision={precision!r}")
    return found


def check_precision(precision: str) -> None:
    """Take the precisions that DeepSpeed has, each under one name.

    Raises:
        InvalidArgumentError: another one.
    """
    if precision in ("bf16-true", "16-true"):
        narrow = precision.removesuffix("-true")
        raise InvalidArgumentError(
            f"precision={precision!r}: DeepSpeed keeps float32 weights beside the {narrow} ones, which is "
            f"precision='{narrow}-mixed'"
        )
    if precision not in ("32-true", "bf16-mixed", "16-mixed"):
        raise InvalidArgumentError(
            f"precision={precision!r}: DeepSpeed computes in '32-true', 'bf16-mixed' or '16-mixed'; "
            "LocalTrainer(strategy='fitrl_fsdp2') in others"
        )


def _check_names(settings: Mapping[str, Any], zero_stage: int) -> None:
    if not isinstance(settings, Mapping):
        raise InvalidArgumentError(f"settings must be a mapping of DeepSpeed's settings, got {settings!r:.80}")
    taken = {"": _TOP, "zero_optimization": (*_ZERO, *_ZERO_3), "fp16": _FP16}
    for prefix, names in taken.items():
        section = settings if not prefix else settings.get(prefix, {})
        if not isinstance(section, Mapping):
            raise InvalidArgumentError(f"settings[{prefix!r}] must be a mapping, got {section!r:.80}")
        for name in section:
            full = f"{prefix}.{name}" if prefix else str(name)
            if full in _ELSEWHERE:
                raise InvalidArgumentError(f"DeepSpeed's setting {full!r} contradicts fitrl: {_ELSEWHERE[full]}")
            if name not in names:
                close = difflib.get_close_matches(str(name), names, n=1)
                hint = f" (did you mean {close[0]!r}?)" if close else ""
                raise InvalidArgumentError(
                    f"settings: {full!r} is no setting that fitrl-deepspeed takes{hint}; it takes "
                    f"{f'in {prefix!r} ' if prefix else ''}{', '.join(names)}"
                )
            if prefix == "zero_optimization" and name in _ZERO_3 and zero_stage != 3:
                raise InvalidArgumentError(
                    f"DeepSpeed's setting {full!r} has no effect with zero_stage={zero_stage}: it is one of stage 3"
                )


def _check_values(config: Mapping[str, Any], scaling: Mapping[str, Any]) -> None:
    """Have DeepSpeed read it all, so that a wrong value is told here and not on the first step."""
    try:
        from deepspeed.runtime.config import DeepSpeedConfig
    except ImportError as error:
        raise MissingDependencyError("DeepSpeed is not installed: pip install fitrl-deepspeed") from error

    tried = dict(config) | {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    if scaling:
        tried["fp16"] = {"enabled": True, **scaling}
    try:
        DeepSpeedConfig(tried)
    except (ValueError, TypeError, AssertionError, KeyError) as error:  # pydantic's is a ValueError
        raise InvalidArgumentError(f"DeepSpeed refuses its settings: {error}") from error
