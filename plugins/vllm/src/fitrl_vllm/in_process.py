"""`InProcessEngine`: vLLM's `LLM` in the trainer's process."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fitrl.errors import InvalidArgumentError
from fitrl_vllm.engine import ADAPTER, Answer, Request
from fitrl_vllm.errors import EngineError


class InProcessEngine:
    """Ask a `vllm.LLM`; requests that arrive while it works are its next batch.

    Args:
        llm: made with `logprobs_mode="processed_logprobs"`, and `enable_lora=True` for adapters.
    """

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._waiting: list[tuple[Request, bool, asyncio.Future[list[Answer]]]] = []
        self._turn = asyncio.Lock()
        self._adapter: Any = None
        self._num_adapters = 0

    async def complete(self, request: Request, *, adapter: bool) -> list[Answer]:
        """Sample with the next batch."""
        context = int(self._llm.model_config.max_model_len)
        if len(request.prompt_ids) >= context:
            raise InvalidArgumentError(
                f"the prompt has {len(request.prompt_ids)} tokens, the engine's context is {context}; shorten it"
            )
        future: asyncio.Future[list[Answer]] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, adapter, future))
        async with self._turn:
            batch, self._waiting = [item for item in self._waiting if not item[2].cancelled()], []
            if batch:  # else it was served with the one before
                try:
                    answers = await asyncio.to_thread(self._generate, [item[:2] for item in batch])
                except Exception as error:
                    for _, _, waiting in batch:
                        if not waiting.done():
                            waiting.set_exception(EngineError(f"vLLM: {type(error).__name__}: {error}"))
                else:
                    for (_, _, waiting), answer in zip(batch, answers, strict=True):
                        if not waiting.done():
                            waiting.set_result(answer)
        return await future

    async def score(self, token_ids: Sequence[int], *, adapter: bool) -> list[float]:
        """Logprobs of a prompt."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=0)
        async with self._turn:
            [output] = await asyncio.to_thread(self._ask, [list(token_ids)], [params], [adapter])
        found = zip(token_ids[1:], output.prompt_logprobs[1:], strict=True)
        return [float(by_id[token].logprob) for token, by_id in found]

    async def load_adapter(self, folder: Path) -> None:
        """Take it in place of the one before, under a number that no cached prompt was computed with."""
        from vllm.lora.request import LoRARequest

        self._num_adapters += 1
        self._adapter = LoRARequest(ADAPTER, self._num_adapters, str(folder))

    async def load_weights(self, folder: Path) -> None:
        """Load them, and forget the prompts that were computed with others."""
        async with self._turn:
            await asyncio.to_thread(self._llm.collective_rpc, "reload_weights", kwargs={"weights_path": str(folder)})
            if not await asyncio.to_thread(self._llm.reset_prefix_cache):
                raise EngineError("vLLM could not forget the prompts it computed with the old weights")

    async def sleep(self) -> None:
        """Level 1: weights to the host's memory, cached prompts dropped."""
        async with self._turn:
            await asyncio.to_thread(self._llm.sleep, 1)

    async def wake(self) -> None:
        """Take weights and cache back to the device."""
        async with self._turn:
            await asyncio.to_thread(self._llm.wake_up)

    async def revive(self, *, is_dead: bool) -> bool:
        """An engine of this process does not lose its connection."""
        return False

    async def aclose(self) -> None:
        """The engine is the user's."""

    def _generate(self, requests: Sequence[tuple[Request, bool]]) -> list[list[Answer]]:
        from vllm import SamplingParams

        context = int(self._llm.model_config.max_model_len)
        params = [
            SamplingParams(
                n=request.n,
                max_tokens=min(request.max_new_tokens, context - len(request.prompt_ids)),
                temperature=request.temperature,
                top_p=request.top_p,
                top_k=0 if request.top_k is None else request.top_k,
                stop=list(request.stop),
                seed=request.seed,
                logprobs=0,
            )
            for request, _ in requests
        ]
        prompts = [list(request.prompt_ids) for request, _ in requests]
        outputs = self._ask(prompts, params, [adapter for _, adapter in requests])
        return [
            [
                Answer(
                    token_ids=tuple(out.token_ids),
                    logprobs=tuple(
                        float(by_id[token].logprob) for token, by_id in zip(out.token_ids, out.logprobs, strict=True)
                    ),
                    text=out.text,
                    finish_reason=str(out.finish_reason),
                )
                for out in sorted(output.outputs, key=lambda out: int(out.index))
            ]
            for output in outputs
        ]

    def _ask(self, prompts: list[list[int]], params: list[Any], adapters: list[bool]) -> list[Any]:
        loras = [self._adapter if adapter else None for adapter in adapters]
        outputs: list[Any] = self._llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts],
            params,
            lora_request=loras if any(lora is not None for lora in loras) else None,
            use_tqdm=False,
        )
        return outputs
