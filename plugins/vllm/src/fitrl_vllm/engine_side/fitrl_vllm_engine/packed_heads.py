"""Packed copies of weights that vLLM's CPU kernels read."""

from __future__ import annotations

from typing import Any

from torch import nn


def pack_again(model: nn.Module) -> None:
    """Pack the weights of linear layers anew, on a CPU.

    vLLM packs them there when it loads the model. Reloading has been seen to leave out an output head that is tied to
    the embeddings, which went on answering with the old ones.
    """
    modules: list[Any] = [module for module in model.modules() if hasattr(module, "cpu_linear")]
    if modules:
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        for module in modules:
            if getattr(module, "weight", None) is not None and module.weight.numel():
                dispatch_cpu_unquantized_gemm(module, remove_weight=False)
