"""torchtitan's components behind a policy: the only file that imports torchtitan, which is pinned because of it.

Enters: a transformers model that was just loaded. Leaves: a `TitanNetwork`: the same weights in torchtitan's modules,
cut over ranks by its plan for the architecture, read and written under transformers' names by its state-dict adapter.
Two modules of ours stand in torchtitan's: the attention, which keeps apart what one row holds, and the output head,
which hands hidden states through, because the loss multiplies with it (what torchtitan's chunked loss is made for).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torchtitan.distributed.context_parallel.api
import torchtitan.distributed.parallel_dims
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.functional import scaled_dot_product_attention
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from torchtitan.distributed.utils import set_spmd_backend
from torchtitan.models.common import CosSinRoPE, Embedding, Linear
from torchtitan.models.common.attention import FlexAttention
from torchtitan.models.common.nn_modules import RMSNorm
from torchtitan.models.qwen3 import _build_qwen3_layers, parallelize_qwen3
from torchtitan.models.qwen3.model import Qwen3Model
from torchtitan.models.qwen3.state_dict_adapter import Qwen3StateDictAdapter

from fitrl.errors import UnsupportedError
from fitrl.policy.attention import allow_many_graphs, attend
from fitrl.policy.packed_row import PackedRow
from fitrl_titan.gathering import gather

Checkpointing = Literal["none", "selective", "full"]
_BACKEND = "partial_dtensor"  # weights and activations are DTensors only where tensor parallel cuts them


@dataclass(frozen=True, slots=True, kw_only=True)
class Degrees:
    """How many ways each thing is cut; their product is the number of ranks.

    Attributes:
        data: groups of ranks with data of their own.
        context: ranks that each hold a stretch of every row.
        tensor: ranks that each hold a part of every matrix.
    """

    data: int
    context: int
    tensor: int


class PackedAttention(FlexAttention):
    """Attention over a row of several histories, or over a stretch of it, by fitrl's kernels.

    A subclass, because torchtitan's context parallel asks for FlexAttention by its type. That one is compiled for each
    length, each time with a search for the fastest kernel, which batches of any length never stop waiting for.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(FlexAttention.Config):
        """Nothing of its own."""

    def forward(
        self,
        q_BLNH: Tensor,  # noqa: N803 - torchtitan's plan for tensor parallel names them
        k_BLNH: Tensor,  # noqa: N803
        v_BLNH: Tensor,  # noqa: N803
        *,
        attention_masks: PackedRow | None = None,
        scale: float | None = None,
        enable_gqa: bool = False,
        **options: Any,
    ) -> Tensor:
        """Attend.

        Args:
            q_BLNH: [B, L, heads, D].
            k_BLNH: [B, L, key heads, D].
            v_BLNH: [B, L, key heads, D].
            attention_masks: who sees whom in a packed row; None: all rows are causal.
            scale: of the logits.
            enable_gqa: whether there are fewer key heads.
            **options: of FlexAttention, which asks for none of them here.
        """
        query, key, value = (heads.transpose(1, 2) for heads in (q_BLNH, k_BLNH, v_BLNH))
        if attention_masks is not None:
            size = query.shape[-1] ** -0.5 if scale is None else scale
            return attend(query, key, value, attention_masks, scale=size)
        return scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            scale=scale,
            enable_gqa=enable_gqa,
        ).transpose(1, 2)


class _Qwen3(Qwen3Model):
    """torchtitan's, whose embeddings and output head stay one weight when tensor parallel cuts them."""

    @dataclass(kw_only=True, slots=True)
    class Config(Qwen3Model.Config):
        """Nothing of its own."""

    def parallelize(self, parallel_dims: ParallelDims) -> None:
        """Cut the weights by the plan."""
        super().parallelize(parallel_dims)
        if self.enable_weight_tying:
            self.tok_embeddings.weight = self.lm_head.weight


def model_config(config: Any) -> Qwen3Model.Config:
    """Describe a transformers model in torchtitan's words.

    Args:
        config: transformers', of its text model.

    Raises:
        UnsupportedError: an architecture, or a variant of one, that is not known here.
    """
    rope = config.rope_parameters
    known = {"model_type": "qwen3", "attention_bias": False, "hidden_act": "silu", "use_sliding_window": False}
    asked = [(name, getattr(config, name, None), wanted) for name, wanted in known.items()]
    for name, found, wanted in [*asked, ("rope_type", rope["rope_type"], "default")]:
        if found != wanted:
            raise UnsupportedError(
                f"fitrl_titan trains Qwen3's dense models with {name}={wanted!r}, here it is {found!r}: take "
                "LocalTrainer"
            )
    norm = RMSNorm.Config(normalized_shape=config.hidden_size, eps=config.rms_norm_eps)
    layers = _build_qwen3_layers(
        n_layers=config.num_hidden_layers,
        dim=config.hidden_size,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        hidden_dim=config.intermediate_size,
        fuse_qkv=False,  # so that each weight is one of transformers', and so are its moments
        attn_backend="flex",
        rope=CosSinRoPE.Config(
            dim=config.head_dim, max_seq_len=config.max_position_embeddings, theta=rope["rope_theta"]
        ),
    )
    described = _Qwen3.Config(
        vocab_size=config.vocab_size,
        dim=config.hidden_size,
        norm=norm,
        tok_embeddings=Embedding.Config(num_embeddings=config.vocab_size, embedding_dim=config.hidden_size),
        lm_head=Linear.Config(in_features=config.hidden_size, out_features=config.vocab_size),
        layers=layers,
        enable_weight_tying=config.tie_word_embeddings,
    )
    for layer in layers:
        layer.attention.inner_attention = PackedAttention.Config()
    for _, each, _, _ in described.traverse(RMSNorm.Config):
        each.eps = config.rms_norm_eps
    return described


class TitanNetwork:
    """A transformers model in torchtitan's modules.

    Args:
        causal_lm: loaded, on the CPU; its weights are shared.

    Raises:
        UnsupportedError: see `model_config`.
    """

    def __init__(self, causal_lm: Any) -> None:
        set_spmd_backend(_BACKEND)
        self._config = model_config(causal_lm.config.get_text_config())
        self._tied = bool(self._config.enable_weight_tying)
        self._adapter = Qwen3StateDictAdapter(self._config, None)
        # of the parameters, in transformers' order
        names = {name: name for name, _ in causal_lm.named_parameters()}
        ours = {theirs: name for name, theirs in self._adapter.from_hf(dict(names)).items() if name != "lm_head.weight"}
        if not self._tied:
            ours["lm_head.weight"] = "lm_head.weight"
        self._names = [ours[name] for name in names]
        self._causal_lm_state = causal_lm.state_dict()
        self.module: Any = None
        self.mesh: DeviceMesh | None = None

    def build(
        self,
        degrees: Degrees,
        device: torch.device,
        *,
        dtype: torch.dtype = torch.float32,
        checkpointing: Checkpointing = "none",
        compiles: bool = False,
        reshards: bool = True,
    ) -> None:
        """Make the modules and cut their weights over the ranks; a collective.

        Args:
            degrees: their product is the number of ranks.
            device: of this rank.
            dtype: that decoder layers compute in; weights, moments and sums of gradients are float32.
            checkpointing: what is computed again in backward.
            compiles: whether each decoder layer is compiled.
            reshards: whether each decoder layer is cut again as soon as it has run.
        """
        parallelism = ParallelismConfig(
            data_parallel_shard_degree=degrees.data,
            context_parallel_degree=degrees.context,
            tensor_parallel_degree=degrees.tensor,
            context_parallel_load_balancer=None,
            fsdp_reshard_after_forward="default" if reshards else "never",
            spmd_backend=_BACKEND,
        )
        if compiles:
            allow_many_graphs()
        self._config.update_from_config(config=SimpleNamespace(parallelism=parallelism))
        self.make()
        # chosen at import, and never a CPU
        torchtitan.distributed.parallel_dims.device_type = device.type
        torchtitan.distributed.context_parallel.api.flex_cp_allgather = _keys_and_values
        parallel = ParallelDims.from_config(parallelism, degrees.data * degrees.context * degrees.tensor)
        parallelize_qwen3(
            self.module,
            parallel_dims=parallel,
            training=TrainingConfig(mixed_precision_param="bfloat16" if dtype == torch.bfloat16 else "float32"),
            parallelism=parallelism,
            compile_config=CompileConfig(enable=compiles, components=["model"]),
            ac_config={"none": None, "selective": SelectiveAC.Config(), "full": FullAC.Config()}[checkpointing],
            dump_folder="",
        )
        self._share_positions(device)
        self.module.lm_head.forward = _handed_through  # once more, because the plan has put its own around it
        if compiles and degrees.tensor > 1:
            self.module.tok_embeddings.register_forward_hook(_waited_for)
        for module in self.shards():
            module.set_gradient_divide_factor(float(degrees.data))  # `PolicyModule` counts on a mean over the data
            if device.type == "cpu":
                module.set_force_sum_reduction_for_comms(True)  # gloo cannot divide on the way
        self.mesh = parallel.get_optional_mesh("cp")

    def make(self) -> None:
        """Make the modules, whole, on the CPU."""
        with torch.device("meta"):
            self.module = self._config.build()
        self.module.load_state_dict(self._adapter.from_hf(dict(self._causal_lm_state)), assign=True)
        del self._causal_lm_state
        if self._tied:
            self.module.tok_embeddings.weight = self.module.lm_head.weight
        self._share_positions(torch.device("cpu"))
        self.module.lm_head.forward = _handed_through

    def _share_positions(self, device: torch.device) -> None:
        """Let all layers read one table of angles, each has its own otherwise."""
        ropes = [module for module in self.module.modules() if isinstance(module, CosSinRoPE)]
        if ropes[0].cache.is_meta:
            ropes[0]._init_self_buffers(buffer_device=device)
        for rope in ropes:
            rope.cache = ropes[0].cache

    def shards(self) -> Iterator[FSDPModule]:
        """What is gathered and cut as one."""
        return (module for module in self.module.modules() if isinstance(module, FSDPModule))

    def parameters(self) -> list[nn.Parameter]:
        """In the order of transformers' parameters."""
        held = {_plain(name): p for name, p in self.module.named_parameters(remove_duplicate=False)}
        return [held[name] for name in self._names]

    def hidden(self, tokens: Tensor, positions: Tensor | None, masks: Any) -> Tensor:
        """Last hidden states [B, L, H], the same on ranks that share a matrix."""
        hidden: Tensor = self.module(tokens, positions=positions, attention_masks=masks)
        return hidden.to_local() if isinstance(hidden, DTensor) else hidden

    @property
    def head_weight(self) -> Tensor:
        """Output head [V, H], after the layers ran: until then it lies in pieces."""
        weight: Tensor = self.module.lm_head.weight
        return weight

    def hf_state(self) -> dict[str, Tensor]:
        """Weights under transformers' names, as this rank has them; both names of two that are tied."""
        state: dict[str, Tensor] = self._adapter.to_hf(self.module.state_dict())
        if self._tied:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        return state

    def load_hf(self, state: Mapping[str, Tensor]) -> None:
        """Set all weights from some under transformers' names, cut as this rank's are."""
        self.module.load_state_dict(self._adapter.from_hf(dict(state)))


def _keys_and_values(key: Tensor, value: Tensor, dimension: int, group_name: str) -> tuple[Tensor, Tensor]:
    """Keys and values of all context ranks by one collective, where torchtitan's takes two."""
    keys, values = gather(torch.cat((key, value), dim=-1), group_name, dimension, adds_up=True).chunk(2, dim=-1)
    return keys, values


def _waited_for(module: nn.Module, inputs: Any, embedded: Tensor) -> Tensor:
    """A copy that no collective is under way for: of one that is, the compiler would make graphs of their own."""
    return embedded.clone()


def _handed_through(hidden: Tensor) -> Tensor:
    return hidden


def _plain(name: str) -> str:
    """A parameter's name without what checkpointing put around its layer."""
    return name.replace("_checkpoint_wrapped_module.", "")
