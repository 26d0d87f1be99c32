"""Triton kernels over rows of logits: one sweep for the statistics, one for the gradient, in place.

Enters: a [T, V] tile of raw logits, and vectors over its rows. Leaves: log-sum-exp, target logprob and entropy of each
row, or the gradient of the logits in the storage of the logits. Import only where Triton is there; `rows` does.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# below any logit, and finite: a difference of two of them is 0, not NaN
_LOWEST = tl.constexpr(-1e30)
# how far above the shift a logit may be: exp(40) times 2^18 columns is far from the largest float32 and bfloat16
_HEADROOM = tl.constexpr(40.0)


@triton.jit
def _bent(logits, bias, columns, inside, softcap, BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    """Raw logits with bias and soft cap, and the slope of the cap."""
    values = logits.to(tl.float32)
    if BIAS:
        values += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    slope = 1.0
    if SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1), right at both ends
        bent = 1.0 - 2.0 / (tl.exp(values * (2.0 / softcap)) + 1.0)
        slope = 1.0 - bent * bent
        values = softcap * bent
    return values, slope


@triton.jit
def _statistics_kernel(
    logits,
    row_stride,
    rows,
    targets,
    temperature,
    temperature_stride,
    bias,
    softcap,
    lse,
    logprobs,
    entropies,
    vocabulary,
    ROWS: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,
):
    """One program a row. Each of LANES keeps a running maximum and sum of its own, and waits for no other."""
    index = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + index) if ROWS else index
    start_of_row = logits + row * row_stride
    scale = 1.0 / tl.load(temperature + index * temperature_stride).to(tl.float32)
    offsets = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    peak = tl.full((LANES,), _LOWEST, tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    moment = tl.zeros((LANES,), tl.float32)  # sum of exp(z - peak) (z - peak)
    for start in range(0, vocabulary, DEPTH * LANES):
        columns = start + offsets
        inside = columns < vocabulary
        raw = tl.load(start_of_row + columns, mask=inside, other=0.0)
        z, _ = _bent(raw, bias, columns, inside, softcap, BIAS, SOFTCAP)
        z = tl.where(inside, z * scale, -float("inf"))
        highest = tl.maximum(peak, tl.max(z, axis=0))
        shrink = tl.exp(peak - highest)
        gap = z - highest[None, :]
        weight = tl.exp(gap)
        if ENTROPY:
            product = tl.where(weight > 0.0, weight * gap, 0.0)
            moment = shrink * (moment + (peak - highest) * total) + tl.sum(product, axis=0)
        total = total * shrink + tl.sum(weight, axis=0)
        peak = highest
    top = tl.max(peak, axis=0)
    shrink = tl.exp(peak - top)
    whole = tl.sum(total * shrink, axis=0)
    log_whole = tl.log(whole)
    target = tl.load(targets + index)
    known = (target >= 0) & (target < vocabulary)
    raw = tl.load(start_of_row + target, mask=known, other=float("nan"))
    z, _ = _bent(raw, bias, target, known, softcap, BIAS, SOFTCAP)
    tl.store(lse + index, top + log_whole)
    tl.store(logprobs + index, (z * scale - top) - log_whole)
    if ENTROPY:
        tl.store(entropies + index, log_whole - tl.sum(shrink * (moment + (peak - top) * total), axis=0) / whole)


@triton.jit
def _swept_kernel(
    logits,
    row_stride,
    result,
    result_stride,
    targets,
    temperature,
    temperature_stride,
    bias,
    softcap,
    lse,
    logprobs,
    units,
    vocabulary,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row: logits become exp(z - shift), less their sum at the target, and the statistics fall out.

    The shift is a guess at the largest logit. A logit far above it makes a new one, and what was written is scaled.
    """
    row = tl.program_id(0).to(tl.int64)
    source = logits + row * row_stride
    drain = result + row * result_stride
    warmth = tl.load(temperature + row * temperature_stride).to(tl.float32)
    scale = 1.0 / warmth
    target = tl.load(targets + row)
    known = (target >= 0) & (target < vocabulary)
    chosen = tl.load(source + target, mask=known, other=float("nan"))
    at_target, slope_at_target = _bent(chosen, bias, target, known, softcap, BIAS, SOFTCAP)
    at_target *= scale
    shift = tl.maximum(at_target, _LOWEST)
    rest = tl.zeros((BLOCK,), tl.float32)
    tl.debug_barrier()  # the target's logit is read before it is overwritten
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocabulary
        raw = tl.load(source + columns, mask=inside, other=0.0)
        z, slope = _bent(raw, bias, columns, inside, softcap, BIAS, SOFTCAP)
        z = tl.where(inside & (columns != target), z * scale, -float("inf"))
        top = tl.max(z, axis=0)
        if top > shift + _HEADROOM:
            shrink = tl.exp(shift - top)
            tl.debug_barrier()
            for before in range(0, start, BLOCK):
                done = before + tl.arange(0, BLOCK)
                written = tl.load(drain + done).to(tl.float32)
                tl.store(drain + done, (written * shrink).to(result.dtype.element_ty))
            tl.debug_barrier()
            rest *= shrink
            shift = top
        weight = tl.exp(z - shift)
        rest += weight
        if NARROW:  # a narrower result lies over the row's first half: all read before any writes
            tl.debug_barrier()
        tl.store(drain + columns, (weight * slope).to(result.dtype.element_ty), mask=inside)
    others = tl.sum(rest, axis=0)
    whole = others + tl.exp(at_target - shift)
    log_whole = tl.log(whole)
    tl.store(lse + row, shift + log_whole)
    tl.store(logprobs + row, (at_target - shift) - log_whole)
    tl.store(units + row, -1.0 / (whole * warmth))
    tl.debug_barrier()  # the loop wrote 0 there
    tl.store(drain + target, (-others * slope_at_target).to(result.dtype.element_ty), mask=known)


@triton.jit
def _gradients_kernel(
    logits,
    row_stride,
    result,
    result_stride,
    targets,
    temperature,
    temperature_stride,
    bias,
    softcap,
    lse,
    entropies,
    d_logprobs,
    d_entropies,
    vocabulary,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row: d loss / d logits from d loss / d logprob and d loss / d entropy, over the logits."""
    row = tl.program_id(0).to(tl.int64)
    source = logits + row * row_stride
    drain = result + row * result_stride
    slope_p = tl.load(d_logprobs + row)
    slope_h = tl.load(d_entropies + row) if ENTROPY else 0.0
    if slope_p == 0.0 and slope_h == 0.0:  # nothing is read: the row may hold anything
        for start in range(0, vocabulary, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            tl.store(drain + columns, tl.zeros((BLOCK,), result.dtype.element_ty), mask=columns < vocabulary)
    else:
        scale = 1.0 / tl.load(temperature + row * temperature_stride).to(tl.float32)
        shift = tl.load(lse + row)
        target = tl.load(targets + row)
        entropy = tl.load(entropies + row) if ENTROPY else 0.0
        for start in range(0, vocabulary, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < vocabulary
            raw = tl.load(source + columns, mask=inside, other=0.0)
            z, slope = _bent(raw, bias, columns, inside, softcap, BIAS, SOFTCAP)
            logprob = z * scale - shift
            p = tl.exp(logprob)
            gradient = tl.where(columns == target, slope_p, 0.0) - slope_p * p
            if ENTROPY:  # dH/dz = -p (log p + H)
                gradient -= slope_h * tl.where(p > 0.0, p * (logprob + entropy), 0.0)
            gradient *= scale * slope
            if NARROW:  # a narrower result lies over the row's first half: all read before any writes
                tl.debug_barrier()
            tl.store(drain + columns, gradient.to(result.dtype.element_ty), mask=inside)


@triton.jit
def _scale_kernel(source, result, factor, size, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    """Multiply by a scalar that only the device knows; in place, a factor of 1 costs nothing."""
    by = tl.load(factor).to(tl.float32)
    if (not IN_PLACE) or by != 1.0:
        first = tl.program_id(0).to(tl.int64) * BLOCK
        for start in range(first, size, tl.num_programs(0).to(tl.int64) * BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            inside = offsets < size
            values = tl.load(source + offsets, mask=inside, other=0.0).to(tl.float32) * by
            tl.store(result + offsets, values.to(result.dtype.element_ty), mask=inside)


def statistics(
    logits: Tensor,
    targets: Tensor,
    temperature: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    with_entropies: bool,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Launch the statistics; see `rows.statistics`."""
    size = len(targets)
    lse, logprobs = (torch.empty(size, dtype=torch.float32, device=logits.device) for _ in range(2))
    entropies = torch.empty_like(lse) if with_entropies else None
    vocabulary = logits.shape[1]
    lanes, depth, warps = _sweep(vocabulary, logits.element_size())
    if not size:
        return lse, logprobs, entropies
    with _device_of(logits):
        _statistics_kernel[(size,)](
            logits,
            logits.stride(0),
            rows,
            targets,
            temperature,
            temperature.stride(0),
            bias,
            softcap or 1.0,
            lse,
            logprobs,
            entropies,
            vocabulary,
            ROWS=rows is not None,
            BIAS=bias is not None,
            SOFTCAP=softcap is not None,
            ENTROPY=with_entropies,
            DEPTH=depth,
            LANES=lanes,
            num_warps=warps,
        )
    return lse, logprobs, entropies


def swept_(
    logits: Tensor,
    result: Tensor,
    targets: Tensor,
    temperature: Tensor,
    bias: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the one sweep; returns log-sum-exp, logprobs and units, see `rows.swept_`."""
    size, vocabulary = logits.shape
    lse, logprobs, units = (torch.empty(size, dtype=torch.float32, device=logits.device) for _ in range(3))
    block = min(2048, max(32, triton.next_power_of_2(vocabulary)))  # measured on an H100
    if not size:
        return lse, logprobs, units
    with _device_of(logits):
        _swept_kernel[(size,)](
            logits,
            logits.stride(0),
            result,
            result.stride(0),
            targets,
            temperature,
            temperature.stride(0),
            bias,
            softcap or 1.0,
            lse,
            logprobs,
            units,
            vocabulary,
            BIAS=bias is not None,
            SOFTCAP=softcap is not None,
            NARROW=result.element_size() < logits.element_size(),
            BLOCK=block,
            num_warps=max(1, block // 512),
        )
    return lse, logprobs, units


def gradients_(
    logits: Tensor,
    result: Tensor,
    targets: Tensor,
    temperature: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    lse: Tensor,
    entropies: Tensor | None,
    d_logprobs: Tensor,
    d_entropies: Tensor | None,
) -> None:
    """Launch the gradient; `result` is the logits, or a view of their storage with a narrower dtype."""
    size, vocabulary = logits.shape
    block, warps = _block(vocabulary, logits.element_size())
    if not size:
        return
    with _device_of(logits):
        _gradients_kernel[(size,)](
            logits,
            logits.stride(0),
            result,
            result.stride(0),
            targets,
            temperature,
            temperature.stride(0),
            bias,
            softcap or 1.0,
            lse,
            entropies,
            d_logprobs,
            d_entropies,
            vocabulary,
            BIAS=bias is not None,
            SOFTCAP=softcap is not None,
            ENTROPY=d_entropies is not None,
            NARROW=result.element_size() < logits.element_size(),
            BLOCK=block,
            num_warps=warps,
        )


def scale(source: Tensor, factor: Tensor, result: Tensor) -> None:
    """Write `source * factor` to `result`, which may be the source."""
    size = source.numel()
    block = 4096
    if not size:
        return
    with _device_of(source):
        _scale_kernel[(min(triton.cdiv(size, block), 132 * 16),)](
            source, result, factor, size, IN_PLACE=source.data_ptr() == result.data_ptr(), BLOCK=block, num_warps=8
        )


def _device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Launch where the tensor is, whichever device is the current one; the interpreter has none."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _sweep(vocabulary: int, itemsize: int) -> tuple[int, int, int]:
    """Lanes, values of a lane in one step, and warps, of the statistics; measured on an H100."""
    columns = triton.next_power_of_2(vocabulary)
    lanes = min(2048, max(32, columns))
    depth = min(8 if itemsize == 2 else 2, max(1, columns // lanes))
    return lanes, depth, max(1, lanes // 256)


def _block(vocabulary: int, itemsize: int) -> tuple[int, int]:
    """Values in one step, and warps, of the gradient; measured on an H100."""
    block = min(16384, max(32, triton.next_power_of_2(vocabulary)))
    return block, max(1, block // (512 if itemsize == 2 else 1024))
