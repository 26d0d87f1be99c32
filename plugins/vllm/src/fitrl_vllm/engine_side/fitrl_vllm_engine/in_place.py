"""Whether weights can be copied over those that a model holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_AS_THEY_COME = ("UnquantizedLinearMethod", "UnquantizedEmbeddingMethod")


def can_load_in_place(model: nn.Module, device: torch.device) -> bool:
    """Whether a model of vLLM's holds its weights as checkpoints have them.

    Then its own loaders copy them where they belong, and there is nothing to make of them afterwards: dense layers on a
    GPU that are not quantized. vLLM's reload layer by layer, which takes care of everything else, costs half a
    millisecond of the host for each tensor.
    """
    if device.type != "cuda":
        return False  # where weights are packed for the kernels
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if method is not None and type(method).__name__ not in _AS_THEY_COME:
            return False
        if type(module).__name__ == "MLAAttention":  # keeps products of its weights
            return False
    return True
