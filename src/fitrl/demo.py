"""`fitrl demo`: the bundled tiny policy learns single-digit addition, on a laptop, in about a minute.

It is the README's loop: rollouts with the embedded sampler, a reward, `fit_rl`, `model.log`.
"""

from __future__ import annotations

import logging
import random
import time
import warnings
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fitrl.data.groups import Trajectory
from fitrl.policy.model import TrainableModel
from fitrl.policy.plots import plot_rewards
from fitrl.rollout.rollout import rollout
from fitrl.trainers.local import LocalTrainer

TASKS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(10) for b in range(10)]
_SAVE_EVERY = 25


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """What the demo leaves behind.

    Attributes:
        rewards: mean reward of each step.
        seconds: wall time of the loop.
        plot: PNG of the reward curve.
        trajectories: folder of the logged trajectories, one JSONL file per step.
        checkpoint: newest checkpoint folder.
    """

    rewards: list[float]
    seconds: float
    plot: Path
    trajectories: Path
    checkpoint: Path

    @property
    def first(self) -> float:
        """Mean reward of the first 10 % of the steps."""
        return _mean(self.rewards[: _tenth(self.rewards)])

    @property
    def last(self) -> float:
        """Mean reward of the last 10 % of the steps."""
        return _mean(self.rewards[-_tenth(self.rewards) :])

    def __str__(self) -> str:
        return (
            f"reward {self.first:.3f} -> {self.last:.3f} in {len(self.rewards)} steps, {self.seconds:.1f} s\n"
            f"curve         {self.plot}\n"
            f"trajectories  {self.trajectories}\n"
            f"checkpoint    {self.checkpoint}"
        )


def correct(task: dict[str, str], trajectory: Trajectory) -> float:
    """1 for the right sum, 0 for anything else."""
    return float(trajectory.completions()[-1].text == task["answer"])


def run(*, steps: int = 200, seed: int = 0, root: Path | None = None, progress: bool = True) -> DemoResult:
    """Teach the tiny policy to add.

    Args:
        steps: calls of `fit_rl`, one optimizer step each.
        seed: of the tasks drawn and of the sampling.
        root: folder of all projects; None: `./.fitrl`. Every demo is a new run in it.
        progress: show a progress bar on standard error.
    """
    torch.set_num_threads(1)  # a tiny model spends more time handing out work than doing it
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="lightning")
    torch.manual_seed(seed)
    model = TrainableModel(
        name=f"adder-{datetime.now():%Y%m%d-%H%M%S-%f}", project="demo", base_model="tiny", lora=None, root=root
    )
    draw = random.Random(seed)
    rewards: list[float] = []
    start = time.perf_counter()
    columns = (
        TextColumn("learning to add"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("reward {task.fields[reward]:.3f}"),
        TimeElapsedColumn(),
    )
    bar = Progress(*columns, console=Console(stderr=True), disable=not progress)
    trainer = LocalTrainer(accelerator="cpu", devices=1, gradient_clip_val=1.0, enable_model_summary=False)
    with trainer, bar:
        shown = bar.add_task("demo", total=steps, reward=0.0)
        for step in range(1, steps + 1):
            groups = rollout(
                trainer.sampler(model), draw.sample(TASKS, 50), reward=correct, group_size=8, max_new_tokens=4
            )
            result = trainer.fit_rl(
                model, groups, learning_rate=3e-4, save_checkpoint=step % _SAVE_EVERY == 0 or step == steps
            )
            model.log(groups, metrics=result.metrics, step=result.step)
            rewards.append(result.metrics["reward/mean"])
            bar.update(shown, advance=1, reward=_mean(rewards[-10:]))
    return DemoResult(
        rewards=rewards,
        seconds=time.perf_counter() - start,
        plot=plot_rewards(
            rewards, model.run_dir / "reward.png", title="Tiny policy, single-digit addition, LocalTrainer.fit_rl"
        ),
        trajectories=model.run_dir / "trajectories" / "train",
        checkpoint=model.checkpoints()[-1],
    )


def _tenth(values: list[float]) -> int:
    return max(1, len(values) // 10)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
