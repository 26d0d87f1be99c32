"""What each rank of the FSDP2 tests does, and one process for comparison: writes what it saw as JSON.

python fsdp2_worker.py OUTPUT        one process, `fitrl_local`
torchrun ... fsdp2_worker.py OUTPUT  several ranks, `fitrl_fsdp2`; each writes OUTPUT.<rank>
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torch._dynamo
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import fitrl
from distributed.ddp_worker import ACCELERATOR, KeepGradients, digest
from fitrl.data import ranks
from fitrl.demo import TASKS, correct
from fitrl.policy.layers import decoder_layers
from fitrl.policy.sharding import own_numel
from fitrl.strategies.fsdp2 import FSDP2Strategy
from samples import make_groups

SEVERAL = int(os.environ.get("WORLD_SIZE", "1")) > 1
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "adapters": {"lora": fitrl.LoraSettings(rank=4)},
    "full, recomputed": {"activation_checkpointing": True},
    "adapters, recomputed, offloaded": {
        "precision": "32-true",
        "lora": fitrl.LoraSettings(rank=4),
        "activation_checkpointing": True,
        "offload": True,
    },
    "float32, compiled": {"precision": "32-true", "compile": True},
    "float32, summed once": {"precision": "32-true", "once": True},
    "float32, summed once, whole in a step": {"precision": "32-true", "once": True, "whole": True},
    "bfloat16": {"precision": "bf16-mixed"},
    "bfloat16, whole in a step": {"precision": "bf16-mixed", "whole": True},
    "adapters, bfloat16": {"precision": "bf16-mixed", "lora": fitrl.LoraSettings(rank=4)},
    "adapters, bfloat16, whole in a step": {
        "precision": "bf16-mixed",
        "lora": fitrl.LoraSettings(rank=4),
        "whole": True,
    },
}


def open_trainer(
    *callbacks: Any,
    offload: bool = False,
    whole: bool = False,
    once: bool = False,
    precision: str = "64-true",
    local: bool = False,
    **options: Any,
) -> fitrl.LocalTrainer:
    several = SEVERAL and not local
    strategy: Any = "fitrl_fsdp2"
    if offload or whole or once:
        strategy = FSDP2Strategy(
            offload=offload,
            reshard_after_forward=False if whole else None,
            sync_every_microbatch=False if once else None,
        )
    return fitrl.LocalTrainer(
        accelerator=ACCELERATOR,
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if several else 1,
        # Lightning takes float64 with a strategy's name only, not with an instance
        strategy=strategy if several else "fitrl_local",
        precision=precision,
        callbacks=list(callbacks),
        gradient_clip_val=0.5,
        enable_model_summary=False,
        **options,
    )


@contextmanager
def unknown_numbers() -> Iterator[set[str]]:
    """Names of what the compiler takes for symbols, in graphs that are compiled meanwhile."""
    found: set[str] = set()
    compile_ = torch.compile

    def backend(graph: Any, inputs: Any) -> Any:
        values = {node.name: node.meta.get("example_value") for node in graph.graph.find_nodes(op="placeholder")}
        found.update(name for name, value in values.items() if isinstance(value, torch.SymInt))
        return torch._dynamo.lookup_backend("inductor")(graph, inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **options: compile_(function, backend=backend, **options))
        yield found


@contextmanager
def collectives() -> Iterator[dict[str, int]]:
    """How often a layer's weights, or those of no layer, are gathered meanwhile, and their gradients summed."""
    found = {"gathers": 0, "sums": 0}

    def counted(what: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args: Any, **options: Any) -> Any:
            found[what] += 1
            return work(*args, **options)

        return count

    with pytest.MonkeyPatch.context() as patch:
        for what, name in (("gathers", "foreach_all_gather"), ("sums", "foreach_reduce")):
            patch.setattr(_fsdp_param_group, name, counted(what, getattr(_fsdp_param_group, name)))
        yield found


def train(root: Path) -> dict[str, Any]:
    """Every case: gradients of two calls, what this rank holds, the weights that come out."""
    seen: dict[str, Any] = {}
    for number, (name, options) in enumerate(CASES.items()):
        options = dict(options)
        model = fitrl.TrainableModel(f"case-{number}", "fsdp2", "tiny", lora=options.pop("lora", None), root=root)
        keep = KeepGradients()
        with unknown_numbers() as numbers, open_trainer(keep, **options) as trainer:
            for seed, most in ((1, 60), (2, 30)):
                with collectives() as counts:
                    result = trainer.fit_rl(
                        model, make_groups(seed=seed), learning_rate=1e-3, max_tokens_per_microbatch=most
                    )
            parameters = list(trainer.verbs.policy_module.network.parameters())
            seen[name] = {
                "gradients": keep.steps,
                "in pieces": all(isinstance(parameter, DTensor) for parameter in parameters),
                "own": sum(map(own_numel, parameters)),
                "all": sum(parameter.numel() for parameter in parameters),
                "names": {name: list(tensor.shape) for name, tensor in trainer.verbs.named_weights()},
                "digest": digest(trainer),
                "checkpoint": str(result.checkpoint_path),
                "memory": str(next(iter(parameters)).device),
                "unknown numbers": sorted(numbers),
                **counts,
                "microbatches": keep.microbatches,
                "parts": 1 + len(decoder_layers(trainer.verbs.policy_module.policy)),
            }
    return seen


def sample_between(root: Path) -> dict[str, Any]:
    """The embedded sampler reads whole weights between calls, whatever each rank samples; steps go on as before."""
    model = fitrl.TrainableModel("sampled", "fsdp2", "tiny", lora=None, root=root)
    keep = KeepGradients()
    seen: dict[str, Any] = {"groups": []}
    with open_trainer(keep) as trainer:
        for call in range(3):
            groups = fitrl.rollout(
                trainer.sampler(model), TASKS[:7], reward=correct, group_size=3, max_new_tokens=4, seed=call
            )
            seen["groups"] += [group.to_json() for group in groups]
            trainer.fit_rl(model, make_groups(seed=call), learning_rate=1e-3)
            if call == 1:  # by hand, right after sampling
                verbs = trainer.open(model)
                samples = fitrl.build_samples(make_groups(seed=9), fitrl.load_tokenizer("tiny"))
                rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
                for batch in fitrl.pack(samples.flat, num_batches=2)[rank::size]:
                    verbs.forward_backward(batch)
                seen["by hand"] = verbs.optim_step(learning_rate=1e-3).grad_norm
        seen["digest"] = digest(trainer)
    seen["gradients"] = keep.steps
    return seen


def resume(root: Path) -> dict[str, Any]:
    """Two calls, and a third in a new session."""
    seen: dict[str, Any] = {}
    for lora in (None, fitrl.LoraSettings(rank=4)):
        keep = KeepGradients()
        name = "full" if lora is None else "adapters"
        for seeds in ((1, 2), (3,)):
            model = fitrl.TrainableModel(f"resume-{name}", "fsdp2", "tiny", lora=lora, root=root)
            with open_trainer(keep) as trainer:
                for seed in seeds:
                    result = trainer.fit_rl(model, make_groups(seed=seed), learning_rate=1e-3)
                end = digest(trainer)
        seen[name] = {"gradients": keep.steps, "digest": end, "checkpoint": str(result.checkpoint_path)}
    return seen


class Samples(lightning.Callback):
    """Samples in the middle of a call, with a sampler that the trainer knows of or one that it does not."""

    def __init__(self) -> None:
        self.how: str | None = None
        self.sampler: Any = None
        self.said: dict[str, str] = {}

    def on_train_batch_end(self, trainer: Any, module: Any, *rest: Any) -> None:
        if self.how is None:
            return
        sampler = fitrl.TransformersSampler(module.policy) if self.how == "own" else self.sampler
        try:
            asyncio.run(sampler.sample([1, 2, 3], max_new_tokens=2))
            self.said[self.how] = "taken"
        except fitrl.FitRLError as error:
            self.said[self.how] = f"{type(error).__name__}: {error}"


def in_mid_call(root: Path) -> dict[str, Any]:
    """A callback that samples while weights lie in pieces."""
    samples = Samples()
    model = fitrl.TrainableModel("mid-call", "fsdp2", "tiny", lora=None, root=root)
    with open_trainer(samples) as trainer:
        samples.sampler = trainer.sampler(model)
        for samples.how in ("trainer's", "own"):
            trainer.fit_rl(model, make_groups(seed=1), learning_rate=1e-3, save_checkpoint=False)
    return samples.said


@contextmanager
def disk_full_on(rank: int) -> Iterator[None]:
    """Let no file of one rank grow beyond 1000 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if ranks.rank() == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save(root: Path) -> dict[str, Any]:
    """Saves that fail on one rank, one of the weights alone, and what is left in the folder each time."""
    model = fitrl.TrainableModel("saved", "fsdp2", "tiny", lora=None, root=root)
    seen: dict[str, Any] = {}
    with open_trainer() as trainer:
        trainer.fit_rl(model, make_groups(seed=1), learning_rate=1e-3)
        for rank in range(ranks.world_size()):
            for kind in ("full", "alone"):
                with disk_full_on(rank):
                    try:
                        trainer.verbs.save(kind, weights_only=kind == "alone")
                        seen[f"{kind} {rank}"] = "saved"
                    except fitrl.FitRLError as error:
                        seen[f"{kind} {rank}"] = f"{type(error).__name__}: {error}"
                ranks.collect("")  # all have seen it
                seen[f"left {kind} {rank}"] = sorted(path.name for path in model.checkpoints_dir.iterdir())
                ranks.collect("")  # before anyone goes on
        folder = Path(trainer.verbs.save("weights", weights_only=True))
        seen["weights"] = sorted(path.name for path in folder.iterdir())
        before = digest(trainer)
        trainer.fit_rl(model, make_groups(seed=2), learning_rate=1e-3, save_checkpoint=False)
        trainer.verbs.load(str(folder))
        seen["same weights"] = digest(trainer) == before
        seen["goes on"] = trainer.fit_rl(model, make_groups(seed=2), learning_rate=1e-3, save_checkpoint=False).step
        before_moments = moments(trainer)
        trainer.verbs.load(str(model.checkpoints_dir / "0001"))
        after = moments(trainer)
        trainer.verbs.save("again")
        trainer.verbs.load(str(model.checkpoints_dir / "again"))
        seen["same moments"] = moments(trainer) == after != before_moments
    return seen


def moments(trainer: fitrl.LocalTrainer) -> str:
    """What tells this rank's moments from any others."""
    sha = hashlib.sha256()
    for entry in trainer.optimizers[0].state.values():
        for name in ("exp_avg", "exp_avg_sq"):
            held = entry[name].to_local() if isinstance(entry[name], DTensor) else entry[name]
            sha.update(held.cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


def refused(root: Path) -> str:
    """What cannot be cut into pieces."""
    model = fitrl.TrainableModel("refused", "fsdp2", "tiny", lora=None, root=root)
    try:
        with open_trainer(optimizer=fitrl.AdamWSettings(moments="8bit")) as trainer:
            trainer.open(model)
    except fitrl.FitRLError as error:
        return f"{type(error).__name__}: {error}"
    return "taken"


def main() -> None:
    torch.set_num_threads(1)
    output = Path(sys.argv[1])
    root = output.parent / f"{output.name}.runs"
    seen: dict[str, Any] = {"train": train(root), "sampled": sample_between(root), "resumed": resume(root)}
    seen["refused"] = refused(root)
    if SEVERAL:
        seen["mid-call"] = in_mid_call(root)
        seen["save"] = save(root)
    plain = AutoModelForCausalLM.from_pretrained(seen["train"]["full"]["checkpoint"])
    seen["saved"] = {name: list(tensor.shape) for name, tensor in plain.state_dict().items()}
    suffix = f".{os.environ['RANK']}" if SEVERAL else ""
    output.with_name(output.name + suffix).write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
