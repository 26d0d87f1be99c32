"""`Probe`: a fixed text whose logprobs tell which weights an engine answers with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fitrl_vllm.engine import Engine, Request
from fitrl_vllm.errors import StaleWeightsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEXT = (
    "A policy is a map from what was said to what is said next. The probability of each next word, given all words "
    "before it, is what the trainer changes and what the engine has to answer with: 1 + 2 = 3, and 17 * 4 = 68."
)
_TOKENS = 64
_MOVED = 1e-3  # nats; an engine in bfloat16 answers otherwise, by some bit of 63 numbers, after such a step


class Probe:
    """Ask an engine for the logprobs [T - 1] of a text of T tokens, and compare them with the trainer's.

    Args:
        tokenizer: of the policy.
        tolerance: most that both may differ in the mean over the tokens, in nats.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tolerance: float) -> None:
        ids: Sequence[int] = tokenizer(_TEXT, add_special_tokens=False)["input_ids"]
        self.token_ids: list[int] = [int(token) for token in ids[:_TOKENS]]
        self.tolerance = tolerance

    async def score(self, engine: Engine, *, adapter: bool) -> Tensor:
        """[T - 1] float32 logprobs, by the engine."""
        return torch.tensor(await engine.score(self.token_ids, adapter=adapter))

    async def tells_temperature(self, engine: Engine) -> bool:
        """Whether the engine's logprobs are of the distribution sampled from: at temperature 2 they differ then."""
        prompt = tuple(self.token_ids)
        hot = Request(prompt_ids=prompt, n=1, max_new_tokens=1, temperature=2.0, top_p=1.0, top_k=None, stop=(), seed=1)
        [answer] = await engine.complete(hot, adapter=False)
        plain = await engine.score([*prompt, *answer.token_ids], adapter=False)
        return abs(answer.logprobs[0] - plain[-1]) > 1e-6

    def compare(self, trainers: Tensor | None, engines: Tensor) -> None:
        """Compare what both say; a trainer that was not asked says nothing.

        Raises:
            StaleWeightsError: they differ by more than the tolerance.
        """
        if trainers is None:
            return
        difference = float((engines - trainers).abs().mean())
        if not difference <= self.tolerance:
            raise StaleWeightsError(
                f"the engine's logprobs differ from the trainer's by {difference:.2g} in the mean, "
                f"tolerance={self.tolerance:g}: it answers with other weights, or in another precision"
            )


def must_have_stayed(before: Tensor | None, after: Tensor | None, version: int) -> None:
    """Notice an engine that did not move, where the trainer's step was smaller than the tolerance.

    Args:
        before: [T - 1] the trainer's logprobs of the weights before; None: it was not asked.
        after: the same, of the new ones.
        version: of the new ones.

    Raises:
        StaleWeightsError: the trainer moved.
    """
    if before is None or after is None:
        return
    moved = float((after - before).abs().max())
    if moved > _MOVED:
        raise StaleWeightsError(
            f"the trainer's logprobs moved by up to {moved:.2g} to version {version}, the engine's did not at all: it "
            "answers with old weights"
        )
