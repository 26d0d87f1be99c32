"""What a custom objective returned, held to the protocol before Lightning or the metrics see it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fitrl.errors import InvalidArgumentError
from fitrl.objective.objective import CustomObjective, LossInputs, PolicyLoss


def evaluate(objective: CustomObjective, inputs: LossInputs) -> PolicyLoss:
    """Call a custom objective.

    Returns:
        Its loss; its metrics as detached scalars, with `loss_train` among them; the logprobs that it asked for, if it
        returned none.

    Raises:
        InvalidArgumentError: it returned no `PolicyLoss`, a loss that is no scalar or has no gradient, or a metric
            that is no number; the message names its class.
    """
    name = type(objective).__name__
    result: Any = objective(inputs)
    if not isinstance(result, PolicyLoss):
        raise InvalidArgumentError(f"{name} must return a fitrl.PolicyLoss(loss=...), got {type(result).__name__}")
    loss = result.loss
    if not isinstance(loss, Tensor) or loss.dim():
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise InvalidArgumentError(f"the loss of {name} must be a scalar tensor, got {what}")
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise InvalidArgumentError(f"the loss of {name} has no gradient: make it of {objective.inputs}, undetached")
    metrics = {"loss_train": loss.detach()}
    for key, value in result.metrics.items():
        try:
            metrics[key] = torch.as_tensor(value, dtype=torch.float64).detach().reshape(()).to(loss.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InvalidArgumentError(f"the metric {key!r} of {name} must be a number, got {value!r:.80}") from error
    logprobs = inputs.outputs.get("logprobs") if result.logprobs is None else result.logprobs
    return PolicyLoss(
        loss=loss,
        metrics=metrics,
        logprobs=None if logprobs is None else logprobs.detach(),
        entropies=result.entropies,
    )
