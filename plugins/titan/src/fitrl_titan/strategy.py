"""`fitrl_titan`: torchtitan's models and parallel plans as a strategy, with the verbs of a policy trainer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.torch_version import TorchVersion
from typing_extensions import override

from fitrl.errors import InvalidArgumentError, MissingDependencyError, UnsupportedError
from fitrl.policy.layers import decoder_layers
from fitrl.policy.lending import LentPolicy
from fitrl.policy.loading import read_weights
from fitrl.policy.policy import Policy
from fitrl.policy.sharding import like, whole
from fitrl.strategies.fsdp2 import FSDP2Strategy

DTYPES = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16}
_SHORT = {"32": "32-true", "bf16": "bf16-mixed"}  # Lightning takes these, too


def check_precision(precision: str) -> None:
    """Refuse what torchtitan's modules do not compute in.

    Raises:
        UnsupportedError: it is none of `DTYPES`.
    """
    if _SHORT.get(precision, precision) not in DTYPES:
        raise UnsupportedError(f"precision={precision!r}: torchtitan computes in {' or '.join(DTYPES)}")


class TitanStrategy(FSDP2Strategy):
    """torchtitan's plan for the architecture, over the ranks of a `torchrun` job; registered as `fitrl_titan`.

    Weights, gradients and moments are in pieces over data and context ranks (FSDP2); with tensor parallel each N
    consecutive ranks share every matrix and, between the layers, the sequence; with context parallel each rank runs a
    stretch of every row. Full weights of Qwen3's dense models. Checkpoints are those of any other strategy of fitrl.

    Args:
        data_parallel_size: groups of ranks with data of their own; None: as many as the ranks make.
        tensor_parallel_size: ranks that share every matrix; neighbours, which should be of one machine.
        context_parallel_size: ranks that share every row.
        selective_checkpointing: where activations are checkpointed, keep what torchtitan finds costly to compute again,
            instead of each layer's input alone.
        **kwargs: `reshard_after_forward` and `sync_every_microbatch` of `FSDP2Strategy`, and those of Lightning's
            `ModelParallelStrategy`.

    Raises:
        InvalidArgumentError: a size below 1, or `offload`.
        MissingDependencyError: torchtitan is not installed.
    """

    strategy_name = "fitrl_titan"
    makes_layers = True

    def __init__(
        self,
        *,
        data_parallel_size: int | None = None,
        tensor_parallel_size: int = 1,
        context_parallel_size: int = 1,
        selective_checkpointing: bool = False,
        **kwargs: Any,
    ) -> None:
        sizes = {
            "data_parallel_size": 1 if data_parallel_size is None else data_parallel_size,
            "tensor_parallel_size": tensor_parallel_size,
            "context_parallel_size": context_parallel_size,
        }
        for name, size in sizes.items():
            if size < 1:
                raise InvalidArgumentError(f"{name} must be at least 1, got {size}")
        if "offload" in kwargs:
            raise InvalidArgumentError(
                f"offload={kwargs['offload']!r}: torchtitan's plans keep weights on the device; fitrl_fsdp2 takes it"
            )
        try:
            import torchtitan  # noqa: F401
        except ImportError as error:
            raise MissingDependencyError("TitanStrategy needs torchtitan: pip install fitrl-titan") from error
        super().__init__(tensor_parallel_size=tensor_parallel_size * context_parallel_size, **kwargs)
        self.tensor_parallel_size = tensor_parallel_size
        self.context_parallel_size = context_parallel_size
        self.selective_checkpointing = selective_checkpointing
        self._wanted_data = data_parallel_size

    @override
    def setup_environment(self) -> None:
        size, shared = self.num_nodes * self.num_processes, self.ranks_per_data
        sizes = (
            f"tensor_parallel_size={self.tensor_parallel_size} times context_parallel_size={self.context_parallel_size}"
        )
        if size % shared or self._wanted_data not in (None, size // shared):
            wanted = "" if self._wanted_data is None else f" times data_parallel_size={self._wanted_data}"
            raise InvalidArgumentError(
                f"{sizes}{wanted} does not make the {size} ranks of this job: start as many, or take other sizes"
            )
        super().setup_environment()

    # -- what PolicyModule asks for -----------------------------------------------------------------------------

    @override
    def shard(self, policy: Policy, *, precision: str, moments: str, compiles: bool) -> Policy:
        """Bring a policy that was just loaded into torchtitan's modules, cut over the ranks.

        Args:
            policy: on the CPU, the same on every rank.
            precision: Lightning's; under "bf16-mixed" layers are gathered in bfloat16, which is what they compute in.
            moments: of AdamW; bitsandbytes' cannot be cut.
            compiles: whether each decoder layer is compiled; with tensor parallel that needs torch 2.13, and
                nothing that is computed again.

        Raises:
            UnsupportedError: one of these, adapters, an architecture that is not known, or a size that cannot be shared
                out equally.
        """
        from fitrl_titan.components import Degrees, TitanNetwork
        from fitrl_titan.policy import TitanPolicy

        if policy.is_adapter:
            raise UnsupportedError("fitrl_titan trains all weights: pass lora=None to TrainableModel, or LocalTrainer")
        if moments != "float32":
            raise UnsupportedError(f"AdamWSettings(moments={moments!r}) cannot be sharded: take 'float32'")
        check_precision(precision)
        module: Any = self.lightning_module
        if compiles and self.tensor_parallel_size > 1:
            self._check_compiler(recomputes=module.activation_checkpointing)
        self._check_sizes(policy)
        recomputed: Literal["selective", "full"] = "selective" if self.selective_checkpointing else "full"
        layers = [weight for layer in decoder_layers(policy) for weight in layer.parameters()]
        of_layers, of_all = (
            sum(weight.numel() for weight in weights) // self.tensor_parallel_size
            for weights in (layers, policy.network.parameters())
        )
        whole_bytes = self._keep_whole(DTYPES[precision].itemsize * of_layers, 4 * of_all)
        titan = TitanNetwork(policy.causal_lm)
        self._copy = LentPolicy(policy)
        titan.build(
            Degrees(
                data=self.device_mesh["data_parallel"].size(),
                context=self.context_parallel_size,
                tensor=self.tensor_parallel_size,
            ),
            self.root_device,
            dtype=DTYPES[precision],
            checkpointing=recomputed if module.activation_checkpointing else "none",
            compiles=compiles,
            reshards=self._reshards,
        )
        return TitanPolicy(
            network=titan.module,
            tokenizer=policy.tokenizer,
            has_linear_head=True,
            can_pack=True,
            can_share=True,
            whole_bytes=whole_bytes,
            titan=titan,
            empty=self._copy.policy.causal_lm,
            sharing=self.device_mesh["tensor_parallel"].get_group(),
        )

    def _check_compiler(self, *, recomputes: bool) -> None:
        """Refuse what torch's compiler cannot do with layers that are cut over ranks, through batches of any length."""
        asked = f"compile=True with tensor_parallel_size={self.tensor_parallel_size}"
        if TorchVersion(torch.__version__) < "2.13":
            raise UnsupportedError(
                f"{asked} needs torch 2.13, this is {torch.__version__}: take compile=False, or tensor_parallel_size=1"
            )
        if recomputes:
            raise UnsupportedError(
                f"{asked} and activation_checkpointing: torch 2.13 fails to compile layers that are cut over ranks and "
                "computed again; take compile=False, activation_checkpointing=False, or tensor_parallel_size=1"
            )

    def _check_sizes(self, policy: Policy) -> None:
        config = policy.causal_lm.config.get_text_config()
        for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size"):
            value = getattr(config, name)
            if value % self.tensor_parallel_size:
                raise UnsupportedError(
                    f"tensor_parallel_size={self.tensor_parallel_size} cannot share out {name}={value} equally: take "
                    "one that divides it"
                )

    # -- whole weights ------------------------------------------------------------------------------------------

    @override
    def lend_weights(self) -> None:
        if self._lent:
            return  # and no step was taken since
        assert self._copy is not None  # set by `shard`
        self.precision_plugin.convert_module(self._copy.policy.network)
        self._copy.take({name: tensor.to(self.root_device) for name, tensor in self.named_weights()}, self.root_device)
        self._lent = True

    @override
    def take_weights_back(self) -> None:
        for module in self._titan.shards():
            module.reshard()  # a pass without a gradient leaves some gathered
        if self._copy is not None:
            self._copy.drain()
        self._lent = False

    @override
    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        self.take_weights_back()
        state: dict[str, Tensor] = self._titan.hf_state()
        for name, tensor in state.items():
            yield name, whole(tensor.detach())

    @override
    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        return self.named_weights()

    @override
    def load_weights(self, folder: Path) -> None:
        held = self._titan.hf_state()
        found = read_weights(self.policy_module.policy, folder, {name: tensor.shape for name, tensor in held.items()})
        self._titan.load_hf({name: like(tensor, held[name]) for name, tensor in found.items()})

    @override
    def _root(self) -> Any:
        return self._titan.module

    @property
    def _titan(self) -> Any:
        module: Any = self.lightning_module
        return module.policy.titan
