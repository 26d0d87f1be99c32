"""Asynchronous against synchronous training: wall time of a step, and reward at equal samples.

    python benchmarks/async.py [--output benchmarks/results] [--part time | reward]

*Time*: a policy of random weights, large enough that both sides compute most of the time. Each attempt first writes a
draft that is thrown away; its length is chosen so that a step's rollouts take as long as its update. Both have one
thread, as if each had a device of its own. The synchronous loop is `rollout` and `fit_rl`; the asynchronous one takes
its groups of a `RolloutPipeline` a step behind, whose sampler has a copy of the weights. Blocks of both take turns, so
that they see the same machine.

*Reward*: the bundled policy learns to add from equally many samples, with staleness 0, 1 and 4.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import fitrl
from fitrl.demo import TASKS, correct
from fitrl.policy.loading import load_policy
from fitrl.rollout.rollout import one_turn

GROUPS, SAMPLES = 8, 8
FREE = 1.8  # of two processors
SKIPPED = 2  # steps of a block: the first batches of a pipeline are sampled while nothing trains


def make_policy(folder: Path) -> str:
    """A policy of 13 M random weights that reads what the bundled one reads."""
    tiny = load_policy("tiny")
    config = AutoConfig.from_pretrained(tiny.causal_lm.config.name_or_path)
    config.update({"hidden_size": 512, "intermediate_size": 1536, "head_dim": 64, "num_attention_heads": 8})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    return str(folder)


class Drafting:
    """An agent that writes a draft, throws it away, and answers."""

    def __init__(self) -> None:
        self.draft_tokens = 0

    async def __call__(self, chat: fitrl.Chat, task: Any) -> fitrl.Trajectory:
        """One attempt."""
        if self.draft_tokens:
            await dataclasses.replace(chat, max_new_tokens=self.draft_tokens)([{"role": "user", "content": "Draft."}])
        return await one_turn(chat, task)


def spread(task: Any, trajectory: fitrl.Trajectory) -> float:
    """A reward that is never equal in a group."""
    return float(sum(trajectory.completions()[-1].token_ids or ()) % 1009)


@dataclasses.dataclass(slots=True, kw_only=True)
class Block:
    """Seconds of the steps of one block, and of their parts where they come one after the other."""

    steps: list[float] = dataclasses.field(default_factory=list)
    cpu: list[float] = dataclasses.field(default_factory=list)
    rollouts_cpu: list[float] = dataclasses.field(default_factory=list)
    rollouts: list[float] = dataclasses.field(default_factory=list)
    updates: list[float] = dataclasses.field(default_factory=list)
    sampler_idle: list[float] = dataclasses.field(default_factory=list)
    trainer_idle: list[float] = dataclasses.field(default_factory=list)


def run_block(how: str, base_model: str, agent: Drafting, num_steps: int, root: str) -> Block:
    """Train a fresh run for so many steps."""
    block = Block()
    options: dict[str, Any] = {"agent": agent, "reward": spread, "group_size": SAMPLES, "max_new_tokens": 24}
    model = fitrl.TrainableModel(f"{how}-{time.time_ns()}", "async", base_model, lora=None, root=root)
    with fitrl.LocalTrainer(accelerator="cpu", devices=1, enable_model_summary=False) as trainer:
        sampler = trainer.sampler(model, own_weights=how == "async")
        pipeline = fitrl.RolloutPipeline(
            sampler, TASKS, groups_per_step=GROUPS, max_steps_off_policy=int(how == "async"), **options
        )
        with pipeline:
            for step in range(SKIPPED + num_steps):
                start, busy = time.perf_counter(), time.process_time()
                groups = (
                    next(pipeline)
                    if how == "async"
                    else fitrl.rollout(sampler, pipeline.tasks_of_step(step), seed=step, **options)
                )
                middle, sampled = time.perf_counter(), time.process_time()
                trainer.fit_rl(model, groups, learning_rate=1e-6, save_checkpoint=False)
                if step >= SKIPPED:
                    end = time.perf_counter()
                    block.steps.append(end - start)
                    block.cpu.append(time.process_time() - busy)
                    block.rollouts_cpu.append(sampled - busy)
                    block.rollouts.append(middle - start)
                    block.updates.append(end - middle)
                    if told := pipeline.metrics():
                        block.sampler_idle.append(told["pipeline/sampler_idle_fraction"])
                        block.trainer_idle.append(told["pipeline/trainer_idle_fraction"])
    return block


def free_cores(seconds: float = 2.0) -> float:
    """How many processors two busy processes get now."""
    code = (
        "import time\nstart, cpu = time.perf_counter(), time.process_time()\n"
        f"while time.perf_counter() - start < {seconds}: pass\n"
        "print((time.process_time() - cpu) / (time.perf_counter() - start))"
    )
    busy = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    return sum(float(process.communicate()[0]) for process in busy)


def quiet_block(measure: Callable[[], Block], tries: int) -> tuple[Block, float]:
    """A block before and after which the machine was free, and how free; the last try counts however it was."""
    free = free_cores()
    for _ in range(tries):
        block, before = measure(), free
        free = free_cores()
        if min(before, free) >= FREE:
            break
    return block, min(before, free)


def measure_time(num_steps: int, num_blocks: int, tries: int) -> dict[str, Any]:
    """Seconds of a step, both ways, where rollouts and update take equally long."""
    agent, merged, free = Drafting(), {"sync": Block(), "async": Block()}, []
    with tempfile.TemporaryDirectory() as root:
        base_model = make_policy(Path(root) / "policy")
        probes = []
        for tokens in (16, 48):
            agent.draft_tokens = tokens
            block = run_block("sync", base_model, agent, 3, root)
            rollouts = statistics.median(block.rollouts_cpu)
            probes.append((tokens, rollouts, statistics.median(block.cpu) - rollouts))
        (few, fast, update), (many, slow, other) = probes
        wanted = (update + other) / 2
        agent.draft_tokens = max(1, round(few + (wanted - fast) * (many - few) / max(slow - fast, 1e-9)))
        for _ in range(num_blocks):
            for how, into in merged.items():
                measure = functools.partial(run_block, how, base_model, agent, num_steps, root)
                block, cores = quiet_block(measure, tries)
                free.append(cores)
                for field in dataclasses.fields(Block):
                    getattr(into, field.name).extend(getattr(block, field.name))
    sync, ahead = merged["sync"], merged["async"]
    return {
        "steps": len(sync.steps),
        "draft_tokens": agent.draft_tokens,
        "free_cores": free,
        "tries": tries,
        "rollouts_s": statistics.median(sync.rollouts),
        "update_s": statistics.median(sync.updates),
        "sync_s": statistics.median(sync.steps),
        "async_s": statistics.median(ahead.steps),
        "ratio": statistics.median(ahead.steps) / statistics.median(sync.steps),
        "best_ratio": max(statistics.median(sync.rollouts), statistics.median(sync.updates))
        / (statistics.median(sync.rollouts) + statistics.median(sync.updates)),
        "sync_cpu_s": statistics.median(sync.cpu),
        "async_cpu_s": statistics.median(ahead.cpu),
        "sampler_idle": statistics.median(ahead.sampler_idle),
        "trainer_idle": statistics.median(ahead.trainer_idle),
    }


def measure_reward(num_steps: int, seeds: int) -> list[dict[str, Any]]:
    """Reward of the last tenth of the steps, by staleness."""
    rows = []
    for behind in (0, 1, 4):
        ends, means, kls = [], [], []
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as root:
                model = fitrl.TrainableModel("adder", "async", "tiny", lora=None, root=root)
                trainer = fitrl.LocalTrainer(
                    accelerator="cpu", devices=1, gradient_clip_val=1.0, enable_model_summary=False
                )
                with trainer:
                    sampler = trainer.sampler(model, own_weights=True)
                    options = {"group_size": 8, "groups_per_step": 50, "max_new_tokens": 4, "seed": 1000 * seed}
                    rewards, told, kl = [], [], []
                    with fitrl.RolloutPipeline(
                        sampler, TASKS, reward=correct, max_steps_off_policy=behind, **options
                    ) as pipeline:
                        for _ in range(num_steps):
                            groups = next(pipeline)
                            result = trainer.fit_rl(
                                model,
                                groups,
                                learning_rate=3e-4,
                                precalculate_logprobs=True,
                                truncated_importance_sampling=2.0,
                                save_checkpoint=False,
                            )
                            rewards.append(result.metrics["reward/mean"])
                            told.append(pipeline.metrics()["off_policy/steps_mean"])
                            kl.append(result.metrics["mismatch/kl"])
                ends.append(statistics.fmean(rewards[-max(1, num_steps // 10) :]))
                means.append(statistics.fmean(told))
                kls.append(statistics.fmean(kl))
        rows.append(
            {
                "max_steps_off_policy": behind,
                "steps_off_policy": statistics.fmean(means),
                "mismatch_kl": statistics.fmean(kls),
                "reward": statistics.fmean(ends),
                "rewards": ends,
            }
        )
    return rows


def main() -> None:
    """Measure and print; with `--output` also keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["time", "reward"], help="only this one")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a block")
    parser.add_argument("--blocks", type=int, default=3, help="blocks of each kind")
    parser.add_argument("--reward-steps", type=int, default=120, help="steps of learning")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each staleness")
    parser.add_argument("--tries", type=int, default=5, help="of a block, where the machine is not free")
    parser.add_argument("--output", type=Path, help="folder for async.md and async.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    path = None if options.output is None else options.output / "async.json"
    report: dict[str, Any] = json.loads(path.read_text()) if path is not None and path.exists() else {}
    parts: dict[str, Callable[[], Any]] = {
        "time": lambda: measure_time(options.steps, options.blocks, options.tries),
        "reward": lambda: measure_reward(options.reward_steps, options.seeds),
    }
    for name, measure in parts.items():
        if options.part in (None, name):
            report[name] = {
                "measured": measure(),
                "hardware": f"{platform.machine()} CPU, {len(os.sched_getaffinity(0))} cores, one thread each",
                "load": f"{os.getloadavg()[1]:.1f} in the mean of the last 5 minutes, this benchmark's own included",
                "versions": f"python {platform.python_version()}, torch {torch.__version__}, "
                f"lightning {lightning.__version__}",
                "commit": _commit(),
                "command": "python " + " ".join(sys.argv),
            }
    text = "# Asynchronous training\n" + "".join(_TABLES[name](report[name]) for name in _TABLES if name in report)
    print(text)
    if options.output is not None and path is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "async.md").write_text(text)
        path.write_text(json.dumps(report, indent=2) + "\n")


def _time_table(part: dict[str, Any]) -> str:
    found = part["measured"]
    return (
        f"\n## Wall time of a step, rollouts and update of equal cost\n\n| median of {found['steps']} steps | s |\n"
        "|---|---|\n"
        f"| synchronous: `rollout`, then `fit_rl` | {found['sync_s']:.2f} |\n"
        f"| of which rollouts | {found['rollouts_s']:.2f} |\n"
        f"| of which the update | {found['update_s']:.2f} |\n"
        f"| `RolloutPipeline(max_steps_off_policy=1)` and `fit_rl` | {found['async_s']:.2f} |\n"
        f"| asynchronous / synchronous | {found['ratio']:.2f} |\n"
        f"| the longer of rollouts and update / their sum | {found['best_ratio']:.2f} |\n"
        f"| processor seconds of a step, synchronous, asynchronous | {found['sync_cpu_s']:.2f}, "
        f"{found['async_cpu_s']:.2f} |\n"
        f"| idle: the sampler, the trainer | {found['sampler_idle']:.0%}, {found['trainer_idle']:.0%} |\n\n"
        f"Before and after each of the {len(found['free_cores'])} blocks two busy processes got at least "
        f"{min(found['free_cores']):.2f} processors. Below {FREE} a block is measured again, {found['tries']} tries at "
        "most: on a machine that others use the ratio says how it is shared out.\n\n" + _about(part)
    )


def _reward_table(part: dict[str, Any]) -> str:
    rows = "".join(
        f"| {row['max_steps_off_policy']} | {row['steps_off_policy']:.2f} | {row['mismatch_kl']:.4f} | "
        f"{row['reward']:.3f} | {', '.join(f'{value:.3f}' for value in row['rewards'])} |\n"
        for row in part["measured"]
    )
    return (
        "\n## Reward at equal samples, the bundled policy learns to add\n\nDecoupled objective "
        "(`precalculate_logprobs=True, truncated_importance_sampling=2.0`); 400 samples a step; reward of the last "
        "tenth of the steps.\n\n| max_steps_off_policy | mean steps off policy | mismatch/kl | reward | of each run |\n"
        f"|---|---|---|---|---|\n{rows}\n" + _about(part)
    )


_TABLES = {"time": _time_table, "reward": _reward_table}


def _about(part: dict[str, Any]) -> str:
    keys = ("hardware", "load", "versions", "commit", "command")
    return "".join(f"* {key}: {part[key]}\n" for key in keys)


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
