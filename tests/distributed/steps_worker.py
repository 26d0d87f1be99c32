"""A rank that trains to a given step, and may kill a rank on the way; rank 0 says each step.

    python steps_worker.py ROOT NAME STEPS                      one process
    torchrun ... steps_worker.py ROOT NAME STEPS                several ranks, of one or several nodes; srun likewise
    torchrun ... steps_worker.py ROOT NAME STEPS backward:1     rank 1 is killed in backward of the second call

What is trained on is drawn from torch's global generator, which a checkpoint brings back. Each rank that gets to the
end writes what it saw to ROOT/NAME.<rank>.json. `FITRL_TEST_STRATEGY` names the strategy of several ranks.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fitrl
from distributed.ddp_worker import KeepGradients
from exact import real_float64
from fitrl.data import ranks
from fitrl.policy.layers import decoder_layers
from fitrl.strategies import saving
from samples import make_groups

ACCELERATOR = os.environ.get("FITRL_TEST_ACCELERATOR", "cpu")
STRATEGY = os.environ.get("FITRL_TEST_STRATEGY", "fitrl_ddp")
PLACES = ("backward", "save", "publish", "rollouts", "stuck")
CALL = 2  # of fit_rl, in which a rank is killed


class Kill:
    """Sends SIGKILL to one rank at one place of the second call, and says when."""

    def __init__(self, place: str, rank: int) -> None:
        self.place, self.rank, self.call = place, rank, 0
        self.processes: list[int] = []

    def meet(self) -> None:
        self.processes = [int(text) for text in ranks.collect(str(os.getpid()))]

    def at(self, place: str, *, told_by: int | None = None) -> None:
        """Kill, if this is the place: the rank itself does, or another one that is there."""
        if self.place == place and self.call == CALL and ranks.rank() == (self.rank if told_by is None else told_by):
            os.write(1, f"killed {time.time()}\n".encode())
            os.kill(self.processes[self.rank], signal.SIGKILL)

    def in_backward(self, module: Any) -> None:
        # a tensor's hook and no parameter's: FSDP2 has backward run on gathered copies of those
        def watch(layer: Any, inputs: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda gradient: self.at("backward"))

        decoder_layers(module.policy)[0].register_forward_hook(watch)

    def in_save(self) -> None:
        write = saving.save_weights

        def writes(*args: Any, **options: Any) -> None:
            write(*args, **options)
            self.at("save", told_by=0)  # the others wait for rank 0

        saving.save_weights = writes

    def between_calls(self) -> None:
        self.at("rollouts")
        self.at("stuck")
        if self.call == CALL and self.place == "rollouts":
            time.sleep(600)  # an agent that waits for something
        if self.call == CALL and self.place == "stuck":  # in C, deaf to signals: as NCCL is when a rank is gone
            mutex = ctypes.create_string_buffer(64)
            for _ in range(2):  # whoever locks it twice waits for itself
                ctypes.CDLL(None).pthread_mutex_lock(mutex)


class Receives:
    """A sampler that is handed the weights and does nothing else."""

    version = 0

    def __init__(self, kill: Kill) -> None:
        self.kill = kill

    async def sample(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def update(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        for number, _ in enumerate(weights):
            if number == 1:
                self.kill.at("publish")
        self.version = version


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(7)
    root, name, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    place, _, rank = sys.argv[4].partition(":") if len(sys.argv) > 4 else ("", "", "0")
    kill, keep = Kill(place, int(rank)), KeepGradients()
    size = int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or "1")
    nodes = int(os.environ.get("GROUP_WORLD_SIZE") or os.environ.get("SLURM_NNODES") or "1")
    model = fitrl.TrainableModel(name, "steps", "tiny", lora=None, root=root)
    options = {"accelerator": ACCELERATOR, "devices": size // nodes, "num_nodes": nodes, "precision": "64-true"}
    with fitrl.LocalTrainer(
        **options,
        strategy=STRATEGY if size > 1 else "fitrl_local",
        sampler=Receives(kill),
        lr_schedule=lambda step: 1 / (1 + 0.1 * step),
        callbacks=[keep],
        enable_model_summary=False,
    ) as trainer:
        trainer.open(model)
        resumed = trainer.global_step
        kill.meet()
        kill.in_save()
        kill.in_backward(trainer.lightning_module)
        while model.step < steps:
            kill.call += 1
            drawn = int(ranks.collect(str(int(torch.randint(2**30, ()))))[0])
            kill.between_calls()
            groups = make_groups(seed=drawn, num_groups=4)
            with real_float64():  # ranks sum in another order than one process does
                result = trainer.fit_rl(model, groups, learning_rate=1e-3, num_minibatches=2)
            if ranks.rank() == 0:
                print(f"step {result.step}", flush=True)
        seen = {"resumed": resumed, "size": ranks.world_size(), "gradients": keep.steps}
        (root / f"{name}.{ranks.rank()}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
