"""What each rank of the Titan tests does; writes what it saw as JSON.

torchrun ... ranks_worker.py FOLDER     each rank writes FOLDER/<rank>.json
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

import fitrl
from distributed.fsdp2_worker import collectives
from fitrl.data import ranks
from fitrl.demo import TASKS, correct
from fitrl_titan import TitanTrainer
from samples import make_groups

ACCELERATOR = os.environ.get("FITRL_TEST_ACCELERATOR", "cpu")
WHOLE = {"reshard_after_forward": False, "sync_every_microbatch": False}
TENSOR, CONTEXT = {"tensor_parallel_size": 2}, {"context_parallel_size": 2}
# each way once, and what changes the way to the same gradient
CASES: dict[str, dict[str, Any]] = {
    "data, recomputed": {"activation_checkpointing": True},
    "data, compiled": {"compile": True},
    **({"tensor, compiled": TENSOR | {"compile": True}} if torch.__version__ >= (2, 13) else {}),
    "tensor, selective": TENSOR | {"activation_checkpointing": "selective"},
    "context": CONTEXT,
    "context, compiled": CONTEXT | {"compile": True},
    "data, bfloat16": {"precision": "bf16-mixed"},
    "tensor, bfloat16": TENSOR | {"precision": "bf16-mixed"},
    "context, bfloat16": CONTEXT | {"precision": "bf16-mixed"},
    "data, whole": WHOLE,
    "tensor, bfloat16, whole": TENSOR | WHOLE | {"precision": "bf16-mixed"},
    "context, compiled, whole": CONTEXT | WHOLE | {"compile": True},
}
RESUMED: dict[str, dict[str, Any]] = {"data": {}, "tensor": TENSOR, "context": CONTEXT}


class Squared:
    """An objective over whole logits: their mean square at the targets' positions, times the advantage."""

    inputs = "logits"

    def __call__(self, inputs: fitrl.LossInputs) -> fitrl.PolicyLoss:
        squares = inputs.logits.square().mean(-1) * inputs.advantages.abs() * inputs.mask
        return fitrl.PolicyLoss(loss=squares.sum() / inputs.num_tokens)


def teach(trainer: Any, model: fitrl.TrainableModel) -> list[list[float]]:
    """Loss and norm of three calls whose steps have other numbers of microbatches, the second of two steps."""
    calls: list[dict[str, Any]] = [
        {"max_tokens_per_microbatch": 60, "entropy_coef": 0.01},
        {"max_tokens_per_microbatch": 30, "num_minibatches": 2, "precalculate_logprobs": True},
        {"kl_coef": 0.1, "reference": "base"},
    ]
    return [_numbers(trainer, model, seed, **arguments) for seed, arguments in enumerate(calls)]


def _numbers(trainer: Any, model: fitrl.TrainableModel, seed: int, **arguments: Any) -> list[float]:
    metrics = trainer.fit_rl(model, make_groups(seed=seed), learning_rate=1e-3, **arguments).metrics
    return [metrics["loss/train"], metrics["loss/grad_norm"]]


def padded_norm(trainer: Any, model: fitrl.TrainableModel) -> float:
    """Norm of the gradient of two padded batches of several histories each, by the verbs."""
    samples = fitrl.build_samples(make_groups(seed=9), fitrl.load_tokenizer("tiny"))
    batches = fitrl.pack(samples.flat, num_batches=2, layout="padded")
    assert all(len(batch.model_inputs.input_ids) > 1 for batch in batches)
    verbs, size = trainer.open(model), ranks.num_data_ranks()
    for batch in batches[ranks.rank() * size // ranks.world_size() :: size]:
        verbs.forward_backward(batch)
    norm: float = verbs.optim_step(learning_rate=1e-3).grad_norm
    return norm


def later_graphs(trainer: Any, model: fitrl.TrainableModel) -> int:
    """Graphs that calls with batches of other lengths are compiled for, once some have been seen."""
    before = counters["stats"]["unique_graphs"]
    for seed, most in enumerate((45, 52, 67), start=3):
        _numbers(trainer, model, seed, max_tokens_per_microbatch=most, entropy_coef=0.01)
    return int(counters["stats"]["unique_graphs"] - before)


def trainer_of(**options: Any) -> TitanTrainer:
    return TitanTrainer(
        accelerator=ACCELERATOR, devices=2, gradient_clip_val=0.5, enable_model_summary=False, **options
    )


def model_of(root: Path, project: str, name: str) -> fitrl.TrainableModel:
    return fitrl.TrainableModel(name, project, "tiny", lora=None, root=root)


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    seen: dict[str, Any] = {"train": {}, "resumed": {}, "logits": {}, "padded": {}, "sampled": {}}
    for name, options in CASES.items():
        model = model_of(folder, "train", name.replace(", ", "-"))
        with trainer_of(**options) as trainer:
            seen["train"][name] = {"calls": teach(trainer, model), "checkpoint": str(model.checkpoints()[-1])}
            held = sum(parameter.to_local().numel() for parameter in trainer.verbs.policy_module.network.parameters())
            with collectives() as counts:
                _numbers(trainer, model, 3, max_tokens_per_microbatch=30)
            seen["train"][name] |= {"held": held, "later graphs": later_graphs(trainer, model), **counts}
    for name, options in RESUMED.items():
        model = model_of(folder, "resumed", name)
        with trainer_of(**options) as trainer:
            seen["resumed"][name] = _numbers(trainer, model, 7)
            seen["logits"][name] = _numbers(trainer, model, 8, objective=Squared(), save_checkpoint=False)
            seen["padded"][name] = padded_norm(trainer, model)
        model = model_of(folder, "sampled", name)
        with trainer_of(**options) as trainer:
            rows = []
            for call in range(2):
                groups = fitrl.rollout(
                    trainer.sampler(model), TASKS[:5], reward=correct, group_size=4, max_new_tokens=4, seed=call
                )
                texts = [[trajectory.completions()[-1].text for trajectory in group] for group in groups]
                result = trainer.fit_rl(model, groups, learning_rate=1e-3, entropy_coef=0.01)
                rows.append([texts, result.step, result.metrics.get("mismatch/kl")])
            seen["sampled"][name] = rows
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
