"""Kill a client with SIGKILL in each phase of a call, and let another process go on; then say what it came to.

    python kills.py ROOT

Imports everything once, then forks: the child of a phase opens the run, trains until it stands at the phase's step, and
is killed there in the middle of the next call. A last child finishes the run. Address and key come from the
environment. Prints JSON.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fitrl
from fitrl.testing.opening import step_groups
from fitrl_serverless import ServerlessTrainer
from fitrl_serverless.client import jobs, pending, service

Arrange = Callable[[], None]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: Any, name: str, *, at: int = 1) -> Arrange:
    """Die before a function is called for the `at`-th time."""
    return lambda: _patch(owner, name, at, after=False)


def after(owner: Any, name: str, *, at: int = 1) -> Arrange:
    """Die once a function has returned for the `at`-th time."""
    return lambda: _patch(owner, name, at, after=True)


def _patch(owner: Any, name: str, at: int, *, after: bool) -> None:
    original, calls = getattr(owner, name), []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if not after and len(calls) == at:
            die()
        result = original(*args, **kwargs)
        if after and len(calls) == at:
            die()
        return result

    setattr(owner, name, counted)


def in_the_middle_of_the_body() -> None:
    """Die with a part of the gzipped body on disk."""
    parts = pending._parts

    def some(*args: Any) -> Any:
        for number, part in enumerate(parts(*args)):
            if number == 4:
                die()
            yield part

    pending._parts = some


def submitted_but_not_confirmed() -> None:
    """Die when the service has the job and its answer has come, before its id is on disk."""
    submit = service.Service.submit

    async def dying(*args: Any) -> str:
        await submit(*args)
        die()
        return ""

    service.Service.submit = dying  # type: ignore[method-assign]


PHASES: dict[str, Arrange] = {
    "before anything is written": before(pending.PendingJob, "create"),
    "in the middle of the body": in_the_middle_of_the_body,
    "body written": after(pending.PendingJob, "create"),
    "recorded, not submitted": after(pending.PendingJob, "save"),
    "submitted, not confirmed": submitted_but_not_confirmed,
    "confirmed": after(pending.PendingJob, "save", at=2),
    "first event": after(jobs, "_take"),
    "gradient step told": before(jobs, "_take", at=3),
    "ended": after(jobs.Jobs, "run"),
    "outcome taken": before(pending.PendingJob, "discard"),
    "forgotten": after(pending.PendingJob, "discard"),
}


def learn(root: Path, until: int, arrange: Arrange | None = None) -> None:
    """What a user's script does; the groups depend on the step alone."""
    torch.set_num_threads(1)
    model = fitrl.TrainableModel("disturbed", "kills", "tiny", lora=None, root=root)
    with ServerlessTrainer() as trainer:
        trainer.open(model)
        while model.step < until:
            trainer.fit_rl(model, step_groups(model.step), learning_rate=1e-3)
        if arrange is not None:
            arrange()
            trainer.fit_rl(model, step_groups(model.step), learning_rate=1e-3)


def spawn(root: Path, until: int, arrange: Arrange | None = None) -> int:
    """Run it in a child; returns the child's wait status."""
    child = os.fork()
    if not child:
        try:
            learn(root, until, arrange)
        except BaseException as error:
            print(f"child: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def main() -> None:
    root = Path(sys.argv[1])
    logging.disable(logging.INFO)
    step_groups(0)  # read the policy before the children do
    killed, left = {}, {}
    run_dir = root / "kills" / "disturbed"
    for step, (phase, arrange) in enumerate(PHASES.items()):
        status = spawn(root, step, arrange)
        killed[phase] = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        left[phase] = sorted(path.name.split("-")[0] for path in run_dir.glob("job*"))
    finished = spawn(root, len(PHASES))
    with ServerlessTrainer() as trainer:
        model = fitrl.TrainableModel("disturbed", "kills", "tiny", lora=None, root=root)
        steps = [found.step for found in trainer.checkpoints(model)]
        weights = (trainer.download_checkpoint(model) / "model.safetensors").read_bytes()
    told = {
        "killed": killed,
        "left": left,
        "finished": finished == 0,
        "steps": steps,
        "weights": hashlib.sha256(weights).hexdigest(),
        "left at the end": sorted(path.name for path in run_dir.glob("job*")),
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
