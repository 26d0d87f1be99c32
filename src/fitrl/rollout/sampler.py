"""`Sampler`: the one seam to inference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeAlias, runtime_checkable

from torch import Tensor

from fitrl.data.completion import Completion, Message, Tool
from fitrl.errors import InvalidArgumentError

Score: TypeAlias = Callable[[Sequence[int]], Tensor]
"""The trainer's own logprobs [T - 1] float32 of the token ids [T] behind the first; with several ranks a collective."""


@runtime_checkable
class Sampler(Protocol):
    """Samples completions from the newest policy it was given.

    Chat code also needs the tokenizer that belongs to the policy, as `tokenizer`.
    """

    @property
    def version(self) -> int:
        """Policy version (optimizer steps) of the weights that answer."""

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
        """Sample n completions of one prompt.

        Args:
            prompt_ids: token ids, chat template applied.
            n: how many.
            max_new_tokens: longest completion in tokens.
            temperature: 0 is greedy.
            top_p: keep the smallest set of tokens with this probability; below 1 the support changes.
            top_k: keep so many tokens; None keeps all.
            stop: strings that end a completion; the text ends before them, the token ids keep them.
            seed: makes the completions repeatable, whatever else is sampled at the same time.

        Returns:
            Completions with `prompt_ids`, `token_ids`, float32 `logprobs` of the distribution sampled from.
        """

    def update(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Answer with these weights from now on."""


@runtime_checkable
class ChatSampler(Sampler, Protocol):
    """A sampler that takes conversations, for services that render chat templates themselves."""

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
        """Sample n completions of one conversation; see `Sampler.sample`."""


@runtime_checkable
class ProvesWeights(Protocol):
    """A sampler that computes elsewhere, and proves which weights answer there; takes the place of `update`."""

    def update_proven(self, weights: Iterable[tuple[str, Tensor]], version: int, score: Score) -> None:
        """Answer with these weights from now on, and compare what they say there with what they say here.

        With several ranks every one drains the weights and asks for the same scores.

        Args:
            weights: names and whole tensors, as for `update`.
            version: policy version; the sampler's own changes only once it is proven.
            score: the trainer's logprobs of a probe.

        Raises:
            SamplerError: other weights answer.
        """


def check_sampling(
    *, n: int, max_new_tokens: int, temperature: float, top_p: float, top_k: int | None, stop: Sequence[str]
) -> None:
    """Check what `Sampler.sample` is asked with.

    Raises:
        InvalidArgumentError: one of them is out of range.
    """
    if isinstance(stop, str) or not isinstance(stop, Sequence) or not all(stop):
        raise InvalidArgumentError(f"stop must be a list of strings that are not empty, got {stop!r}")
    for name, value in (("n", n), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise InvalidArgumentError(f"{name} must be at least 1, got {value}")
    if not 0.0 <= temperature < float("inf"):
        raise InvalidArgumentError(f"temperature must be a finite number of at least 0, got {temperature}")
    if not 0.0 < top_p <= 1.0:
        raise InvalidArgumentError(f"top_p must be in (0, 1], got {top_p}")
    if top_k is not None and top_k < 1:
        raise InvalidArgumentError(f"top_k must be at least 1 or None, got {top_k}")
