"""A service in memory: what a remote backend's tests talk to. Its network is transformers' own, its loss explicit."""

from __future__ import annotations

import copy
import importlib.resources
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from fitrl.data.batch import Batch
from fitrl.objective.objective import CustomObjective, Objective
from fitrl.policy.batch_loss import batch_loss
from fitrl.strategies.remote import RemoteStep, RemoteStepResult, RemoteStrategy

_SAVED: dict[Path, dict[str, tuple[int, dict, dict | None]]] = {}


class InMemoryService:
    """Holds the policy; takes optimizer steps; keeps saved states by URI."""

    def __init__(self) -> None:
        folder = importlib.resources.files("fitrl.assets") / "tiny"
        self.network = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float64).train()
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=0.0)
        self.saved: dict[str, tuple[int, dict, dict | None]] = {}
        self.requests: list[tuple[int, RemoteStep]] = []
        self.step = 0
        self.fail_next = False

    @classmethod
    def at(cls, folder: Path) -> InMemoryService:
        """A service with the base policy that finds what earlier ones saved for the same folder."""
        service = cls()
        service.saved = _SAVED.setdefault(folder, {})
        return service

    def train(self, microbatches: Sequence[tuple[Batch, Objective]], step: RemoteStep) -> RemoteStepResult:
        if self.fail_next:
            self.fail_next = False
            raise ConnectionError("the service is away")
        self.requests.append((len(microbatches), step))
        losses, metrics = [], []
        self.optimizer.zero_grad()
        for batch, objective in microbatches:
            inputs, targets = batch.model_inputs, batch.loss_inputs
            # with a cache, transformers would not see that a row holds several histories
            logits = self.network(inputs.input_ids, position_ids=inputs.position_ids, use_cache=False).logits
            rows = logits.flatten(0, 1)[targets.rows] / targets.temperature[:, None]
            logprobs = rows.log_softmax(-1).gather(1, targets.targets[:, None]).squeeze(1)
            result = batch_loss(batch, logprobs, objective)
            result.loss.backward()
            losses.append(float(result.loss.detach()))
            metrics.append({name: float(value) for name, value in result.metrics.items()})
        limit = step.grad_clip_norm if step.grad_clip_norm is not None else float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), limit)
        for group in self.optimizer.param_groups:
            group.update(lr=step.learning_rate, betas=step.betas, eps=step.eps, weight_decay=step.weight_decay)
        self.optimizer.step()
        self.step += 1
        return RemoteStepResult(losses=losses, metrics=metrics, grad_norm=float(norm))


class InMemoryStrategy(RemoteStrategy):
    """A remote strategy of about fifteen lines."""

    strategy_name = "in_memory"

    def __init__(self, service: InMemoryService) -> None:
        super().__init__()
        self.service = service

    def submit(
        self, microbatches: Sequence[tuple[Batch, Objective | CustomObjective]], step: RemoteStep
    ) -> Callable[[], RemoteStepResult]:
        answer = self.service.train(microbatches, step)
        return lambda: answer

    def remote_save(self, name: str, weights_only: bool) -> str:
        service = self.service
        optimizer = None if weights_only else copy.deepcopy(service.optimizer.state_dict())
        service.saved[f"memory://{name}"] = (service.step, copy.deepcopy(service.network.state_dict()), optimizer)
        return f"memory://{name}"

    def remote_load(self, uri: str) -> int:
        self.service.step, weights, optimizer = copy.deepcopy(self.service.saved[uri])
        self.service.network.load_state_dict(weights)
        self.service.optimizer = torch.optim.AdamW(self.service.network.parameters(), lr=0.0)
        if optimizer is not None:
            self.service.optimizer.load_state_dict(optimizer)
        return self.service.step

    def newest(self) -> str | None:
        return next(reversed(self.service.saved), None)
