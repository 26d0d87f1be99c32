"""How requests share an engine in this process, against a stand-in for `vllm.LLM`; `test_real` has the real one."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
import threading
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import fitrl
from fitrl.errors import InvalidArgumentError
from fitrl_vllm import EngineError, InProcessEngine
from fitrl_vllm.engine import Answer, Request


class Engine:
    """Says one token of each request in a step: its prompt's first id.

    Attributes:
        together: how many requests each step had.
        raises: what the next step raises.
        holds: steps wait while it is cleared.
    """

    def __init__(self) -> None:
        self.running: dict[str, Any] = {}
        self.together: list[int] = []
        self.aborted: list[str] = []
        self.raises: Exception | None = None
        self.renderer = SimpleNamespace(render_cmpl=list)
        self.holds = threading.Event()
        self.holds.set()

    def add_request(self, name: str, prompt: Any, params: Any, lora_request: Any) -> None:
        if params.temperature == 99.0:
            raise ValueError("such a temperature is refused")
        self.running[name] = SimpleNamespace(prompt=prompt["prompt_token_ids"], params=params, said=[])

    def abort_request(self, names: list[str]) -> None:
        self.aborted += names
        for name in names:
            self.running.pop(name, None)

    def has_unfinished_requests(self) -> bool:
        return bool(self.running)

    def step(self) -> list[Any]:
        self.holds.wait()
        self.together.append(len(self.running))
        if self.raises is not None:
            error, self.raises = self.raises, None
            raise error
        outputs = []
        for name, one in list(self.running.items()):
            one.said.append(one.prompt[0])
            finished = len(one.said) == one.params.max_tokens
            assert one.params.flat_logprobs and not one.params.detokenize
            places = range(len(one.said))
            found = SimpleNamespace(
                start_indices=[2 * at for at in places],
                end_indices=[2 * at + 2 for at in places],
                logprobs=[-0.5, -0.25] * len(places),  # of what was sampled, and of the likeliest
            )
            choices = [
                SimpleNamespace(index=n, token_ids=one.said, logprobs=found, text="", finish_reason="length")
                for n in reversed(range(one.params.n))
            ]
            outputs.append(SimpleNamespace(request_id=name, finished=finished, outputs=choices))
            if finished:
                del self.running[name]
        return outputs


@pytest.fixture
def engine(monkeypatch) -> Engine:
    vllm, params = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    vllm.SamplingParams = SimpleNamespace
    params.RequestOutputKind = SimpleNamespace(FINAL_ONLY="final")
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", params)
    return Engine()


@pytest.fixture
def inside(engine) -> InProcessEngine:
    return InProcessEngine(llm_with(fitrl.load_tokenizer("tiny"), engine))


def llm_with(tokenizer: Any, engine: Engine | None = None) -> Any:
    return SimpleNamespace(
        llm_engine=engine, model_config=SimpleNamespace(max_model_len=16), get_tokenizer=lambda: tokenizer
    )


def asked(first: int, *, tokens: int = 3, n: int = 1, temperature: float = 1.0) -> Request:
    return Request(
        prompt_ids=(first, 0),
        n=n,
        max_new_tokens=tokens,
        temperature=temperature,
        top_p=1.0,
        top_k=None,
        stop=(),
        seed=None,
    )


def test_requests_join_those_under_way(inside, engine) -> None:
    async def both() -> list[list[Answer]]:
        engine.holds.clear()
        first = asyncio.create_task(inside.complete(asked(1), adapter=False))
        while not engine.running:
            await asyncio.sleep(0)
        second = asyncio.create_task(inside.complete(asked(2, tokens=99, n=2), adapter=False))
        await asyncio.sleep(0)
        engine.holds.set()
        return [await first, await second]

    [one], two = asyncio.run(both())
    assert one.token_ids == (1, 1, 1) and one.logprobs == (-0.5,) * 3 and one.finish_reason == "length"
    assert [item.token_ids for item in two] == [(2,) * 14] * 2  # what the context has room for
    assert engine.together[:2] == [1, 2]


def test_steps_go_on_until_there_is_something_to_say(inside, engine, monkeypatch) -> None:
    turns, step = [], inside._step

    def counted(*arguments: Any) -> dict[str, Any]:
        turns.append(len(engine.together))
        return step(*arguments)

    monkeypatch.setattr(inside, "_step", counted)

    async def both() -> None:
        await asyncio.gather(*(inside.complete(asked(1, tokens=tokens), adapter=False) for tokens in (5, 9)))

    asyncio.run(both())
    assert turns == [0, 5] and len(engine.together) == 9


def test_a_request_that_is_given_up_is_taken_out(inside, engine) -> None:
    async def one_stays() -> list[Answer]:
        engine.holds.clear()
        tasks = [asyncio.create_task(inside.complete(asked(first, tokens=9), adapter=False)) for first in (1, 2)]
        while len(engine.running) < 2:
            await asyncio.sleep(0)
        tasks[0].cancel()
        await asyncio.sleep(0)
        engine.holds.set()
        return await tasks[1]

    [item] = asyncio.run(one_stays())
    assert item.token_ids == (2,) * 9 and engine.aborted == ["fitrl-0"] and engine.together == [2] + [1] * 8


def test_a_request_that_is_refused_fails_alone(inside) -> None:
    async def three() -> list[Any]:
        work = [
            inside.complete(asked(1), adapter=False),
            inside.complete(asked(2, temperature=99.0), adapter=False),
            inside.complete(asked(3), adapter=False),
        ]
        return await asyncio.gather(*work, return_exceptions=True)

    first, refused, last = asyncio.run(three())
    assert first[0].token_ids == (1, 1, 1) and last[0].token_ids == (3, 3, 3)
    assert isinstance(refused, EngineError) and "such a temperature is refused" in str(refused)


def test_a_step_that_fails_fails_its_requests_and_not_later_ones(inside, engine) -> None:
    async def two() -> list[Any]:
        engine.raises = RuntimeError("out of memory")
        work = [inside.complete(asked(first), adapter=False) for first in (1, 2)]
        failed = await asyncio.gather(*work, return_exceptions=True)
        return [*failed, await inside.complete(asked(3), adapter=False)]

    *failed, [later] = asyncio.run(two())
    assert all(isinstance(error, EngineError) and "out of memory" in str(error) for error in failed)
    assert later.token_ids == (3, 3, 3) and sorted(engine.aborted) == ["fitrl-0", "fitrl-1"]


def metaspace() -> PreTrainedTokenizerFast:
    """As Llama 2's: a token says whether a space is before it, and a text begins without one."""
    words = {word: number for number, word in enumerate(["</s>", "▁", "▁a", "a", "▁b", "é", "漢", "."])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="."))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


@pytest.mark.parametrize("tokenizer", [fitrl.load_tokenizer("tiny"), metaspace()], ids=["bytes", "metaspace"])
@given(data=st.data(), ended=st.booleans())
def test_texts_are_what_a_stream_of_tokens_says(tokenizer, data, ended) -> None:
    """vLLM makes them token by token, by tokenizers' `DecodeStream`."""
    special = tokenizer.eos_token_id

    def tokens(least: int) -> list[int]:
        if tokenizer.vocab_size < 256:
            ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12))
            return ids + data.draw(st.lists(st.integers(1, tokenizer.vocab_size - 1), min_size=least, max_size=1))
        parts = data.draw(st.lists(st.text("ab é漢.", max_size=3), min_size=least, max_size=6))
        ids = [[*tokenizer(part, add_special_tokens=False)["input_ids"], special] for part in parts]
        return [one for part in ids for one in part][: None if least else -1]

    prompt, said = tokens(1), tokens(0)
    stream = decoders.DecodeStream(ids=prompt, skip_special_tokens=True)
    expected = "".join(stream.step(tokenizer._tokenizer, one) or "" for one in said)
    out = SimpleNamespace(
        token_ids=[*said, *[special] * ended], finish_reason="stop" if ended else "length", text="not asked for"
    )
    request = dataclasses.replace(asked(0), prompt_ids=tuple(prompt))
    assert InProcessEngine(llm_with(tokenizer))._text(request, out) == expected


def test_a_prompt_without_room_is_refused(inside) -> None:
    request = Request(
        prompt_ids=(1,) * 16, n=1, max_new_tokens=1, temperature=1.0, top_p=1.0, top_k=None, stop=(), seed=None
    )
    with pytest.raises(InvalidArgumentError, match="context is 16"):
        asyncio.run(inside.complete(request, adapter=False))
