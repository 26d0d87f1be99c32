"""Chats with trained models: the embedded sampler, in the server's process, on weights of saved checkpoints.

A pinned step is loaded as it is. The newest step of a model has one sampler that takes over each new checkpoint.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from starlette.concurrency import run_in_threadpool

import fitrl
from fitrl.data.tokens import render_prompt
from fitrl.errors import CheckpointError, InvalidArgumentError, ModelNotFoundError
from fitrl.policy.loading import load_policy, load_weights
from fitrl_serverless import wire
from fitrl_serverless.server.errors import RefusedError
from fitrl_serverless.server.registry import Registry, StoredModel
from fitrl_serverless.server.settings import Settings
from fitrl_serverless.wire.groups import plain

_DEFAULT_TOKENS = 256


class Chats:
    """Answers chat requests.

    Args:
        registry: of the server.
        settings: of the server.
    """

    def __init__(self, registry: Registry, settings: Settings) -> None:
        self._registry = registry
        self._settings = settings
        self._samplers: OrderedDict[tuple[str, int | None], fitrl.TransformersSampler] = OrderedDict()
        self._loading = asyncio.Lock()
        self._under_way = 0

    async def complete(self, owner: str, body: wire.ChatRequest) -> wire.ChatCompletion:
        """Answer a request of an owner.

        Raises:
            RefusedError: 404, no such model or step; 422, more than the limits; 429, too many requests at once.
            InvalidArgumentError: a value that the sampler refuses.
            TokenizationError: a conversation that the chat template refuses.
        """
        limit = self._check(body)
        if self._under_way >= self._settings.limits.chats:
            raise RefusedError(429, f"{self._under_way} chats are under way: try again", {"retry-after": "1"})
        self._under_way += 1
        try:
            artifact = wire.Artifact.parse(body.model)
            model, step = await run_in_threadpool(self._registry.find, owner, artifact)
            sampler = await self._sampler(model, step, pinned=artifact.step is not None)
            prompt = await run_in_threadpool(_prompt, body, sampler)
            completions = await sampler.sample(
                prompt,
                n=body.n,
                max_new_tokens=limit,
                temperature=1.0 if body.temperature is None else body.temperature,
                top_p=1.0 if body.top_p is None else body.top_p,
                top_k=body.top_k,
                stop=[body.stop] if isinstance(body.stop, str) else body.stop or (),
                seed=body.seed,
            )
        finally:
            self._under_way -= 1
        return _answer(body, artifact, prompt, completions)

    def forget(self, model_id: str) -> None:
        """Let go of a deleted model's weights."""
        for key in [key for key in self._samplers if key[0] == model_id]:
            del self._samplers[key]

    def _check(self, body: wire.ChatRequest) -> int:
        """The longest completion that the request allows."""
        limits = self._settings.limits
        if (not body.messages) == (body.prompt_token_ids is None):
            raise RefusedError(422, "pass messages, or prompt_token_ids in their place")
        if body.prompt_token_ids is not None and body.tools:
            raise RefusedError(422, "tools are rendered with messages: prompt_token_ids have them already")
        if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
            raise RefusedError(422, "max_tokens and max_completion_tokens are two names of one thing: pass one")
        if body.n > limits.completions:
            raise RefusedError(422, f"n may be {limits.completions} at most, got {body.n}")
        asked = body.max_completion_tokens or body.max_tokens or min(_DEFAULT_TOKENS, limits.completion_tokens)
        if asked > limits.completion_tokens:
            raise RefusedError(422, f"max_tokens may be {limits.completion_tokens} at most, got {asked}")
        return asked

    async def _sampler(self, model: StoredModel, step: int, *, pinned: bool) -> fitrl.TransformersSampler:
        key = (model.id, step if pinned else None)
        async with self._loading:  # one at a time: what is loaded together would not fit together
            sampler = self._samplers.get(key)
            if sampler is None or sampler.version != step:
                try:
                    sampler = await run_in_threadpool(self._load, model, step, sampler)
                except (CheckpointError, ModelNotFoundError, InvalidArgumentError) as error:
                    self._samplers.pop(key, None)
                    raise RefusedError(503, f"step {step} of this model cannot be loaded now") from error
            self._samplers[key] = sampler
            self._samplers.move_to_end(key)
            while len(self._samplers) > self._settings.samplers:
                self._samplers.popitem(last=False)
            return sampler

    def _load(
        self, model: StoredModel, step: int, known: fitrl.TransformersSampler | None
    ) -> fitrl.TransformersSampler:
        """A sampler of a step: a new one, or the known one with other weights."""
        if known is None:
            policy = load_policy(self._settings.base_models[model.base_model], model.lora)
            policy.network.to(self._settings.sampler_device)
            sampler = fitrl.TransformersSampler(policy, version=0)
        else:
            sampler = known
        with sampler.lock:
            if step:
                load_weights(sampler.policy, self._registry.folder(model, step))
            sampler.update((), step)
        return sampler


def _prompt(body: wire.ChatRequest, sampler: fitrl.TransformersSampler) -> list[int]:
    if body.prompt_token_ids is not None:
        return body.prompt_token_ids
    messages: list[dict[str, Any]] = [plain(message) for message in body.messages]
    return render_prompt(sampler.tokenizer, messages, body.tools)


def _answer(
    body: wire.ChatRequest, artifact: wire.Artifact, prompt: Sequence[int], completions: Sequence[fitrl.Completion]
) -> wire.ChatCompletion:
    version = completions[0].version
    choices = [wire.choice_to_wire(completion, index) for index, completion in enumerate(completions)]
    if not body.logprobs:
        choices = [choice.model_copy(update={"logprobs": None}) for choice in choices]
    sampled = sum(len(completion.token_ids or ()) for completion in completions)
    named = wire.Artifact(entity=artifact.entity, project=artifact.project, name=artifact.name, step=version)
    return wire.ChatCompletion(
        id=f"chatcmpl-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=named.model,
        choices=choices,
        usage=wire.Usage(prompt_tokens=len(prompt), completion_tokens=sampled, total_tokens=len(prompt) + sampled),
        policy_version=version,
    )
