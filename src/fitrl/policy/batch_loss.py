"""The objective on logprobs that were computed elsewhere: by a service, or by a network of one's own.

Enters: a batch and the logprobs of its targets. Leaves: a `PolicyLoss`.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fitrl.data.batch import Batch
from fitrl.errors import UnsupportedError
from fitrl.objective.custom import evaluate
from fitrl.objective.objective import CustomObjective, LossInputs, Objective, PolicyLoss
from fitrl.objective.policy_loss import policy_loss


def batch_loss(batch: Batch, logprobs: Tensor, objective: Objective | CustomObjective) -> PolicyLoss:
    """Loss of one microbatch, from logprobs alone.

    Args:
        batch: the microbatch.
        logprobs: [R] of its targets at their temperature, with grad where a gradient is wanted.
        objective: the loss.

    Raises:
        UnsupportedError: the objective needs more than logprobs: entropies, logits or hidden states.
    """
    targets = batch.loss_inputs
    if not isinstance(objective, Objective):
        if objective.inputs != "logprobs":
            raise UnsupportedError(
                f"{type(objective).__name__} reads {objective.inputs}, and only logprobs are known here: train with "
                "LocalTrainer"
            )
        return evaluate(objective, loss_inputs(batch, {"logprobs": logprobs}))
    if objective.entropy_coef:
        raise UnsupportedError(
            f"entropy_coef={objective.entropy_coef} needs entropies, and only logprobs are known here: train with "
            "LocalTrainer"
        )
    return policy_loss(
        logprobs,
        targets.old_logprobs,
        targets.advantages,
        targets.mask,
        targets.trajectory_ids,
        objective,
        rollout_logprobs=targets.rollout_logprobs,
        reference_logprobs=targets.reference_logprobs,
        num_tokens=targets.num_tokens,
        num_sequences=targets.num_sequences,
        kl_mean=targets.kl_mean,
    )


def loss_inputs(batch: Batch, outputs: Mapping[str, Tensor]) -> LossInputs:
    """What a custom objective is called with.

    Args:
        batch: the microbatch.
        outputs: of the model, by the names that `LossInputs` has for them.
    """
    targets = batch.loss_inputs
    return LossInputs(
        targets=targets.targets,
        old_logprobs=targets.old_logprobs,
        advantages=targets.advantages,
        mask=targets.mask,
        trajectory_ids=targets.trajectory_ids,
        temperature=targets.temperature,
        num_tokens=targets.num_tokens,
        num_sequences=targets.num_sequences,
        rollout_logprobs=targets.rollout_logprobs,
        reference_logprobs=targets.reference_logprobs,
        outputs=outputs,
    )
