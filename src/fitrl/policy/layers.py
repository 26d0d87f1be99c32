"""Decoder layers made cheaper: compiled, computed again in backward instead of kept, held in 16 bits where frozen.

Enters: a policy that was just loaded. Leaves: the same modules, under the same names; at most their `forward` is
wrapped. All layers share one compiled graph, and only one layer's activations exist in backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from fitrl.errors import UnsupportedError
from fitrl.policy.attention import allow_many_graphs

if TYPE_CHECKING:
    from fitrl.policy.policy import Policy


def decoder_layers(policy: Policy) -> list[nn.Module]:
    """The longest list of modules in the network.

    Raises:
        UnsupportedError: there is none.
    """
    lists = [list(module) for module in policy.causal_lm.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise UnsupportedError(f"{type(policy.causal_lm).__name__} has no list of decoder layers")
    return max(lists, key=len)


def compile_layers(policy: Policy) -> None:
    """Compile the decoder layers' forward, once for all layers and batch shapes; hooks on them stay outside.

    On a GPU there may be three graphs of each kind of layout, whatever the number of shapes: torch's compiler fuses the
    backward of norms for rows of many tokens only, from 2,560 or 5,120 at a width of 1024, and guards that.
    """
    allow_many_graphs()
    compiled: dict[Any, Any] = {}
    for layer in decoder_layers(policy):
        any_layer: Any = layer
        plain = any_layer.forward.__func__
        if plain not in compiled:
            compiled[plain] = torch.compile(plain, dynamic=True)
        any_layer.forward = MethodType(compiled[plain], layer)


def recompute_layers(policy: Policy, *, keep_attention: bool) -> None:
    """Keep each decoder layer's input for backward, and compute the rest again (Chen et al. 2016).

    Args:
        policy: whose layers.
        keep_attention: also keep what attention returned, 2 bytes a token, layer and head number under bfloat16: it is
            most of the time of a long history. For compiled layers only: outside of them FlexAttention would run
            uncompiled.
    """
    for layer in decoder_layers(policy):
        any_layer: Any = layer
        # a method, so that a copy of the layer computes with its own weights
        any_layer.forward = MethodType(_recomputed(any_layer.forward.__func__, keep_attention), layer)


def plain_layers(policy: Policy) -> None:
    """Undo both: compute as the model's own code does."""
    for layer in decoder_layers(policy):
        vars(layer).pop("forward", None)


def narrow_frozen_layers(policy: Policy, dtype: torch.dtype) -> None:
    """Hold the frozen linear layers' weights in the dtype that autocast multiplies in: half the memory, same results.

    Not the output head, whose weight may be the embedding's, which is not multiplied.
    """
    causal_lm: Any = policy.causal_lm
    head = causal_lm.get_output_embeddings()
    kept = {id(parameter) for parameter in head.parameters()} if head is not None else set()
    for layer in causal_lm.modules():
        if isinstance(layer, nn.Linear):
            for parameter in layer.parameters(recurse=False):
                if not parameter.requires_grad and parameter.dtype == torch.float32 and id(parameter) not in kept:
                    parameter.data = parameter.data.to(dtype)


@functools.cache
def _recomputed(forward: Callable[..., Any], keep_attention: bool) -> Callable[..., Any]:
    options: dict[str, Any] = {"use_reentrant": False}
    if keep_attention:
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_attention)

    @functools.wraps(forward)
    def recomputed(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(self, *args, **kwargs)
        return checkpoint(forward, self, *args, **options, **kwargs)

    return recomputed


_ATTENTION = (
    torch.ops.torch_attn._varlen_attn.default,
    torch.ops.fitrl.tree_attention.default,
    torch.ops.higher_order.flex_attention,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)


def _keep_attention(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE
