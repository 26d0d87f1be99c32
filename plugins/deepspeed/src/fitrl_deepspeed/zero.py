"""`ZeroStrategy`: Lightning's `DeepSpeedStrategy` on whatever device the trainer has, CPU ranks included.

Lightning's refuses all but CUDA, reads accumulation and clipping once, and saves a folder of pickled pieces. Here
microbatches add up until a step is taken, the clip value is read at each step, and a checkpoint is one file of whole
tensors, as with any other strategy.
"""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from fitrl.errors import InvalidArgumentError
from fitrl_deepspeed.settings import check_precision, deepspeed_config, loss_scaling

# DeepSpeed 0.19 calls collectives by the names that torch 2.13 is about to drop
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)

DTYPES = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class ZeroStrategy(DeepSpeedStrategy):
    """See `DeepSpeedRLStrategy`, which adds the verbs."""

    config: dict[str, Any]

    def __init__(
        self,
        *,
        zero_stage: int,
        offload_optimizer: bool,
        offload_params: bool,
        settings: Mapping[str, Any],
        **lightning_options: Any,
    ) -> None:
        config = deepspeed_config(
            zero_stage, offload_optimizer=offload_optimizer, offload_params=offload_params, settings=settings
        )
        super().__init__(config=config, logging_level=logging.ERROR, **lightning_options)
        self.zero_stage = zero_stage
        self.settings = dict(settings)
        self._engine: Any = None

    @property
    def engine(self) -> Any:
        """DeepSpeed's, around the module that is set up."""
        assert self._engine is not None  # set up before anything asks
        return self._engine

    def full_config(self) -> dict[str, Any]:
        """The configuration with what only the trainer knows.

        Raises:
            InvalidArgumentError: a precision or a way of clipping that DeepSpeed does not have.
        """
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        precision = str(trainer.precision)
        check_precision(precision)
        if trainer.gradient_clip_algorithm == "value":
            raise InvalidArgumentError("gradient_clip_algorithm='value': DeepSpeed clips by the norm only")
        config = self.config | {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": float(trainer.gradient_clip_val or 0.0),
        }
        scaling = loss_scaling(self.settings, precision)
        if precision == "bf16-mixed":
            config["bf16"] = {"enabled": True}
        elif precision == "16-mixed":
            config["fp16"] = {"enabled": True, **scaling}
        return config

    # -- set up and torn down -----------------------------------------------------------------------------------

    @property
    @override
    def handles_gradient_accumulation(self) -> bool:
        """Lightning counts the microbatches; the step ends what was accumulated."""
        return False

    @contextmanager
    @override
    def block_backward_sync(self) -> Generator[None, None, None]:
        yield  # nothing is reduced before the step, or all of it in pieces

    @override
    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()

    @override
    def setup_distributed(self) -> None:
        import deepspeed

        super(DeepSpeedStrategy, self).setup_distributed()
        if self.root_device.type == "cpu":
            # gloo does what this would, without a compiler on the machine
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        os.environ.setdefault("LOCAL_RANK", str(self.local_rank))  # DeepSpeed asks, and srun does not say
        deepspeed.init_distributed(torch.distributed.get_backend(), auto_mpi_discovery=False, verbose=False)

    @contextmanager
    @override
    def model_sharded_context(self) -> Generator[None, None, None]:
        yield  # transformers cannot read weights into slices: they are cut when they are there

    @override
    def setup(self, trainer: lightning.Trainer) -> None:
        assert self.accelerator is not None and self.lightning_module is not None
        self.accelerator.setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
            self._wrap(self.lightning_module, self.optimizers[0])
            self.optimizers = [self.engine.optimizer]
        elif self.zero_stage == 3:
            self._wrap(self.lightning_module, None)
        else:
            self.lightning_module.to(device=self.root_device, dtype=DTYPES[str(trainer.precision)])
        self.barrier()

    @override
    def setup_optimizers(self, trainer: lightning.Trainer) -> None:
        super(DeepSpeedStrategy, self).setup_optimizers(trainer)

    def _wrap(self, module: nn.Module, optimizer: Optimizer | None) -> None:
        import deepspeed

        device = self.root_device.index if self.root_device.type == "cuda" else self.local_rank
        self._engine, *_ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=device),
            model=module,
            optimizer=optimizer,
            model_parameters=[parameter for parameter in module.parameters() if parameter.requires_grad],
            config=self.full_config(),
            dist_init_required=False,
        )
        self.model = self._engine

    @override
    def teardown(self) -> None:
        from fitrl_deepspeed import pieces

        if self._engine is not None:
            pieces.release(self._engine)
            self._engine = None
            self.model = self.lightning_module
        self.optimizers = []
        super().teardown()

    # -- Lightning's checkpoints, whole -------------------------------------------------------------------------

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        from fitrl_deepspeed import pieces

        assert self.lightning_module is not None
        state: dict[str, Any] = {}
        for name, tensor in self.lightning_module.state_dict(keep_vars=True).items():
            whole = pieces.get(tensor)
            if self.is_global_zero:
                state[name] = whole.cpu()
        return state

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        from fitrl_deepspeed import pieces

        assert self.lightning_module is not None
        held = self.lightning_module.state_dict(keep_vars=True)
        saved: Mapping[str, Tensor] = checkpoint["state_dict"]
        if strict and held.keys() != saved.keys():
            raise InvalidArgumentError(f"the checkpoint holds other weights: {sorted(held.keys() ^ saved.keys())[:3]}")
        pieces.put(self.engine, [(held[name], saved[name]) for name in held.keys() & saved.keys()])

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        from fitrl_deepspeed import pieces

        return pieces.get_moments(self.engine, self._trained())

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return True

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        from fitrl_deepspeed import pieces

        pieces.put_moments(self.engine, self._trained(), checkpoint["optimizer_states"][0])

    def _trained(self) -> list[nn.Parameter]:
        """The parameters in the order in which the optimizer got them."""
        assert self.lightning_module is not None
        return [parameter for parameter in self.lightning_module.parameters() if parameter.requires_grad]

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)
