"""The output head as one weight: what the fused loss multiplies hidden states with.

Enters: the module that makes logits of hidden states. Leaves: its weight [V, H] and bias, with grad; those of a LoRA
adapter on it included.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fitrl.objective.vocabulary_shard import VocabularyShard


def is_linear(head: Any) -> bool:
    """Whether a head is a plain linear layer, or one with plain LoRA adapters on it."""
    if type(head) is nn.Linear:
        return True
    if not _has_lora(head) or type(head.base_layer) is not nn.Linear:
        return False
    plain = not head.fan_in_fan_out and not head.lora_variant  # a variant (DoRA, ...) is no sum of two products
    return plain and all(up.bias is None for up in head.lora_B.values())


def weight_and_bias(head: Any) -> tuple[Tensor, Tensor | None]:
    """Weight [V, H] and bias of a linear head; with adapters (Hu et al. 2021) the weight is W + scaling B A.

    The sum is made in the adapters' dtype or the weight's, whichever is wider, and rounded to a narrower one only by
    who multiplies with it.
    """
    if type(head) is nn.Linear:
        return head.weight, head.bias
    weight: Tensor = head.base_layer.weight
    bias: Tensor | None = head.base_layer.bias
    if head.disable_adapters or head.merged:
        return weight, bias
    for name in head.active_adapters:
        if name in head.lora_A:
            down, up = head.lora_A[name].weight, head.lora_B[name].weight
            with torch.autocast(weight.device.type, enabled=False):
                weight = weight + head.scaling[name] * (up @ down)
    return weight, bias


def own_rows(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None, VocabularyShard | None]:
    """The rows of a head that are on this rank, and which ones they are; None: all."""
    if not isinstance(weight, DTensor):
        return weight, bias, None
    mesh = weight.device_mesh
    rows: Tensor = weight.to_local()
    start = mesh.get_local_rank() * len(rows)  # shares are equal
    shard = VocabularyShard(group=mesh.get_group(), start=start, size=len(weight))
    return rows, bias.to_local() if isinstance(bias, DTensor) else bias, shard


def _has_lora(head: Any) -> bool:
    return type(head).__module__.startswith("peft.") and type(head).__name__ == "Linear" and hasattr(head, "lora_A")
