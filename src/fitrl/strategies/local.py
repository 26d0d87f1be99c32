"""`fitrl_local`: train in this process, on one device."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from typing_extensions import override

from fitrl.errors import InvalidArgumentError
from fitrl.strategies.verbs import PolicyVerbs


class LocalStrategy(PolicyVerbs, SingleDeviceStrategy):
    """One device, set up once per model; registered as `fitrl_local`.

    Args:
        device: where to train; None: the one device that the trainer was given.
        **kwargs: of Lightning's `SingleDeviceStrategy`.
    """

    strategy_name = "fitrl_local"
    copies_in_memory = True

    def __init__(self, device: torch.device | str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._device = None if device is None else torch.device(device)

    @property
    @override
    def root_device(self) -> torch.device:
        return self._device or torch.device("cpu")

    @property
    def parallel_devices(self) -> list[torch.device]:
        """The device, where it was given; Lightning sets this to the trainer's devices otherwise."""
        return [] if self._device is None else [self._device]

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device]) -> None:
        if len(devices) > 1:
            raise InvalidArgumentError(
                f"strategy 'fitrl_local' trains on one device, got {len(devices)}: pass devices=1, or a strategy for "
                "several"
            )
        self._device = torch.device(devices[0])
