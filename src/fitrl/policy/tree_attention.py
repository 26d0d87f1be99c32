"""Attention of histories that share prefixes, by flash attention alone.

A token sees its own segment causally and the segments above it as a whole. So attention is a causal part over all
segments, and for each depth of the tree a part in which what lies below a segment sees the whole of it: every part is
flash attention over lengths. Their results are merged by their log-sum-exps. With merged results and log-sum-exps the
backward of each part is that of the whole, restricted to the part's pairs, so that the gradients simply add up (both as
in ring attention, Liu et al. 2023).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op


def _flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    scale: float,
    *,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """[L, heads, D] attended and [heads, L] log-sum-exps; 0 and infinity where a query has no key."""
    found = torch.ops.aten._flash_attention_forward(
        query, key, value, *bounds, *longest, 0.0, causal, return_debug_mask=False, scale=scale
    )
    return found[0], found[1]


def _flash_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attended: Tensor,
    sums: Tensor,
    bounds: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    scale: float,
    *,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=query.device), torch.empty(0, device=query.device)
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
        *(gradient, query, key, value, attended, sums, *bounds, *longest, 0.0, causal, *no_dropout), scale=scale
    )
    return found


def _merge(attended: Tensor, sums: Tensor, other: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from attention over each."""
    others = torch.where(others == torch.inf, -torch.inf, others)
    both = torch.logaddexp(sums, others)
    one, two = ((part - both).exp().T[..., None] for part in (sums, others))
    return (attended * one + other * two).to(attended.dtype), both


@functools.cache
def _compiled_merge() -> Callable[..., tuple[Tensor, Tensor]]:
    merge: Any = torch.compile(_merge, dynamic=True)
    return merge  # type: ignore[no-any-return]


# where segments begin among queries and keys, crossings, longest segment, longest (queries, keys)
_Lengths = tuple[Tensor, Tensor, Tensor, int, int, int]


def _parts(lengths: _Lengths) -> list[tuple[tuple[Tensor, Tensor], tuple[int, int], bool]]:
    query_bounds, key_bounds, crossings, longest, queries, keys = lengths
    parts = [((query_bounds, key_bounds), (longest, longest), True)]
    return parts + [((below, above), (queries, keys), False) for below, above in crossings]


@custom_op(
    "fitrl::tree_attention",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor query_bounds, Tensor key_bounds, Tensor crossings, "
    "SymInt longest, SymInt longest_below, SymInt longest_above, float scale) -> (Tensor, Tensor)",
)
def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_bounds: Tensor,
    key_bounds: Tensor,
    crossings: Tensor,
    longest: int,
    longest_below: int,
    longest_above: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention [L, heads, D] within a tree of segments, and its log-sum-exps [heads, L].

    Args:
        query: [L, heads, D] bf16 or fp16.
        key: [K, key heads, D], as many keys or, where the queries are a stretch of the row, more.
        value: [K, key heads, D].
        query_bounds: see `PackedRow`; so is the next.
        key_bounds: [S + 1]; of a segment with fewer queries than keys, the queries are its last tokens.
        crossings: [depths, 2, N + 1], see `ModelInputs`; so are the next three.
        longest: of the segments, or more.
        longest_below: queries.
        longest_above: keys.
        scale: of the logits.
    """
    merge = _compiled_merge() if query.device.type == "cuda" else _merge
    attended, sums = query, query
    for bounds, most, causal in _parts((query_bounds, key_bounds, crossings, longest, longest_below, longest_above)):
        found = _flash_forward(query, key, value, bounds, most, scale, causal=causal)
        attended, sums = found if causal else merge(attended, sums, *found)
    return attended.contiguous(), sums


@tree_attention.register_fake
def _(query: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    sums = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(query.shape), query.new_empty((query.shape[1], query.shape[0]), dtype=sums)


@custom_op(
    "fitrl::tree_attention_backward",
    mutates_args=(),
    schema="(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor attended, Tensor sums, "
    "Tensor query_bounds, Tensor key_bounds, Tensor crossings, SymInt longest, SymInt longest_below, "
    "SymInt longest_above, float scale) -> (Tensor, Tensor, Tensor)",
)
def _tree_attention_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attended: Tensor,
    sums: Tensor,
    query_bounds: Tensor,
    key_bounds: Tensor,
    crossings: Tensor,
    longest: int,
    longest_below: int,
    longest_above: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    total: tuple[Tensor, ...] = ()
    for bounds, most, causal in _parts((query_bounds, key_bounds, crossings, longest, longest_below, longest_above)):
        found = _flash_backward(
            gradient.contiguous(), query, key, value, attended, sums, bounds, most, scale, causal=causal
        )
        total = tuple(one.add_(other) for one, other in zip(total, found, strict=True)) if total else found
    query, key, value = total
    return query.contiguous(), key.contiguous(), value.contiguous()


@_tree_attention_backward.register_fake
def _(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.numbers = inputs[6:]


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, *bounds, attended, sums = ctx.saved_tensors
    gradients: tuple[Tensor, ...] = torch.ops.fitrl.tree_attention_backward(
        gradient, query, key, value, attended, sums, *bounds, *ctx.numbers
    )
    return (*gradients, *(None,) * 7)


tree_attention.register_autograd(_backward, setup_context=_setup_context)
