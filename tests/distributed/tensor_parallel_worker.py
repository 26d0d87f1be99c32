"""What each rank of the tensor-parallel tests does, and one process for comparison: writes what it saw as JSON.

python tensor_parallel_worker.py OUTPUT LLAMA              one process, `fitrl_local`
torchrun ... tensor_parallel_worker.py OUTPUT LLAMA        two ranks, `fitrl_fsdp2`; each writes OUTPUT.<rank>
torchrun ... tensor_parallel_worker.py OUTPUT LLAMA SAVED  four ranks: the shortest of it, going on from SAVED

LLAMA is a folder of a small Llama with biases and a head of its own.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import fitrl
from distributed.ddp_worker import ACCELERATOR, KeepGradients, digest
from fitrl import _compat
from fitrl.demo import TASKS, correct
from fitrl.policy.sharding import clip_by_norm, gradient_norm, own_numel, whole
from fitrl.strategies.fsdp2 import FSDP2Strategy
from samples import make_groups

SEVERAL = int(os.environ.get("WORLD_SIZE", "1")) > 1
LORA = fitrl.LoraSettings(rank=4)
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "adapters, recomputed": {"lora": LORA, "activation_checkpointing": True},
    "llama, entropy": {"base_model": "llama", "entropy_coef": 0.1, "num_minibatches": 2},
    "reference and recomputed logprobs": {
        "precalculate_logprobs": True,
        "truncated_importance_sampling": 2.0,
        "kl_coef": 0.1,
        "reference": "base",
        "importance_sampling_level": "sequence",
    },
    "bfloat16": {"precision": "bf16-mixed"},
    "offloaded": {"precision": "32-true", "offload": True},
}
BRIEF = ("full", "adapters, recomputed")
OF_TRAINER = ("precision", "offload", "activation_checkpointing")

# Lightning takes float64 with a strategy's name only, not with an instance
_compat.registry.register("test_tensor_parallel", FSDP2Strategy, tensor_parallel_size=2)


def open_trainer(
    *callbacks: Any, offload: bool = False, precision: str = "64-true", **options: Any
) -> fitrl.LocalTrainer:
    strategy: Any = "test_tensor_parallel" if SEVERAL else "fitrl_local"
    if SEVERAL and offload:
        strategy = FSDP2Strategy(tensor_parallel_size=2, offload=True)
    return fitrl.LocalTrainer(
        accelerator=ACCELERATOR,
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        strategy=strategy,
        precision=precision,
        callbacks=list(callbacks),
        gradient_clip_val=0.5,
        enable_model_summary=False,
        **options,
    )


class Mixed(lightning.Callback):
    """Measures gradients of all layouts beside one that no rank shares, and clips copies of them."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float, float]] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        grads = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        mixed = [*(grad.detach().clone() for grad in grads), torch.ones(3, dtype=grads[0].dtype)]
        wholes = torch.cat([whole(grad).flatten().cpu() for grad in mixed])
        found = gradient_norm(mixed)
        clip_by_norm(mixed, 0.25, found)
        self.seen.append((float(found), float(wholes.norm()), float(gradient_norm(mixed))))


class Crossed:
    """Notes the sizes of what ranks of one computation sum up, and holds them to what is small."""

    def __init__(self) -> None:
        self.largest = 0

    def __enter__(self) -> Crossed:
        self._all_reduce = dist.all_reduce

        def noted(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            self.largest = max(self.largest, tensor.numel())
            return self._all_reduce(tensor, *args, **kwargs)

        dist.all_reduce = noted
        return self

    def __exit__(self, *_: Any) -> None:
        dist.all_reduce = self._all_reduce


def train(root: Path, llama: str, cases: list[str]) -> dict[str, Any]:
    """Every case: gradients of two calls, what this rank holds, the weights that come out."""
    seen: dict[str, Any] = {}
    for number, name in enumerate(cases):
        options = dict(CASES[name])
        base_model = llama if options.pop("base_model", "tiny") == "llama" else "tiny"
        model = fitrl.TrainableModel(f"case-{number}", "tp", base_model, lora=options.pop("lora", None), root=root)
        own = {key: options.pop(key) for key in OF_TRAINER if key in options}
        keep = KeepGradients()
        mixed = Mixed()
        with open_trainer(keep, mixed, **own) as trainer, Crossed() as crossed:
            results = [
                trainer.fit_rl(
                    model, make_groups(seed=seed), learning_rate=1e-3, max_tokens_per_microbatch=60, **options
                )
                for seed in (1, 2)
            ]
            parameters = list(trainer.verbs.policy_module.network.parameters())
            timed = ("time/", "throughput/", "memory/", "data/padding", "data/shared")
            seen[name] = {
                "gradients": keep.steps,
                "metrics": [
                    {key: value for key, value in result.metrics.items() if not key.startswith(timed)}
                    for result in results
                ],
                "in pieces": all(isinstance(parameter, DTensor) for parameter in parameters),
                "own": sum(map(own_numel, parameters)),
                "all": sum(parameter.numel() for parameter in parameters),
                "names": {name: list(tensor.shape) for name, tensor in trainer.verbs.named_weights()},
                "digest": digest(trainer),
                "checkpoint": str(results[-1].checkpoint_path),
                "largest": crossed.largest,
                "mixed": mixed.seen,
            }
    return seen


def sample_between(root: Path) -> dict[str, Any]:
    """The embedded sampler reads whole weights between calls, whatever each rank samples; steps go on as before."""
    seen: dict[str, Any] = {"groups": []}
    for kind, lora in (("full", None), ("adapters", LORA)):
        model = fitrl.TrainableModel(f"sampled-{kind}", "tp", "tiny", lora=lora, root=root)
        keep = KeepGradients()
        with open_trainer(keep) as trainer:
            for call in range(2):
                groups = fitrl.rollout(
                    trainer.sampler(model), TASKS[:5], reward=correct, group_size=3, max_new_tokens=4, seed=call
                )
                seen["groups"] += [group.to_json() for group in groups]
                trainer.fit_rl(model, make_groups(seed=call), learning_rate=1e-3)
            verbs = trainer.open(model)
            samples = fitrl.build_samples(make_groups(seed=9), fitrl.load_tokenizer("tiny"))
            [batch] = fitrl.pack(samples.flat, num_batches=1)
            verbs.forward_backward(batch)
            seen[f"by hand, {kind}"] = verbs.optim_step(learning_rate=1e-3).grad_norm
            seen[f"logprobs, {kind}"] = verbs.forward(batch).logprobs.tolist()
        seen[f"gradients, {kind}"] = keep.steps
    return seen


def resume(root: Path) -> dict[str, Any]:
    """Two calls, and a third in a new session."""
    seen: dict[str, Any] = {}
    for name, lora in (("full", None), ("adapters", LORA)):
        keep = KeepGradients()
        for seeds in ((1, 2), (3,)):
            model = fitrl.TrainableModel(f"resume-{name}", "tp", "tiny", lora=lora, root=root)
            with open_trainer(keep) as trainer:
                for seed in seeds:
                    result = trainer.fit_rl(model, make_groups(seed=seed), learning_rate=1e-3)
                end = digest(trainer)
        seen[name] = {"gradients": keep.steps, "digest": end, "checkpoint": str(result.checkpoint_path)}
    return seen


def go_on(root: Path) -> dict[str, float]:
    """The gradient's norm of a fourth call, after the three of `resume`, which is not saved."""
    norms: dict[str, float] = {}
    for name, lora in (("full", None), ("adapters", LORA)):
        model = fitrl.TrainableModel(f"resume-{name}", "tp", "tiny", lora=lora, root=root)
        with open_trainer() as trainer:
            result = trainer.fit_rl(model, make_groups(seed=4), learning_rate=1e-3, save_checkpoint=False)
            assert result.step == 4
        norms[name] = result.metrics["loss/grad_norm"]
    return norms


class OverHidden:
    """A custom objective that wants what no rank has."""

    inputs = "hidden"

    def __call__(self, inputs: Any) -> Any:
        raise AssertionError("must not be called")


def refused(root: Path) -> dict[str, str]:
    """What cannot be computed together, and what is said of it."""
    head = fitrl.LoraSettings(target_modules=("q_proj", "lm_head"))
    said: dict[str, str] = {}

    def note(name: str, work: Any) -> None:
        try:
            work()
            said[name] = "taken"
        except fitrl.FitRLError as error:
            said[name] = f"{type(error).__name__}: {error}"

    with open_trainer() as trainer:
        model = fitrl.TrainableModel("head", "tp", "tiny", lora=head, root=root)
        note("adapters on the head", lambda: trainer.open(model))
    with open_trainer() as trainer:
        model = fitrl.TrainableModel("hidden", "tp", "tiny", lora=None, root=root)
        note("hidden", lambda: trainer.fit_rl(model, make_groups(seed=1), objective=OverHidden()))
    with open_trainer(compile=True) as trainer:
        model = fitrl.TrainableModel("compiled", "tp", "tiny", lora=None, root=root)
        note("compiled", lambda: trainer.open(model))
    note("size", lambda: FSDP2Strategy(tensor_parallel_size=0))
    return said


def main() -> None:
    torch.set_num_threads(1)
    output, llama = Path(sys.argv[1]), sys.argv[2]
    root = output.parent / f"{output.name}.runs"
    saved = Path(sys.argv[3]) if len(sys.argv) > 3 else None
    seen: dict[str, Any] = {"train": train(root, llama, list(CASES if saved is None else BRIEF))}
    if saved is None:
        seen["sampled"] = sample_between(root)
        seen["resumed"] = resume(root)
    if saved is not None or not SEVERAL:
        seen["continued"] = go_on(saved or root)
    if saved is None and SEVERAL:
        seen["refused"] = refused(root)
    suffix = f".{os.environ['RANK']}" if SEVERAL else ""
    output.with_name(output.name + suffix).write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
