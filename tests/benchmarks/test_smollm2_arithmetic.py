"""The recipe for real input, in two steps on a CPU; what its figures rest on."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("smollm2_arithmetic", ROOT / "benchmarks" / "smollm2_arithmetic.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["full", "lora"])
def test_smoke_run(weights, tmp_path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "smollm2_arithmetic.py"), "--output", str(tmp_path)]
    command += ["--config", str(ROOT / "configs" / "smoke" / "smollm2_arithmetic.yaml"), "--weights", weights]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / f"smollm2_arithmetic_{weights}.json").read_text())
    assert report["steps"] == 2 and all(math.isfinite(reward) for reward in report["rewards"])
    for when in ("before", "after"):
        for kind in ("greedy", "sampled"):
            low, high = report[when][kind]["interval"]
            assert 0.0 <= low <= report[when][kind]["mean"] <= high <= 1.0
    assert (tmp_path / f"smollm2_arithmetic_{weights}.png").read_bytes().startswith(b"\x89PNG")
    assert "| greedy |" in (tmp_path / f"smollm2_arithmetic_{weights}.md").read_text()


def test_held_out_problems_are_not_trained_on(recipe) -> None:
    sums = recipe.Sums(num_terms=2, max_digits=2, num_train=500, num_held_out=100, seed=0)
    held_out, train = (
        {task["entry"]["metadata"]["expression"] for task in tasks} for tasks in (sums.held_out, sums.train)
    )
    assert len(held_out) == 100 and len(train) == 500 and not held_out & train


def test_the_reward_is_the_verifiers_score_of_the_last_integer(recipe) -> None:
    import fitrl

    sums = recipe.Sums(num_terms=2, max_digits=1, num_train=20, num_held_out=2, seed=0)
    task = {"entry": {"answer": "-4"}}
    for text, reward in (("1 - 5 = -4", 1.0), ("It is \u22124.", 1.0), ("-4, or 5", 0.0), ("no idea", 0.0), ("", 0.0)):
        said = fitrl.Completion(message={"role": "assistant", "content": text})
        assert sums.reward(task, fitrl.Trajectory(messages_and_choices=[said])) == reward, text


def test_wilson_interval(recipe) -> None:
    low, high = recipe.wilson(0.5, 100)
    assert (low, high) == pytest.approx((0.4038, 0.5962), abs=1e-4)  # Wilson 1927, by hand
    assert recipe.wilson(0.0, 10)[0] == 0.0 and recipe.wilson(1.0, 10)[1] == pytest.approx(1.0)
