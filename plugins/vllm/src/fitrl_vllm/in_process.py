"""`InProcessEngine`: vLLM's `LLM` in the trainer's process."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from fitrl.errors import InvalidArgumentError
from fitrl_vllm.engine import ADAPTER, Answer, Request, Revived
from fitrl_vllm.errors import EngineError

_BEFORE = 8  # tokens of the prompt that a text is decoded behind


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request, and who waits for the answer."""

    prompt: dict[str, list[int]]
    params: Any
    adapter: Any
    answer: asyncio.Future[Any]


class InProcessEngine:
    """Ask a `vllm.LLM`; requests that arrive while it works join the ones under way.

    Nobody else may generate with it meanwhile: it has one queue of answers.

    Args:
        llm: made with `logprobs_mode="processed_logprobs"`, `enable_lora=True` for adapters, and `**TRANSFER`
            for weights that come without files.
    """

    TRANSFER: ClassVar[dict[str, Any]] = {
        "worker_extension_cls": "fitrl_vllm.engine_side.fitrl_vllm_engine.worker.Worker",
        "weight_transfer_config": {"backend": "fitrl"},
    }
    """Arguments of `vllm.LLM`, for `VLLMSampler(transfer="memory")` or `"nccl"`."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._numbers = itertools.count()
        self._arrived: dict[str, _Asked] = {}
        self._under_way: dict[str, _Asked] = {}
        self._working: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()
        self._adapter: Any = None
        self._num_adapters = 0

    async def complete(self, request: Request, *, adapter: bool) -> list[Answer]:
        """Sample n completions."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        context, size = int(self._llm.model_config.max_model_len), len(request.prompt_ids)
        if size >= context:
            raise InvalidArgumentError(f"the prompt has {size} tokens, the engine's context is {context}; shorten it")
        params = SamplingParams(
            n=request.n,
            max_tokens=min(request.max_new_tokens, context - size),
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=0 if request.top_k is None else request.top_k,
            stop=list(request.stop),
            seed=request.seed,
            logprobs=0,
            flat_logprobs=True,
            detokenize=bool(request.stop),  # else vLLM makes text of each token, twice with logprobs: half of its time
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        output = await self._ask(request.prompt_ids, params, adapter)
        return [
            Answer(
                token_ids=tuple(out.token_ids),
                logprobs=_first_of_each(out.logprobs),
                text=out.text if request.stop else self._text(request, out),
                finish_reason=str(out.finish_reason),
            )
            for out in sorted(output.outputs, key=lambda out: int(out.index))
        ]

    def _text(self, request: Request, out: Any) -> str:
        """What was said behind the prompt, without the token that ended it.

        As vLLM would have it, but for a character that was cut off: vLLM leaves it out, and the next turn asks for it.
        """
        tokenizer = self._llm.get_tokenizer()

        def decode(token_ids: Sequence[int]) -> str:
            return str(tokenizer.decode(list(token_ids), skip_special_tokens=True))

        said = tuple(out.token_ids)[: -1 if out.finish_reason == "stop" else None]
        before = request.prompt_ids[-_BEFORE:]  # some tokenizers leave out a space where a text begins
        seen, whole = decode(before), decode((*before, *said))
        return whole[len(seen) :] if whole.startswith(seen) else decode(said)

    async def score(self, token_ids: Sequence[int], *, adapter: bool) -> list[float]:
        """Logprobs of a prompt."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=1,
            temperature=1.0,
            prompt_logprobs=0,
            flat_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        output = await self._ask(token_ids, params, adapter)
        return list(_first_of_each(output.prompt_logprobs))

    async def load_adapter(self, folder: Path) -> None:
        """Take it in place of the one before, under a number that no cached prompt was computed with."""
        from vllm.lora.request import LoRARequest

        self._num_adapters += 1
        self._adapter = LoRARequest(ADAPTER, self._num_adapters, str(folder))

    async def load_weights(self, folder: Path) -> None:
        """Load them, and forget the prompts that were computed with others."""
        async with self._turn:
            await self._rpc("reload_weights", weights_path=str(folder))
            await self._forget_prompts()

    async def tell_of_weights(self) -> list[dict[str, str]]:
        """Asked of what `TRANSFER` adds to the workers."""
        try:
            return await self._rpc("tell_of_weights")
        except Exception as error:
            raise EngineError(
                f"vllm.LLM(...) takes weights without files only if made with **InProcessEngine.TRANSFER: {error}"
            ) from error

    async def receive(self, init_info: dict[str, Any] | None) -> None:
        """By vLLM's weight-transfer API."""
        async with self._turn:
            if init_info is not None:
                await self._rpc("init_weight_transfer_engine", init_info=init_info)
            await self._rpc("start_weight_update")
            await self._rpc("update_weights", update_info={})
            await self._rpc("finish_weight_update")
            await self._forget_prompts()

    async def _forget_prompts(self) -> None:
        if not await asyncio.to_thread(self._llm.reset_prefix_cache):
            raise EngineError("vLLM could not forget the prompts it computed with the old weights")

    async def _rpc(self, method: str, **arguments: Any) -> list[Any]:
        """What each worker answers."""
        answers: list[Any] = await asyncio.to_thread(self._llm.collective_rpc, method, kwargs=arguments)
        return answers

    async def sleep(self) -> None:
        """Level 1: weights to the host's memory, cached prompts dropped."""
        async with self._turn:
            await asyncio.to_thread(self._llm.sleep, 1)

    async def wake(self) -> None:
        """Take weights and cache back to the device."""
        async with self._turn:
            await asyncio.to_thread(self._llm.wake_up)

    async def revive(self, *, is_dead: bool) -> Revived:
        """An engine of this process does not lose its connection."""
        return "gone"

    async def aclose(self) -> None:
        """The engine is the user's."""

    async def _ask(self, token_ids: Sequence[int], params: Any, adapter: bool) -> Any:
        """Hand a request to whoever works, and wait for all of its answer.

        Raises:
            EngineError: vLLM raised.
        """
        answer = asyncio.get_running_loop().create_future()
        asked = _Asked({"prompt_token_ids": list(token_ids)}, params, self._adapter if adapter else None, answer)
        self._arrived[f"fitrl-{next(self._numbers)}"] = asked
        if self._working is None or self._working.done():
            self._working = asyncio.create_task(self._work())  # not of this request, which may be cancelled
        return await answer

    async def _work(self) -> None:
        """Step until everything is answered."""
        async with self._turn:
            while self._arrived or self._under_way:
                arrived, self._arrived = self._arrived, {}
                self._under_way |= arrived
                gone = [name for name, asked in self._under_way.items() if asked.answer.cancelled()]
                try:
                    outputs = await asyncio.to_thread(self._step, arrived, gone)
                except Exception as error:
                    failed, self._under_way = self._under_way, {}
                    for asked in failed.values():
                        _settle(asked, error)
                    with contextlib.suppress(Exception):  # it may be dead
                        self._llm.llm_engine.abort_request(list(failed))
                    continue
                for name in gone:
                    del self._under_way[name]
                for name, output in outputs.items():
                    _settle(self._under_way.pop(name), output)

    def _step(self, arrived: dict[str, _Asked], gone: list[str]) -> dict[str, Any]:
        """Steps of the engine, until there is something to say: answers that are whole, or why a request was refused.

        The loop is returned to where a request arrived or was given up, not after each step: that would be two
        hand-overs between threads for every token.
        """
        engine, outputs = self._llm.llm_engine, {}
        for name, asked in arrived.items():
            if name not in gone:
                try:
                    [prompt] = engine.renderer.render_cmpl([asked.prompt])
                    engine.add_request(name, prompt, asked.params, lora_request=asked.adapter)
                except ValueError as error:
                    outputs[name] = error
        if running := [name for name in gone if name not in arrived]:
            engine.abort_request(running)
        while engine.has_unfinished_requests() and not outputs:
            outputs = {output.request_id: output for output in engine.step() if output.finished}
            if self._arrived or any(asked.answer.cancelled() for asked in self._under_way.values()):
                break
        return {name: output for name, output in outputs.items() if name not in gone}


def _first_of_each(positions: Any) -> tuple[float, ...]:
    """Of vLLM's flat logprobs: the token that is there comes first, and a prompt's first one has none."""
    starts, ends = positions.start_indices, positions.end_indices
    return tuple(positions.logprobs[start] for start, end in zip(starts, ends, strict=True) if start < end)


def _settle(asked: _Asked, outcome: Any) -> None:
    if asked.answer.done():  # cancelled
        return
    if isinstance(outcome, Exception):
        error = EngineError(f"vLLM: {type(outcome).__name__}: {outcome}")
        error.__cause__ = outcome
        asked.answer.set_exception(error)
    else:
        asked.answer.set_result(outcome)
