"""Lightning's options that say how to compute: a service computes, so that they could have no effect here."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import lightning

from fitrl.errors import InvalidArgumentError

_ALSO = {"accelerator": ("cpu",), "devices": (1, "1"), "precision": ("32-true", "32", 32)}  # what the client has
_OF_THE_SERVICE = (
    *("accelerator", "devices", "num_nodes", "precision", "gradient_clip_val", "gradient_clip_algorithm"),
    *("plugins", "sync_batchnorm", "detect_anomaly", "use_distributed_sampler", "model_registry", "strategy"),
)


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse what another machine would have to be told.

    Raises:
        InvalidArgumentError: with the option.
    """
    defaults = inspect.signature(lightning.Trainer.__init__).parameters
    for name in _OF_THE_SERVICE:
        value = options.get(name)
        if value is not None and value != defaults[name].default and value not in _ALSO.get(name, ()):
            raise InvalidArgumentError(
                f"{name}={value!r} has no effect on a service, which computes as it is configured: leave it out"
            )
