"""What takes the time and the memory of an update, by part of the model: attention, MLP, head, optimizer.

Enters: a call of `fit_rl` on one GPU, compiled or not. Leaves: milliseconds of device time by part, and gigabytes by
what holds them. A compiled decoder layer is one graph, so its parts are told apart by what they compute: a product's
shapes, a kernel's name, a kept tensor's shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from fitrl.policy import scoring

GIB = 2**30
# what the names of kernels hold
_KERNELS = {
    "attention": ("flash", "fmha", "flex_attention", "sdpa"),
    "head's sweeps": ("_swept_kernel", "_statistics_kernel", "_gradients_kernel", "_scale_kernel"),
    "optimizer": ("FusedAdam", "FusedOpti", "multi_tensor", "Optimizer"),
}
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::_grouped_mm")


def times(call: Callable[[], Any], sizes: dict[str, int], rank: int | None = None) -> dict[str, float]:
    """Milliseconds of device time of a call by part; on a CPU, where there are no kernels, of products alone.

    Args:
        call: an update.
        sizes: of the model, as transformers' configuration names them.
        rank: of the adapters.
    """
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=activities, record_shapes=True) as profiler:
        call()
    found = dict.fromkeys(("attention", "attention's products", "MLP", "head", "optimizer", "rest"), 0.0)
    found |= {"adapters": 0.0} if rank else {}
    for event in profiler.key_averages(group_by_input_shape=True):
        if event.key in _PRODUCTS:
            taken = event.self_device_time_total if torch.cuda.is_available() else event.self_cpu_time_total
            found[_product(event.input_shapes, sizes, rank)] += taken / 1e3
    whole = 0.0
    for event in profiler.key_averages():
        if event.device_type != DeviceType.CUDA or event.is_user_annotation:
            continue
        taken = event.self_device_time_total / 1e3
        whole += taken
        for part, names in _KERNELS.items():
            if any(name in event.key for name in names):
                found["head" if part == "head's sweeps" else part] += taken
                break
    found["rest"] = max(0.0, whole - sum(found.values()))
    return found | {"all kernels": whole}


def _product(shapes: Sequence[Sequence[int]], sizes: dict[str, int], rank: int | None) -> str:
    """Whose product this is, by the sizes of its matrices."""
    dims = {size for shape in shapes for size in shape}
    if sizes["vocab_size"] in dims:
        return "head"
    if rank in dims:
        return "adapters"
    return "MLP" if sizes["intermediate_size"] in dims else "attention's products"


class Memory:
    """What holds the memory of an update, in GiB; `report` makes the call.

    Args:
        network: the model that is trained.
        sizes: of the model, as transformers' configuration names them.
    """

    def __init__(self, network: torch.nn.Module, sizes: dict[str, int]) -> None:
        self._sizes = sizes
        self._parameters = list(network.parameters())
        self._own = {parameter.untyped_storage().data_ptr() for parameter in self._parameters}
        self._kept: dict[int, tuple[str, int]] = {}
        self._most: dict[str, float] = {}
        self._head = 0.0

    def report(self, call: Callable[[], Any], moments: Iterable[Tensor]) -> dict[str, float]:
        """Make a call, and say what its largest microbatch kept for the backward, and what was there anyway."""
        head = scoring.fused_linear_policy_loss
        with (
            mock.patch.object(scoring, "fused_linear_policy_loss", lambda *a, **k: self._in_head(head, *a, **k)),
            saved_tensors_hooks(self._keep, lambda tensor: tensor),
        ):
            call()
        trained = [parameter for parameter in self._parameters if parameter.requires_grad]
        return {
            "weights": _gib(self._parameters),
            "gradients": _gib(trained),
            "moments": _gib(moments),
            **{f"kept by {part}": size for part, size in self._most.items()},
            "head's most": self._head,
        }

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own:
            self._kept[storage.data_ptr()] = (self._part(tensor), storage.nbytes())
        return tensor

    def _part(self, tensor: Tensor) -> str:
        sizes, shape = self._sizes, set(tensor.shape)
        heads = {sizes["num_attention_heads"], sizes["num_key_value_heads"]}
        widths = {count * sizes["head_dim"] for count in heads} - {sizes["hidden_size"]}
        if max(shape, default=0) <= max(sizes["hidden_size"], sizes["intermediate_size"], *widths):
            return "16-bit weights" if tensor.numel() >= sizes["hidden_size"] ** 2 // 2 else "norms and residuals"
        if sizes["intermediate_size"] in shape:
            return "MLP"
        if sizes["head_dim"] in shape or shape & (heads | widths):
            return "attention"
        return "norms and residuals"

    def _in_head(self, head: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        found: dict[str, float] = dict.fromkeys(("attention", "MLP", "norms and residuals", "16-bit weights"), 0.0)
        for part, size in self._kept.values():
            found[part] += size / GIB
        self._kept.clear()
        if sum(found.values()) > sum(self._most.values()):
            self._most = found
        if not torch.cuda.is_available():
            return head(*args, **kwargs)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = head(*args, **kwargs)
        self._head = max(self._head, (torch.cuda.max_memory_allocated() - before) / GIB)
        return result


def _gib(tensors: Iterable[Tensor]) -> float:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / GIB
