"""Tensor parallel: each layer's matrices, the embeddings and the output head cut over the ranks of a group.

Enters: a policy that was just loaded, the same on every rank, and a mesh of one dimension. Leaves: the same modules,
whose weights are `DTensor`s and whose inputs and outputs are plain tensors. Hidden states are whole on every rank;
attention heads, the width of the MLP and the vocabulary are shared out (Shoeybi et al. 2019).
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from fitrl.errors import UnsupportedError
from fitrl.policy.policy import Policy

# architectures whose plan in transformers was compared with one device, gradients and all
_KNOWN = ("llama", "qwen3")


def parallelize(policy: Policy, mesh: DeviceMesh) -> None:
    """Cut a policy's weights over a mesh by transformers' plan for its architecture.

    LoRA adapters (Hu et al. 2021) follow the layer they are on: where its outputs are cut so are those of B, where its
    inputs are cut so are those of A, and the other half is whole on every rank.

    Args:
        policy: on the CPU.
        mesh: "tensor_parallel".

    Raises:
        UnsupportedError: the architecture, a size that cannot be shared out equally, or adapters on the embeddings or
            the output head.
    """
    model: Any = policy.causal_lm
    config = model.config.get_text_config()
    if config.model_type not in _KNOWN:
        raise UnsupportedError(
            f"tensor_parallel_size={mesh.size()} knows the layers of {', '.join(_KNOWN)}, not of "
            f"{config.model_type!r}: take tensor_parallel_size=1, which shards any model over the data"
        )
    _check_sizes(policy, config, mesh.size())
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    # some releases of transformers plan the embeddings too: they follow the head, below
    modules = {name: module for name, module in model.named_modules() if module not in (embeddings, head)}
    for pattern, style in config.base_model_tp_plan.items():
        wanted = re.compile(re.escape(f"{model.base_model_prefix}.{pattern}").replace(r"\*", r"\d+"))
        for name in filter(wanted.fullmatch, modules):
            _cut(modules[name], style, mesh)
    if type(embeddings) is not nn.Embedding or type(head) is not nn.Linear:
        raise UnsupportedError(
            "tensor parallel shares out plain embeddings and a plain output head, here are "
            f"{type(embeddings).__name__} and {type(head).__name__}: leave them out of LoraSettings.target_modules, or "
            "take tensor_parallel_size=1"
        )
    tied = head.weight is embeddings.weight
    _apply(embeddings, RowwiseParallel(input_layouts=Replicate()), mesh)
    _apply(head, ColwiseParallel(output_layouts=Replicate()), mesh)
    if tied:
        head.weight = embeddings.weight


def _check_sizes(policy: Policy, config: Any, size: int) -> None:
    sizes = {
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "intermediate_size": config.intermediate_size,
        "vocabulary": policy.vocabulary_size,
    }
    for name, value in sizes.items():
        if value % size:
            raise UnsupportedError(
                f"tensor_parallel_size={size} cannot share out {name}={value} equally: take a size that divides it"
            )


def _cut(module: nn.Module, style: str, mesh: DeviceMesh) -> None:
    """Cut one module of the plan, and the adapters on it."""
    any_module: Any = module
    adapted = hasattr(module, "base_layer")
    base = any_module.base_layer if adapted else module
    match style:
        case "colwise":
            parts = [base, *(any_module.lora_B.values() if adapted else ())]
            for part in parts:
                _apply(part, ColwiseParallel(), mesh)
        case "rowwise":
            parts = [base, *(any_module.lora_A.values() if adapted else ())]
            for part in parts:
                _apply(part, RowwiseParallel(), mesh)
        case "replicated_with_grad_allreduce":
            # a norm of each head [B, L, heads, D]: its weight is whole, its gradient the sum over the heads
            _apply(module, SequenceParallel(sequence_dim=2, use_local_output=True), mesh)
        case _:
            raise UnsupportedError(f"transformers plans {style!r} for {type(module).__name__}, which is not known here")


def _apply(module: nn.Module, style: ParallelStyle, mesh: DeviceMesh) -> None:
    trained = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    parallelize_module(module, mesh, style, src_data_rank=None)  # every rank has the weights
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(trained[name])
