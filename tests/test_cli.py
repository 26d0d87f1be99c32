"""The `fitrl` command, as a user types it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "fitrl", *arguments], capture_output=True, text=True, check=False)


def test_demo_prints_the_rise_and_where_things_lie(tmp_path) -> None:
    runs = set()
    for bar in ([], ["--no-progress"]):
        done = run("demo", "--steps", "3", "--root", str(tmp_path), *bar)
        assert done.returncode == 0, done.stderr
        rise, *paths = done.stdout.splitlines()
        assert re.fullmatch(r"reward \d\.\d{3} -> \d\.\d{3} in 3 steps, \d+\.\d s", rise)
        curve, trajectories, checkpoint = (Path(line.split()[-1]) for line in paths)
        assert curve.read_bytes().startswith(b"\x89PNG")
        assert len(list(trajectories.glob("*.jsonl"))) == 3
        assert (checkpoint / "model.safetensors").is_file() and checkpoint.name == "0003"
        assert ("reward 0." in done.stderr) == (not bar)
        runs.add(checkpoint.parents[1])
    assert len(runs) == 2  # each demo is a new run


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["demo", "--steps", "0"], ["demo", "--steps", "x"]])
def test_bad_arguments(arguments) -> None:
    done = run(*arguments)
    assert done.returncode == 2 and "usage: fitrl" in done.stderr


def test_help() -> None:
    assert "single-digit addition" in run("--help").stdout
    assert "optimizer steps" in run("demo", "--help").stdout
