"""`fitrl_ddp`: the same policy on every rank of a `torchrun` job, gradients averaged by DDP."""

from __future__ import annotations

from lightning.pytorch.strategies import DDPStrategy as LightningDDP

from fitrl.strategies.verbs import PolicyVerbs


class DDPStrategy(PolicyVerbs, LightningDDP):
    """Distributed data parallel, set up once per model; registered as `fitrl_ddp`. gloo on CPUs, NCCL on GPUs.

    `fit_rl` splits the microbatches of each optimizer step over the ranks, equally many for each, and the gradient is
    that of one process. Takes the arguments of Lightning's `DDPStrategy`.
    """

    strategy_name = "fitrl_ddp"
    copies_in_memory = True
