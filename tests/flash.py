"""The flash kernel over lengths by its definition, in place of the one that needs a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fitrl.policy import tree_attention


def use_flash_by_definition(patch: pytest.MonkeyPatch) -> None:
    """Let `tree_attention` run on a CPU, in any precision."""
    patch.setattr(tree_attention, "_flash_forward", _flash_forward)
    patch.setattr(tree_attention, "_flash_backward", _flash_backward)


def _spans(bounds: tuple[Tensor, Tensor]) -> Iterator[tuple[slice, slice]]:
    for (a, b), (c, d) in zip(*(list(pairwise(bound.tolist())) for bound in bounds), strict=True):
        assert b >= a and d >= c
        yield slice(a, b), slice(c, d)


def _pairs(bounds: tuple[Tensor, Tensor], longest: tuple[int, int], shape: tuple[int, int], causal: bool) -> Tensor:
    """[queries, keys] bool: who sees whom by the lengths that the flash kernel is given."""
    seen = torch.zeros(shape, dtype=torch.bool)
    for queries, keys in _spans(bounds):
        size = queries.stop - queries.start, keys.stop - keys.start
        # of stretches that are longer, also of those without the other, the kernel leaves results unwritten
        assert size[0] <= longest[0] and size[1] <= longest[1]
        block = torch.ones(size, dtype=torch.bool)
        seen[queries, keys] = block.tril(size[1] - size[0]) if causal else block  # the last ones are in one line
    assert [int(bound[0]) for bound in bounds] == [0, 0]
    assert tuple(int(bound[-1]) for bound in bounds) == shape  # else some results would not be written
    return seen


def _logits(query: Tensor, key: Tensor, scale: float, seen: Tensor) -> Tensor:
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return (torch.einsum("qhd,khd->hqk", query, key) * scale).masked_fill(~seen, -torch.inf)


def _flash_forward(query: Any, key: Any, value: Any, bounds: Any, longest: Any, scale: float, *, causal: bool) -> Any:
    """By its definition, float64; 0 and infinity where there is no key, as the kernel has it."""
    logits = _logits(query, key, scale, _pairs(bounds, longest, (len(query), len(key)), causal))
    sums = logits.logsumexp(-1)
    weights = logits.softmax(-1).nan_to_num(0.0)
    value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    return torch.einsum("hqk,khd->qhd", weights, value), sums.masked_fill(sums.isinf(), torch.inf)


def _flash_backward(
    gradient: Any, query: Any, key: Any, value: Any, attended: Any, sums: Any, bounds: Any, longest: Any, scale: float,
    *, causal: bool,
) -> Any:  # fmt: skip
    """Formulas of Dao et al. 2022, appendix B.2, with the log-sum-exps and results that are given."""
    groups = query.shape[1] // key.shape[1]
    weights = (
        _logits(query, key, scale, _pairs(bounds, longest, (len(query), len(key)), causal)) - sums[..., None]
    ).exp()
    each_key, each_value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    of_value = torch.einsum("hqk,qhd->khd", weights, gradient)
    through = torch.einsum("qhd,khd->hqk", gradient, each_value)
    of_logits = weights * (through - (gradient * attended).sum(-1).T[..., None]) * scale
    of_key = torch.einsum("hqk,qhd->khd", of_logits, query)
    fold = (len(key), key.shape[1], groups, -1)
    return (
        torch.einsum("hqk,khd->qhd", of_logits, each_key),
        of_key.view(fold).sum(2),
        of_value.view(fold).sum(2),
    )
