"""A trainer of somebody else: the verbs of `PolicyTrainer` on plain torch.

It has no base class, and its ranks do not know each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

import fitrl
from fitrl.errors import CheckpointError, NothingAccumulatedError, UnsupportedError
from fitrl.policy.batch_loss import batch_loss
from fitrl.policy.loading import load_policy
from fitrl.protocols.results import (
    ForwardBackwardResult,
    OptimStepResult,
    TokenLogprobs,
    TrainerConfig,
    TrainerStatus,
)


class PlainTrainer:
    """SGD on the tiny policy, one history a row."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._network = load_policy("tiny").causal_lm
        self._optimizer = torch.optim.SGD(self._network.parameters(), lr=0.1)
        self._step = self._accumulated = 0

    def _logprobs(self, batch: fitrl.Batch) -> Tensor:
        rows, inputs = batch.loss_inputs, batch.model_inputs
        if batch.layout != "padded":
            raise UnsupportedError(f"a {batch.layout} row: use pack(..., layout='padded')")
        logits = self._network(inputs.input_ids).logits.flatten(0, 1)[rows.rows] / rows.temperature[:, None]
        return logits.log_softmax(-1).gather(1, rows.targets[:, None]).squeeze(1)

    def forward_backward(
        self, batch: fitrl.Batch, objective: fitrl.Objective | fitrl.CustomObjective | None = None
    ) -> ForwardBackwardResult:
        result = batch_loss(batch, self._logprobs(batch), objective or fitrl.Objective())
        result.loss.backward()
        self._accumulated += 1
        metrics = {name: float(value) for name, value in result.metrics.items()}
        return ForwardBackwardResult(loss=float(result.loss.detach()), metrics=metrics)

    def optim_step(self, *, learning_rate: float | None = None) -> OptimStepResult:
        if not self._accumulated:
            raise NothingAccumulatedError("optim_step before any forward_backward")
        rate = 0.1 if learning_rate is None else learning_rate
        self._optimizer.param_groups[0]["lr"] = rate
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._network.parameters() if p.grad is not None])
        self._optimizer.step()
        accumulated = self._accumulated
        self.clear_gradients()
        self._step += 1
        return OptimStepResult(
            step=self._step, learning_rate=rate, grad_norm=float(norm), accumulated_microbatches=accumulated
        )

    def clear_gradients(self) -> None:
        self._optimizer.zero_grad()
        self._accumulated = 0

    def save(self, name: str | None = None, path: str | None = None, weights_only: bool = False) -> str:
        file = Path(path) if path is not None else self._folder / f"{name or f'{self._step:04d}'}.pt"
        torch.save({"step": self._step, "network": self._network.state_dict()}, file)
        return str(file)

    def load(self, path: str | None = None) -> str:
        found = sorted(self._folder.glob("*.pt")) if path is None else [Path(path)]
        if not found:
            raise CheckpointError(f"{self._folder} holds no checkpoint")
        state = torch.load(found[-1])
        self._network.load_state_dict(state["network"])
        self._step = state["step"]
        self.clear_gradients()
        return str(found[-1])

    def get_config(self) -> TrainerConfig:
        return TrainerConfig(
            backend="plain",
            base_model="tiny",
            lora_rank=None,
            precision="32-true",
            world_size=1,
            gradient_clip_val=None,
        )

    def get_status(self) -> TrainerStatus:
        return TrainerStatus(step=self._step, accumulated_microbatches=self._accumulated, learning_rate=0.1)

    @torch.no_grad()
    def forward(self, batch: fitrl.Batch) -> TokenLogprobs:
        return TokenLogprobs(logprobs=self._logprobs(batch))

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._network.state_dict().items()


@contextmanager
def opened(folder: Path) -> Iterator[PlainTrainer]:
    """One, ready to train."""
    yield PlainTrainer(folder)
