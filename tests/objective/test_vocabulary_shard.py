"""A head whose vocabulary lies on several ranks against `policy_loss` of explicit logits; the ranks are threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fitrl import fused_linear_policy_loss
from fitrl.errors import InvalidArgumentError
from fitrl.objective import rows
from fitrl.objective.logprobs import linear_logprobs
from fitrl.objective.rows import RowShape
from fitrl.objective.vocabulary_shard import VocabularyShard
from objective.test_fused_linear import (
    OBJECTIVES,
    assert_close,
    explicit_logprobs,
    explicit_policy_loss,
    gradients,
    make_batch,
    make_head,
)

_T = TypeVar("_T")


class Ranks:
    """Threads that stand in for a process group, and note what they tell each other."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.told: list[tuple[int, ...]] = []
        self._barrier = threading.Barrier(size, timeout=30.0)
        self._said: list[Tensor | None] = [None] * size
        self._rank = threading.local()

    def all_reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> None:
        assert group is self
        self._said[self._rank.number] = tensor.clone()
        self._barrier.wait()
        together = torch.stack([said for said in self._said if said is not None])
        self._barrier.wait()
        tensor.copy_(together.amax(0) if op == dist.ReduceOp.MAX else together.sum(0))
        if self._rank.number == 0:
            self.told.append(tuple(tensor.shape))

    def run(self, work: Callable[[int], _T]) -> list[_T]:
        def as_rank(number: int) -> _T:
            self._rank.number = number
            try:
                return work(number)
            except threading.BrokenBarrierError:
                raise
            except BaseException as error:
                failures.append(error)
                self._barrier.abort()
                raise

        failures: list[BaseException] = []
        with mock.patch.object(dist, "all_reduce", self.all_reduce), ThreadPoolExecutor(self.size) as pool:
            jobs = [pool.submit(as_rank, number) for number in range(self.size)]
        if failures:
            raise failures[0]
        return [job.result() for job in jobs]


def cut(ranks: Ranks, head: dict[str, Tensor], rank: int) -> tuple[dict[str, Tensor], VocabularyShard]:
    """A rank's rows of the head, as leaves, and which ones they are."""
    size = len(head["weight"])
    start, end = (number * size // ranks.size for number in (rank, rank + 1))
    own = {
        name: (tensor if name == "hidden" else tensor[start:end]).detach().clone().requires_grad_(tensor.requires_grad)
        for name, tensor in head.items()
    }
    return own, VocabularyShard(group=ranks, start=start, size=size)  # type: ignore[arg-type]


def put_together(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The whole head's gradients of the ranks'; each of them has those of the hidden states."""
    for part in parts[1:]:
        assert torch.equal(part["hidden"], parts[0]["hidden"])
    return {
        name: tensor if name == "hidden" else torch.cat([part[name] for part in parts])
        for name, tensor in parts[0].items()
    }


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    name=st.sampled_from(sorted(OBJECTIVES)),
    size=st.integers(1, 4),
    tokens=st.integers(1, 9),
    vocabulary=st.integers(4, 21),
    rows_per_tile=st.none() | st.integers(1, 4),
    softcap=st.none() | st.just(2.5),
    scale=st.sampled_from([1.0, 40.0]),
    has_bias=st.booleans(),
    with_entropies=st.booleans(),
    leave_out=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_loss_metrics_and_gradients_are_those_of_the_whole_head(
    name: str,
    size: int,
    tokens: int,
    vocabulary: int,
    rows_per_tile: int | None,
    softcap: float | None,
    scale: float,
    has_bias: bool,
    with_entropies: bool,
    leave_out: bool,
    seed: int,
) -> None:
    objective = OBJECTIVES[name]
    head, batch = make_head(tokens, vocabulary=vocabulary, seed=seed), make_batch(tokens, vocabulary, seed=seed)
    head["hidden"] = (head["hidden"] * scale).detach().requires_grad_()
    if not has_bias:
        del head["bias"]
    keywords: dict[str, Any] = {"objective": objective, "softcap": softcap, "temperature": 0.7}
    wanted = explicit_policy_loss(head, batch, **keywords)
    ranks = Ranks(size)

    def work(rank: int) -> tuple[Any, dict[str, Tensor]]:
        own, shard = cut(ranks, head, rank)
        found = fused_linear_policy_loss(
            **own,
            **batch,
            **keywords,
            shard=shard,
            rows_per_tile=rows_per_tile,
            with_entropies=with_entropies,
            leave_out=leave_out,
        )
        return found, gradients(found.loss, own)

    found = ranks.run(work)
    for result, _ in found:
        assert torch.equal(result.loss, found[0][0].loss)
        assert_close(result.loss, wanted.loss)
        # the explicit loss has seen every row: metrics of ratios are over those that were computed
        if not leave_out:
            assert_close(dict(result.metrics), {key: wanted.metrics[key] for key in result.metrics})
    assert_close(put_together([part for _, part in found]), gradients(wanted.loss, head))
    statistics = {shape for shape in ranks.told if len(shape) == 1 or shape[0] in (2, 3)}
    states = {shape for shape in ranks.told if len(shape) == 2 and shape[1] == head["hidden"].shape[1]}
    assert {len(shape) for shape in ranks.told} <= {1, 2} and set(ranks.told) <= statistics | states


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(
    size=st.integers(1, 4),
    vocabulary=st.integers(4, 21),
    rows_per_tile=st.none() | st.integers(1, 4),
    with_entropies=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_logprobs_and_their_gradients(
    size: int, vocabulary: int, rows_per_tile: int | None, with_entropies: bool, seed: int
) -> None:
    head, batch = make_head(vocabulary=vocabulary, seed=seed), make_batch(vocabulary=vocabulary, seed=seed)
    temperature = torch.linspace(0.5, 2.0, len(batch["targets"]), dtype=torch.float64)
    logprobs, entropies = explicit_logprobs(**head, targets=batch["targets"], temperature=temperature)
    direction = batch["advantages"]
    wanted = (direction * logprobs).sum() + (direction.flip(0) * entropies).sum() * with_entropies
    ranks = Ranks(size)

    def work(rank: int) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        own, shard = cut(ranks, head, rank)
        found, spread = linear_logprobs(
            **own,
            targets=batch["targets"],
            temperature=temperature,
            rows_per_tile=rows_per_tile,
            with_entropies=with_entropies,
            shard=shard,
        )
        told = (direction * found).sum() + (0.0 if spread is None else (direction.flip(0) * spread).sum())
        return found.detach(), None if spread is None else spread.detach(), gradients(told, own)

    results = ranks.run(work)
    for found, spread, _ in results:
        assert_close(found, logprobs.detach())
        if spread is not None:
            assert_close(spread, entropies.detach())
    assert_close(put_together([part for *_, part in results]), gradients(wanted, head))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_heads_are_as_near_as_a_whole_one(dtype: torch.dtype) -> None:
    batch = {name: t.float() if t.is_floating_point() else t for name, t in make_batch(vocabulary=16).items()}
    head = make_head(vocabulary=16, dtype=dtype)
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in head.items()}
    wanted = gradients(
        explicit_policy_loss(
            exact, {k: t.double() if t.is_floating_point() else t for k, t in batch.items()}, objective=OBJECTIVES["k3"]
        ).loss,
        exact,
    )
    ranks = Ranks(2)

    def work(rank: int) -> dict[str, Tensor]:
        own, shard = cut(ranks, head, rank)
        options = {"objective": OBJECTIVES["k3"], "shard": shard, "exact_logits": True}
        return gradients(fused_linear_policy_loss(**own, **batch, **options).loss, own)

    found = put_together(ranks.run(work))
    whole = gradients(
        fused_linear_policy_loss(**head, **batch, objective=OBJECTIVES["k3"], exact_logits=True).loss, head
    )
    for name, tensor in wanted.items():
        error = (found[name].double() - tensor).norm() / tensor.norm()
        of_whole = (whole[name].double() - tensor).norm() / tensor.norm()
        assert error <= 2.0 * of_whole + 1e-6


@pytest.mark.parametrize("with_entropies", [False, True])
def test_the_kernels_and_their_twins_see_the_same_shard(monkeypatch, with_entropies: bool) -> None:
    """Triton's statistics of parts, joined, are the twins' of the whole; so is the gradient."""
    pytest.importorskip("triton")
    from fitrl.objective import triton_rows

    lock = threading.Lock()  # Triton's interpreter is for one thread

    def alone(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with lock:
                return kernel(*args)

        return call

    for name in ("statistics", "gradients_"):
        monkeypatch.setattr(triton_rows, name, alone(getattr(triton_rows, name)))
    generator = torch.Generator().manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits = (3.0 * torch.randn(5, 34, generator=generator)).to(device)
    shape = RowShape(
        targets=torch.tensor([0, 16, 17, 33, 5], device=device), temperature=torch.full((5,), 0.8, device=device)
    )
    d_logprobs, d_entropies = torch.randn(2, 5, generator=generator).to(device)

    def both(part: Tensor, how: RowShape) -> tuple[Any, Tensor]:
        found = rows.statistics(part, how, with_entropies=with_entropies)
        slopes = d_entropies if with_entropies else None
        return found, rows.gradients_(part.clone(), how, found, d_logprobs, slopes, part.dtype)

    monkeypatch.setattr(rows, "_on_gpu", lambda tensor: False)
    wanted, gradient = both(logits, shape)
    monkeypatch.setattr(rows, "_on_gpu", lambda tensor: True)
    ranks = Ranks(2)

    def work(rank: int) -> tuple[Any, Tensor]:
        shard = VocabularyShard(group=ranks, start=17 * rank, size=34)  # type: ignore[arg-type]
        how = RowShape(targets=shape.targets, temperature=shape.temperature, shard=shard)
        return both(logits[:, 17 * rank : 17 * (rank + 1)].contiguous(), how)

    results = ranks.run(work)
    for found, _ in results:
        for name in ("lse", "logprobs", "entropies"):
            torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([part for _, part in results], dim=1), gradient, rtol=1e-5, atol=1e-5)


def test_a_part_that_is_none_of_the_vocabulary_is_refused() -> None:
    head, batch = make_head(), make_batch()
    shard = VocabularyShard(group=Ranks(1), start=1, size=len(head["weight"]))  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="from token 1 on, the vocabulary has 17"):
        linear_logprobs(**head, targets=batch["targets"], shard=shard)
    own, shard = cut(Ranks(2), head, 0)
    with pytest.raises(InvalidArgumentError, match="the vocabulary has 17 tokens"):
        linear_logprobs(own["hidden"], own["weight"][:0], batch["targets"], shard=shard)
    with pytest.raises(InvalidArgumentError, match="the vocabulary has 17 tokens"):
        own, shard = cut(Ranks(2), head, 0)
        linear_logprobs(**own, targets=torch.full((len(batch["targets"]),), 17), shard=shard)


def test_a_tile_that_does_not_fit_is_not_halved_by_one_rank_alone(monkeypatch) -> None:
    head, batch = make_head(), make_batch()
    own, shard = cut(Ranks(1), head, 0)

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr("fitrl.objective.logprobs.statistics", full)
    with pytest.raises(torch.OutOfMemoryError):
        linear_logprobs(**own, targets=batch["targets"], shard=shard)
