"""AdamW: which implementation, how near the 8-bit one is, and that it resumes."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

import fitrl
from fitrl.errors import InvalidArgumentError, MissingDependencyError
from fitrl.policy.optimizers import AdamWSettings, adamw
from samples import make_groups

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CPU = {"accelerator": "cpu", "devices": 1, "enable_model_summary": False}


def train(moments: Any, steps: int = 30) -> torch.Tensor:
    """Change of 64 x 128 weights after some steps with the same noisy gradients."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(64, 128, generator=generator)
    weights = torch.nn.Parameter(start.clone())
    optimizer = adamw([weights], AdamWSettings(moments=moments, weight_decay=0.01), 1e-3, unscales=False)
    direction = torch.randn(64, 128, generator=generator)
    for _ in range(steps):
        weights.grad = direction + torch.randn(64, 128, generator=generator)
        optimizer.step()
    return weights.detach() - start


def test_paged_is_exact_and_8_bits_are_near() -> None:
    exact = train("float32")
    assert torch.allclose(train("paged"), exact, rtol=0, atol=1e-6)
    near = train("8bit")
    assert not torch.equal(near, exact)
    assert float(torch.cosine_similarity(near.flatten(), exact.flatten(), dim=0)) > 0.99
    assert float((near - exact).norm() / exact.norm()) < 0.1


def test_8_bit_moments_take_2_bytes_a_weight() -> None:
    weights = torch.nn.Parameter(torch.zeros(256, 256))
    weights.grad = torch.ones_like(weights)
    settings = AdamWSettings(moments="8bit")
    optimizer = adamw([weights], settings, 1e-3, unscales=False)
    optimizer.step()
    held = sum(value.nbytes for value in optimizer.state[weights].values() if isinstance(value, torch.Tensor))
    assert held < 1.1 * (settings.bytes_per_weight * weights.numel() + 2 * 256 * 4)


@pytest.mark.parametrize("moments", ["8bit", "paged"])
def test_moments_resume_exactly(moments: Any, tmp_path) -> None:
    def calls(root: Any, numbers: range, again: bool) -> torch.Tensor:
        for number in numbers if again else (None,):
            model = fitrl.TrainableModel("run", "optimizers", "tiny", lora=None, root=root)
            with fitrl.LocalTrainer(**CPU, optimizer=AdamWSettings(moments=moments)) as trainer:
                for call in numbers if number is None else (number,):
                    trainer.fit_rl(model, make_groups(seed=call), learning_rate=1e-3)
                weights = torch.cat([tensor.flatten() for _, tensor in trainer.verbs.named_weights()])
        return weights

    through = calls(tmp_path / "a", range(3), again=False)
    assert torch.equal(calls(tmp_path / "b", range(3), again=True), through)


def test_settings_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidArgumentError, match="moments must be"):
        AdamWSettings(moments="4bit")  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"fitrl\[bitsandbytes\]"):
        AdamWSettings(moments="8bit")
    AdamWSettings()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("unscales", [False, True])
def test_a_gpu_takes_the_fused_one_where_nothing_unscales(device: str, unscales: bool) -> None:
    weights = torch.nn.Parameter(torch.zeros(3, device=device))
    optimizer: Any = adamw([weights], AdamWSettings(), 1e-3, unscales=unscales)
    assert bool(optimizer.defaults["fused"]) == (device == "cuda" and not unscales)


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_gradients_of_any_optimizer_are_clipped(precision: Any, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning refuses to clip for an optimizer that unscales, as it thinks that every fused one does."""
    plain = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, **options: plain(*args, **(options | {"fused": True})))
    model = fitrl.TrainableModel("run", "optimizers", "tiny", lora=None, root=tmp_path)
    with fitrl.LocalTrainer(**CPU, precision=precision, gradient_clip_val=1e-3) as trainer:
        result = trainer.fit_rl(model, make_groups(seed=0), learning_rate=1e-3, save_checkpoint=False)
    assert result.metrics["loss/grad_norm"] > 1e-3
