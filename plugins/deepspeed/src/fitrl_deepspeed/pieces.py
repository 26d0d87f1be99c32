"""Weights and moments as DeepSpeed's ZeRO optimizers hold them, read and written as whole tensors.

Enters: an engine, or its parameters. Leaves: tensors as one process would have them. Each function is a collective.
The only file that knows how ZeRO's optimizers keep things where DeepSpeed has no public way to ask; `deepspeed` is
pinned because of it, and the contracts hold each line to what it is for.

Stages 1 and 2: every rank has all weights, and the float32 originals of one slice of all of them laid end to end, with
that slice's moments. Stage 3: every rank has a slice of each weight, its float32 original and its moments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero import parameter_offload
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from fitrl.data import ranks

MOMENTS = ("exp_avg", "exp_avg_sq")
_SCALING = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # of the loss, under float16


def is_cut(parameter: Any) -> bool:
    """Whether it is a parameter of which each rank has a slice."""
    return hasattr(parameter, "ds_tensor")


def shape(parameter: Any) -> torch.Size:
    """Shape of the whole tensor."""
    whole: torch.Size = parameter.ds_shape if is_cut(parameter) else parameter.shape
    return whole


def cut(network: nn.Module, config: dict[str, Any], dtype: torch.dtype) -> None:
    """Cut every weight of a network on the host into this rank's slice of it, one weight after the other.

    No device ever holds the network as a whole, nor does the host twice.
    """
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)
    offload = config["zero_optimization"].get("offload_param", {})
    deepspeed.zero.Init(
        module=network,
        config_dict_or_path=config,
        dtype=dtype,
        remote_device=offload.get("device"),
        pin_memory=bool(offload) and torch.cuda.is_available(),
    )


def get(parameter: Tensor) -> Tensor:
    """The whole weight on its device: the float32 original of a trained one."""
    if parameter.requires_grad and (original := safe_get_full_fp32_param(parameter)) is not None:
        return original  # type: ignore[no-any-return]
    if not is_cut(parameter):
        return parameter.detach()
    with torch.no_grad(), deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


@torch.no_grad()
def put(engine: Any, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Set weights from whole tensors, the float32 original and what is multiplied with.

    Args:
        engine: DeepSpeed's; one without an optimizer has no originals.
        pairs: parameter and its whole new value, the same on every rank.
    """
    parameter: Any
    for parameter, value in pairs:
        value = value.to(engine.device)
        if is_cut(parameter):
            own = _slice(parameter, value)
            if parameter.requires_grad and hasattr(parameter, "_z3_optimizer"):
                safe_set_local_fp32_param(parameter, own.float())
            parameter.ds_tensor.data.copy_(own)
            if parameter.data.numel() == value.numel():  # small ones stay whole on every rank
                parameter.data.copy_(value)
        else:
            safe_set_full_fp32_param(parameter, value.float())
            parameter.data.copy_(value)


def get_moments(engine: Any, parameters: Sequence[Tensor]) -> dict[str, Any]:
    """The state of AdamW as torch has it in one process, and of the scaling of the loss; whole on rank 0."""
    adamw = engine.optimizer.optimizer
    group = {name: value for name, value in adamw.param_groups[0].items() if name != "params"}
    state: dict[int, dict[str, Tensor]] = {}
    if adamw.state:
        step = next(iter(adamw.state.values()))["step"].detach().cpu().clone()
        for number, parameter in enumerate(parameters):
            whole = {name: safe_get_full_optimizer_state(parameter, name) for name in MOMENTS}
            if ranks.rank() == 0:
                state[number] = {"step": step.clone(), **{name: value.cpu() for name, value in whole.items()}}
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return {
        "state": state,
        "param_groups": [group | {"params": list(range(len(parameters)))}],
        "loss_scaling": {name: getattr(scaler, name) for name in _SCALING if hasattr(scaler, name)},
    }


@torch.no_grad()
def put_moments(engine: Any, parameters: Sequence[Tensor], saved: dict[str, Any]) -> None:
    """Set the state of AdamW from one that `get_moments`, or torch's optimizer of one process, gave."""
    zero, adamw = engine.optimizer, engine.optimizer.optimizer
    for name in ("lr", "initial_lr", "betas", "eps", "weight_decay"):
        for group in adamw.param_groups:
            if name in saved["param_groups"][0]:
                group[name] = saved["param_groups"][0][name]
    for name, value in saved.get("loss_scaling", {}).items():
        if hasattr(zero.loss_scaler, name):
            setattr(zero.loss_scaler, name, value)
    state = saved["state"]
    if not state:
        forget_moments(engine)
        return
    _make_moments(zero)
    for number, parameter in enumerate(parameters):
        for name in MOMENTS:
            value = state[number][name].to(engine.device)
            if is_cut(parameter):
                safe_set_local_optimizer_state(parameter, _slice(parameter, value), name)
            else:
                safe_set_full_optimizer_state(parameter, value, name)
    for held in adamw.state.values():
        held["step"].fill_(float(state[0]["step"]))


@torch.no_grad()
def forget_moments(engine: Any) -> None:
    """Put AdamW where it has not taken a step; the tensors stay, because the weights' slices are tied to them."""
    for held in engine.optimizer.optimizer.state.values():
        for tensor in held.values():
            tensor.zero_()


def clear_gradients(engine: Any) -> None:
    """Forget what microbatches have added up, also what a backward that raised had not summed over the ranks yet."""
    zero = engine.optimizer
    engine.zero_grad()  # first, because on a CPU ZeRO's own stumbles over what is left of stage 3
    zero.zero_grad(set_to_none=True)
    for name in ("averaged_gradients", "all_grad_tensors", "_offload_accumulated_param_ids"):
        if hasattr(zero, name):
            getattr(zero, name).clear()  # others hold the same container
    for bucket in getattr(zero, "ipg_buckets", {}).values():
        getattr(bucket, "clear_params", bucket.clear)()  # stage 3 keeps its buffer
    reduced = getattr(zero, "params_already_reduced", [])
    for number in list(reduced) if isinstance(reduced, dict) else range(len(reduced)):
        reduced[number] = False
    if hasattr(zero, "micro_step_id"):  # the next microbatch is the first one
        zero.micro_step_id = 0 if engine.zero_optimization_partition_weights() else -1


def leave_pass(engine: Any) -> None:
    """Forget that a forward or backward was under way when it raised, and cut again what it has left whole."""
    zero = engine.optimizer
    while getattr(zero, "_backward_active_depth", 0) > 0:
        zero.exit_backward()
    if engine.zero_optimization_partition_weights():
        del parameter_offload.FWD_MODULE_STACK[1:]
        engine._forward_epilogue()
        _offload(engine).release_backward_leftovers()
        _offload(engine).partition_all_parameters()


def lend(engine: Any, network: nn.Module) -> Callable[[], None]:
    """Make all weights whole on every rank, without what DeepSpeed hangs on each layer's forward.

    Returns:
        What cuts them again.
    """
    offload = _offload(engine)
    lent: list[Any] = [parameter for parameter in network.parameters() if is_cut(parameter)]
    for hooks in (offload.forward_hooks, offload.backward_hooks):
        while hooks:
            hooks.pop().remove()
    lent[0].all_gather(param_list=lent)

    def take_back() -> None:
        offload._register_deepspeed_module(offload.module)
        offload.partition_all_parameters()

    return take_back


def release(engine: Any) -> None:
    """Take the engine off the module; what is cut stays cut."""
    engine.destroy()
    parameter_offload.FWD_MODULE_STACK.clear()


def _offload(engine: Any) -> Any:
    """What gathers and cuts the weights of stage 3; without an optimizer it is in the optimizer's place."""
    return getattr(engine.optimizer, "parameter_offload", engine.optimizer)


def _slice(parameter: Any, whole: Tensor) -> Tensor:
    """This rank's slice of a whole tensor, padded where the ranks do not divide it."""
    size = parameter.ds_tensor.numel()
    own = whole.new_zeros(size)
    part = whole.flatten()[ranks.rank() * size : (ranks.rank() + 1) * size]
    own[: part.numel()] = part
    return own


def _make_moments(zero: Any) -> None:
    """Give AdamW the state that its first step would make."""
    for group in zero.optimizer.param_groups:
        for flat in _flats(zero):
            if flat not in zero.optimizer.state:
                on_device = bool(group.get("fused") or group.get("capturable"))
                zero.optimizer.state[flat] = {
                    "step": torch.zeros((), device=flat.device if on_device else "cpu"),
                    **{name: torch.zeros_like(flat) for name in MOMENTS},
                }
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._lazy_init_hp_params_optimizer_state()


def _flats(zero: Any) -> list[Tensor]:
    """This rank's slices of the float32 originals."""
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition"):
        if hasattr(zero, name):
            return list(getattr(zero, name))
    raise AssertionError(f"{type(zero).__name__} is no optimizer of ZeRO")
