"""What each rank of the DDP tests does, and one process for comparison: writes what it saw as JSON.

python ddp_worker.py OUTPUT        one process
torchrun ... ddp_worker.py OUTPUT  several ranks; each writes OUTPUT.<rank>
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

import fitrl
from exact import real_float64
from fitrl.data import ranks
from fitrl.demo import TASKS, correct
from fitrl.policy.sharding import whole
from samples import make_groups

STRATEGY = os.environ.get("FITRL_TEST_STRATEGY", "fitrl_ddp")
ACCELERATOR = os.environ.get("FITRL_TEST_ACCELERATOR", "cpu")
AFTER_A_STEP = 1e-6 if ACCELERATOR == "gpu" else 1e-8
"""Of a gradient's norm: how far two runs in float64 may be apart once a step was taken.

On a GPU sums have no fixed order, and Adam makes more of last bits.
"""


class KeepGradients(lightning.Callback):
    """Keeps the gradient of each optimizer step as it is before clipping."""

    def __init__(self) -> None:
        self.steps: list[list[float]] = []
        self.microbatches = 0
        """Of the last call."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.microbatches = 0

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.microbatches += 1

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        grads = [whole(p.grad).flatten() for p in module.parameters() if p.grad is not None]
        flat = torch.cat(grads).double().cpu()
        index = torch.arange(flat.numel(), dtype=torch.float64)
        # enough to tell any two gradients apart, small enough to write down
        self.steps.append([float(flat.norm()), float(flat.sum()), float((flat * torch.cos(index)).sum())])


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "small microbatches": {"max_tokens_per_microbatch": 30},
    "two minibatches, two epochs": {"num_minibatches": 2, "num_epochs": 2, "ppo": True},
    "sequence level, means of means": {
        "importance_sampling_level": "sequence",
        "loss_aggregation": "seq_mean_token_mean",
    },
    "shared prompts": {"max_tokens_per_microbatch": 60, "importance_sampling_level": "sequence", "num_epochs": 2},
    "reference and recomputed": {
        "precalculate_logprobs": True,
        "truncated_importance_sampling": 2.0,
        "kl_coef": 0.1,
        "kl_in": "advantage",
        "reference": "base",
        "max_tokens_per_microbatch": 40,
    },
}


def new_trainer(*callbacks: lightning.Callback, precision: str = "64-true") -> fitrl.LocalTrainer:
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return fitrl.LocalTrainer(
        accelerator=ACCELERATOR,
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        strategy=STRATEGY if several else "fitrl_local",
        precision=precision,
        callbacks=list(callbacks),
        gradient_clip_val=0.5,
        enable_model_summary=False,
    )


def digest(trainer: fitrl.LocalTrainer) -> str:
    sha = hashlib.sha256()
    for _, tensor in trainer.verbs.named_weights():
        sha.update(tensor.contiguous().cpu().numpy().tobytes())
    return sha.hexdigest()


def train(root: Path) -> dict[str, Any]:
    """Every case on a model of its own; what is compared with one process."""
    seen: dict[str, Any] = {}
    for number, (name, arguments) in enumerate(CASES.items()):
        keep = KeepGradients()
        with new_trainer(keep) as trainer:
            model = fitrl.TrainableModel(f"case-{number}", "ddp", "tiny", lora=None, root=root)
            prompt = 20 if name == "shared prompts" else 0
            trainer.open(model)
            groups = [make_groups(seed=seed, prompt=prompt) for seed in (1, 2)]
            with real_float64() if prompt else nullcontext():  # ranks sum a prompt's gradient in another order
                results = [trainer.fit_rl(model, some, learning_rate=1e-3, **arguments) for some in groups]
            if prompt:
                assert all(result.metrics["data/shared_prefix_tokens_saved"] > 0 for result in results)
            own = ("time/", "throughput/", "memory/", "data/padding_fraction", "data/shared_prefix_tokens_saved")
            seen[name] = {
                "gradients": keep.steps,
                "steps": [result.step for result in results],
                "metrics": [
                    {key: value for key, value in result.metrics.items() if not key.startswith(own)}
                    for result in results
                ],
                "checkpoints": [str(result.checkpoint_path) for result in results],
            }
    return seen


def shared_groups(root: Path) -> dict[str, Any]:
    """The same groups held by every rank, by rank 0 only, and by each rank a part."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    groups = make_groups(seed=3, num_groups=4)
    ways = {
        "all": groups,
        "rank 0": groups if rank == 0 else [],
        "parts": groups[rank * len(groups) // size : (rank + 1) * len(groups) // size],
    }
    seen: dict[str, Any] = {}
    for number, (name, mine) in enumerate(ways.items()):
        keep = KeepGradients()
        with new_trainer(keep) as trainer:
            model = fitrl.TrainableModel(f"groups-{number}", "ddp", "tiny", lora=None, root=root)
            result = trainer.fit_rl(model, mine, learning_rate=1e-3, save_checkpoint=False)
            seen[name] = [keep.steps, result.metrics["data/num_groups_submitted"], digest(trainer)]
    return seen


def collectives(root: Path) -> list[str]:
    """What the ranks wait for each other with in a call of two microbatches each, but for the gradients."""
    found: list[str] = []

    def counted(name: str) -> Any:
        collective = getattr(torch.distributed, name)

        def call(*args: Any, **options: Any) -> Any:
            found.append(name)
            return collective(*args, **options)

        return call

    with new_trainer() as trainer:
        model = fitrl.TrainableModel("collectives", "ddp", "tiny", lora=None, root=root)
        trainer.fit_rl(model, make_groups(seed=1))
        with pytest.MonkeyPatch.context() as patch:
            for name in ("all_gather", "all_reduce", "broadcast", "barrier", "broadcast_object_list"):
                patch.setattr(torch.distributed, name, counted(name))
            trainer.fit_rl(model, make_groups(seed=2), max_tokens_per_microbatch=30, save_checkpoint=False)
    return found


def rollouts(root: Path) -> dict[str, Any]:
    """Rollouts shared over the ranks, then a step; logging; a second trainer on the same run."""
    seen: dict[str, Any] = {}
    with new_trainer(precision="32-true") as trainer:
        model = fitrl.TrainableModel("rollouts", "ddp", "tiny", lora=None, root=root)
        groups = fitrl.rollout(
            trainer.sampler(model), TASKS[:5], reward=correct, group_size=4, max_new_tokens=4, seed=3
        )
        seen["groups"] = [group.to_json() for group in groups]
        unseeded = fitrl.rollout(trainer.sampler(model), TASKS[:3], reward=correct, group_size=2, max_new_tokens=4)
        seen["unseeded"] = [group.to_json() for group in unseeded]
        result = trainer.fit_rl(model, groups, learning_rate=1e-3)
        seen["logged"] = model.log(groups, metrics={"loss": result.metrics["loss/train"]}, step=result.step)

        async def both() -> None:
            """Rollouts on this thread beside a call on the trainer's: each rank may be first at either."""
            more = fitrl.rollout_async(
                trainer.sampler(model), TASKS[:2], reward=correct, group_size=2, max_new_tokens=2, seed=4
            )
            await asyncio.gather(more, trainer.fit_rl_async(model, groups, learning_rate=1e-3))

        asyncio.run(both())
        seen["step"], seen["weights"] = trainer.global_step, digest(trainer)
        try:
            new_trainer(precision="32-true").open(fitrl.TrainableModel("rollouts", "ddp", "tiny", lora=None, root=root))
        except fitrl.FitRLError as error:
            seen["second trainer"] = f"{type(error).__name__}: {error}"

        def wrong(task: Any, trajectory: Any) -> float:
            if task is TASKS[0]:  # rank 0 attempts it
                raise ValueError("no reward")
            return 0.0

        try:
            fitrl.rollout(trainer.sampler(model), TASKS[:2], reward=wrong, group_size=1, max_new_tokens=2)
        except fitrl.FitRLError as error:
            seen["failed rollout"] = f"{type(error).__name__}: {error}"
        seen["usable"] = trainer.fit_rl(model, groups, learning_rate=1e-3, save_checkpoint=False).step
    with new_trainer(precision="32-true") as trainer:
        trainer.open(model)
        seen["resumed"], seen["resumed weights"] = trainer.global_step, digest(trainer)
    seen["connected"] = ranks.world_size() > 1
    return seen


def stock(root: Path) -> dict[str, Any]:
    """A stock Lightning trainer with the strategy by name and a data module."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    torch.manual_seed(5)
    keep = KeepGradients()
    trainer = lightning.Trainer(
        accelerator=ACCELERATOR,
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        strategy=STRATEGY if several else "fitrl_local",
        max_steps=2,
        precision="64-true",
        callbacks=[keep],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = fitrl.PolicyModule(fitrl.TrainableModel("stock", "ddp", "tiny", lora=None, root=root), learning_rate=1e-3)
    trainer.fit(module, datamodule=fitrl.RolloutDataModule(TASKS, correct, max_new_tokens=4, tasks_per_step=12))
    return {"steps": trainer.global_step, "norms": [step[0] for step in keep.steps]}


def main() -> None:
    torch.set_num_threads(1)
    output = Path(sys.argv[1])
    root = output.parent / f"{output.name}.runs"
    seen = {"train": train(root), "groups": shared_groups(root), "rollouts": rollouts(root), "stock": stock(root)}
    seen["collectives"] = collectives(root)
    suffix = f".{os.environ['RANK']}" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    output.with_name(output.name + suffix).write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
