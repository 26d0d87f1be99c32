"""What our servers add to vLLM's workers (`--worker-extension-cls fitrl_vllm_worker.Worker`).

It runs in the engine's environment, where fitrl is not installed: `VLLMServer` puts this folder on its path.
"""

from __future__ import annotations

from typing import Any


class Worker:
    """Mixed into the worker's class by vLLM."""

    def reload_weights_of_all_layers(self, weights_path: str) -> None:
        """Reload weights in place, and on a CPU the packed copies that its matrix products read.

        vLLM packs a linear layer's weights there when it loads the model. `reload_weights` has been seen to leave out
        an output head that is tied to the embeddings, which went on answering with the old ones.
        """
        me: Any = self
        me.reload_weights(weights_path=weights_path)
        modules = [module for module in me.get_model().modules() if hasattr(module, "cpu_linear")]
        if modules:
            from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

            for module in modules:
                if getattr(module, "weight", None) is not None and module.weight.numel():
                    dispatch_cpu_unquantized_gemm(module, remove_weight=False)
