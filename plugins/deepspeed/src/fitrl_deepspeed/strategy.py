"""`fitrl_deepspeed`: DeepSpeed's ZeRO as a strategy, with the verbs of a policy trainer.

Stage 1 cuts AdamW's moments into pieces over the ranks, stage 2 gradients too, stage 3 weights too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from fitrl import PolicyModule
from fitrl.errors import UnsupportedError
from fitrl.policy.loading import read_weights, trained_state
from fitrl.policy.pieces import read_whole
from fitrl.policy.policy import Policy
from fitrl.strategies.saving import moment_of
from fitrl.strategies.verbs import PolicyVerbs
from fitrl_deepspeed.settings import ZeroStage
from fitrl_deepspeed.zero import DTYPES, ZeroStrategy


class DeepSpeedRLStrategy(PolicyVerbs, ZeroStrategy):
    """ZeRO (Rajbhandari et al. 2020) by DeepSpeed; registered as `fitrl_deepspeed`.

    gloo on CPUs, NCCL on GPUs, one process for each device, started with `torchrun` or `srun`. The gradient of a step
    is that of one process, however many ranks and microbatches there are: DeepSpeed's own counting of microbatches is
    off. Under "bf16-mixed" and "16-mixed" it keeps the weights in 16 bits and their float32 originals in pieces;
    gradients are added up in float32. Checkpoints are whole tensors, which any number of ranks, any stage and any
    other strategy of fitrl resumes. The embedded sampler needs whole weights: in stage 3 they are gathered for it when
    it is handed out and after each call, and cut again before the next step.

    Args:
        zero_stage: 1, 2 or 3.
        offload_optimizer: keep moments and the float32 originals in the host's memory, and step there.
        offload_params: keep the weights in the host's memory, too; stage 3 only.
        settings: further settings by DeepSpeed's names, `{"zero_optimization": {"reduce_bucket_size": 10**8}}` say.
        **lightning_options: of Lightning's `DeepSpeedStrategy`: cluster_environment, process_group_backend, timeout.

    Raises:
        InvalidArgumentError: a setting that is unknown, contradicts an argument, or could have no effect.
        MissingDependencyError: DeepSpeed is not installed.
    """

    strategy_name = "fitrl_deepspeed"
    evaluates_in_inference_mode = False
    notes_steps = True  # gradients are in DeepSpeed's buffers, and their norm is known when the step is taken

    def __init__(
        self,
        *,
        zero_stage: ZeroStage = 2,
        offload_optimizer: bool = False,
        offload_params: bool = False,
        settings: Mapping[str, Any] | None = None,
        **lightning_options: Any,
    ) -> None:
        super().__init__(
            zero_stage=zero_stage,
            offload_optimizer=offload_optimizer,
            offload_params=offload_params,
            settings={} if settings is None else settings,
            **lightning_options,
        )
        self._take_back: Callable[[], None] | None = None

    @property
    def skips_overflow(self) -> bool:
        """Whether a step whose gradient overflowed in 16 bits is left out, and the loss scaled by less after it."""
        module = self.lightning_module
        return module is not None and module.trainer.precision == "16-mixed"

    # -- what PolicyModule asks for -----------------------------------------------------------------------------

    def shard(self, policy: Policy, *, precision: str, moments: str, compiles: bool) -> Policy:
        """Bring a policy that was just loaded to the device; in stage 3 only this rank's slices of its weights.

        Args:
            policy: on the CPU, the same on every rank.
            precision: Lightning's.
            moments: of AdamW; bitsandbytes' cannot be cut.
            compiles: whether decoder layers are compiled; in stage 3 they cannot be.
        """
        from fitrl_deepspeed import pieces

        if moments != "float32":
            raise UnsupportedError(
                f"AdamWSettings(moments={moments!r}) cannot be cut into pieces: take 'float32' with "
                "strategy='fitrl_deepspeed', or strategy='fitrl_ddp'"
            )
        if self.zero_stage == 3 and compiles:
            raise UnsupportedError(
                "compile=True with zero_stage=3: each layer's weights come and go inside of what is compiled; take "
                "zero_stage=2, or strategy='fitrl_fsdp2'"
            )
        config = self.full_config()
        if self.zero_stage == 3:
            pieces.cut(policy.network, config, DTYPES[precision])
        else:
            policy.network.to(self.root_device)
        return policy

    # -- microbatches and steps ---------------------------------------------------------------------------------

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        self.take_weights_back()  # every forward starts here
        return super().batch_to_device(batch, device, dataloader_idx)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().training_step(*args, **kwargs)
        except BaseException:
            self._leave_pass()
            raise

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().validation_step(*args, **kwargs)
        except BaseException:
            self._leave_pass()
            raise

    @override
    def backward(self, *args: Any, **kwargs: Any) -> Tensor:
        try:
            return super().backward(*args, **kwargs)
        except BaseException:
            self._leave_pass()
            raise

    @override
    def inside(self, call: Callable[[], Tensor]) -> Tensor:
        try:
            with torch.no_grad():
                found: Tensor = self.engine(call)
                return found
        except BaseException:
            self._leave_pass()
            raise

    def _leave_pass(self) -> None:
        from fitrl_deepspeed import pieces

        if self._engine is not None:
            pieces.leave_pass(self._engine)

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        module: Any = self.lightning_module
        zero = self.engine.optimizer
        zero.clip_grad = float(module.trainer.gradient_clip_val or 0.0)
        used = float(optimizer.param_groups[0]["lr"])
        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        norm = torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32, device=self.root_device)
        module.note_step(torch.where(norm < 0, torch.inf, norm), used)  # -1 is DeepSpeed's for one that is not finite
        if self.skips_overflow:
            skipped = not self.engine.was_step_applied()
            self._tell_of_overflow(module, skipped, float(zero.loss_scale))
        return output

    def _tell_of_overflow(self, module: PolicyModule, skipped: bool, scale: float) -> None:
        """Count the steps of a call that were left out, and say so."""
        count = module.host_metrics.get("precision/skipped_steps", 0.0) + float(skipped)
        module.host_metrics |= {"precision/skipped_steps": count, "precision/loss_scale": scale}
        if skipped:
            rank_zero_warn(
                f"step {module.trainer.global_step + 1} was skipped: its gradient overflowed in float16; the loss is "
                f"now scaled by {scale:g}"
            )

    @override
    def clear_gradients(self) -> None:
        from fitrl_deepspeed import pieces

        if self._engine is not None:
            pieces.clear_gradients(self._engine)
        super().clear_gradients()

    @override
    def on_exception(self, exception: BaseException) -> None:
        if self.keep_alive:
            self.clear_gradients()
        super().on_exception(exception)

    # -- whole weights for the embedded sampler -----------------------------------------------------------------

    @override
    def lend_weights(self) -> None:
        from fitrl_deepspeed import pieces

        if self.zero_stage == 3 and self._take_back is None:
            assert self.lightning_module is not None
            self._take_back = pieces.lend(self.engine, self.lightning_module)

    @override
    def take_weights_back(self) -> None:
        if self._take_back is not None:
            take_back, self._take_back = self._take_back, None
            take_back()

    @override
    def close(self) -> None:
        self._take_back = None
        super().close()

    # -- where weights and moments lie --------------------------------------------------------------------------

    @override
    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        from fitrl_deepspeed import pieces

        for name, parameter in trained_state(self.policy_module.policy, keep_parameters=True).items():
            yield name, pieces.get(parameter).detach()

    @override
    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        return self.named_weights()

    @override
    def load_weights(self, folder: Path) -> None:
        from fitrl_deepspeed import pieces

        policy = self.policy_module.policy
        held = trained_state(policy, keep_parameters=True)
        found = read_weights(policy, folder, {name: pieces.shape(tensor) for name, tensor in held.items()})
        pieces.put(self.engine, [(held[name], value) for name, value in found.items()])

    @override
    def moments(self) -> dict[str, Any]:
        return self.optimizer_state(self.optimizers[0])

    @override
    def load_moments(self, state: dict[str, Any], pieces_in: Path | None) -> None:
        kept = {number: dict(moments) for number, moments in state["state"].items()}
        if pieces_in is not None:  # `fitrl_fsdp2` saved them
            for name, tensor in read_whole(pieces_in).items():
                number, key = moment_of(name, kept)
                kept[number][key] = tensor
        self.load_optimizer_state_dict({"optimizer_states": [state | {"state": kept}]})

    @override
    def forget_moments(self) -> None:
        from fitrl_deepspeed import pieces

        pieces.forget_moments(self.engine)
