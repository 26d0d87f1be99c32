"""`Policy`: a causal language model in memory, and how a batch runs through it.

Enters: a transformers model, perhaps with PEFT around it, and a batch's model inputs. Leaves: hidden states or logits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fitrl.data.batch import ModelInputs
from fitrl.errors import InvalidArgumentError, UnsupportedError
from fitrl.objective.logprobs import linear_logits
from fitrl.objective.vocabulary_shard import VocabularyShard
from fitrl.policy.attention import attention_kernels, is_one_long_history, packed_row, prepare, skips_hidden_keys
from fitrl.policy.head import own_rows, weight_and_bias
from fitrl.policy.packed_row import as_packed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(slots=True, kw_only=True)
class Policy:
    """A causal language model in memory.

    Attributes:
        network: the transformers model, or the PEFT model around it.
        tokenizer: its tokenizer.
        has_linear_head: whether logits are exactly `head(last hidden state)` with a linear head, so that
            the loss can be computed by tiles of rows; LoRA adapters on the head are a part of its weight. Found out by
            comparing both ways once.
        can_pack: whether several histories in one row stay apart; found out the same way.
        can_share: whether histories in one row can have a common prefix; found out the same way.
        softcap: soft cap of the final logits, or None.
        root: what is entered whenever the network runs, where its weights are in pieces over several ranks.
        whole_bytes: what of these, and of their gradients, stays whole from one microbatch to the next.
    """

    network: nn.Module
    tokenizer: PreTrainedTokenizerBase
    has_linear_head: bool = False
    can_pack: bool = False
    can_share: bool = False
    softcap: float | None = None
    root: nn.Module | None = None
    whole_bytes: int = 0

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model, adapters inside."""
        network: Any = self.network
        return network.get_base_model() if is_peft(network) else network  # type: ignore[no-any-return]

    @property
    def is_adapter(self) -> bool:
        """Whether only adapters are trained."""
        return is_peft(self.network)

    @property
    def trained_parameters(self) -> list[nn.Parameter]:
        """What the optimizer changes, in the order of a saved optimizer's state: that of the transformers model."""
        return [parameter for parameter in self.network.parameters() if parameter.requires_grad]

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return int(self.causal_lm.config.get_text_config().hidden_size)

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids that the policy can read."""
        embeddings: Any = self.causal_lm.get_input_embeddings()
        embeddings = getattr(embeddings, "base_layer", embeddings)  # below adapters
        # the weight may be in pieces and say nothing
        return int(embeddings.num_embeddings if isinstance(embeddings, nn.Embedding) else embeddings.weight.shape[0])

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return int(self.causal_lm.config.get_text_config().num_hidden_layers)

    @property
    def ranks_per_row(self) -> int:
        """Ranks that a row's activations are shared out over."""
        return 1

    @property
    def skips_hidden_keys(self) -> bool:
        """Whether attention over a packed row costs only what is in sight."""
        return skips_hidden_keys(next(self.network.parameters()).device)

    @property
    def context_length(self) -> int | None:
        """Longest sequence the model was made for, in tokens."""
        length = getattr(self.causal_lm.config.get_text_config(), "max_position_embeddings", None)
        return int(length) if length else None

    @property
    def stop_ids(self) -> frozenset[int]:
        """Token ids that end a completion."""
        configured = self.causal_lm.generation_config.eos_token_id if self.causal_lm.generation_config else None
        found = {self.tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}
        return frozenset(token for token in found if isinstance(token, int))

    @property
    def head(self) -> tuple[Tensor, Tensor | None]:
        """Weight [V, H] and bias of the output head, adapters on it included."""
        causal_lm: Any = self.causal_lm
        return weight_and_bias(causal_lm.get_output_embeddings())

    @property
    def head_here(self) -> tuple[Tensor, Tensor | None, VocabularyShard | None]:
        """The rows of the output head that are on this rank, and which ones they are; None: all."""
        return own_rows(*self.head)

    def hidden(self, input_ids: Tensor, position_ids: Tensor | None = None, **cache: Any) -> Any:
        """Run the decoder layers; returns transformers' output with `last_hidden_state` [B, L, H]."""
        return self._run(self.causal_lm.base_model, input_ids, position_ids, cache)

    def hidden_of(self, inputs: ModelInputs) -> Tensor:
        """Last hidden states [B, L, H] of a batch; a packed row may go on behind its tokens."""
        hidden: Tensor = self._run_batch(self.causal_lm.base_model, inputs).last_hidden_state
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits [T, V] of hidden states [T, H], for models with a linear head."""
        weight, bias = self.head
        return linear_logits(hidden, weight, bias=bias, softcap=self.softcap)

    @torch.no_grad()
    def own_logits(self, hidden: Tensor) -> Tensor:
        """Logits [T, V] of hidden states [T, H] by the model's own code, whatever it does after the decoder layers."""
        from transformers.modeling_outputs import BaseModelOutputWithPast

        model: Any = self.causal_lm
        decoder = model.base_model
        decoded = iter([BaseModelOutputWithPast(last_hidden_state=hidden[None])])
        decoder.forward = lambda *args, **kwargs: next(decoded)
        try:
            logits: Tensor = model(input_ids=torch.zeros(1, len(hidden), dtype=torch.int64), use_cache=False).logits
        finally:
            del decoder.forward
        if next(decoded, None) is not None:
            raise UnsupportedError(f"{type(model).__name__} does not call its base_model, so its head cannot run alone")
        return logits[0]

    def full_logits(self, input_ids: Tensor, position_ids: Tensor | None = None, **cache: Any) -> Any:
        """Run the whole model; returns transformers' output with `logits` [B, L, V]."""
        return self._run(self.causal_lm, input_ids, position_ids, cache)

    def full_logits_of(self, inputs: ModelInputs) -> Tensor:
        """Logits [B, L, V] of a batch by the whole model; a packed row may go on behind its tokens."""
        logits: Tensor = self._run_batch(self.causal_lm, inputs).logits
        return logits

    def _run_batch(self, network: Any, inputs: ModelInputs) -> Any:
        """Run a batch, if its layout is one that the policy keeps apart."""
        if inputs.ends is None:
            if not (self.can_pack and is_one_long_history(inputs)):
                return self._run(network, inputs.input_ids, None, {})
            inputs = as_packed(inputs)
        shared = inputs.crossings is not None
        if not (self.can_share if shared else self.can_pack):
            layouts = "layout='packed' or 'padded'" if self.can_pack else "layout='padded'"
            raise InvalidArgumentError(
                f"{type(self.causal_lm).__name__} mixes histories that share a {'prefix' if shared else 'row'}: use "
                f"pack(..., {layouts})"
            )
        row = packed_row(inputs)
        prepare(row, self.causal_lm)
        return self._run(network, row.input_ids, row.position_ids, {"attention_mask": row.mask, "packed_row": row})

    def _run(self, network: Any, input_ids: Tensor, position_ids: Tensor | None, cache: dict[str, Any]) -> Any:
        options = {"use_cache": False} | cache  # with a cache, transformers would not see that a row is packed
        call = functools.partial(network, input_ids=input_ids, position_ids=position_ids, **options)
        with attention_kernels(input_ids.device):
            return call() if self.root is None else self.root(call)


def is_peft(network: nn.Module) -> bool:
    """Whether the network is a PEFT model."""
    return hasattr(network, "peft_config") and hasattr(network, "get_base_model")
