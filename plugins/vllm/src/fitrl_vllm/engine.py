"""`Engine`: what a sampler asks of vLLM, whichever way it is reached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

ADAPTER = "policy"
"""The name of the trained adapter on the engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt, to be completed n times.

    Attributes:
        prompt_ids: [P] token ids, chat template applied.
        n: completions.
        max_new_tokens: longest completion.
        temperature: of sampling; 0 is greedy.
        top_p: nucleus; 1 keeps all tokens.
        top_k: most likely tokens to keep; None keeps all.
        stop: strings that end a completion.
        seed: of the first completion; None: fresh ones.
    """

    prompt_ids: tuple[int, ...]
    n: int
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int | None
    stop: tuple[str, ...]
    seed: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One completion.

    Attributes:
        token_ids: [T] as sampled, the end-of-turn id included.
        logprobs: [T] of the distribution sampled from.
        text: without special tokens, and without a stop string.
        finish_reason: "stop" or "length".
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: str


Revived = Literal["gone", "as it was", "perhaps anew"]
"""An engine after a lost connection: without answer; with the weights that it had taken; perhaps without them."""


class Engine(Protocol):
    """One vLLM engine. Coroutines run on the sampler's own event loop."""

    async def complete(self, request: Request, *, adapter: bool) -> list[Answer]:
        """Sample; `adapter`: with the adapter that was loaded."""

    async def score(self, token_ids: Sequence[int], *, adapter: bool) -> list[float]:
        """Logprobs [T - 1] of the token ids [T] behind the first, at temperature 1."""

    async def load_adapter(self, folder: Path) -> None:
        """Take a PEFT folder's adapter in place of the one before."""

    async def load_weights(self, folder: Path) -> None:
        """Take a folder's weights in place of the ones before."""

    async def tell_of_weights(self) -> list[dict[str, str]]:
        """Of each of its workers: "dtype" and "device", a kind, of the weights."""

    async def receive(self, init_info: dict[str, Any] | None) -> None:
        """Take all weights from a `fitrl_vllm.transfer.Sender` in place of the ones before.

        Args:
            init_info: what workers are initialized with first; None: they are already.
        """

    async def sleep(self) -> None:
        """Give the device's memory to a trainer that shares it."""

    async def wake(self) -> None:
        """Take it back."""

    async def revive(self, *, is_dead: bool) -> Revived:
        """After a lost connection: wait until it answers, or start it again.

        Args:
            is_dead: it certainly is; else the connection may be all that was lost.
        """

    async def aclose(self) -> None:
        """Close connections."""
