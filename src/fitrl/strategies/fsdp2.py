"""`fitrl_fsdp2`: the policy's weights, gradients and moments in pieces over the ranks of a `torchrun` job.

Each decoder layer is gathered when it runs and cut again after it, or, where memory is no matter, once for all
microbatches of an optimizer step, as gradients are summed once then; what is left, embeddings and output head among it,
is gathered once for forward, loss and backward together. With tensor parallel each of these is a part of its own: the
matrices of a layer, and the vocabulary, are shared out over a second dimension of the mesh.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.optim import Optimizer
from typing_extensions import override

from fitrl import _compat
from fitrl.data import ranks
from fitrl.errors import InvalidArgumentError, UnsupportedError
from fitrl.policy.layers import decoder_layers
from fitrl.policy.lending import LentPolicy
from fitrl.policy.policy import Policy
from fitrl.policy.sharding import Root, own_numel
from fitrl.policy.tensor_parallel import parallelize
from fitrl.strategies.verbs import PolicyVerbs

_SMALL = 8  # what takes at most so large a part of a GPU's memory stays whole for a step


class FSDP2Strategy(PolicyVerbs, ModelParallelStrategy):
    """Fully sharded data parallel (Zhao et al. 2023), Lightning's `ModelParallelStrategy`; registered as `fitrl_fsdp2`.

    gloo on CPUs, NCCL on GPUs. `fit_rl` splits the microbatches of each optimizer step over the ranks, equally many for
    each, and the gradient is that of one process. The embedded sampler needs whole weights: they are gathered for it
    when it is handed out and after each call, and cut again before the next step.

    With `tensor_parallel_size` N each N consecutive ranks compute one microbatch together: attention heads, the width
    of the MLP, embeddings and output head are shared out among them, and only their results, and statistics of each row
    of logits, go from rank to rank. For Qwen3 and Llama. Rollouts are made by each rank alone, with whole weights,
    which its device holds beside the pieces while it samples; a sampler given to `LocalTrainer` takes no such room.

    Args:
        tensor_parallel_size: ranks that compute together; neighbours, which should be of one machine.
        reshard_after_forward: cut each layer again as soon as it has run (ZeRO-3), or keep it whole from the first
            microbatch of an optimizer step to the last (ZeRO-2), which takes the room of all weights in the type that
            they multiply in, and saves two gathers of each for every further microbatch. None: keep them on GPUs of
            whose memory they take an eighth at most.
        sync_every_microbatch: sum gradients over the ranks after each microbatch, so that each rank holds its pieces
            only, or once for an optimizer step, as DDP does, which takes the room of all gradients. None: once on GPUs
            of whose memory whole weights and gradients together take an eighth at most.
        offload: keep weights, gradients and moments in the host's memory; each layer visits the device.
        **kwargs: of Lightning's `ModelParallelStrategy`, but for the data's size of the mesh, which is what remains.

    Raises:
        InvalidArgumentError: the size of tensor parallel does not divide the number of ranks, or `offload` with
            `reshard_after_forward=False` or `sync_every_microbatch=False`.
    """

    strategy_name = "fitrl_fsdp2"
    evaluates_in_inference_mode = False

    def __init__(
        self,
        *,
        tensor_parallel_size: int = 1,
        reshard_after_forward: bool | None = None,
        sync_every_microbatch: bool | None = None,
        offload: bool = False,
        **kwargs: Any,
    ) -> None:
        for name, value in (
            ("reshard_after_forward", reshard_after_forward),
            ("sync_every_microbatch", sync_every_microbatch),
        ):
            if offload and value is False:
                raise InvalidArgumentError(
                    f"offload=True keeps everything in the host's memory, {name}=False whole on the device: take one"
                )
        if tensor_parallel_size < 1:
            raise InvalidArgumentError(f"tensor_parallel_size must be at least 1, got {tensor_parallel_size}")
        super().__init__(tensor_parallel_size=tensor_parallel_size, save_distributed_checkpoint=False, **kwargs)
        self.ranks_per_data = tensor_parallel_size
        self.reshard_after_forward = reshard_after_forward
        self.sync_every_microbatch = sync_every_microbatch
        self.offload = offload
        self._reshards = self._syncs = True
        self._lent = False
        self._copy: LentPolicy | None = None

    @override
    def setup_environment(self) -> None:
        size = self.num_nodes * self.num_processes
        if size % self.ranks_per_data:
            raise InvalidArgumentError(
                f"tensor_parallel_size={self.ranks_per_data} does not divide the {size} ranks of this job: start a "
                "multiple of it, or take a size that does"
            )
        _compat.set_data_parallel_size(self, self.ranks_per_data)
        super().setup_environment()

    @override
    def model_to_device(self) -> None:
        if not self.offload:
            super().model_to_device()

    @override
    def setup_optimizers(self, trainer: lightning.Trainer) -> None:
        self.take_weights_back()  # the optimizer's are the pieces, not what a validation left gathered
        super().setup_optimizers(trainer)

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        self.take_weights_back()  # what a pass without a gradient has left gathered is old now
        return output

    # -- what PolicyModule asks for -----------------------------------------------------------------------------

    def shard(self, policy: Policy, *, precision: str, moments: str, compiles: bool) -> Policy:
        """Cut a policy that was just loaded, the same on every rank, into this rank's pieces.

        Args:
            policy: on the CPU.
            precision: Lightning's; under "bf16-mixed" decoder layers are gathered in bfloat16, which is what they
                multiply in, and their gradients are summed in float32.
            moments: of AdamW; bitsandbytes' cannot be cut.
            compiles: whether decoder layers are compiled; with tensor parallel they cannot be.

        Raises:
            UnsupportedError: one of these, or see `parallelize`.
        """
        if moments != "float32":
            raise UnsupportedError(
                f"AdamWSettings(moments={moments!r}) cannot be sharded: take 'float32' with strategy='fitrl_fsdp2', or "
                "strategy='fitrl_ddp'"
            )
        if self.ranks_per_data > 1 and compiles:
            raise UnsupportedError(
                f"compile=True with tensor_parallel_size={self.ranks_per_data}: torch's compiler cannot follow layers "
                "that are cut over ranks through batches of any length; take compile=False, or tensor_parallel_size=1"
            )
        if self.ranks_per_data > 1:
            self._copy = LentPolicy(policy)
            parallelize(policy, self.device_mesh["tensor_parallel"])
        options: dict[str, Any] = {"mesh": self.device_mesh["data_parallel"]}
        if self.offload:
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=self.root_device.type == "cuda")
        narrow = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
        inner = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=torch.float32, cast_forward_inputs=False)
        layers = decoder_layers(policy)
        weights = [weight for layer in layers for weight in layer.parameters()]
        gathered_bytes = sum(own_numel(weight) * (narrow or weight.dtype).itemsize for weight in weights)
        gradient_bytes = sum(4 * own_numel(weight) for weight in policy.network.parameters() if weight.requires_grad)
        policy.whole_bytes = self._keep_whole(gathered_bytes, gradient_bytes)
        for layer in layers:
            fully_shard(
                layer,
                mp_policy=inner if narrow is not None else MixedPrecisionPolicy(),
                reshard_after_forward=self._reshards,
                **options,
            )
            if compiles:
                # of modules that say so the compiler takes the numbers, the size of a head say, for unknown ones, which
                # FlexAttention cannot be compiled with; inside a layer's forward they are as any others
                for module in layer.modules():
                    any_module: Any = module
                    any_module._is_fsdp_managed_module = False
        root: Any = fully_shard(Root(policy.network), reshard_after_forward=False, **options)
        policy.root = root
        return policy

    def _keep_whole(self, gathered_bytes: int, gradient_bytes: int) -> int:
        """Decide what stays whole within a step, of layers' weights and of gradients; returns the size of that."""
        self._reshards = self._cuts(gathered_bytes, self.reshard_after_forward)
        self._syncs = self._cuts(gathered_bytes + gradient_bytes, self.sync_every_microbatch)
        return (0 if self._reshards else gathered_bytes) + (0 if self._syncs else gradient_bytes)

    def _cuts(self, num_bytes: int, told: bool | None) -> bool:
        """Whether something so large is cut again within a step, the same on every rank."""
        if told is not None or self.offload or self.root_device.type != "cuda":
            return told is not False
        memory = torch.cuda.get_device_properties(self.root_device).total_memory
        return num_bytes * _SMALL > min(map(int, ranks.collect(str(memory))))

    @contextmanager
    @override
    def block_backward_sync(self) -> Iterator[None]:
        """Around a microbatch that is not the last of its step: what stays whole is left so for the next."""
        root = self._root() if not (self._reshards and self._syncs) else None
        if root is not None:
            root.set_reshard_after_backward(self._reshards)
            root.set_requires_gradient_sync(self._syncs)
        try:
            yield
        finally:
            if root is not None:
                root.set_reshard_after_backward(True)
                root.set_requires_gradient_sync(True)

    # -- whole weights for the embedded sampler -----------------------------------------------------------------

    @property
    @override
    def lent_policy(self) -> Policy:
        return super().lent_policy if self._copy is None else self._copy.policy

    @override
    def lend_weights(self) -> None:
        if self._lent:
            return  # and no step was taken since
        self.take_weights_back()  # what is gathered may be older than the last step
        if self._copy is not None:
            self.precision_plugin.convert_module(self._copy.policy.network)
            self._copy.fill(super().lent_policy.network, self.root_device)
            self._lent = True
            return
        for module in self._sharded():
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        self._lent = True

    @override
    def take_weights_back(self) -> None:
        in_place = self._lent and self._copy is None
        for module in self._sharded():
            reshards = self._reshards and not isinstance(module, Root)
            if in_place:
                module.set_reshard_after_forward(reshards, recurse=False)
            if in_place or not reshards:  # a pass without a gradient leaves these gathered
                module.reshard()
        if self._copy is not None:
            self._copy.drain()
        self._lent = False

    def _root(self) -> Any:
        module: Any = self.lightning_module
        assert module.policy.root is not None  # set by `shard`
        return module.policy.root

    def _sharded(self) -> list[FSDPModule]:
        return [module for module in self._root().modules() if isinstance(module, FSDPModule)]

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        if self._lent or self._reshards:  # else the microbatches of a step share what the first one gathered
            self.take_weights_back()  # every forward starts here
        return super().batch_to_device(batch, device, dataloader_idx)

    @override
    def close(self) -> None:
        self._lent = False
        self._copy = None
        super().close()
