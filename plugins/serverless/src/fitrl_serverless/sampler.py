"""`ServerlessSampler`: sample from a trained model over `/chat/completions`; ids and logprobs are kept as they come.

A conversation is sent as messages, and the service renders the chat template. Where the policy has spoken before,
`fitrl serve` is given the ids themselves, so that all turns are one history.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fitrl import Completion, Message, load_tokenizer, prompt_ids
from fitrl.data.completion import Tool
from fitrl.errors import SamplerError, UnsupportedError
from fitrl.rollout.sampler import check_sampling
from fitrl_serverless import wire
from fitrl_serverless.client.service import Service

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ServerlessSampler:
    """Samples from a model of a service, at a step or at its newest.

    Args:
        service: that serves it.
        artifact: given a step (None: the newest), the model's name.
        base_model: whose tokenizer is loaded, if ids have to be told apart here.
        version: step to sample from. 0 is the base model, which is asked for without a step.
        timeout_s: longest silence before an answer.
    """

    def __init__(
        self,
        service: Service,
        artifact: Callable[[int | None], wire.Artifact],
        *,
        base_model: str,
        version: int,
        timeout_s: float,
    ) -> None:
        self._service = service
        self._artifact = artifact
        self._base_model = base_model
        self._version = version
        self._timeout_s = timeout_s
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._closed = False

    @property
    def version(self) -> int:
        """Step of the weights that answer."""
        return self._version

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's tokenizer, loaded when it is first asked for."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._base_model)
        return self._tokenizer

    def update(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Sample from another step.

        Raises:
            UnsupportedError: weights were given, which the service has its own of.
        """
        for name, _ in weights:
            raise UnsupportedError(f"a service samples from its own checkpoints and takes no weights, got {name!r}")
        self._version = version

    def close(self) -> None:
        """Refuse further requests."""
        self._closed = True

    async def sample(
        self,
        prompt_ids: Sequence[int],
        *,
        n: int = 1,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        stop: Sequence[str] = (),
        seed: int | None = None,
    ) -> list[Completion]:
        """Sample n completions of one prompt; see `Sampler.sample`.

        Raises:
            UnsupportedError: the service takes messages only; `sample_chat`, and so `fitrl.rollout`, sends those.
            ServiceError: it cannot be used.
        """
        if not (await self._off_loop(self._service.about())).knows_fitrl:
            raise UnsupportedError("this service takes messages, not token ids: use sample_chat, or fitrl.rollout")
        settings = _settings(n, max_new_tokens, temperature, top_p, top_k, stop, seed)
        return await self._ask(settings, prompt_token_ids=list(prompt_ids))

    async def sample_chat(
        self,
        messages: Sequence[Message | Completion],
        *,
        tools: list[Tool] | None = None,
        n: int = 1,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        stop: Sequence[str] = (),
        seed: int | None = None,
    ) -> list[Completion]:
        """Sample n completions of one conversation; see `Sampler.sample`.

        Raises:
            SamplerError: the service told no logprobs.
            ServiceError: it cannot be used.
        """
        settings = _settings(n, max_new_tokens, temperature, top_p, top_k, stop, seed)
        has_spoken = any(isinstance(item, Completion) for item in messages)
        if has_spoken and (await self._off_loop(self._service.about())).knows_fitrl:
            return await self._ask(settings, prompt_token_ids=prompt_ids(self.tokenizer, messages, tools))
        plain = [item.message if isinstance(item, Completion) else item for item in messages]
        return await self._ask(
            settings, messages=[wire.Message.model_validate(message) for message in plain], tools=tools
        )

    async def _ask(self, settings: dict[str, Any], **prompt: Any) -> list[Completion]:
        if self._closed:
            raise SamplerError("the trainer of this sampler is closed, or has another model open: ask it for a new one")
        version = self._version
        artifact = self._artifact(version or None)
        request = wire.ChatRequest(
            model=artifact.model, logprobs=True, return_tokens_as_token_ids=True, **settings, **prompt
        )
        answer = await self._off_loop(self._service.chat(request, silence_s=self._timeout_s))
        if len(answer.choices) != settings["n"]:
            raise SamplerError(f"the service was asked for {settings['n']} completions and gave {len(answer.choices)}")
        told = version if answer.policy_version is None else answer.policy_version
        full_support = settings["top_p"] == 1.0 and settings.get("top_k") is None
        return [_completion(choice, settings["temperature"], told, full_support) for choice in answer.choices]

    async def _off_loop(self, work: Any) -> Any:
        """Run on the connection's event loop; a rollout that is cancelled cancels its request."""
        return await asyncio.wrap_future(self._service.connection.start(work))


def _settings(
    n: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int | None,
    stop: Sequence[str],
    seed: int | None,
) -> dict[str, Any]:
    """Sampling settings as a request has them; None is not sent."""
    check_sampling(n=n, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, stop=stop)
    return {
        "n": n,
        "max_tokens": max_new_tokens,
        "temperature": float(temperature),
        "top_p": float(top_p),
        "top_k": top_k,
        "stop": list(stop) or None,
        "seed": None if seed is None else seed % 2**63,
    }


def _completion(choice: wire.Choice, temperature: float, version: int, full_support: bool) -> Completion:
    if choice.logprobs is None or not choice.logprobs.content:
        raise SamplerError("the service told no logprobs of what it sampled, so nothing could be learned from it")
    read = wire.choice_from_wire(choice, version=version)
    return dataclasses.replace(read, temperature=temperature, full_support=full_support)
