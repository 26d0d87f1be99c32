"""`fitrl_ddp`: the same policy on every rank of a `torchrun` job, gradients averaged by DDP."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import DDPStrategy as LightningDDP

from fitrl.strategies.verbs import PolicyVerbs


class DDPStrategy(PolicyVerbs, LightningDDP):
    """Distributed data parallel, set up once per model; registered as `fitrl_ddp`. gloo on CPUs, NCCL on GPUs.

    `fit_rl` splits the microbatches of each optimizer step over the ranks, equally many for each, and the gradient is
    that of one process.

    Args:
        **kwargs: of Lightning's `DDPStrategy`; `gradient_as_bucket_view` is True unless given: a gradient is reduced
            where it lies, in the memory of one instead of two.
    """

    strategy_name = "fitrl_ddp"
    copies_in_memory = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"gradient_as_bucket_view": True} | kwargs)
