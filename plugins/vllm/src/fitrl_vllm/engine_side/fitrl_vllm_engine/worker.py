"""What our servers add to vLLM's workers (`--worker-extension-cls fitrl_vllm_engine.worker.Worker`).

`VLLMServer` puts the folder of this package on the engine's path.
"""

from __future__ import annotations

from typing import Any

from . import transfer  # noqa: F401 - registers the backend
from .packed_heads import pack_again


class Worker:
    """Mixed into the worker's class by vLLM."""

    def reload_weights_of_all_layers(self, weights_path: str) -> None:
        """Reload weights in place, also those whose packed copies `reload_weights` leaves as they were."""
        me: Any = self
        me.reload_weights(weights_path=weights_path)
        pack_again(me.get_model())

    def tell_of_weights(self) -> dict[str, str]:
        """In which type they are held, and on which kind of device."""
        me: Any = self
        return {"dtype": str(me.model_config.dtype).removeprefix("torch."), "device": me.device.type}
