"""What a model's sizes say about products and kept tensors, on a layer whose arithmetic is counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fitrl.policy import scoring
from parts import Memory, times

SIZES = {"hidden_size": 8, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"head_dim": 3, "vocab_size": 50}
TOKENS = 40
GIB = 2**30


class Network(nn.Module):
    """The products of one decoder layer and a head, with something kept by each."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(8, 12, bias=False)
        self.out = nn.Linear(12, 8, bias=False)
        self.up = nn.Linear(8, 24, bias=False)
        self.down = nn.Linear(24, 8, bias=False)
        self.head = nn.Linear(8, 50, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Keeps `hidden` [40, 8] twice, [40, 12] and [40, 24]."""
        attended = self.out(self.query(hidden))
        return hidden + attended + self.down(self.up(hidden))


def test_memory_is_told_by_the_shape_of_what_is_kept_and_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network()
    monkeypatch.setattr(scoring, "fused_linear_policy_loss", lambda hidden: network.head(hidden).sum())

    def call() -> None:
        for tokens in (TOKENS, TOKENS // 2):  # the larger microbatch is told
            scoring.fused_linear_policy_loss(network(torch.randn(tokens, 8))).backward()

    found = Memory(network, SIZES).report(call, [torch.zeros(3, 5)])

    weights = sum(parameter.numel() for parameter in network.parameters())
    assert found["weights"] == found["gradients"] == 4 * weights / GIB
    assert found["moments"] == 4 * 15 / GIB
    assert found["kept by attention"] == 4 * TOKENS * 12 / GIB
    assert found["kept by MLP"] == 4 * TOKENS * 24 / GIB
    assert found["kept by norms and residuals"] == 4 * TOKENS * 8 / GIB
    assert found["kept by 16-bit weights"] == 0.0


def test_products_are_told_by_their_sizes() -> None:
    network = Network()
    hidden = torch.randn(TOKENS, 8)

    def only(part: nn.Module, width: int) -> dict[str, float]:
        return times(lambda: part(torch.randn(TOKENS, width)), SIZES)

    for part, width, name in ((network.up, 8, "MLP"), (network.down, 24, "MLP"), (network.head, 8, "head")):
        found = only(part, width)
        assert found[name] > 0 and sum(found.values()) == found[name]
    found = times(lambda: network(hidden), SIZES)
    assert found["attention's products"] > 0 and found["MLP"] > 0 and found["head"] == 0
    assert times(lambda: torch.randn(5, 2) @ torch.randn(2, 24), SIZES, rank=2)["adapters"] > 0
