"""`fitrl_ddp`: the same policy on every rank of a `torchrun` job, gradients averaged by DDP."""

from __future__ import annotations

import inspect
from typing import Any

from lightning.pytorch.strategies import DDPStrategy as LightningDDP
from torch.nn.parallel import DistributedDataParallel

from fitrl.strategies.verbs import PolicyVerbs

_NEW, _OLD = "forward_sync_buffers", "broadcast_buffers"  # torch 2.13 renamed it
_BUFFERS = _NEW if _NEW in inspect.signature(DistributedDataParallel).parameters else _OLD


class DDPStrategy(PolicyVerbs, LightningDDP):
    """Distributed data parallel, set up once per model; registered as `fitrl_ddp`. gloo on CPUs, NCCL on GPUs.

    `fit_rl` splits the microbatches of each optimizer step over the ranks, equally many for each, and the gradient is
    that of one process.

    Args:
        **kwargs: of Lightning's `DDPStrategy`. Unless given, `gradient_as_bucket_view` is True: a gradient is reduced
            where it lies, in the memory of one instead of two; and buffers are not sent before a forward: those of a
            language model are constants, which every rank has loaded.
    """

    strategy_name = "fitrl_ddp"
    copies_in_memory = True

    def __init__(self, **kwargs: Any) -> None:
        chosen: dict[str, Any] = {"gradient_as_bucket_view": True}
        if not kwargs.keys() & {_NEW, _OLD}:
            chosen[_BUFFERS] = False
        super().__init__(**chosen | kwargs)
