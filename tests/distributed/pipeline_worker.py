"""One rank: train beside a `RolloutPipeline`, and say what it was handed.

python pipeline_worker.py OUTPUT STRATEGY
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import lightning
import torch

import fitrl
from fitrl.data import ranks
from fitrl.demo import TASKS, correct

OPTIONS: dict[str, Any] = {"group_size": 4, "groups_per_step": 12, "max_new_tokens": 4}


def beside_fit_rl(root: Path, strategy: str) -> dict[str, Any]:
    """Three steps, then a pipeline whose attempts fail on the rank that makes them."""
    model = fitrl.TrainableModel("pipeline", "ranks", "tiny", lora=None, root=root)
    seen: dict[str, Any] = {"batches": [], "metrics": []}
    with fitrl.LocalTrainer(
        accelerator="cpu", devices=2, strategy=strategy, precision="64-true", enable_model_summary=False
    ) as trainer:
        copied = trainer.sampler(model, own_weights=True)
        with fitrl.RolloutPipeline(copied, TASKS, reward=correct, model=model, **OPTIONS) as pipeline:
            for groups in pipeline:
                seen["batches"].append(len(groups))
                result = trainer.fit_rl(model, groups, learning_rate=1e-3)
                seen["metrics"].append(pipeline.metrics())
                if result.step == 3:
                    break
        seen["weights"] = [float(tensor.double().sum()) for _, tensor in trainer.open(model).named_weights()]

        def say(sampler: fitrl.Sampler) -> list[str]:
            said = asyncio.run(sampler.sample(list(b"3+4="), n=8, max_new_tokens=6, seed=1))
            return [repr((completion.token_ids, completion.logprobs, completion.version)) for completion in said]

        seen["same"] = say(copied) == say(trainer.sampler(model))

        def broken(task: Any, trajectory: Any) -> float:
            raise ValueError("no reward")

        options = OPTIONS | {"max_retries": 0, "max_failed_groups": 0}
        with fitrl.RolloutPipeline(copied, TASKS, reward=broken, **options) as pipeline:
            try:
                next(pipeline)
            except fitrl.FitRLError as error:
                seen["failure"] = f"{type(error).__name__}: {error}"
    seen["folder"] = sorted(path.name for path in (model.run_dir / "pipeline").iterdir()) if ranks.rank() == 0 else []
    return seen


def beside_fit(root: Path, strategy: str) -> dict[str, Any]:
    """The same in a stock Lightning trainer."""
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_steps=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = fitrl.TrainableModel("stock", "ranks", "tiny", lora=None, root=root)
    module = fitrl.PolicyModule(model, learning_rate=1e-3)
    data = fitrl.RolloutDataModule(
        TASKS, correct, tasks_per_step=12, group_size=4, max_new_tokens=4, max_steps_off_policy=1
    )
    trainer.fit(module, datamodule=data)
    return {"steps": trainer.global_step, "num_groups": module.call_metrics["data/num_groups_submitted"]}


def main() -> None:
    torch.set_num_threads(1)
    output, strategy = Path(sys.argv[1]), sys.argv[2]
    root = output.parent / "runs"
    seen = {"fit_rl": beside_fit_rl(root, strategy), "fit": beside_fit(root, strategy)}
    output.with_name(f"{output.name}.{os.environ['RANK']}").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
