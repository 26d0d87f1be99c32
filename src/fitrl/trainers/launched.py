"""Who started this process, `torchrun`, SLURM's `srun` or the user alone, and whether a trainer fits to it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import lightning
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from fitrl.errors import InvalidArgumentError


def check_processes(trainer: lightning.Trainer) -> None:
    """Let only `torchrun`, or a scheduler like it, start several processes, and as many as the trainer counts on.

    Lightning's own launchers run the whole script again on each rank, rollouts and all, from its start.

    Raises:
        InvalidArgumentError: with what to pass, or the command to start the script with.
    """
    launcher, local, nodes = _started()
    strategy = type(trainer.strategy).__name__
    if launcher and local * nodes > 1 and trainer.world_size == 1:
        raise InvalidArgumentError(
            f"{launcher} started {local * nodes} processes, and {strategy} trains with one: pass "
            f"strategy='fitrl_ddp', devices={local}, num_nodes={nodes}"
        )
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if trainer.strategy.launcher is None:
        return
    if environment is not None and environment.creates_processes_externally:
        if launcher and (trainer.num_devices, trainer.num_nodes) != (local, nodes):
            raise InvalidArgumentError(
                f"{launcher} started {local} processes on each of {nodes} nodes, and the trainer has devices="
                f"{trainer.num_devices}, num_nodes={trainer.num_nodes}: pass devices={local}, num_nodes={nodes}"
            )
        if not launcher and isinstance(environment, SLURMEnvironment) and trainer.world_size > 1:
            raise InvalidArgumentError(
                f"the SLURM job has {trainer.world_size} tasks, and this process is none of them: start the script "
                "with 'srun --kill-on-bad-exit=1 python ...'"
            )
        return
    program = Path(sys.argv[0]).name or "script.py"
    if program in ("fitrl", "__main__.py"):
        program = "-m fitrl fit_rl ..."
    several = f"--nnodes {trainer.num_nodes} " if trainer.num_nodes > 1 else ""
    raise InvalidArgumentError(
        f"{strategy} trains with several processes, which torchrun starts: run "
        f"'torchrun {several}--nproc_per_node {max(1, trainer.num_devices)} {program}'"
    )


def _started() -> tuple[str, int, int]:
    """Who started this process, processes on each node, and nodes; no name if nobody did who starts several."""
    if TorchElasticEnvironment.detect():
        size, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
        return "torchrun", local, size // local
    # a batch script that calls python itself has one process, whatever the job asked for
    if SLURMEnvironment.detect() and "SLURM_STEP_ID" in os.environ:
        size, nodes = int(os.environ["SLURM_NTASKS"]), int(os.environ.get("SLURM_NNODES", "1"))
        return "srun", size // nodes, nodes
    return "", 1, 1
