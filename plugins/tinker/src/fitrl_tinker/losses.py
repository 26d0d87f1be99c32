"""Which of the service's losses an objective is, exactly.

The service sums over tokens: our aggregation is a weight per token, which goes into the advantages.

    cispo   -sum sg(clip(r)) A p           `ppo=False`, level "token"
    ppo     -sum min(r A, clip(r) A)       `ppo=True`, level "token"
    gspo    the same with the ratio of the sequence, GSPO-token's gradient: `ppo=True`, level "sequence", where every
            trajectory is one datum; its tokens have one weight, so the gradient is that of the objective

Everything else that depends on logprobs alone takes two passes: the service computes the logprobs, the loss and its
gradient with respect to them are computed here, and the gradient is sent back as the weights of its cross-entropy.
That is what the SDK's `forward_backward_custom` does; done here, an objective that raises costs nothing, while there it
would leave a client that refuses all further requests.

Sources: the service's documentation of its losses; GSPO: Zheng et al. 2025; CISPO: MiniMax 2025.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fitrl.data.batch import Batch
from fitrl.objective.objective import CustomObjective, Objective
from fitrl.objective.token_rows import token_rows
from fitrl.policy.batch_loss import batch_loss
from fitrl_tinker.datums import Datums

# what the service's own losses read of an objective; any other option that is set needs two passes
_KNOWN = ("ppo", "epsilon", "epsilon_high", "importance_sampling_level", "loss_aggregation", "norm_length")


LossName: TypeAlias = Literal["cispo", "ppo", "gspo", "cross_entropy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceLoss:
    """A loss as the service is asked for it.

    Attributes:
        name: of the service's loss.
        config: of it.
        columns: [R] each, by the name of the datum's input.
    """

    name: LossName
    config: dict[str, float] | None
    columns: Mapping[str, Tensor]


def own_loss(batch: Batch, objective: Objective | CustomObjective, datums: Datums) -> ServiceLoss | None:
    """The service's own loss that is this objective, computed in one pass; None if none is.

    Args:
        batch: the microbatch.
        objective: the loss.
        datums: how the microbatch is sent.
    """
    targets = batch.loss_inputs
    if not isinstance(objective, Objective) or bool(targets.old_logprobs[targets.mask].isnan().any()):
        return None
    plain = Objective(**{name: getattr(objective, name) for name in _KNOWN})
    if objective != plain:
        return None
    name: LossName
    if objective.importance_sampling_level == "token":
        name = "ppo" if objective.ppo else "cispo"
    elif objective.importance_sampling_level == "sequence" and objective.ppo and datums.is_one_each:
        name = "gspo"
    else:
        return None
    rows = token_rows(
        targets.old_logprobs,
        targets.advantages,
        targets.mask,
        targets.trajectory_ids,
        objective,
        size=datums.size,
        dtype=torch.float64,
        num_tokens=targets.num_tokens,
        num_sequences=targets.num_sequences,
    )
    columns = {"logprobs": rows.old_logprobs, "advantages": rows.advantages * rows.weights}
    if name == "gspo":
        columns["sequence_ratio_mask"] = targets.mask.double()
    low, high = objective.ratio_window
    return ServiceLoss(name=name, config={"clip_low_threshold": low, "clip_high_threshold": high}, columns=columns)


def gradient_as_weights(batch: Batch, logprobs: Tensor, objective: Objective | CustomObjective) -> ServiceLoss:
    """A cross-entropy whose gradient is the objective's, given the logprobs [R] of the policy as it is."""
    p = logprobs.double().requires_grad_()
    with torch.enable_grad():
        loss = batch_loss(batch, p, objective).loss
        [gradient] = torch.autograd.grad(loss, p)
    return ServiceLoss(name="cross_entropy", config=None, columns={"weights": -gradient})


def is_the_sum(loss: ServiceLoss, logprobs: Tensor, value: float, told: float) -> bool:
    """Whether the sum that the service told is the one it has to be, up to rounding.

    Args:
        loss: as it was asked for.
        logprobs: [R] that the service returned.
        value: of the objective at these logprobs.
        told: the service's `loss:sum`.
    """
    p = logprobs.double()
    column = loss.columns["weights" if loss.name == "cross_entropy" else "advantages"]
    expected = -float((column * p).sum()) if loss.name == "cross_entropy" else value
    size = float((column.abs() * (1.0 + p.abs())).sum())
    return abs(told - expected) <= 1e-4 * size
