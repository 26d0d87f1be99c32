"""Somebody's own trainer, of plain torch and transformers: no base class of fitrl's and none of Lightning's."""

from __future__ import annotations

import importlib.resources
import math

import torch
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForCausalLM

from fitrl import Objective, policy_loss
from fitrl.errors import CheckpointError, NothingAccumulatedError
from fitrl.protocols.results import ForwardBackwardResult, OptimStepResult, TokenLogprobs, TrainerConfig, TrainerStatus

TINY = str(importlib.resources.files("fitrl.assets") / "tiny")


class Plain:
    def __init__(self, folder, learning_rate, schedule, clip, dtype):
        self.folder, self.learning_rate, self.schedule, self.clip = folder, learning_rate, schedule, clip
        self.network = AutoModelForCausalLM.from_pretrained(TINY, dtype=dtype)
        self.adam = torch.optim.AdamW(self.network.parameters(), weight_decay=0.0)
        self.step = self.waiting = 0

    def logprobs(self, inputs, targets):
        logits = self.network(inputs.input_ids, position_ids=inputs.position_ids, use_cache=False).logits
        rows = logits.flatten(0, 1)[targets.rows] / targets.temperature[:, None]
        return rows.log_softmax(-1).gather(1, targets.targets[:, None]).squeeze(1)

    def forward_backward(self, batch, objective=None):
        t = batch.loss_inputs
        columns = (t.old_logprobs, t.advantages, t.mask, t.trajectory_ids, objective or Objective())
        p = self.logprobs(batch.model_inputs, t)
        result = policy_loss(p, *columns, num_tokens=t.num_tokens, num_sequences=t.num_sequences)
        result.loss.backward()
        self.waiting += 1
        return ForwardBackwardResult(float(result.loss.detach()), {k: float(v) for k, v in result.metrics.items()})

    def optim_step(self, *, learning_rate=None):
        if not self.waiting:
            raise NothingAccumulatedError("there is no gradient to step with")
        rate = self.get_status().learning_rate if learning_rate is None else learning_rate
        norm = float(clip_grad_norm_(self.network.parameters(), self.clip or math.inf))
        self.adam.param_groups[0]["lr"] = rate
        self.adam.step()
        self.step, used = self.step + 1, self.waiting
        self.clear_gradients()
        return OptimStepResult(step=self.step, learning_rate=rate, grad_norm=norm, accumulated_microbatches=used)

    def clear_gradients(self):
        self.adam.zero_grad()
        self.waiting = 0

    def save(self, name=None, path=None, weights_only=False):
        where = path or str(self.folder / f"{name or self.step}.pt")
        adam = None if weights_only else self.adam.state_dict()
        torch.save((self.step, self.network.state_dict(), adam, torch.get_rng_state()), where)
        return where

    def load(self, path=None):
        found = path or max(map(str, self.folder.glob("*.pt")), default=None)
        if found is None:
            raise CheckpointError(f"nothing was saved in {self.folder}")
        self.step, weights, adam, random = torch.load(found)
        self.network.load_state_dict(weights)
        self.adam = torch.optim.AdamW(self.network.parameters(), weight_decay=0.0)
        if adam is not None:
            self.adam.load_state_dict(adam)
            torch.set_rng_state(random)
        self.clear_gradients()
        return found

    def get_config(self):
        fixed = {"precision": str(self.network.dtype), "world_size": 1, "gradient_clip_val": self.clip}
        return TrainerConfig(backend="plain", base_model="tiny", lora_rank=None, **fixed)

    def get_status(self):
        rate = self.learning_rate * self.schedule(self.step)
        return TrainerStatus(step=self.step, accumulated_microbatches=self.waiting, learning_rate=rate)

    @torch.no_grad()
    def forward(self, batch):
        return TokenLogprobs(logprobs=self.logprobs(batch.model_inputs, batch.loss_inputs).float())

    def named_weights(self):
        return ((name, tensor.detach()) for name, tensor in self.network.state_dict().items())
