"""An output head whose rows, the tokens of the vocabulary, lie on several ranks (Shoeybi et al. 2019).

Enters: statistics of rows of logits, each over the columns that a rank holds. Leaves: those over all columns, the same
on every rank. Two vectors or three of a number for each row are all that crosses; logits and weights stay where they
are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fitrl.errors import InvalidArgumentError


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularyShard:
    """Which part of the vocabulary this rank holds, and who holds the rest.

    All ranks of the group are given the same hidden states, targets and derivatives, and each its own rows of the
    weight.

    Attributes:
        group: the ranks that hold one vocabulary together.
        start: the first token id whose row is here.
        size: V, tokens of the whole vocabulary.
    """

    group: dist.ProcessGroup
    start: int
    size: int

    def check(self, columns: int) -> None:
        """Hold the head's rows that are here to the vocabulary.

        Raises:
            InvalidArgumentError: they reach beyond it, or there are none.
        """
        if not 0 <= self.start < self.start + columns <= self.size:
            raise InvalidArgumentError(
                f"weight has {columns} rows from token {self.start} on, the vocabulary has {self.size} tokens"
            )

    def columns(self, targets: Tensor) -> Tensor:
        """Where the targets [T] are among the columns here; out of range where another rank has them."""
        return targets - self.start

    def joined(
        self, lse: Tensor, logprobs: Tensor, entropies: Tensor | None, is_here: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Statistics over all columns, of those over the columns of each rank.

        With shares w of the ranks' parts in a row's sum of exponentials, a target's probability is w times that among
        the part's columns, and the entropy is sum w (H - log w).

        Args:
            lse: [T] log-sum-exp of the columns here.
            logprobs: [T] of the targets among the columns here; any value where the target is elsewhere.
            entropies: [T] of the distribution over the columns here, or None.
            is_here: [T] bool, whether the target is.

        Returns:
            log-sum-exps, logprobs and entropies [T].
        """
        top = lse.clone()
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=self.group)
        height = lse - top
        share = height.exp()
        parts = [share, torch.where(is_here, logprobs + height, 0.0)]
        if entropies is not None:
            parts.append(torch.where(share == 0, 0.0, share * (entropies - height)))
        total = torch.stack(parts)
        self.add_up(total)
        log_whole = total[0].log()
        found = total[2] / total[0] + log_whole if entropies is not None else None
        return top + log_whole, total[1] - log_whole, found

    def add_up(self, tensor: Tensor) -> Tensor:
        """Sum of all ranks' tensors, in place."""
        dist.all_reduce(tensor, group=self.group)
        return tensor
