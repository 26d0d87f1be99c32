"""Kill a training process again and again, and let it resume; then say what it came to.

    python nursery.py ROOT STEPS KILLS SEED

Imports everything once, then forks: each child opens the run, trains until `STEPS`, and is killed with SIGKILL at a
random moment of its life. Half of the kills wait until a checkpoint is being written. After `KILLS` kills a last child
is left alone. An undisturbed run in the same process tree is what it must equal. Prints JSON.
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

import fitrl
from fitrl.demo import TASKS, correct
from fitrl.policy.checkpoints import newest, read

STILL_RUNNING = 0


def train(root: Path, name: str, steps: int) -> None:
    """What a user's script does: everything random comes from the global generators."""
    torch.set_num_threads(1)
    torch.manual_seed(7)
    random.seed(7)
    model = fitrl.TrainableModel(name, "faults", "tiny", lora=None, root=root)
    schedule = {"lr_schedule": lambda step: 1 / (1 + 0.1 * step)}
    with fitrl.LocalTrainer(accelerator="cpu", devices=1, enable_model_summary=False, **schedule) as trainer:
        trainer.open(model)
        while model.step < steps:
            tasks = random.sample(TASKS, 4)
            groups = fitrl.rollout(trainer.sampler(model), tasks, reward=correct, group_size=4, max_new_tokens=3)
            result = trainer.fit_rl(
                model, groups, learning_rate=1e-3, num_minibatches=2, scale_learning_rate_by_reward_std_dev=True
            )
            model.log(groups, metrics=result.metrics, step=result.step)


def spawn(root: Path, name: str, steps: int) -> int:
    """Train in a child; returns its process id."""
    child = os.fork()
    if child:
        return child
    try:
        train(root, name, steps)
    except BaseException as error:
        print(f"child: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def kill_somewhere(child: int, run: Path, draw: random.Random, life: float) -> str:
    """Kill a child after a part of its life, or while it writes a checkpoint; says what it was doing."""
    wait_for_save = draw.random() < 0.5
    deadline = time.monotonic() + draw.uniform(0.0, life) + (10.0 if wait_for_save else 0.0)
    after = draw.uniform(0.0, 0.03)
    while time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG)[0] != STILL_RUNNING:
            return "finished"
        if wait_for_save and any(run.glob("checkpoints/.*.tmp")):
            time.sleep(after)
            break
    saving = any(run.glob("checkpoints/.*.tmp"))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "saving" if saving or any(run.glob("checkpoints/.*.tmp")) else "running"


def outcome(run: Path) -> dict[str, object]:
    """Everything that the next step would depend on."""
    folder = newest(run / "checkpoints")
    assert folder is not None
    manifest, state = read(folder)
    assert state is not None
    adam = [tensor for entry in state["optimizer"]["state"].values() for tensor in entry.values()]
    return {
        "step": manifest.step,
        "weights": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "adam": hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in adam)).hexdigest(),
        "rates": [scheduler["_last_lr"] for scheduler in state["schedulers"]],
        "rng": hashlib.sha256(json.dumps(state["rng"]).encode()).hexdigest(),
        "reward_history": state["reward_history"],
        "left over": [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")],
    }


def main() -> None:
    root, steps, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    logging.disable(logging.INFO)
    draw = random.Random(seed)
    start = time.monotonic()
    child = spawn(root, "undisturbed", steps)
    assert os.waitpid(child, 0)[1] == 0
    life = 8 * (time.monotonic() - start) / steps + 0.5  # opening a run, and a few steps
    run = root / "faults" / "disturbed"
    killed: dict[str, int] = {"running": 0, "saving": 0}
    while sum(killed.values()) < kills:
        what = kill_somewhere(spawn(root, "disturbed", steps), run, draw, life)
        assert what != "finished", f"{steps} steps are done after {killed}: too few for so many kills"
        killed[what] += 1
    assert os.waitpid(spawn(root, "disturbed", steps), 0)[1] == 0
    print(
        json.dumps(
            {
                "killed": killed,
                "undisturbed": outcome(root / "faults" / "undisturbed"),
                "disturbed": outcome(run),
                "seconds": time.monotonic() - start,
            }
        )
    )


if __name__ == "__main__":
    main()
