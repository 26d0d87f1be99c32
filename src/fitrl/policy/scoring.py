"""What a policy makes of a batch: the logprobs of its targets, and the objective on them.

Enters: a policy and a `Batch`. Leaves: a `PolicyLoss`, or logprobs [R]. A head that is one matrix is never asked for
all logits at once; any other is asked as the model itself would.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fitrl.data.batch import Batch
from fitrl.errors import InvalidArgumentError, UnsupportedError
from fitrl.objective.custom import evaluate
from fitrl.objective.fused_linear import fused_linear_policy_loss
from fitrl.objective.logprobs import linear_logprobs, logits_logprobs
from fitrl.objective.objective import CustomObjective, LossInputs, Objective, PolicyLoss
from fitrl.objective.policy_loss import policy_loss
from fitrl.policy.batch_loss import loss_inputs
from fitrl.policy.policy import Policy

# operations that end a model and whose backward does not read what they returned: the gradient may take its place
_KEEP_NO_RESULT = (
    *("AddmmBackward0", "MmBackward0", "UnsafeViewBackward0", "AddBackward0"),
    *("MulBackward0", "DivBackward0", "ToCopyBackward0"),
)


def loss_of(
    policy: Policy, batch: Batch, objective: Objective | CustomObjective, *, rows_per_tile: int | None = None
) -> PolicyLoss:
    """Loss of one microbatch, with a gradient.

    Args:
        policy: read where it lies.
        batch: the microbatch.
        objective: the loss.
        rows_per_tile: rows of logits held at once by a linear head; None: see `fused_linear_policy_loss`.

    Raises:
        UnsupportedError: a custom objective reads what this policy's head cannot give.
    """
    if not isinstance(objective, Objective):
        return evaluate(objective, _custom_inputs(policy, batch, objective))
    targets = batch.loss_inputs
    fixed = (targets.old_logprobs, targets.advantages, targets.mask, targets.trajectory_ids, objective)
    common: dict[str, Any] = {
        "rollout_logprobs": targets.rollout_logprobs,
        "reference_logprobs": targets.reference_logprobs,
        "num_tokens": targets.num_tokens,
        "num_sequences": targets.num_sequences,
        "kl_mean": targets.kl_mean,
    }
    if policy.has_linear_head:
        hidden = _hidden_rows(policy, batch)
        weight, bias, shard = policy.head_here  # after the layers ran: until then it may lie in pieces
        return fused_linear_policy_loss(
            hidden,
            weight,
            targets.targets,
            *fixed,
            bias=bias,
            temperature=targets.temperature,
            softcap=policy.softcap,
            rows_per_tile=rows_per_tile,
            exact_logits=True,
            leave_out=False,  # packing did that, and nothing here may wait for the device
            shard=shard,
            **common,
        )
    logprobs, entropies = _logprobs_of_logits(policy, batch, with_entropies=objective.entropy_coef != 0)
    result = policy_loss(logprobs, *fixed, entropies=entropies, **common)
    return PolicyLoss(loss=result.loss, metrics=result.metrics, logprobs=logprobs.detach())


def logprobs_of(policy: Policy, batch: Batch, *, rows_per_tile: int | None = None) -> Tensor:
    """Float32 logprobs [R] of the batch's targets, at their temperature.

    Args:
        policy: read where it lies.
        batch: the microbatch.
        rows_per_tile: rows of logits held at once; None: as many as `linear_logprobs` holds, or all of them where the
            head is not linear and a gradient may be wanted.
    """
    targets = batch.loss_inputs
    if not policy.has_linear_head and rows_per_tile is not None:
        return _logprobs_by_tiles(policy, batch, rows_per_tile)
    if not policy.has_linear_head:
        return _logprobs_of_logits(policy, batch)[0]
    hidden = _hidden_rows(policy, batch)
    weight, bias, shard = policy.head_here  # as above
    return linear_logprobs(
        hidden,
        weight,
        targets.targets,
        bias=bias,
        temperature=targets.temperature,
        softcap=policy.softcap,
        rows_per_tile=rows_per_tile,
        exact_logits=True,
        shard=shard,
    )[0]


def _custom_inputs(policy: Policy, batch: Batch, objective: CustomObjective) -> LossInputs:
    outputs: dict[str, Tensor] = {}
    if objective.inputs == "logits":
        outputs["logits"] = _logit_rows(policy, batch)
    elif objective.inputs == "logprobs":
        outputs["logprobs"] = logprobs_of(policy, batch)
    elif objective.inputs == "hidden" and policy.has_linear_head:
        outputs["hidden"] = _hidden_rows(policy, batch)
        outputs["weight"], bias, shard = policy.head_here
        if shard is not None:
            raise UnsupportedError(
                "tensor parallel leaves each rank a part of the output head, so an objective over hidden states "
                "would be wrong; use inputs='logprobs' or 'logits', or tensor_parallel_size=1"
            )
        outputs |= {} if bias is None else {"bias": bias}
    elif objective.inputs == "hidden":
        raise UnsupportedError(
            f"{type(policy.causal_lm).__name__} has no plain linear head, so an objective over hidden states would "
            "be wrong; use inputs='logits' or 'logprobs'"
        )
    else:
        raise InvalidArgumentError(
            f"a custom objective's inputs must be 'logprobs', 'logits' or 'hidden', got {objective.inputs!r}"
        )
    return loss_inputs(batch, outputs)


def _hidden_rows(policy: Policy, batch: Batch) -> Tensor:
    """Last hidden states [R, H] of the positions that predict a target."""
    return policy.hidden_of(batch.model_inputs).flatten(0, 1).index_select(0, batch.loss_inputs.rows)


def _logit_rows(policy: Policy, batch: Batch) -> Tensor:
    """Logits [R, V] of the whole model, float32 (float64 stays), divided by the temperature."""
    targets = batch.loss_inputs
    rows = policy.full_logits_of(batch.model_inputs).flatten(0, 1).index_select(0, targets.rows)
    rows = rows if rows.dtype == torch.float64 else rows.float()
    return rows / targets.temperature[:, None]


def _logprobs_of_logits(policy: Policy, batch: Batch, *, with_entropies: bool = False) -> tuple[Tensor, Tensor | None]:
    """Logprobs [R] and entropies of a model whose head cannot be taken apart; the logits are used up."""
    targets = batch.loss_inputs
    logits = policy.full_logits_of(batch.model_inputs)
    maker, flat = logits.grad_fn, logits.flatten(0, 1)
    shared = batch.layout == "shared"  # then several targets may be predicted at one position, each by its own copy
    return logits_logprobs(
        flat.index_select(0, targets.rows) if shared else flat,
        targets.targets,
        temperature=targets.temperature,
        rows=None if shared else targets.rows,
        with_entropies=with_entropies,
        in_place=shared or (maker is not None and maker.name() in _KEEP_NO_RESULT),
    )


def _logprobs_by_tiles(policy: Policy, batch: Batch, rows_per_tile: int) -> Tensor:
    """Logprobs [R] by the model's own head, so many rows of logits at a time; for passes without a gradient."""
    targets = batch.loss_inputs
    columns = (_hidden_rows(policy, batch), targets.targets, targets.temperature)
    logprobs: list[Tensor] = []
    for hidden, chosen, temperature in zip(*(torch.split(c, rows_per_tile) for c in columns), strict=True):
        logprobs.append(logits_logprobs(policy.own_logits(hidden), chosen, temperature=temperature)[0])
    return torch.cat(logprobs)
