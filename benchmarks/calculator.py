"""The bundled tiny policy learns to call a calculator: an environment of several turns with a tool.

    python benchmarks/calculator.py [--steps 60] [--output benchmarks/results]

`3+4=` is answered in two turns: the policy says `3+4`, which calls the calculator, reads its result, and says that.
Only an answer that the calculator gave counts, so guessing, which the policy does well, earns nothing. A few
demonstrations come first, as trajectories without logprobs, for the policy has never seen a call. Then it learns from
its own attempts, which a `RolloutPipeline` makes a step behind. It takes about a minute on two cores.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch

import fitrl

CALL = re.compile(r"(\d+)\+(\d+)")
TASKS = [{"prompt": f"{a}+{b}=", "call": f"{a}+{b}", "answer": str(a + b)} for a in range(10) for b in range(10)]


class Calculator:
    """One sum. A message that is a sum calls the calculator; any other one is the answer."""

    tools: list[fitrl.Tool] | None = [{"name": "calculator"}]

    def __init__(self) -> None:
        self.wanted = ""
        self.told: str | None = None
        self.said: str | None = None

    async def reset(self, task: dict[str, str]) -> list[fitrl.Message]:
        """Ask."""
        self.wanted = task["answer"]
        return [{"role": "user", "content": task["prompt"]}]

    async def step(self, message: fitrl.Message) -> tuple[list[fitrl.Message], bool]:
        """Compute, or take the answer."""
        if call := CALL.fullmatch(message["content"]):
            self.told = str(int(call[1]) + int(call[2]))
            return [{"role": "tool", "content": self.told}], False
        self.said = message["content"]
        return [], True

    async def reward(self) -> float:
        """1 for the right sum, if the calculator gave it."""
        return float(self.said == self.told == self.wanted)


def demonstration(task: dict[str, str], other: dict[str, str]) -> fitrl.TrajectoryGroup:
    """How it is done, and how not."""
    question: fitrl.Message = {"role": "user", "content": task["prompt"]}
    done: list[fitrl.Message] = [
        {"role": "assistant", "content": task["call"]},
        {"role": "tool", "content": task["answer"]},
        {"role": "assistant", "content": task["answer"]},
    ]
    guessed: list[fitrl.Message] = [{"role": "assistant", "content": other["answer"]}]
    return fitrl.TrajectoryGroup(
        fitrl.Trajectory(messages_and_choices=[question, *said], reward=reward, tools=Calculator.tools)
        for said, reward in ((done, 1.0), (guessed, 0.0))
    )


def learn(*, steps: int, demonstrations: int, seed: int, root: Path) -> dict[str, Any]:
    """Train; returns the mean reward and the share of attempts with a call, of each step."""
    draw = random.Random(seed)
    model = fitrl.TrainableModel(f"calculator-{seed}", "benchmarks", "tiny", lora=None, root=root)
    agent = fitrl.EnvironmentAgent(Calculator, max_turns=3)
    rewards: list[float] = []
    calls: list[float] = []
    start = time.perf_counter()
    with fitrl.LocalTrainer(accelerator="cpu", devices=1, gradient_clip_val=1.0, enable_model_summary=False) as trainer:
        trainer.open(model)
        for _ in range(demonstrations):
            shown = [demonstration(draw.choice(TASKS), draw.choice(TASKS)) for _ in range(24)]
            trainer.fit_rl(
                model,
                shown,
                learning_rate=1e-3,
                advantage_balance=1.0,  # learn how it is done, and nothing from how not
                allow_training_without_logprobs=True,
                save_checkpoint=False,
            )
        with fitrl.RolloutPipeline(
            trainer.sampler(model, own_weights=True),
            TASKS,
            agent=agent,
            reward=agent.reward,
            group_size=8,
            groups_per_step=32,
            max_new_tokens=6,
            seed=seed,
        ) as pipeline:
            for groups in pipeline:
                result = trainer.fit_rl(model, groups, learning_rate=5e-4, save_checkpoint=False)
                model.log(groups, metrics=result.metrics | pipeline.metrics(), step=result.step)
                rewards.append(result.metrics["reward/mean"])
                calls.append(statistics.fmean(len(t.completions()) > 1 for group in groups for t in group))
                if len(rewards) == steps:
                    break
    return {"rewards": rewards, "calls": calls, "seconds": time.perf_counter() - start}


def main() -> None:
    """Learn and print; with `--output` also keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="steps of learning from own attempts")
    parser.add_argument("--demonstrations", type=int, default=40, help="steps of learning from demonstrations before")
    parser.add_argument("--seed", type=int, default=0, help="of tasks and sampling")
    parser.add_argument("--output", type=Path, help="folder for calculator.md and .json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    with tempfile.TemporaryDirectory() as root:
        found = learn(steps=options.steps, demonstrations=options.demonstrations, seed=options.seed, root=Path(root))
    tenth = max(1, options.steps // 10)
    rows = "".join(
        f"| {name} | {statistics.fmean(values[:tenth]):.3f} | {statistics.fmean(values[-tenth:]):.3f} |\n"
        for name, values in (("mean reward", found["rewards"]), ("attempts with a call", found["calls"]))
    )
    table = f"| of {options.steps} steps | first tenth | last tenth |\n|---|---|---|\n{rows}"
    about = {
        "seconds": f"{found['seconds']:.0f}, demonstrations included",
        "hardware": f"{platform.machine()} CPU, {len(os.sched_getaffinity(0))} cores, one thread each",
        "load": f"{os.getloadavg()[0]:.1f} in the mean of the last minute, this run's own included",
        "versions": f"python {platform.python_version()}, torch {torch.__version__}, lightning {lightning.__version__}",
        "commit": _commit(),
        "command": "python " + " ".join(sys.argv),
    }
    lines = "".join(f"* {key}: {value}\n" for key, value in about.items())
    text = f"# The tiny policy learns to call a calculator\n\n{table}\n{lines}"
    print(text)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "calculator.md").write_text(text)
        (options.output / "calculator.json").write_text(json.dumps(found | about, indent=2) + "\n")


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
