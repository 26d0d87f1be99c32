"""The loops of `fitrl fit_rl`, the README's: rollout or the next batch of a pipeline, `fit_rl`, `model.log`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from fitrl.cli.config import FitRLCLI
from fitrl.policy.model import TrainableModel
from fitrl.rollout.pipeline import RolloutPipeline
from fitrl.trainers.progress import RewardProgressBar

CONFIG = "config.yaml"


def learn(cli: FitRLCLI) -> None:
    """Make the calls that are left of `steps`, or fewer if a callback asks to stop; print what is left behind."""
    model, steps, seed = cli.model, cli.config.steps, cli.config.seed
    trainer: Any = cli.trainer  # of a backend: a Lightning trainer with fit_rl and sampler
    torch.manual_seed(seed)  # before the policy is opened: a checkpoint brings the RNG's state with it
    bars = [callback for callback in trainer.callbacks if isinstance(callback, RewardProgressBar)]
    rewards: list[float] = []
    note = artifact = ""
    start = time.perf_counter()
    pipeline: RolloutPipeline | None = None
    with _no_empty_folder(model), trainer, ExitStack() as beside:
        goes_ahead = cli.rollouts.max_steps_off_policy > 0
        sampler = trainer.sampler(model, own_weights=goes_ahead)  # opens the run: from here on it is ours
        if goes_ahead:
            pipeline = beside.enter_context(cli.rollouts.pipeline(sampler, model=model, seed=seed))
        done, saved = calls_done(model), model.step
        if trainer.is_global_zero:
            save_config(model, cli.resolved)
        for bar in bars:
            bar.completed = done
        for call in range(done + 1, steps + 1):
            begin = time.perf_counter()
            sampler = trainer.sampler(model, own_weights=goes_ahead)  # a service's moves to the newest weights now
            groups = cli.rollouts.groups(sampler, seed=seed, call=call) if pipeline is None else next(pipeline)
            extra = {"loop/call": float(call), "time/rollout_s": time.perf_counter() - begin}
            extra |= {} if pipeline is None else pipeline.metrics()
            result = trainer.fit_rl(model, groups, **cli.arguments | _saving(cli, call))
            logged = model.log(groups, metrics=result.metrics | extra, step=result.step)
            rewards.append(logged["reward/mean"])
            artifact = getattr(result, "artifact_name", None) or artifact
            saved = result.step if getattr(result, "checkpoint_path", None) is not None else saved
            if not result.num_optimizer_steps:
                for bar in bars:
                    bar.advance(result.metrics)
            if trainer.should_stop and call < steps:
                note = f"a callback asked to stop after {call} of {steps} steps"
                break
        if saved != model.step and cli.arguments.get("save_checkpoint"):
            trainer.open(model).save()  # the last call stopped early, or had nothing to learn from
        speaks = trainer.is_global_zero
    if speaks:  # now that the bar has given the terminal back
        report(model, rewards, time.perf_counter() - start, note, artifact)


def _saving(cli: FitRLCLI, call: int) -> dict[str, bool]:
    """Whether a call saves; nothing for a backend that does not leave it to us."""
    if "save_checkpoint" not in cli.arguments:
        return {}
    is_due = call % cli.config.save_every == 0 or call == cli.config.steps
    return {"save_checkpoint": bool(cli.arguments["save_checkpoint"]) and is_due}


def calls_done(model: TrainableModel) -> int:
    """Calls behind the newest checkpoint; 0 without one, because a run without one starts anew.

    The checkpoint of step S was saved by the first call after all those whose line in the history is of a step below
    S; it is not necessarily in the history itself, because the process may have died between the two.
    """
    if not model.step:
        return 0
    before = [
        int(line["metrics"]["loop/call"])
        for line in model.history()
        if line["step"] < model.step and "loop/call" in line["metrics"]
    ]
    return 1 + max(before, default=0)


def save_config(model: TrainableModel, resolved: str) -> None:
    """Write the configuration beside the run; one that is resumed with another keeps the one up to its step too."""
    path: Path = model.run_dir / CONFIG
    model.run_dir.mkdir(parents=True, exist_ok=True)
    if path.is_file() and path.read_text() != resolved:
        path.rename(path.with_name(f"config-until-{model.step:04d}.yaml"))
    path.write_text(resolved)


@contextmanager
def _no_empty_folder(model: TrainableModel) -> Iterator[None]:
    """Leave no run folder behind when the first call already fails: there is nothing in it but the configuration."""
    is_new = not model.run_dir.exists()
    try:
        yield
    except BaseException:
        left = {path.name for path in model.run_dir.glob("*")}
        if is_new and CONFIG in left and left <= {CONFIG, "lock", "holder.json"}:
            for name in left:
                (model.run_dir / name).unlink(missing_ok=True)
            model.run_dir.rmdir()
        raise


def report(model: TrainableModel, rewards: list[float], seconds: float, note: str, artifact: str = "") -> None:
    """Say what was learned and where it lies: in the run folder, or on a service under the artifact's name."""
    if note:
        print(note)
    if rewards:
        tenth = max(1, len(rewards) // 10)
        first, last = (sum(part) / tenth for part in (rewards[:tenth], rewards[-tenth:]))
        print(f"reward {first:.3f} -> {last:.3f} in {len(rewards)} steps, {seconds:.1f} s")
    else:
        print("there was nothing left to do: the run has made its steps already")
    checkpoints = model.checkpoints()
    print(f"run           {model.run_dir}")
    print(f"configuration {model.run_dir / CONFIG}")
    print(f"checkpoint    {checkpoints[-1] if checkpoints else artifact or 'none'}")
