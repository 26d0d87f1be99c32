"""AdamW: its settings, and the implementation that suits the device.

Enters: parameters with gradients. Leaves: a torch optimizer; its moments in float32, in 8 bits, or in paged memory.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from fitrl.errors import InvalidArgumentError, MissingDependencyError


@dataclass(frozen=True, kw_only=True)  # no slots: the command line reads defaults with vars()
class AdamWSettings:
    """AdamW (Loshchilov and Hutter 2019) of a policy; the learning rate is an argument of `fit_rl`.

    Attributes:
        betas: decay of the two moments.
        eps: added to the denominator.
        weight_decay: 0, because a policy should stay near where it started, not near 0.
        moments: "float32", 8 bytes a trained weight; "8bit", 2 bytes, quantised in blocks (Dettmers et al. 2021);
            "paged", float32 in memory that moves to the host when the device runs short. The last two are those of
            bitsandbytes (`pip install 'fitrl[bitsandbytes]'`); on a CPU "paged" is plain float32.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    moments: Literal["float32", "8bit", "paged"] = "float32"

    def __post_init__(self) -> None:
        if not all(0.0 <= beta < 1.0 for beta in self.betas) or self.eps <= 0 or self.weight_decay < 0:
            raise InvalidArgumentError(f"AdamW needs betas in [0, 1), eps > 0 and weight_decay >= 0, got {self}")
        if self.moments not in ("float32", "8bit", "paged"):
            raise InvalidArgumentError(f"moments must be 'float32', '8bit' or 'paged', got {self.moments!r}")
        if self.moments != "float32" and importlib.util.find_spec("bitsandbytes") is None:
            raise MissingDependencyError(
                f"moments={self.moments!r} needs bitsandbytes: pip install 'fitrl[bitsandbytes]'"
            )

    @property
    def bytes_per_weight(self) -> int:
        """Device memory of the moments of one trained weight."""
        return {"float32": 8, "8bit": 2, "paged": 0}[self.moments]


def adamw(
    parameters: Sequence[nn.Parameter], settings: AdamWSettings, learning_rate: float, *, unscales: bool
) -> torch.optim.Optimizer:
    """AdamW over the parameters.

    Args:
        parameters: on one device.
        settings: but for the learning rate.
        learning_rate: of all of them.
        unscales: whether a gradient scaler divides gradients before they are clipped. torch's fused AdamW would do
            that by itself, inside of the step, where it is too late for clipping.
    """
    options: dict[str, Any] = {
        "lr": learning_rate,
        "betas": settings.betas,
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }
    if settings.moments == "float32":
        on_gpu = all(parameter.device.type == "cuda" for parameter in parameters)
        plain: Any = torch.optim.AdamW(parameters, fused=True if on_gpu and not unscales else None, **options)
        # Lightning clips no gradients of an optimizer that could unscale them; without a scaler none does
        plain._step_supports_amp_scaling = False
        return plain  # type: ignore[no-any-return]
    import bitsandbytes

    kinds: Any = bitsandbytes.optim
    optimizer: torch.optim.Optimizer = {"8bit": kinds.AdamW8bit, "paged": kinds.PagedAdamW}[settings.moments](
        parameters, **options
    )
    return optimizer
