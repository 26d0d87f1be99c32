"""The tiny policy learns to call the calculator: an environment, a tool, a pipeline and an update, together."""

import asyncio
import importlib.util
import statistics
from pathlib import Path

import pytest

import fitrl

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("calculator", ROOT / "benchmarks" / "calculator.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_only_what_the_calculator_said_counts(example) -> None:
    assert isinstance(example.Calculator(), fitrl.Environment)

    async def play(*texts: str) -> float:
        environment = example.Calculator()
        await environment.reset({"prompt": "3+4=", "answer": "7"})
        for text in texts:
            _, is_over = await environment.step({"role": "assistant", "content": text})
        assert is_over
        return await environment.reward()

    assert asyncio.run(play("3+4", "7")) == 1.0
    assert [asyncio.run(play(*texts)) for texts in (["7"], ["3+5", "7"], ["3+4", "8"], ["2+5", "8"])] == [0.0] * 4


@pytest.mark.slow
def test_its_reward_rises(example, tmp_path) -> None:
    found = example.learn(steps=40, demonstrations=40, seed=0, root=tmp_path)
    first, last = statistics.fmean(found["rewards"][:4]), statistics.fmean(found["rewards"][-4:])
    assert last > first + 0.15 and found["calls"][-1] > found["calls"][0]
