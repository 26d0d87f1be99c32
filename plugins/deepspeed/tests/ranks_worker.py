"""What each rank of the DeepSpeed tests does; writes what it saw as JSON.

torchrun ... ranks_worker.py FOLDER     each rank writes FOLDER/<rank>.json
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch

import fitrl
from fitrl.demo import TASKS, correct
from fitrl.policy.layers import decoder_layers
from fitrl_deepspeed import DeepSpeedTrainer
from samples import make_groups

LORA = fitrl.LoraSettings(rank=4)
EVERYTHING = os.environ.get("FITRL_DEEPSPEED_ALL") == "1"
# each stage with full weights and with adapters, and what changes the way to the same gradient
CASES: dict[str, dict[str, Any]] = {
    "1 full": {"zero_stage": 1},
    "1 adapters": {"zero_stage": 1, "lora": LORA},
    "2 full, offloaded": {"zero_stage": 2, "offload_optimizer": True},
    "2 adapters": {"zero_stage": 2, "lora": LORA},
    "3 full, recomputed": {"zero_stage": 3, "activation_checkpointing": True},
    "3 adapters": {"zero_stage": 3, "lora": LORA},
    "1 bfloat16": {"zero_stage": 1, "precision": "bf16-mixed"},
    "3 bfloat16": {"zero_stage": 3, "precision": "bf16-mixed"},
}
if EVERYTHING:
    CASES |= {
        "2 adapters, compiled": {"zero_stage": 2, "lora": LORA, "compile": True},
        "3 adapters, recomputed": {"zero_stage": 3, "lora": LORA, "activation_checkpointing": True},
        "3 full, offloaded": {"zero_stage": 3, "offload_optimizer": True, "offload_params": True},
        "2 bfloat16": {"zero_stage": 2, "precision": "bf16-mixed"},
    }
ACCELERATOR = os.environ.get("FITRL_TEST_ACCELERATOR", "cpu")
SAMPLED = (2, 3) if EVERYTHING else (3,)
BROKEN = OVERFLOWED = (1, 2, 3) if EVERYTHING else (2, 3)
RESUMED = [(1, 3, "full"), (2, 1, "adapters"), (3, 2, "full"), (3, 1, "adapters")]  # two stages in turn
RESUMED += [(0, 2, "full"), (0, 3, "adapters")]  # 0: fitrl_fsdp2, whose ranks write their moments in pieces
RESUMED += [(1, 3, "adapters"), (2, 1, "full")] if EVERYTHING else []
WHOLE = {"stage3_param_persistence_threshold": 0}  # of so small a policy stage 3 would leave most weights whole


def teach(trainer: Any, model: fitrl.TrainableModel) -> list[dict[str, float]]:
    """Three calls whose steps have other numbers of microbatches, the second of two steps."""
    calls: list[dict[str, Any]] = [
        {"max_tokens_per_microbatch": 60},
        {"max_tokens_per_microbatch": 30, "num_minibatches": 2},
        {},
    ]
    return [
        trainer.fit_rl(model, make_groups(seed=seed), learning_rate=1e-3, **arguments).metrics
        for seed, arguments in enumerate(calls)
    ]


def trainer_of(options: dict[str, Any], **further: Any) -> DeepSpeedTrainer:
    settings = {"zero_optimization": WHOLE} if options["zero_stage"] == 3 else {}
    chosen = {"gradient_clip_val": 0.5, "settings": settings} | options | further
    return DeepSpeedTrainer(accelerator=ACCELERATOR, devices=2, enable_model_summary=False, **chosen)


def of_stage(stage: int) -> fitrl.LocalTrainer:
    """A trainer of a stage; 0: of `fitrl_fsdp2`."""
    if stage:
        return trainer_of({"zero_stage": stage})
    options: dict[str, Any] = {"accelerator": ACCELERATOR, "devices": 2, "gradient_clip_val": 0.5}
    return fitrl.LocalTrainer(strategy="fitrl_fsdp2", enable_model_summary=False, **options)


def held(trainer: DeepSpeedTrainer) -> int:
    """Numbers of weights that are whole on this rank."""
    return sum(parameter.numel() for parameter in trainer.verbs.policy_module.network.parameters())


def train(root: Path) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    initialize, count = deepspeed.initialize, [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return initialize(*args, **kwargs)

    deepspeed.initialize = counted
    for number, (name, options) in enumerate(CASES.items()):
        options, count[0] = dict(options), 0
        model = fitrl.TrainableModel(f"case-{number}", "zero", "tiny", lora=options.pop("lora", None), root=root)
        with trainer_of(options) as trainer:
            metrics = teach(trainer, model)
            weights = {key: tensor.cpu() for key, tensor in trainer.verbs.named_weights()}
            seen[name] = {
                "calls": [[row["loss/train"], row["loss/grad_norm"]] for row in metrics],
                "zero": options["zero_stage"],
                "initialized": count[0],
                "held": held(trainer),
                "shapes": {key: list(tensor.shape) for key, tensor in weights.items()},
                "dtypes": sorted({str(tensor.dtype) for tensor in weights.values()}),
                "sum": float(sum(tensor.double().sum() for tensor in weights.values())),
                "checkpoint": str(model.checkpoints()[-1]),
            }
    deepspeed.initialize = initialize
    return seen


def sampled(root: Path) -> dict[str, Any]:
    """Each rank samples on its own from whole weights, in every stage alike; they are in pieces again for a step."""
    seen: dict[str, Any] = {}
    for stage in SAMPLED:
        model = fitrl.TrainableModel(f"sampled-{stage}", "zero", "tiny", lora=None, root=root)
        with trainer_of({"zero_stage": stage}) as trainer:
            rows = []
            for call in range(2):
                groups = fitrl.rollout(
                    trainer.sampler(model), TASKS[:5], reward=correct, group_size=3, max_new_tokens=4, seed=call
                )
                lent = held(trainer)
                texts = [[trajectory.completions()[-1].text for trajectory in group] for group in groups]
                trainer.fit_rl(model, make_groups(seed=call), learning_rate=1e-4)
                trainer.verbs.take_weights_back()
                rows.append([texts, lent, held(trainer)])
            seen[str(stage)] = rows
    return seen


def resumed(root: Path) -> dict[str, Any]:
    """What one process saved goes on here in one stage, and from there in another."""
    seen: dict[str, Any] = {}
    for first, then, kind in RESUMED:
        name, rows = f"{first}-{then}-{kind}", []
        for seed, stage in ((7, first), (8, then)):
            model = fitrl.TrainableModel(name, "resumed", "tiny", lora=None if kind == "full" else LORA, root=root)
            with of_stage(stage) as trainer:
                metrics = trainer.fit_rl(model, make_groups(seed=seed), learning_rate=1e-3).metrics
                rows.append([trainer.global_step, metrics["loss/train"], metrics["loss/grad_norm"]])
        seen[name] = rows
    return seen


class NotANumber:
    """An objective whose gradient is none."""

    inputs = "logprobs"

    def __call__(self, inputs: fitrl.LossInputs) -> fitrl.PolicyLoss:
        return fitrl.PolicyLoss(loss=(inputs.logprobs * inputs.mask).sum() * torch.nan)


def _raise(gradient: torch.Tensor) -> None:
    raise ArithmeticError("in backward, on purpose")


def _watch(layer: Any, inputs: Any, output: torch.Tensor) -> None:
    if output.requires_grad:
        output.register_hook(_raise)


def broken(root: Path) -> dict[str, Any]:
    """After a backward that raised, and after a gradient that is not a number, calls are as if it had not been."""
    seen: dict[str, Any] = {}
    for stage in BROKEN:
        rows: list[Any] = []
        model = fitrl.TrainableModel(f"broken-{stage}", "zero", "tiny", lora=None, root=root)
        with trainer_of({"zero_stage": stage}) as trainer:
            for seed in range(3):
                try:
                    if seed == 1:  # on the way through the layers, when some gradients are there
                        first = decoder_layers(trainer.verbs.policy_module.policy)[0]
                        with first.register_forward_hook(_watch):
                            trainer.fit_rl(model, make_groups(seed=9))
                    elif seed == 2:
                        trainer.fit_rl(model, make_groups(seed=9), objective=NotANumber())
                except (ArithmeticError, fitrl.FitRLError) as error:
                    rows.append(type(error).__name__)
                metrics = trainer.fit_rl(model, make_groups(seed=seed), learning_rate=1e-4).metrics
                rows.append([metrics["loss/train"], metrics["loss/grad_norm"], trainer.global_step])
        seen[str(stage)] = rows
    return seen


def overflowed(root: Path) -> dict[str, Any]:
    """Under float16, whose losses are scaled by too much at first; on a CPU DeepSpeed has to be told that it can."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    accelerator.is_fp16_supported = lambda: True
    accelerator.supported_dtypes = lambda: [torch.float, torch.bfloat16, torch.float16]
    scaling = {"initial_scale_power": 19, "hysteresis": 1}
    seen: dict[str, Any] = {}
    for stage in OVERFLOWED:
        model = fitrl.TrainableModel(f"overflowed-{stage}", "zero", "tiny", lora=None, root=root)
        rows = []
        for _ in range(2):  # the second resumes, and knows what scales
            with trainer_of({"zero_stage": stage}, precision="16-mixed", settings={"fp16": scaling}) as trainer:
                result = trainer.fit_rl(model, make_groups(seed=1), learning_rate=1e-3, num_epochs=6)
                keys = ("precision/skipped_steps", "precision/loss_scale")
                rows.append([result.step, *(result.metrics[key] for key in keys)])
        seen[str(stage)] = rows
    return seen


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    seen = {
        "train": train(folder),
        "sampled": sampled(folder),
        "resumed": resumed(folder),
        "broken": broken(folder),
        "overflowed": overflowed(folder),
    }
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
