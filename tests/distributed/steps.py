"""What `steps_worker.py` came to: gradients and weights, to be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distributed.ddp_worker import AFTER_A_STEP
from fitrl.policy.checkpoints import list_checkpoints


def outcome(root: Path, name: str, rank: int = 0) -> dict[str, Any]:
    """What a rank wrote when it was done, and the weights of the newest checkpoint."""
    seen: dict[str, Any] = json.loads((root / f"{name}.{rank}.json").read_text())
    step, folder = list_checkpoints(root / "steps" / name / "checkpoints")[-1]
    weights = [load_file(file) for file in folder.glob("model*.safetensors")]
    return seen | {"step": step, "weights": {name: tensor for part in weights for name, tensor in part.items()}}


def compare(ours: dict[str, Any], expected: dict[str, Any]) -> None:
    """Hold the last gradients, and all weights, to those of another run in float64."""
    assert ours["step"] == expected["step"]
    last = expected["gradients"][-len(ours["gradients"]) :]
    for gradient, others in zip(ours["gradients"], last, strict=True):
        bound = AFTER_A_STEP * others[0] if AFTER_A_STEP > 1e-8 else 1e-10
        assert gradient == pytest.approx(others, rel=AFTER_A_STEP, abs=bound)
    for name, tensor in expected["weights"].items():
        assert tensor.dtype == torch.float64
        torch.testing.assert_close(ours["weights"][name], tensor, rtol=AFTER_A_STEP, atol=AFTER_A_STEP)
