"""How many positions a microbatch may have: what is likely to fit, and less once that did not.

Enters: a live policy on its device. Leaves: a number of positions for packing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fitrl.data import ranks
from fitrl.data.samples import Sample, num_positions
from fitrl.errors import OutOfMemoryError
from fitrl.policy.module import PolicyModule
from fitrl.policy.sharding import own_numel

_CPU_TOKENS = 8192
_MOST_TOKENS = 65536
_HEAD_BYTES = 4 << 30  # a tile of logits and what the head's products need beside it


def max_tokens(samples: Sequence[Sample], asked: int | None, module: PolicyModule, device: torch.device) -> int:
    """Positions in a microbatch: as asked, else what is likely to fit beside the weights; no more than ever fitted."""
    longest = _longest(samples, module)
    limit = module.most_positions
    if asked is not None:
        return asked if limit is None else max(longest, min(asked, limit))
    fits = _CPU_TOKENS if device.type != "cuda" else _fits(module, device)
    return max(longest, fits if limit is None else min(fits, limit))


def halve(tried: int, samples: Sequence[Sample], module: PolicyModule, error: BaseException) -> None:
    """Remember that a microbatch of so many positions was too large: from now on they have half as many at most.

    Raises:
        OutOfMemoryError: it cannot be smaller: one trajectory fills the largest, or other ranks are waiting.
    """
    longest = _longest(samples, module)
    half = max(longest, tried // 2)
    if half >= tried or ranks.world_size() > 1:
        smaller = f"max_tokens_per_microbatch={tried // 2}, " if half < tried else ""
        raise OutOfMemoryError(
            f"a microbatch of {tried} positions, the longest trajectory has {longest}, does not fit into the device's "
            f"memory: {smaller}activation_checkpointing=True, LoRA, or AdamWSettings(moments='8bit') need less"
        ) from error
    module.most_positions = half


def _longest(samples: Sequence[Sample], module: PolicyModule) -> int:
    return max(num_positions(sample.histories, padded=not module.policy.can_pack) for sample in samples)


def _fits(module: PolicyModule, device: torch.device) -> int:
    policy = module.policy
    free = torch.cuda.mem_get_info(device)[0] + (
        torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    )
    free -= policy.whole_bytes
    trained = [parameter for parameter in policy.network.parameters() if parameter.requires_grad]
    free -= sum(own_numel(parameter) * parameter.itemsize for parameter in trained if parameter.grad is None)
    if not module.has_moments:
        free -= module.optimizer_settings.bytes_per_weight * sum(map(own_numel, trained))
    # bytes of activations for each position, layer and hidden number: of compiled layers what Qwen3-0.6B was seen to
    # take under bf16-mixed, the others estimated, as uncompiled layers keep about 34 two-byte values (Korthikanti et
    # al. 2022), some in float32; what turns out too large is halved
    kept = {(False, False): 120, (True, False): 52, (False, True): 8, (True, True): 12}
    size = kept[module.compiles, module.activation_checkpointing] * policy.hidden_size * policy.num_layers
    fits = min(int(0.8 * (free - _HEAD_BYTES) / size * policy.ranks_per_row), _MOST_TOKENS)
    return min(map(int, ranks.collect(str(max(1, fits)))))  # every rank makes the same plan
