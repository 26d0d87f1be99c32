"""What the tests of actors do, in a process of its own, because a process can have Monarch's client once only.

python actors_worker.py FOLDER     writes FOLDER/seen.json
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from plain_trainer import opened

import fitrl
from fitrl.demo import TASKS, correct
from fitrl.policy.loading import load_policy
from fitrl.testing.samples import make_samples
from fitrl_titan import TitanTrainer
from fitrl_titan.actors import SamplerActors, TrainerActors

RATE, STEPS, BOUND = 1e-3, 4, 2


class On:
    """An objective that does something to one rank, and is CISPO elsewhere."""

    inputs = "logprobs"

    def __init__(self, rank: int, what: str) -> None:
        self.rank, self.what = str(rank), what

    def __call__(self, inputs: fitrl.LossInputs) -> fitrl.PolicyLoss:
        if os.environ["RANK"] == self.rank:
            if self.what == "dies":
                os._exit(3)
            raise ArithmeticError("on purpose")
        return fitrl.policy_loss(
            inputs.logprobs,
            inputs.old_logprobs,
            inputs.advantages,
            inputs.mask,
            inputs.trajectory_ids,
            fitrl.Objective(),
            num_tokens=inputs.num_tokens,
        )


@contextmanager
def titan(root: Path, name: str, size: int) -> Iterator[fitrl.PolicyTrainer]:
    with TitanTrainer(accelerator="cpu", devices=size, enable_model_summary=False) as trainer:
        yield trainer.open(fitrl.TrainableModel(name, "actors", "tiny", lora=None, root=root))


@contextmanager
def local(root: Path, name: str) -> Iterator[fitrl.PolicyTrainer]:
    with fitrl.LocalTrainer(accelerator="cpu", devices=1, enable_model_summary=False) as trainer:
        yield trainer.open(fitrl.TrainableModel(name, "actors", "tiny", lora=None, root=root))


def batches(seed: int, count: int) -> list[fitrl.Batch]:
    return fitrl.pack(make_samples(seed=seed, num_trajectories=8), num_batches=count, layout="padded")


async def told(call: Any) -> list[str]:
    """Kind and text of the error that a call raises."""
    try:
        await call
    except Exception as error:
        return [type(error).__name__, str(error), *getattr(error, "__notes__", [])]
    return ["nothing"]


async def verbs(actors: TrainerActors) -> dict[str, Any]:
    """Two steps, the second with fewer batches than ranks, and everything that can be asked between them."""
    seen: dict[str, Any] = {"is": isinstance(actors, fitrl.AsyncPolicyTrainer), "ranks": actors.num_data_ranks}
    seen["early"] = await told(actors.optim_step())
    first = await actors.forward_backward(batches(0, actors.num_data_ranks))
    seen["accumulated"] = (await actors.get_status()).accumulated_microbatches
    step = await actors.optim_step(learning_rate=RATE)
    seen["first"] = [first.loss, step.grad_norm, step.step, first.metrics["token_count"], first.metrics["ratio_max"]]
    seen["saved"] = [await actors.save(), await actors.save(name="weights", weights_only=True)]
    seen["logprobs"] = (await actors.forward(batches(1, actors.num_data_ranks))).logprobs.tolist()
    weights = {name: tensor async for name, tensor in actors.named_weights()}
    seen["weights"] = [len(weights), float(sum(tensor.double().sum() for tensor in weights.values()))]
    exporting = actors.named_weights()
    await anext(exporting)
    await actors.forward_backward(batches(1, 1)[0])
    await actors.clear_gradients()
    second = await actors.forward_backward(batches(1, 1)[0])
    step = await actors.optim_step(learning_rate=RATE)
    seen["second"] = [second.loss, step.grad_norm, step.step, step.accumulated_microbatches]
    seen["back"] = [await actors.load(seen["saved"][0]) == seen["saved"][0], (await actors.get_status()).step]
    seen["world"] = (await actors.get_config()).world_size
    return seen


async def of_titan(root: Path) -> dict[str, Any]:
    """Two ranks of Titan: everything, an error that one has while the other waits for it, then rollouts beside it."""
    seen: dict[str, Any] = {}
    actors = TrainerActors(functools.partial(titan, root, "titan", 2), ranks=2, grace_s=1.0)
    async with actors:
        seen["verbs"] = await verbs(actors)
        seen["too many"] = await told(actors.forward_backward(batches(0, 3)))
        seen["twice"] = await told(actors.open())
        await actors.forward_backward(batches(1, 2))
        await actors.optim_step(learning_rate=RATE)  # is lost, because it is not saved
        seen["stuck"] = await told(actors.forward_backward(batches(1, 2), On(1, "raises")))
        seen["step"] = (await actors.get_status()).step
        result = await actors.forward_backward(batches(1, 2))
        seen["again"] = [result.loss, (await actors.optim_step(learning_rate=RATE)).grad_norm]
        seen["asynchronous"] = await asynchronous(actors)
    seen["closed"] = await told(actors.get_status())
    return seen


async def of_local(root: Path) -> dict[str, Any]:
    async with TrainerActors(functools.partial(local, root, "local")) as actors:
        return {"verbs": await verbs(actors)}


async def of_somebody(root: Path) -> dict[str, Any]:
    """Two of a trainer of somebody else, each on its own: an error that one has, and one that dies, twice."""
    seen: dict[str, Any] = {}
    async with TrainerActors(functools.partial(opened, root), ranks=2, most_restarts=1) as actors:
        seen["verbs"] = await verbs(actors)
        await actors.save(name="0001")
        seen["one alone"] = await told(actors.forward_backward(batches(0, 1)[0], On(1, "raises")))
        seen["cleared"] = await told(actors.optim_step())
        await actors.forward_backward(batches(1, 1)[0])
        await actors.optim_step(learning_rate=RATE)  # is lost, because it is not saved
        seen["dead"] = await told(actors.forward_backward(batches(1, 1)[0], On(1, "dies")))
        seen["step"] = (await actors.get_status()).step
        result = await actors.forward_backward(batches(1, 1)[0])
        seen["again"] = [result.loss, (await actors.optim_step(learning_rate=RATE)).grad_norm]
        seen["dead again"] = await told(actors.forward_backward(batches(1, 1)[0], On(0, "dies")))
        seen["not running"] = await told(actors.get_status())
    seen["cannot open"] = await told(TrainerActors(functools.partial(opened, root, 1)).open())
    return seen


def sampler() -> fitrl.TransformersSampler:
    return fitrl.TransformersSampler(load_policy("tiny"))


async def asynchronous(trainer: TrainerActors) -> dict[str, Any]:
    """Rollouts by two samplers go on while a trainer of two ranks takes steps; old groups are left out."""
    queue: asyncio.Queue[list[fitrl.TrajectoryGroup]] = asyncio.Queue(maxsize=1)
    seen: dict[str, Any] = {"losses": [], "lags": [], "left out": 0, "begun": 0}
    tokenizer = fitrl.load_tokenizer("tiny")
    first = (await trainer.get_status()).step
    async with SamplerActors(sampler, count=2) as samplers:
        await samplers.take(trainer.named_weights(), version=first)
        seen["sampler"] = [isinstance(samplers, fitrl.Sampler), samplers.version]
        seen["update"] = await told(_update(samplers))

        async def roll() -> None:
            while True:
                seen["begun"] += 1
                options: dict[str, Any] = {"group_size": 4, "max_new_tokens": 4, "seed": seen["begun"]}
                await queue.put(await fitrl.rollout_async(samplers, TASKS[:4], reward=correct, **options))

        rolling = asyncio.create_task(roll())
        step = first
        try:
            while step < first + STEPS:
                groups = await queue.get()
                said = [trajectory.completions()[-1] for group in groups for trajectory in group]
                versions = [completion.version for completion in said]
                samples = fitrl.build_samples(groups, tokenizer, teaches_without_advantage=True).flat
                if step - min(versions) > BOUND:
                    seen["left out"] += 1
                    continue
                seen["lags"].append(step - min(versions))
                result = await trainer.forward_backward(fitrl.pack(samples, num_batches=trainer.num_data_ranks))
                seen["losses"].append(result.loss)
                step = (await trainer.optim_step(learning_rate=1e-4)).step
                await samplers.take(trainer.named_weights(), version=step)
        finally:
            rolling.cancel()
            await asyncio.gather(rolling, return_exceptions=True)
        seen["version"] = samplers.version
        prompt = fitrl.prompt_ids(tokenizer, [{"role": "user", "content": "1+2="}])
        [one] = await samplers.sample(prompt, max_new_tokens=4, temperature=1.0, seed=1)
        policy = load_policy("tiny")
        policy.causal_lm.load_state_dict({name: tensor async for name, tensor in trainer.named_weights()})
        own = fitrl.TransformersSampler(policy, version=step)
        [expected] = await own.sample(prompt, max_new_tokens=4, temperature=1.0, seed=1)
        seen["said"] = [one.token_ids == expected.token_ids, one.version == expected.version == step]
        seen["logprobs"] = [list(one.logprobs or ()), list(expected.logprobs or ())]
    return seen


async def _update(samplers: SamplerActors) -> None:
    samplers.update([], 1)


async def main(folder: Path) -> None:
    seen: dict[str, Any] = {}
    for part in (of_titan, of_local, of_somebody):
        (folder / part.__name__).mkdir()
        seen[part.__name__] = await part(folder / part.__name__)
    seen["left"] = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
    (folder / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    torch.set_num_threads(1)
    asyncio.run(main(Path(sys.argv[1])))
