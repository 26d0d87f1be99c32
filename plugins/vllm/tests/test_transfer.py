"""Weights that come without files: pieces, and the channel through shared memory, read as the engine reads it."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fitrl
from fitrl.errors import InvalidArgumentError, UnsupportedError
from fitrl_vllm import EngineError, StaleWeightsError, VLLMSampler
from fitrl_vllm.engine_side.fitrl_vllm_engine.channels import (
    HEADER_BYTES,
    MOST_PIECES,
    MemoryChannel,
    NcclChannel,
    header_of,
)
from fitrl_vllm.engine_side.fitrl_vllm_engine.in_place import can_load_in_place
from fitrl_vllm.engine_side.fitrl_vllm_engine.pieces import Assembly, Piece, fill
from fitrl_vllm.transfer import MemorySender, NcclSender

CPU = torch.device("cpu")
SHAPES = st.lists(st.integers(1, 5), max_size=3)
KINDS = st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int32])


def never() -> None:
    pass


def weights_of(shapes: Iterable[tuple[torch.dtype, list[int]]]) -> list[tuple[str, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [
        (f"w{number}", (100 * torch.randn(shape, dtype=torch.float64, generator=draw)).to(kind))
        for number, (kind, shape) in enumerate(shapes)
    ]


def assert_same(found: list[tuple[str, Tensor]], weights: list[tuple[str, Tensor]], dtype: torch.dtype) -> None:
    assert [name for name, _ in found] == [name for name, _ in weights]
    for (_, ours), (_, given_) in zip(found, weights, strict=True):
        expected = given_.to(dtype) if given_.is_floating_point() else given_
        assert ours.dtype == expected.dtype and torch.equal(ours, expected)


@given(
    shapes=st.lists(st.tuples(KINDS, SHAPES), max_size=9),
    size=st.integers(16, 200),
    most=st.integers(1, 4),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_tensors_are_put_together_from_their_pieces(shapes, size, most, dtype) -> None:
    weights, assembly = weights_of(shapes), Assembly(CPU)
    buffer = torch.zeros(size, dtype=torch.uint8)
    found = []
    for table, used in fill(iter(weights), iter(lambda: buffer, None), dtype, most):
        assert 0 < used <= size and 0 < len(table) <= most
        assert all(piece.offset % 16 == 0 for piece in table)
        found += assembly.take(table, buffer)
        buffer.fill_(255)  # what was taken is a copy
    assembly.finish()
    assert_same(found, weights, dtype)


def test_weights_are_loaded_in_place_where_nothing_is_made_of_them() -> None:
    def module(kind: str, method: str | None = None) -> nn.Module:
        made = type(kind, (nn.Module,), {})()
        made.quant_method = None if method is None else type(method, (), {})()
        return made

    gpu, plain = torch.device("cuda", 0), module("QKVParallelLinear", "UnquantizedLinearMethod")
    dense = nn.Sequential(module("VocabParallelEmbedding", "UnquantizedEmbeddingMethod"), plain, module("Attention"))
    assert can_load_in_place(dense, gpu)
    assert not can_load_in_place(dense, CPU)
    for other in (module("FusedMoE", "UnquantizedFusedMoEMethod"), module("MLAAttention"), module("Any", "Fp8Method")):
        assert not can_load_in_place(nn.Sequential(dense, other), gpu)


def test_a_tensor_that_lacks_pieces_is_no_tensor() -> None:
    assembly = Assembly(CPU)
    assert not list(assembly.take([Piece("w", "float32", (4,), 0, 2, 0)], torch.zeros(16, dtype=torch.uint8)))
    with pytest.raises(RuntimeError, match="lacks pieces"):
        assembly.finish()


def test_the_largest_table_fits_into_a_header() -> None:
    piece = Piece(
        "model.layers.1000.some_module.some_projection.some_matrix.weight" * 2, "bfloat16", (10**6,) * 4, *(10**12,) * 3
    )
    assert len(header_of({"table": [piece] * MOST_PIECES, "size": 10**12})) == HEADER_BYTES


def received(sender: MemorySender, number: int = 1) -> Callable[[], list[list[tuple[str, Tensor]]]]:
    """Have so many workers read what a sender sends; returns what waits for what they read."""
    init = sender.prepare([{"dtype": "float32", "device": "cpu"}] * number, 1)
    pool = ThreadPoolExecutor(number)

    def work() -> list[tuple[str, Tensor]]:
        assembly = Assembly(CPU)
        found = [item for table, buffer in MemoryChannel(init["socket"], CPU) for item in assembly.take(table, buffer)]
        assembly.finish()
        return found

    futures = [pool.submit(work) for _ in range(number)]

    def wait() -> list[list[tuple[str, Tensor]]]:
        pool.shutdown()
        return [future.result() for future in futures]

    return wait


@pytest.mark.parametrize("workers", [1, 2])
def test_every_worker_reads_all_weights_through_shared_memory(workers) -> None:
    weights = weights_of([(torch.float32, [7, 3]), (torch.bfloat16, [100]), (torch.float64, [50]), (torch.float32, [])])
    sender = MemorySender(bucket_bytes=64)  # many more buckets than buffers
    try:
        for _ in range(2):
            wait = received(sender, workers)
            sender.send(iter(weights), never)
            for found in wait():
                assert_same(found, weights, torch.float32)
    finally:
        sender.close()


def test_weights_that_cannot_be_had_end_the_transfer_for_the_engine_too() -> None:
    def weights() -> Iterable[tuple[str, Tensor]]:
        yield "w", torch.zeros(100)
        raise ArithmeticError("no more")

    sender = MemorySender(bucket_bytes=64)
    try:
        wait = received(sender)
        with pytest.raises(ArithmeticError):
            sender.send(weights(), never)
        with pytest.raises(RuntimeError, match="the trainer ended before all weights had come"):
            wait()
        wait = received(sender)  # and it can be used again
        sender.send(iter([("w", torch.ones(2))]), never)
        assert_same(wait()[0], [("w", torch.ones(2))], torch.float32)
    finally:
        sender.close()


@pytest.mark.parametrize("make", [MemorySender, NcclSender])
def test_a_sender_does_not_wait_for_an_engine_that_has_given_up(make) -> None:
    def gone() -> None:
        raise EngineError("gone")

    sender = make()
    try:
        with pytest.raises(EngineError, match="gone"):
            sender.send(iter([("w", torch.ones(2))]), gone)
        if make is MemorySender:
            sender.prepare([{"dtype": "float32", "device": "cpu"}], 1)
            with pytest.raises(EngineError, match="gone"):
                sender.send(iter([("w", torch.ones(2))]), gone)
    finally:
        sender.close()


# -- by NCCL, with a queue in its place ----------------------------------------------------------------------------


class Wire:
    """A communicator of two in one process: what rank 0 broadcasts is what the other one's next broadcast has."""

    def __init__(self) -> None:
        self.sent: queue.Queue[Tensor] = queue.Queue()

    def broadcast(self, data: Tensor) -> None:
        self.sent.put(data.clone())

    def abort(self) -> None:
        self.sent.put(torch.zeros(0, dtype=torch.uint8))


class WireEnd(Wire):
    def __init__(self, other: Wire) -> None:
        self.sent = other.sent

    def broadcast(self, data: Tensor) -> None:
        said = self.sent.get(timeout=20.0)
        assert len(said) == len(data)  # or NCCL would wait for ever
        data.copy_(said)


@pytest.fixture
def wired(monkeypatch) -> tuple[NcclSender, Wire]:
    """A sender that has joined, on a CPU."""
    cuda = SimpleNamespace(
        current_stream=lambda: None,
        Stream=lambda: SimpleNamespace(wait_stream=lambda other: None),
        Event=lambda: SimpleNamespace(query=lambda: True, record=lambda stream: None),
        stream=lambda stream: nullcontext(),
    )
    monkeypatch.setattr("fitrl_vllm.transfer._cuda", cuda)
    sender, wire = NcclSender(bucket_bytes=64), Wire()
    return sender, wire


def read(wire: Wire) -> list[tuple[str, Tensor]]:
    assembly = Assembly(CPU)
    found = [item for table, data in NcclChannel(WireEnd(wire), CPU) for item in assembly.take(table, data)]
    assembly.finish()
    return found


@pytest.mark.parametrize("number", [0, 1, 4])
def test_the_engine_reads_what_is_broadcast(number, wired) -> None:
    sender, wire = wired
    kinds = [(torch.float32, [7, 3]), (torch.bfloat16, [100]), (torch.float64, [50]), (torch.float32, [])]
    weights = weights_of(kinds[:number])
    for _ in range(2):
        sender._broadcast(wire, iter(weights), torch.bfloat16, CPU, never)
        assert_same(read(wire), weights, torch.bfloat16)
        assert wire.sent.empty()


@pytest.mark.parametrize("size", [20, 16])  # in the middle of a bucket, and at its end
def test_the_engine_is_told_that_weights_cannot_be_had(size, wired) -> None:
    def weights() -> Iterable[tuple[str, Tensor]]:
        yield "w", torch.zeros(size)
        raise ArithmeticError("no more")

    sender, wire = wired
    with pytest.raises(ArithmeticError):
        sender._broadcast(wire, weights(), torch.float32, CPU, never)
    with pytest.raises(RuntimeError, match="the trainer ended before all weights had come"):
        read(wire)


# -- by the sampler -------------------------------------------------------------------------------------------------


def sampler_of(server: Any, tmp_path: Any, transfer: Any = "memory", **options: Any) -> VLLMSampler:
    model = fitrl.TrainableModel("small", "tests", str(server.folder), lora=None, root=tmp_path)
    return VLLMSampler(model, server.url, tolerance=1e-4, transfer=transfer, **options)


def changed(server: Any) -> list[tuple[str, Tensor]]:
    return [(name, weight.detach() + 0.01) for name, weight in server.base.named_parameters()]


def test_the_engine_is_asked_by_vllms_weight_transfer_api(server, tmp_path) -> None:
    weights = changed(server)
    with sampler_of(server, tmp_path) as sampler:
        sampler.update(iter(weights), 1)
        assert sampler.version == 1
        assert not list(server.base.parameters())[0].isnan().any()
        for (_, ours), (_, given_) in zip(server.base.named_parameters(), weights, strict=True):
            assert torch.equal(ours, given_)
        asked = [path for path, _ in server.requests if "weight" in path or "rpc" in path or "cache" in path]
        assert asked == [
            "/collective_rpc",
            "/init_weight_transfer_engine",
            "/start_weight_update",
            "/update_weights",
            "/finish_weight_update",
            "/reset_prefix_cache",
        ]


def test_an_engine_that_keeps_old_weights_is_found_out(server, tmp_path) -> None:
    server.keeps_old_weights = True
    with sampler_of(server, tmp_path) as sampler, pytest.raises(StaleWeightsError):
        sampler.update_proven(iter(changed(server)), 1, lambda ids: torch.zeros(len(ids) - 1))


def test_an_engine_that_knows_no_transfer_is_told_of(server, tmp_path) -> None:
    server.knows_transfer = False
    with sampler_of(server, tmp_path) as sampler:
        with pytest.raises(EngineError, match="let VLLMServer start it, or take transfer='folder'"):
            sampler.update(iter(changed(server)), 1)
        assert sampler.version == 0


def test_nccl_without_gpus_is_refused(server, tmp_path) -> None:
    with sampler_of(server, tmp_path, transfer="nccl") as sampler:
        with pytest.raises(UnsupportedError, match="transfer='nccl' needs an engine on GPUs"):
            sampler.update(iter(changed(server)), 1)
        assert sampler.version == 0


def test_an_engine_that_fails_in_the_middle_fails_the_exchange(server, tmp_path) -> None:
    server.fails_receiving = True
    with sampler_of(server, tmp_path) as sampler:
        with pytest.raises(EngineError, match="out of memory"):
            sampler.update(iter(changed(server)), 1)
        server.fails_receiving = False
        sampler.update(iter(changed(server)), 1)  # and the next one may succeed
        assert sampler.version == 1


@pytest.mark.parametrize(
    "transfer, lora, said", [("memory", 8, "adapters are trained"), ("smoke", None, "folder, memory, nccl")]
)
def test_a_transfer_that_cannot_be_is_refused(transfer, lora, said, server, tmp_path) -> None:
    settings = None if lora is None else fitrl.LoraSettings(rank=lora)
    model = fitrl.TrainableModel("small", "tests", str(server.folder), lora=settings, root=tmp_path)
    with pytest.raises(InvalidArgumentError, match=said):
        VLLMSampler(model, server.url, transfer=transfer)


def test_a_server_that_does_not_answer_is_not_waited_for_once_it_is_not_well(server, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("fitrl_vllm.http._LOOK_S", 0.1)
    with sampler_of(server, tmp_path, timeout_s=2.0) as sampler:
        server.lives.clear()
        with pytest.raises(EngineError, match="is gone"):
            sampler.update(iter(changed(server)), 1)
        server.lives.set()
        sampler.update(iter(changed(server)), 1)
        assert sampler.version == 1
