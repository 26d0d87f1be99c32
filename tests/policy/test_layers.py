"""Compiled and recomputed decoder layers compute what plain ones do, with few graphs, and keep what they promise."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from fitrl.data.batch import Batch
from fitrl.data.packing import pack
from fitrl.policy import attention
from fitrl.policy.layers import compile_layers, decoder_layers, narrow_frozen_layers, recompute_layers
from fitrl.policy.loading import LoraSettings, load_policy
from fitrl.policy.packed_row import PackedRow
from fitrl.policy.policy import Policy
from flash import use_flash_by_definition
from helpers import sample, token_history


@pytest.fixture(autouse=True)
def no_graphs_from_elsewhere() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def policy_of(adapters: bool) -> Policy:
    return load_policy("tiny", LoraSettings(rank=4) if adapters else None)


def batch_of(seed: int, layout: Any) -> Batch:
    """Some prompts with answers, some histories of their own; another shape for each seed."""
    draw = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [draw.randrange(200) for _ in range(count)]

    samples = []
    for _ in range(draw.randint(1, 4)):
        prompt = ids(draw.randint(3, 30))
        for _ in range(draw.randint(1, 5)):
            answer = ids(draw.randint(2, 20))
            samples.append(sample(token_history([*prompt, *answer], [0] * len(prompt) + [1] * len(answer))))
    [batch] = pack(samples, layout=layout)
    return batch


def gradient_of(policy: Policy, batch: Batch) -> Tensor:
    hidden = policy.hidden_of(batch.model_inputs).flatten(0, 1)[batch.loss_inputs.rows]
    weight = torch.cos(torch.arange(hidden.numel(), dtype=hidden.dtype)).view_as(hidden)
    parameters = [p for p in policy.causal_lm.base_model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad((hidden * weight).sum(), parameters, allow_unused=True)
    return torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


def _tree_where_there_is_one(query: Tensor, value: Tensor, row: PackedRow, **asked: Any) -> str:
    return "dense" if row.crossings is None else "tree"


@pytest.mark.parametrize(
    ("adapters", "recomputed", "by_tree"),
    [(False, None, False), (True, "all", False), (False, "but attention", True), (True, "but attention", True)],
)
def test_20_batch_shapes_do_not_compile_20_times(
    adapters: bool, recomputed: str | None, by_tree: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by_tree:
        use_flash_by_definition(monkeypatch)
        monkeypatch.setattr(attention, "choose_kernel", _tree_where_there_is_one)
    policy = policy_of(adapters)
    policy.network.double()
    plain = copy.copy(policy)
    plain.network = copy.deepcopy(policy.network)
    counter = CompileCounterWithBackend("aot_eager")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, backend=counter))
        if recomputed is not None:
            recompute_layers(policy, keep_attention=recomputed == "but attention")
        compile_layers(policy)
    shapes = set()
    counts = []
    for seed in range(20):
        for layout in ("packed", "shared", "padded"):
            batch = batch_of(seed, layout)
            shapes.add((layout, *batch.model_inputs.input_ids.shape))
            exact, ours = gradient_of(plain, batch), gradient_of(policy, batch)
            assert float((ours - exact).norm()) <= 1e-9 * float(exact.norm())
        counts.append(counter.frame_count)
    assert len(shapes) >= 50
    assert counts[2] > 0 and counts[-1] <= counts[2] + 1 and counts[-1] <= 8, counts


class _Count(TorchDispatchMode):
    """How often attention was computed."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("keep_attention", "times"), [(False, 2), (True, 1)])
def test_attention_is_computed_once_where_it_is_kept(keep_attention: bool, times: int) -> None:
    policy = policy_of(False)
    recompute_layers(policy, keep_attention=keep_attention)
    with _Count() as count:
        gradient_of(policy, batch_of(0, "packed"))
    assert count.calls == times * len(decoder_layers(policy))


def test_a_copy_of_recomputed_layers_computes_with_its_own_weights() -> None:
    policy = policy_of(False)
    recompute_layers(policy, keep_attention=False)
    other = copy.copy(policy)
    other.network = copy.deepcopy(policy.network)
    batch = batch_of(0, "packed")
    before = policy.hidden_of(batch.model_inputs)
    with torch.no_grad():
        for layer in decoder_layers(other):
            for parameter in layer.parameters():
                parameter.zero_()
    assert torch.equal(policy.hidden_of(batch.model_inputs), before)
    assert not torch.allclose(other.hidden_of(batch.model_inputs), before, atol=1e-2)


def test_frozen_layers_in_16_bits_give_the_same_bits() -> None:
    policy = policy_of(True)
    with torch.no_grad():
        for parameter in policy.network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    batch = batch_of(0, "shared")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wide, gradient = policy.hidden_of(batch.model_inputs), gradient_of(policy, batch)
        size = sum(p.nbytes for p in policy.network.parameters() if not p.requires_grad)
        narrow_frozen_layers(policy, torch.bfloat16)
        assert torch.equal(policy.hidden_of(batch.model_inputs), wide)
        assert torch.equal(gradient_of(policy, batch), gradient)
    narrowed = sum(p.nbytes for p in policy.network.parameters() if not p.requires_grad)
    embeddings: Any = policy.causal_lm.get_input_embeddings()
    assert embeddings.weight.dtype == torch.float32
    assert narrowed < 0.6 * size
    assert all(p.dtype == torch.float32 for p in policy.network.parameters() if p.requires_grad)
