"""What `fit_rl` costs beside the update itself: 20 calls against a loop written by hand, on the tiny policy.

Both start from the same groups and do the same: read token ids and logprobs, compute advantages, pad, one forward and
backward pass of CISPO, the gradient's norm, one AdamW step. The loop does nothing else. Calls alternate, so that both
see the same machine. For that `fit_rl` is kept from sharing prefixes, which the loop does not do; what a call takes
with sharing, as users have it, is a row of its own.

    python benchmarks/step_overhead.py [--calls 20] [--output benchmarks/results]
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import lightning
import torch
from transformers import AutoModelForCausalLM

import fitrl
from fitrl.demo import TASKS, correct
from fitrl.policy.loading import load_policy

LEARNING_RATE = 3e-4


class ByHand:
    """The same update without fitrl or Lightning."""

    def __init__(self, folder: str) -> None:
        self.network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=LEARNING_RATE, weight_decay=0.0)

    def step(self, groups: Sequence[fitrl.TrajectoryGroup]) -> dict[str, float]:
        """One optimizer step; returns its metrics."""
        rows: list[tuple[list[int], int, list[float], float]] = []
        rewards: list[float] = []
        for group in groups:
            tensor = torch.tensor(group.rewards, dtype=torch.float64)
            rewards += group.rewards
            if len(set(group.rewards)) < 2:
                continue
            advantages = ((tensor - tensor.mean()) / (tensor.std(correction=0) + 1e-6)).tolist()
            for trajectory, advantage in zip(group, advantages, strict=True):
                [said] = trajectory.completions()
                assert said.prompt_ids is not None and said.token_ids is not None and said.logprobs is not None
                rows.append(([*said.prompt_ids, *said.token_ids], len(said.prompt_ids), list(said.logprobs), advantage))
        width = max(len(ids) for ids, *_ in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        old = torch.zeros(len(rows), width)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        advantage = torch.tensor([row[3] for row in rows], dtype=torch.float32)[:, None]
        for index, (tokens, start, logprobs, _) in enumerate(rows):
            ids[index, : len(tokens)] = torch.tensor(tokens)
            old[index, start : len(tokens)] = torch.tensor(logprobs)
            mask[index, start : len(tokens)] = True
        logits = self.network(ids[:, :-1], use_cache=False).logits
        logprobs = logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
        ratio = (logprobs - old[:, 1:]).exp()
        token_loss = -ratio.clamp(0.0, 5.0).detach() * advantage * logprobs
        loss = torch.where(mask[:, 1:], token_loss, 0.0).sum() / mask.sum()
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.network.parameters() if p.grad is not None])
        self.optimizer.step()
        return {
            "loss": float(loss.detach()),
            "grad_norm": float(norm),
            "reward": statistics.fmean(rewards),
            "ratio": float(ratio.detach()[mask[:, 1:]].mean()),
        }


def main() -> None:
    """Measure and print one table; with `--output` also keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=20, help="timed calls of each")
    parser.add_argument("--prompts", type=int, default=32, help="prompts in a call")
    parser.add_argument("--samples", type=int, default=8, help="samples of each prompt")
    parser.add_argument("--output", type=Path, help="folder for step_overhead.md and .json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as root, fitrl.LocalTrainer(accelerator="cpu", devices=1) as trainer:
        model = fitrl.TrainableModel("overhead", "benchmarks", "tiny", lora=None, root=root)
        groups = fitrl.rollout(
            trainer.sampler(model),
            draw.sample(TASKS, options.prompts),
            reward=correct,
            group_size=options.samples,
            max_new_tokens=4,
            seed=1,
        )
        folder = load_policy("tiny").causal_lm.config.name_or_path
        hand = ByHand(folder)
        policy = trainer.verbs.policy_module.policy
        assert policy.can_share
        ours: list[float] = []
        shared: list[float] = []
        theirs: list[float] = []
        for call in range(options.calls + 5):
            policy.can_share = False
            start = time.perf_counter()
            result = trainer.fit_rl(model, groups, learning_rate=LEARNING_RATE, save_checkpoint=False)
            middle = time.perf_counter()
            plain = hand.step(groups)
            end = time.perf_counter()
            if call == 0:  # the same weights, so the same update
                assert abs(result.metrics["loss/train"] - plain["loss"]) < 1e-5, (result.metrics, plain)
                assert abs(result.metrics["loss/grad_norm"] / plain["grad_norm"] - 1) < 1e-3, (result.metrics, plain)
            policy.can_share = True
            begin = time.perf_counter()
            trainer.fit_rl(model, groups, learning_rate=LEARNING_RATE, save_checkpoint=False)
            if call >= 5:
                ours.append(middle - start)
                theirs.append(end - middle)
                shared.append(time.perf_counter() - begin)
    report = {
        "fit_rl_ms": 1e3 * statistics.median(ours),
        "by_hand_ms": 1e3 * statistics.median(theirs),
        "ratio_of_medians": statistics.median(ours) / statistics.median(theirs),
        "fit_rl_shared_ms": 1e3 * statistics.median(shared),
        "calls": options.calls,
        "trajectories": options.prompts * options.samples,
        "hardware": f"{platform.machine()} CPU, one thread",
        "versions": f"python {platform.python_version()}, torch {torch.__version__}, lightning {lightning.__version__}",
        "commit": _commit(),
        "command": "python " + " ".join(sys.argv),
    }
    table = (
        "| update of {trajectories} trajectories | median ms of {calls} |\n|---|---|\n"
        "| `LocalTrainer.fit_rl(save_checkpoint=False)`, no prefixes shared | {fit_rl_ms:.1f} |\n"
        "| loop written by hand | {by_hand_ms:.1f} |\n"
        "| ratio | {ratio_of_medians:.3f} |\n"
        "| `fit_rl` as it is, with shared prefixes | {fit_rl_shared_ms:.1f} |\n"
    ).format(**report)
    print(table)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        about = "\n".join(f"* {key}: {report[key]}" for key in ("hardware", "versions", "commit", "command"))
        (options.output / "step_overhead.md").write_text(f"# Overhead of one fit_rl call\n\n{table}\n{about}\n")
        (options.output / "step_overhead.json").write_text(json.dumps(report, indent=2) + "\n")


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
