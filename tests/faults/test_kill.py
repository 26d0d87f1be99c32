"""kill -9 at any moment, in mid-save too, and resume: bit for bit the undisturbed run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def run(script: str, *arguments: object) -> dict[str, Any]:
    """What a script of this folder prints in its last line."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script)), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_fifty_kills_change_nothing(tmp_path) -> None:
    seen = run("nursery.py", tmp_path, 150, 50, 1)
    assert sum(seen["killed"].values()) == 50
    assert min(seen["killed"].values()) >= 10  # both kinds of moments were met
    assert seen["disturbed"] == seen["undisturbed"]
    assert seen["disturbed"]["step"] >= 150


@pytest.mark.slow
@pytest.mark.parametrize("max_steps_off_policy", [0, 1])
def test_ten_kills_lose_and_double_no_group_of_a_pipeline(tmp_path, max_steps_off_policy) -> None:
    steps = 45
    seen = run("pipeline_nursery.py", tmp_path, steps, 10, 1, max_steps_off_policy)
    by_step: dict[int, list[dict[str, Any]]] = {}
    for note in seen["notes"]:
        by_step.setdefault(note["step"], []).append(note)
    assert len({note["process"] for note in seen["notes"]}) == 11 and sorted(by_step) == list(range(steps))
    assert any(len(notes) > 1 for notes in by_step.values())  # a step was taken again
    for notes in by_step.values():  # with the same groups, to the last bit
        assert len({(tuple(note["numbers"]), note["digest"]) for note in notes}) == 1
    trained = [number for step in range(steps) for number in by_step[step][-1]["numbers"]]
    assert len(set(trained)) == len(trained) == 3 * steps
    dropped = {note["process"]: note["dropped"] for note in seen["notes"]}  # on a busy machine some come too late
    near_the_end = max(trained) - 3 * (max_steps_off_policy + 1)  # some may be under way or wait
    assert len(set(range(near_the_end)) - set(trained)) <= sum(dropped.values())
    if max_steps_off_policy == 0:  # and so is everything that was learned
        assert trained == list(range(3 * steps)) and seen["disturbed"] == seen["undisturbed"]
