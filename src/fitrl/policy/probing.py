"""What a loaded model allows, found out by comparing: a plain head, packed rows, shared prefixes.

Enters: a `Policy` that was just loaded. Leaves: its flags. Nothing is concluded from a model's name: a head that scales
its logits, positions that come from the mask, a state that runs through the row all show in the logits.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fitrl.data.batch import Batch
from fitrl.data.histories import TokenHistory
from fitrl.data.packing import pack
from fitrl.data.samples import Sample
from fitrl.policy.attention import keep_soft_caps, read_no_packed_rows, read_packed_rows
from fitrl.policy.head import is_linear

if TYPE_CHECKING:
    from fitrl.policy.policy import Policy

_log = logging.getLogger(__name__)
_TOLERANCE = 1e-4


@torch.no_grad()
def probe(policy: Policy) -> None:
    """Find out, on two short histories, whether the head is plain, and whether histories in one row stay apart."""
    network = policy.network
    was_training = network.training
    network.eval()
    with torch.device("cpu"):  # where batches are packed; Lightning makes the model's device the default around this
        histories = [TokenHistory.all_trained(ids) for ids in ([1, 5, 3, 2, 4, 1], [1, 5, 3, 4, 2])]
        [packed], [shared] = (
            pack([Sample(histories=histories, advantage=1.0)], layout=layout) for layout in ("packed", "shared")
        )
    try:
        with _narrow_windows(policy.causal_lm):
            keep_soft_caps(policy.causal_lm)
            device = next(network.parameters()).device
            ids = [history.token_ids[None, :-1].to(device) for history in histories]
            alone = torch.cat([policy.full_logits(row).logits[0].float() for row in ids])
            causal_lm: Any = policy.causal_lm
            head = causal_lm.get_output_embeddings()
            if is_linear(head):
                apart = policy.logits(policy.hidden(ids[0]).last_hidden_state[0])
                policy.has_linear_head = _close(apart, alone[: len(apart)])
            policy.can_pack = policy.can_share = read_packed_rows(causal_lm)  # tried at least
            policy.can_pack = policy.can_pack and _stays_apart(policy, packed, alone)
            policy.can_share = policy.can_pack and _stays_apart(policy, shared, alone)
    finally:
        network.train(was_training)
    if not policy.has_linear_head:
        _log.info(
            "%s: logits are not a linear head (%s) of the last hidden state, so whole logits are computed",
            type(network).__name__,
            type(head).__name__,
        )
    if not policy.can_pack:
        read_no_packed_rows(policy.causal_lm)
        _log.info("%s: sequences in one row are not kept apart, so batches are padded", type(network).__name__)
    elif not policy.can_share:
        _log.info(
            "%s: sequences with a common prefix are not kept apart, so each holds its own", type(network).__name__
        )


@contextmanager
def _narrow_windows(network: Any) -> Iterator[None]:
    """Let sliding windows and chunks be two tokens wide, so that short histories show whether they are kept."""
    owners = {id(owner): owner for module in network.modules() for owner in (module, getattr(module, "config", None))}
    kept = [
        (owner, name, value)
        for owner in owners.values()
        for name in ("sliding_window", "attention_chunk_size")
        if type(value := getattr(owner, name, None)) is int
    ]
    try:
        for owner, name, _ in kept:
            setattr(owner, name, 2)
        yield
    finally:
        for owner, name, value in kept:
            setattr(owner, name, value)


def _stays_apart(policy: Policy, batch: Batch, alone: Tensor) -> bool:
    """Whether histories in one row have the logits that they have alone."""
    try:
        batch = batch.to(alone.device)
        together = policy.full_logits_of(batch.model_inputs).flatten(0, 1)[batch.loss_inputs.rows].float()
    except Exception as error:  # code of any model, asked for what it may never have been meant for
        layout = "packed" if batch.model_inputs.crossings is None else "shared"
        _log.debug("%s cannot read a %s row: %s", type(policy.causal_lm).__name__, layout, error)
        return False
    return _close(together, alone)


def _close(left: Tensor, right: Tensor) -> bool:
    return bool((left - right).abs().max() <= _TOLERANCE * max(1.0, float(right.abs().max())))
