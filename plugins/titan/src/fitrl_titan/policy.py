"""`TitanPolicy`: a policy whose network is torchtitan's, and how a batch runs through it.

Enters: a batch's model inputs, whole on every rank that shares its data. Leaves: the last hidden states of all of its
positions, and the part of the output head that is this rank's; the loss is fitrl's own over both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear, pad

from fitrl.data.batch import ModelInputs
from fitrl.errors import UnsupportedError
from fitrl.objective.vocabulary_shard import VocabularyShard
from fitrl.policy.attention import attention_kernels, prepare
from fitrl.policy.packed_row import BLOCK, PackedRow, as_packed
from fitrl.policy.policy import Policy
from fitrl_titan.components import TitanNetwork
from fitrl_titan.gathering import counted_once, gather


@dataclass(slots=True, kw_only=True)
class TitanPolicy(Policy):
    """A policy in torchtitan's modules.

    Attributes:
        titan: them.
        empty: the transformers model without weights, for its configuration, and for saving.
        sharing: the ranks that work on the same data.
    """

    titan: TitanNetwork
    empty: Any
    sharing: dist.ProcessGroup

    @property
    def causal_lm(self) -> Any:
        """The transformers model, without weights."""
        return self.empty

    @property
    def trained_parameters(self) -> list[nn.Parameter]:
        """All of them, in the order of the transformers model."""
        return self.titan.parameters()

    @property
    def ranks_per_row(self) -> int:
        """Ranks that work on the same data: each has a stretch of it, or a part of what is computed from it."""
        return dist.get_world_size(self.sharing)

    @property
    def context_ranks(self) -> int:
        """Ranks that each hold a stretch of a row."""
        return 1 if self.titan.mesh is None else self.titan.mesh.size()

    # -- the output head ----------------------------------------------------------------------------------------

    @property
    def head(self) -> tuple[Tensor, Tensor | None]:
        """Weight [V, H] of the whole output head; a collective where ranks share it."""
        weight = self.titan.head_weight
        if isinstance(weight, DTensor):
            weight = weight.full_tensor()
        return counted_once(weight, self.context_ranks), None

    @property
    def head_here(self) -> tuple[Tensor, Tensor | None, VocabularyShard | None]:
        """The rows of the output head that this rank's share of the loss is over, and which ones they are.

        With context parallel the weight is whole on each of the ranks, and all have the same hidden states: they share
        the vocabulary out, so that no logit is computed twice.
        """
        weight, size, start = self.titan.head_weight, self.vocabulary_size, 0
        if isinstance(weight, DTensor):
            mesh, rows = weight.device_mesh, weight.to_local()
            weight, start = rows, mesh.get_local_rank() * len(rows)
        if self.titan.mesh is not None:
            rank, count = self.titan.mesh.get_local_rank(), self.context_ranks
            first, after = len(weight) * rank // count, len(weight) * (rank + 1) // count
            weight, start = weight[first:after], start + first
        if len(weight) == size:
            return weight, None, None
        return weight, None, VocabularyShard(group=self.sharing, start=start, size=size)

    # -- the layers ---------------------------------------------------------------------------------------------

    def hidden_of(self, inputs: ModelInputs) -> Tensor:
        """Last hidden states [B, L, H] of a batch; a packed row may go on behind its tokens."""
        device, mesh = inputs.input_ids.device, self.titan.mesh
        stretch = None if mesh is None else (mesh.get_local_rank(), mesh.size())
        row = None
        if inputs.ends is not None or mesh is not None:
            packed = as_packed(inputs) if inputs.ends is None else inputs
            row = PackedRow(packed, multiple_of=self._multiple(device), stretch=stretch)
            prepare(row, self.empty)
        # torchtitan's mixed precision is in its weights
        with attention_kernels(device), torch.autocast(device.type, enabled=False):
            if row is None:
                return self._padded(inputs)
            hidden = self.titan.hidden(row.input_ids[:, row.queries], row.position_ids[:, row.queries], row)
            if mesh is not None:
                hidden = gather(hidden, mesh.get_group().group_name, 1)
        if inputs.ends is not None:
            return hidden
        (rows, length), size = inputs.input_ids.shape, hidden.shape[-1]
        return hidden[:, : rows * length].reshape(rows, length, size)

    def _padded(self, inputs: ModelInputs) -> Tensor:
        """Each history in a row of its own, the padding out of sight behind it."""
        length = inputs.input_ids.shape[1]
        more = -length % self.ranks_per_row
        return self.titan.hidden(pad(inputs.input_ids, (0, more)), None, None)[:, :length].contiguous()

    def _multiple(self, device: torch.device) -> int:
        """What the length of a row has to be a multiple of, for the ranks to share it and for the kernels."""
        return math.lcm(self.ranks_per_row, BLOCK * self.context_ranks if device.type == "cuda" else 1)

    def full_logits_of(self, inputs: ModelInputs) -> Tensor:
        """Logits [B, L, V] of a batch."""
        hidden = self.hidden_of(inputs)  # first: until the layers ran, the head lies in pieces
        return linear(hidden, self.head[0])

    def hidden(self, input_ids: Tensor, position_ids: Tensor | None = None, **cache: Any) -> Any:
        """Not of this policy: it samples from a copy in transformers' modules.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError("torchtitan's modules keep no cache: sample from the strategy's lent_policy")

    def full_logits(self, input_ids: Tensor, position_ids: Tensor | None = None, **cache: Any) -> Any:
        """As `hidden`."""
        return self.hidden(input_ids, position_ids, **cache)

    def own_logits(self, hidden: Tensor) -> Tensor:
        """Logits [T, V] of hidden states [T, H]."""
        return self.logits(hidden)
