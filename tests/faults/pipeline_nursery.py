"""Kill a process that trains beside a `RolloutPipeline` again and again; then say which groups its weights have seen.

    python pipeline_nursery.py ROOT STEPS KILLS SEED MAX_STEPS_OFF_POLICY

Each child is forked, begins to train on a few batches, and is killed with SIGKILL a random moment later; the last one
is left alone. Before each call of `fit_rl` a child writes down what it is about to train on. Every second call saves,
so a child also finds batches that were trained on and are in no checkpoint. Prints JSON.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from nursery import STILL_RUNNING, outcome

import fitrl
from fitrl.demo import TASKS
from fitrl.rollout.rollout import one_turn


async def attempt(chat: fitrl.Chat, task: object) -> fitrl.Trajectory:
    """One turn, which says its seed."""
    trajectory = await one_turn(chat, task)
    trajectory.metadata["seed"] = chat.seed
    return trajectory


def reward(task: object, trajectory: fitrl.Trajectory) -> float:
    """By text and seed, so that no group is flat and every call takes a step."""
    return len(trajectory.completions()[0].text) + trajectory.metadata["seed"] % 1000 / 1000


def train(root: Path, name: str, steps: int, ahead: int) -> None:
    """What a user's script does."""
    torch.set_num_threads(1)
    torch.manual_seed(7)
    random.seed(7)
    model = fitrl.TrainableModel(name, "faults", "tiny", lora=None, root=root)
    with fitrl.LocalTrainer(accelerator="cpu", devices=1, enable_model_summary=False) as trainer:
        sampler = trainer.sampler(model, own_weights=True)
        options = {"group_size": 3, "groups_per_step": 3, "max_new_tokens": 4, "max_steps_off_policy": ahead}
        options |= {"agent": attempt, "reward": reward}
        with fitrl.RolloutPipeline(sampler, TASKS, model=model, **options) as pipeline:
            while model.step < steps:
                groups = next(pipeline)
                text = "\n".join(group.to_json() for group in groups)
                note = {
                    "step": model.step,
                    "numbers": [group.metadata["number"] for group in groups],
                    "digest": hashlib.sha256(text.encode()).hexdigest(),
                    "dropped": sum(pipeline.dropped.values()),
                    "process": os.getpid(),
                }
                with (root / f"{name}.jsonl").open("a") as file:
                    file.write(json.dumps(note) + "\n")
                trainer.fit_rl(model, groups, learning_rate=1e-4, save_checkpoint=model.step % 2 == 1)


def spawn(root: Path, name: str, steps: int, ahead: int) -> int:
    """Train in a child; returns its process id."""
    child = os.fork()
    if child:
        return child
    try:
        train(root, name, steps, ahead)
    except BaseException as error:
        print(f"child: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def kill_somewhere(child: int, notes: Path, draw: random.Random) -> None:
    """Kill a child a random moment after it has begun to train on a few batches."""
    wanted = _lines(notes) + draw.randrange(1, 6)
    while _lines(notes) < wanted:
        assert os.waitpid(child, os.WNOHANG)[0] == STILL_RUNNING, "all steps are done: too few for so many kills"
    time.sleep(draw.uniform(0.0, 0.15))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def _lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def main() -> None:
    root, steps, kills, seed, ahead = Path(sys.argv[1]), *map(int, sys.argv[2:])
    logging.disable(logging.INFO)
    draw = random.Random(seed)
    start = time.monotonic()
    assert os.waitpid(spawn(root, "undisturbed", steps, ahead), 0)[1] == 0
    run = root / "faults" / "disturbed"
    for _ in range(kills):
        kill_somewhere(spawn(root, "disturbed", steps, ahead), root / "disturbed.jsonl", draw)
    assert os.waitpid(spawn(root, "disturbed", steps, ahead), 0)[1] == 0
    print(
        json.dumps(
            {
                "undisturbed": outcome(root / "faults" / "undisturbed"),
                "disturbed": outcome(run),
                "notes": [json.loads(line) for line in (root / "disturbed.jsonl").read_text().splitlines()],
                "kept": sorted(path.name for path in (run / "pipeline" / "groups").iterdir()),
                "seconds": time.monotonic() - start,
            }
        )
    )


if __name__ == "__main__":
    main()
