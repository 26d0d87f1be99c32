"""Tensors in pieces on three gloo ranks, put together again."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from fitrl.policy.sharding import whole
from fitrl.testing import is_rank, run_on_ranks

pytestmark = pytest.mark.slow
on_ranks = pytest.mark.skipif(not is_rank(), reason="the ranks run it")


@pytest.mark.skipif(is_rank(), reason="it starts the ranks")
def test_on_three_ranks() -> None:
    assert "passed" in run_on_ranks(__file__, ranks=3)


@pytest.fixture(scope="module")
def meshes():
    dist.init_process_group("gloo")
    yield [init_device_mesh("cpu", shape) for shape in ((3,), (3, 1), (1, 3))]
    dist.destroy_process_group()


@on_ranks
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 9])
def test_pieces_make_the_tensor(meshes, length) -> None:
    """Of sizes that three ranks share equally or not, some with nothing for the last, cut along each dimension."""
    torch.manual_seed(length)
    for mesh in meshes:
        for shape, dimension in [((length,), 0), ((length, 4), 0), ((4, length), 1), ((2, length, 3), 1)]:
            for dtype in (torch.float32, torch.bfloat16):
                expected = torch.randn(shape).to(dtype)
                pieces = distribute_tensor(expected.clone().requires_grad_(), mesh, [Shard(dimension)] * mesh.ndim)
                found = whole(pieces)
                assert torch.equal(found, expected) and found.dtype == dtype
                assert found.is_contiguous() and not found.requires_grad


@on_ranks
def test_what_is_whole_already(meshes) -> None:
    tensor = torch.arange(6.0)
    assert whole(tensor) is tensor
    for mesh in meshes:
        assert torch.equal(whole(distribute_tensor(tensor, mesh, [Replicate()] * mesh.ndim)), tensor)


@on_ranks
def test_none_of_torchs_gathers_is_asked_for(meshes, monkeypatch) -> None:
    """Ranks have died of theirs on CPUs, too rarely for a test to see; that it is not used is seen."""
    pieces = [distribute_tensor(torch.arange(7.0), mesh, [Shard(0)] * mesh.ndim) for mesh in meshes]
    for name in ("full_tensor", "redistribute"):
        monkeypatch.setattr(type(pieces[0]), name, lambda *_, **__: pytest.fail("asked for"))
    for tensor in pieces:
        assert torch.equal(whole(tensor), torch.arange(7.0))
