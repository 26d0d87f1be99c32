"""Attention of packed rows: every kernel against a softmax over each history alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import flex_attention

from fitrl.data.packing import pack
from fitrl.data.samples import Sample
from fitrl.errors import UnsupportedError
from fitrl.policy import attention
from fitrl.policy.packed_row import BLOCK, PackedRow, _visible_blocks, as_packed
from flash import use_flash_by_definition
from helpers import sample, token_history
from trees import trees

HEADS, KEY_HEADS, SIZE = 4, 2, 16
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def row_of(samples: list[Sample], layout: str = "shared", multiple_of: int = 1) -> tuple[PackedRow, list[Tensor]]:
    """A packed row, and the places of each history in it."""
    [batch] = pack(samples, layout=layout)  # type: ignore[arg-type]
    everything = [history for one in samples for history in one.histories]
    row = PackedRow(batch.model_inputs, multiple_of=multiple_of)
    allowed = row.dense()
    places, start = [], 0
    for history in everything:
        trained = int(history.mask.sum())
        last_trained = int(batch.loss_inputs.rows[start + trained - 1])
        start += trained
        places.append(allowed[last_trained].nonzero().squeeze(1))  # up to the last predictor; the rest nobody reads
    return row, places


def heads_of(row: PackedRow, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, row.length, SIZE, dtype=dtype, generator=generator)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    )
    return query, key, value


def alone(
    query: Tensor, key: Tensor, value: Tensor, places: Tensor, scale: float, softcap: float | None, window: int | None
) -> Tensor:
    """[L, heads, D] attention of one history, head by head, token by token."""
    outputs = []
    for t in range(len(places)):
        first = 0 if window is None else max(0, t + 1 - window)
        seen = places[first : t + 1]
        for head in range(HEADS):
            other = head * KEY_HEADS // HEADS
            logits = key[0, other, seen] @ query[0, head, places[t]] * scale
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            outputs.append(logits.softmax(0) @ value[0, other, seen])
    return torch.stack(outputs).view(len(places), HEADS, SIZE)


def compare(
    kernel: Callable[..., Tensor], row: PackedRow, places: list[Tensor], *, gradient: bool, **asked: Any
) -> None:
    """A kernel's outputs, and gradients, against those of histories alone."""
    query, key, value = (heads.requires_grad_(gradient) for heads in heads_of(row))
    ours = kernel(query, key, value, row, scale=0.3, **asked)
    assert ours.shape == (1, row.length, HEADS, SIZE)
    weights = [torch.cos(torch.arange(len(own) * HEADS * SIZE)).view(-1, HEADS, SIZE) for own in places]
    window, softcap = asked.get("window"), asked.get("softcap")
    theirs = [alone(query, key, value, own, 0.3, softcap, window) for own in places]
    for own, expected in zip(places, theirs, strict=True):
        assert torch.allclose(ours[0, own], expected, rtol=0, atol=1e-12)
    if gradient:
        together = sum((ours[0, own] * weight).sum() for own, weight in zip(places, weights, strict=True))
        apart = sum((expected * weight).sum() for expected, weight in zip(theirs, weights, strict=True))
        for left, right in zip(
            torch.autograd.grad(together, (query, key, value)),
            torch.autograd.grad(apart, (query, key, value)),
            strict=True,
        ):
            assert torch.allclose(left, right, rtol=0, atol=1e-12)


windows = st.sampled_from([None, 1, 2, 3, 7])
softcaps = st.sampled_from([None, 0.7])


@given(trees(max_trajectories=4, max_histories=2), st.sampled_from(["packed", "shared"]), windows, softcaps)
def test_a_dense_mask_keeps_histories_apart(samples: list[Sample], layout: str, window: Any, softcap: Any) -> None:
    row, places = row_of(samples, layout)

    compare(attention.dense_attention, row, places, gradient=True, window=window, softcap=softcap)


@given(trees(max_trajectories=4, max_histories=2), windows, softcaps)
def test_flex_attention_keeps_histories_apart(samples: list[Sample], window: Any, softcap: Any) -> None:
    """Not compiled, so that no compiler stands between the definition and the test; it has no backward on a CPU."""
    row, places = row_of(samples, multiple_of=BLOCK)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_compiled_flex_attention", lambda: flex_attention)
        compare(attention.flex_attention, row, places, gradient=False, window=window, softcap=softcap)


@given(trees(max_trajectories=4, max_histories=2), windows, st.sampled_from([1, BLOCK]))
def test_lengths_say_where_histories_are(samples: list[Sample], window: int | None, multiple_of: int) -> None:
    """The flash kernel needs a GPU: what it is asked for, computed by a loop over the lengths."""
    row, places = row_of(samples, "packed", multiple_of)

    def by_lengths(*given: Any, **asked: Any) -> Tensor:
        *_, begin, begin_k, longest, longest_k = given
        assert begin is begin_k and longest == longest_k == int(begin.diff().max())
        assert asked.get("enable_gqa", True)
        return lengths_by_definition(*given, **asked)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "varlen_attn", by_lengths)
        compare(attention.length_attention, row, places, gradient=False, window=window)


def lengths_by_definition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    begin: Tensor,
    begin_k: Tensor,
    longest: int,
    longest_k: int,
    **asked: Any,
) -> Tensor:
    """What the flash kernel computes: the last query of a segment is in one line with its last key."""
    assert int(begin[-1]) == len(query) and int(begin_k[-1]) == len(key) == len(value)
    assert begin.dtype == begin_k.dtype == torch.int32
    left, right = asked["window_size"]
    assert right == 0
    groups = query.shape[1] // key.shape[1]
    outputs = []
    for a, b, c, d in zip(*(each.tolist() for each in (begin[:-1], begin[1:], begin_k[:-1], begin_k[1:])), strict=True):
        assert b - a <= longest and d - c <= longest_k and b - a <= d - c
        seen = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))
        if left != -1:
            seen = seen.triu(d - c - (b - a) - left)
        heads = [each.transpose(0, 1) for each in (query[a:b], key[c:d], value[c:d])]
        queries, keys, values = heads[0], *(each.repeat_interleave(groups, dim=0) for each in heads[1:])
        logits = (queries @ keys.transpose(1, 2) * asked["scale"]).masked_fill(~seen, -torch.inf)
        outputs.append((logits.softmax(-1) @ values).transpose(0, 1))
    return torch.cat(outputs)


def lengthened(samples: list[Sample], times: int) -> list[Sample]:
    """The same trees with each token so many times."""
    longer = [
        [[i for i in history.token_ids.tolist() for _ in range(times)] for history in one.histories] for one in samples
    ]
    return [sample(*(token_history(ids, [0] + [1] * (len(ids) - 1)) for ids in histories)) for histories in longer]


def test_a_padded_batch_is_a_packed_row_of_its_histories() -> None:
    lengths = (5, 9, 3)
    samples = [sample(token_history(range(1, n + 1), [0] + [1] * (n - 1))) for n in lengths]
    [batch] = pack(samples, layout="padded")
    inputs = batch.model_inputs
    (rows, length), row = inputs.input_ids.shape, PackedRow(as_packed(inputs))
    assert rows == 3 and row.input_ids.tolist() == [inputs.input_ids.flatten().tolist()]
    assert row.position_ids.tolist() == [list(range(length)) * rows]
    apart = torch.block_diag(*[torch.ones(length, length).tril()] * rows).bool()
    assert torch.equal(row.dense(), apart) and row.boundaries.tolist() == [0, length, 2 * length, 3 * length]
    halves = [PackedRow(as_packed(inputs), multiple_of=2, stretch=(number, 2)).dense() for number in (0, 1)]
    assert torch.equal(torch.cat(halves)[: len(apart), : len(apart)], apart)


@given(
    trees(max_trajectories=4, max_histories=2),
    st.integers(1, 4),
    st.sampled_from(
        [("dense", "packed"), ("dense", "shared"), ("flex", "shared"), ("length", "packed"), ("shared",) * 2]
    ),
    st.sampled_from([None, 1, 2, 7, 100]),
    st.integers(1, 90),
)
def test_stretches_of_a_row_add_up_to_it(
    samples: list[Sample], count: int, how: tuple[str, str], window: int | None, longer: int
) -> None:
    """Queries of a stretch against all keys, and what all stretches together say of the keys' gradients."""
    kernel, layout = how
    if kernel == "flex":  # so that there are tokens in more than the first block
        samples = lengthened(samples, longer)
    [batch] = pack(samples, layout=layout)  # type: ignore[arg-type]
    asked = {"scale": 0.3} if kernel == "shared" else {"scale": 0.3, "window": window}
    if kernel == "shared" and batch.model_inputs.crossings is None:
        return
    multiple = count * BLOCK if kernel == "flex" else count
    whole = PackedRow(batch.model_inputs, multiple_of=multiple)
    rows = [PackedRow(batch.model_inputs, multiple_of=multiple, stretch=(number, count)) for number in range(count)]
    heads = [each.requires_grad_(kernel != "flex") for each in heads_of(whole)]  # FlexAttention: no backward on a CPU
    expected = attention.dense_attention(*heads, whole, **asked)
    read = batch.num_positions  # what fills up the row is not compared

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "varlen_attn", lengths_by_definition)
        patch.setattr(attention, "_compiled_flex_attention", lambda: flex_attention)
        use_flash_by_definition(patch)
        attend = getattr(attention, f"{kernel}_attention")
        parts = [attend(heads[0][:, :, row.queries], *heads[1:], row, **asked) for row in rows]

        ours, expected = torch.cat(parts, dim=1)[:, :read], expected[:, :read]
        assert torch.allclose(ours, expected, rtol=0, atol=1e-12)
        if kernel != "flex":
            weight = torch.cos(torch.arange(ours.numel())).view_as(ours)
            gradients = [torch.autograd.grad((said * weight).sum(), heads) for said in (ours, expected)]
            for mine, wanted in zip(*gradients, strict=True):
                assert torch.allclose(mine, wanted, rtol=0, atol=1e-12)


@given(trees(max_histories=2), st.sampled_from([1, BLOCK]))
def test_parts_of_a_tree_add_up(samples: list[Sample], multiple_of: int) -> None:
    """The flash kernel needs a GPU: in its place its definition, forward and backward, in float64."""
    row, places = row_of(samples, multiple_of=multiple_of)

    if row.crossings is None:
        return
    with pytest.MonkeyPatch.context() as patch:
        use_flash_by_definition(patch)
        compare(attention.shared_attention, row, places, gradient=True)


@given(trees(max_histories=2), st.sampled_from([None, 2, 100, 200]), st.integers(1, 90))
def test_block_masks_are_those_of_the_dense_mask(samples: list[Sample], window: int | None, times: int) -> None:
    samples = lengthened(samples, times)  # so that there are blocks
    row, _ = row_of(samples, multiple_of=BLOCK)
    dense = row.dense(window).view(row.length // BLOCK, BLOCK, -1, BLOCK)

    some, whole = _visible_blocks(row.ends, row.position_ids[0], window)
    blocks = row.blocks(window)

    holds, full = dense.any(3).any(1), dense.all(3).all(1)
    if window is None:
        assert torch.equal(some, holds) and torch.equal(whole, full)
    assert not (holds & ~some).any() and not (whole & ~full).any()
    assert torch.equal(blocks.to_dense()[0, 0].bool(), some)
    count = row.length // BLOCK
    [batch] = pack(samples, layout="shared")
    for number in range(count):
        part = PackedRow(batch.model_inputs, multiple_of=BLOCK, stretch=(number, count)).blocks(window)
        assert torch.equal(part.to_dense()[0, 0].bool(), some[number : number + 1])
    assert blocks is row.blocks(window)  # made once


def test_a_window_that_hides_nothing_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    row, _ = row_of([sample(token_history(range(9), [0] * 8 + [1]))])
    asked = []
    monkeypatch.setattr(attention, "dense_attention", lambda *heads, **options: asked.append(options["window"]))
    for window in (7, 8, 4096):
        attention.attend(*heads_of(row), row, scale=1.0, window=window)
    assert asked == [7, None, None]


def test_flex_attention_is_not_compiled_for_each_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(flex_attention, dynamic=True, backend=counter)
    monkeypatch.setattr(attention, "_compiled_flex_attention", lambda: compiled)
    counts, lengths = [], []
    for number in range(20):
        prompt = list(range(100 + 53 * number))
        samples = [
            sample(token_history([*prompt, i, i, i], [0] * (len(prompt) + 2) + [1])) for i in range(2 + number % 5)
        ]
        row, _ = row_of(samples, multiple_of=BLOCK)
        attention.flex_attention(*heads_of(row, dtype=torch.float32), row, scale=0.3)
        counts.append(counter.frame_count)
        lengths.append(row.length)
    assert len(set(lengths)) >= 8
    assert counts[-1] <= 2  # sizes that happen to be equal in the first batch may take a second time
    torch._dynamo.reset()


def test_autocast_reaches_packed_attention() -> None:
    """Rotary embeddings leave queries in float32 beside values in bfloat16."""
    row, _ = row_of([sample(token_history(range(9), [0] * 8 + [1]))])
    query, key, value = heads_of(row, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for softcap in (None, 2.0):
            out = attention.attend(query, key, value.bfloat16(), row, scale=0.3, softcap=softcap)
            assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("asked", [{"s_aux": torch.zeros(4)}, {"position_bias": torch.zeros(1)}, {"dropout": 0.1}])
def test_what_packed_attention_lacks_is_refused(asked: dict[str, Any]) -> None:
    row, _ = row_of([sample(token_history(range(9), [0] * 8 + [1]))])
    with pytest.raises(UnsupportedError, match="layout='padded'"):
        attention._attend_as_asked(torch.nn.Module(), *heads_of(row), row, asked)
    attention._attend_as_asked(torch.nn.Module(), *heads_of(row), row, {"s_aux": None, "dropout": 0.0})


def test_torch_has_the_flash_kernel_that_is_asked_for() -> None:
    from torch.nn.attention.varlen import varlen_attn

    names = list(inspect.signature(varlen_attn).parameters)
    assert names[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"scale", "window_size"} <= set(names)


@GPU
@pytest.mark.parametrize("layout", ["packed", "shared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (50, None), (None, 2.0), (50, 2.0)])
def test_gpu_kernels_compute_what_the_dense_mask_does(
    layout: str, dtype: torch.dtype, window: Any, softcap: Any
) -> None:
    prompt = list(range(200))
    samples = [
        sample(token_history([*prompt, *[i] * (20 + 30 * i)], [0] * 200 + [1] * (20 + 30 * i))) for i in range(6)
    ]
    [batch] = pack(samples, layout=layout)  # type: ignore[arg-type]
    inputs = batch.to("cuda").model_inputs
    row = PackedRow(inputs, multiple_of=2 * BLOCK)
    halves = [PackedRow(inputs, multiple_of=2 * BLOCK, stretch=(number, 2)) for number in (0, 1)]
    query, key, value = (heads.cuda() for heads in heads_of(row))

    def by_halves(query: Tensor, key: Tensor, value: Tensor, row: PackedRow, **asked: Any) -> Tensor:
        parts = [attention.attend(query[:, :, half.queries], key, value, half, **asked) for half in halves]
        return torch.cat(parts, dim=1)

    weight = torch.randn(1, row.length, HEADS, SIZE, device="cuda", dtype=torch.float64)
    read = batch.num_positions  # what fills up the row is not compared
    weight[:, read:] = 0.0
    results = []
    for kernel, kind in ((attention.dense_attention, torch.float64), (attention.attend, dtype), (by_halves, dtype)):
        leaves = [heads.to(kind).requires_grad_() for heads in (query, key, value)]
        out = kernel(*leaves, row, scale=0.3, window=window, softcap=softcap)
        results.append([out[:, :read], *torch.autograd.grad((out.double() * weight).sum(), leaves)])
    for exact, *found in zip(*results, strict=True):
        for ours in found:
            error = float((exact - ours.double()).norm() / exact.norm())
            assert error < (1e-2 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_one_long_history_takes_the_kernel_for_one(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    [batch] = pack([sample(token_history([i % 50 for i in range(300)], [0] + [1] * 299))], layout="padded")
    inputs = as_packed(batch.to(device).model_inputs)
    assert not attention.packed_row(inputs).is_one_long_history
    monkeypatch.setattr(attention, "LONG", 256)
    row = attention.packed_row(inputs)
    if device == "cuda":
        assert row.is_one_long_history and row.length == 304
    else:
        monkeypatch.setattr(attention, "_LONG_BACKEND", SDPBackend.MATH)
    leaves = [heads.to(device).requires_grad_() for heads in heads_of(row)]
    exact = attention.dense_attention(*leaves, row, scale=0.3)[:, :299]
    weight = torch.cos(torch.arange(exact.numel(), device=device)).view_as(exact)
    expected = [exact, *torch.autograd.grad((exact * weight).sum(), leaves)]
    own = [heads.detach().to(torch.float64 if device == "cpu" else torch.bfloat16).requires_grad_() for heads in leaves]
    ours = attention.causal_attention(*own, scale=0.3)[:, :299]
    for wanted, found in zip(expected, [ours, *torch.autograd.grad((ours * weight).sum(), own)], strict=True):
        assert float((wanted - found.double()).norm() / wanted.norm()) < (1e-12 if device == "cpu" else 1e-2)
