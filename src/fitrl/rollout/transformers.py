"""The embedded sampler: transformers and a KV cache, in the trainer's process, on the trainer's weights or a copy.

A copy takes new weights between two tokens: what is under way goes on with them and its cache, and each token has the
version that sampled it. Requests that arrive in the same turn of the event loop are sampled as one batch in a worker
thread. A prompt is computed once for its n completions. Logprobs come from the same head as the trainer's, so that the
two agree.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fitrl.data.completion import Completion
from fitrl.errors import InvalidArgumentError, SamplerError
from fitrl.policy.loading import trained_state
from fitrl.policy.policy import Policy
from fitrl.policy.sharding import in_pieces
from fitrl.rollout.sampler import check_sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def _nothing() -> None:
    """In place of a reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    """What requests of one batch share."""

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int | None
    stop: tuple[str, ...]


@dataclass(slots=True, kw_only=True)
class _Request:
    prompt_ids: tuple[int, ...]
    n: int
    seed: int
    future: asyncio.Future[list[Completion]]


@dataclass(slots=True, kw_only=True)
class _Row:
    """One completion under way."""

    request: _Request
    uniforms: Tensor
    max_tokens: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    text: str | None = None


class TransformersSampler:
    """Sample with transformers.

    Args:
        policy: network, tokenizer and head; shared with the trainer, or a copy of its own.
        version: policy version of the weights.
        max_batch_size: most completions sampled at once.
        context: entered around each forward pass: the trainer's autocast.
        own_weights: nobody else trains or reads these weights, so that `update` need not wait for completions; its
            layers must not be compiled.
        lock: held while it samples, and by whoever changes the weights; None: one of its own.
        refuses: why a request cannot be answered where it is made, a sentence; None: it can.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        version: int = 0,
        max_batch_size: int = 256,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        own_weights: bool = False,
        lock: threading.RLock | None = None,
        refuses: Callable[[], str | None] = _nothing,
    ) -> None:
        if max_batch_size < 1:
            raise InvalidArgumentError(f"max_batch_size must be at least 1, got {max_batch_size}")
        self.policy = policy
        self.own_weights = own_weights
        if own_weights:
            policy.network.eval()
        self.lock = threading.RLock() if lock is None else lock
        self._refuses = refuses
        self._version = version
        self._max_batch_size = max_batch_size
        self._context = context
        # by event loop: a request is answered by the loop that asked, and one loop never waits for another
        self._waiting: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[_Settings, list[_Request]]] = (
            weakref.WeakKeyDictionary()
        )
        self._closed = False

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer."""
        return self.policy.tokenizer

    @property
    def version(self) -> int:
        """Policy version of the weights that answer."""
        return self._version

    def update(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy weights in (those that are shared with the trainer are there already) and take their version.

        Raises:
            SamplerError: a weight that this policy does not have.
        """
        with self.lock, torch.no_grad():
            own: Mapping[str, Tensor] | None = None
            for name, tensor in weights:
                own = own or trained_state(self.policy)
                if name not in own or own[name].shape != tensor.shape:
                    raise SamplerError(f"the weight {name!r} {tuple(tensor.shape)} does not fit this sampler's policy")
                if own[name].data_ptr() != tensor.data_ptr():
                    own[name].copy_(tensor)
            self._version = version

    def close(self) -> None:
        """Refuse further requests; the policy is not this sampler's any more."""
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
        """Sample n completions of one prompt; see `Sampler.sample`. Without a seed, torch's global RNG gives one."""
        self._check(prompt_ids, n, max_new_tokens, temperature, top_p, top_k, stop)
        loop = asyncio.get_running_loop()
        settings = _Settings(
            max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, stop=tuple(stop)
        )
        request = _Request(
            prompt_ids=tuple(prompt_ids),
            n=n,
            seed=int(torch.randint(2**62, ())) if seed is None else seed,
            future=loop.create_future(),
        )
        if loop not in self._waiting:
            self._waiting[loop] = {}
            loop.call_soon(self._dispatch, loop)
        self._waiting[loop].setdefault(settings, []).append(request)
        return await request.future

    def _dispatch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start one worker for everything that has arrived."""
        loop.run_in_executor(None, self._serve, loop, self._waiting.pop(loop))

    def _serve(self, loop: asyncio.AbstractEventLoop, waiting: dict[_Settings, list[_Request]]) -> None:
        for settings, requests in waiting.items():
            try:
                answers = self._sample(settings, requests)
            except Exception as error:
                for request in requests:
                    loop.call_soon_threadsafe(_settle, request.future, None, error)
            else:
                for request, completions in zip(requests, answers, strict=True):
                    loop.call_soon_threadsafe(_settle, request.future, completions, None)

    def _check(
        self,
        prompt_ids: Sequence[int],
        n: int,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        top_k: int | None,
        stop: Sequence[str],
    ) -> None:
        if self._closed:
            raise SamplerError("this sampler's trainer was closed or took up another model; ask trainer.sampler(model)")
        if (reason := self._refuses()) is not None:  # here, on the caller's side: a worker thread would wait forever
            raise SamplerError(reason)
        if not len(prompt_ids):
            raise InvalidArgumentError("prompt_ids is empty: a completion needs at least one token before it")
        size = self.policy.vocabulary_size
        if not 0 <= min(prompt_ids) <= max(prompt_ids) < size:
            wrong = next(token for token in prompt_ids if not 0 <= token < size)
            raise InvalidArgumentError(f"prompt_ids holds {wrong}; the policy's vocabulary is 0 to {size - 1}")
        check_sampling(n=n, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, stop=stop)
        context = self.policy.context_length
        if context is not None and len(prompt_ids) >= context:
            raise InvalidArgumentError(
                f"the prompt has {len(prompt_ids)} tokens, the policy's context is {context}; shorten it"
            )

    def _sample(self, settings: _Settings, requests: Sequence[_Request]) -> list[list[Completion]]:
        """Sample all completions of requests that share settings; equal prompts are computed once."""
        context = self.policy.context_length
        rows_of: list[list[_Row]] = []
        by_prompt: dict[tuple[int, ...], list[_Row]] = {}
        for request in requests:
            limit = settings.max_new_tokens
            if context is not None:
                limit = min(limit, context - len(request.prompt_ids))
            uniforms = torch.rand(request.n, limit, generator=torch.Generator().manual_seed(request.seed % 2**63))
            rows = [_Row(request=request, uniforms=row, max_tokens=limit) for row in uniforms]
            rows_of.append(rows)
            by_prompt.setdefault(request.prompt_ids, []).extend(rows)
        size = self._max_batch_size
        prompts = [
            (prompt, rows[start : start + size])
            for prompt, rows in by_prompt.items()
            for start in range(0, len(rows), size)
        ]
        network = self.policy.network
        with nullcontext() if self.own_weights else self.lock:
            if in_pieces(network):
                raise SamplerError(
                    "the policy's weights lie in pieces on several ranks: sample between calls of fit_rl, with "
                    "trainer.sampler(model); with a strategy in your own hands call its lend_weights() first, on every "
                    "rank, and sample from its lent_policy"
                )
            was_training = network.training
            network.eval()
            try:
                batch: list[tuple[tuple[int, ...], list[_Row]]] = []
                for prompt in prompts:
                    if batch and sum(len(rows) for _, rows in batch) + len(prompt[1]) > self._max_batch_size:
                        self._generate(batch, settings)
                        batch = []
                    batch.append(prompt)
                self._generate(batch, settings)
            finally:
                network.train(was_training)
        return [[self._finish(row, settings) for row in rows] for rows in rows_of]

    def _finish(self, row: _Row, settings: _Settings) -> Completion:
        text = row.text if row.text is not None else self._decode(row.token_ids)
        return Completion(
            message={"role": "assistant", "content": text},
            token_ids=tuple(row.token_ids),
            logprobs=tuple(row.logprobs),
            temperature=settings.temperature,
            prompt_ids=row.request.prompt_ids,
            finish_reason=row.finish_reason,
            version=row.versions[0] if row.versions else self._version,
            versions=tuple(row.versions) if len(set(row.versions)) > 1 else None,
            full_support=settings.top_p == 1.0 and settings.top_k is None,
        )

    def _decode(self, token_ids: Sequence[int]) -> str:
        ids = list(token_ids)
        if ids and ids[-1] in self.policy.stop_ids:
            ids.pop()
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    @torch.no_grad()
    def _generate(self, prompts: Sequence[tuple[tuple[int, ...], list[_Row]]], settings: _Settings) -> None:
        """Prefill each prompt once, then one token a row and turn until every row has ended."""
        from transformers import DynamicCache

        policy = self.policy
        device = next(policy.network.parameters()).device
        width = max(len(ids) for ids, _ in prompts)
        ids = torch.zeros(len(prompts), width, dtype=torch.int64)
        attention = torch.zeros(len(prompts), width, dtype=torch.int64)
        for place, (prompt_ids, _) in enumerate(prompts):
            ids[place, width - len(prompt_ids) :] = torch.tensor(prompt_ids)
            attention[place, width - len(prompt_ids) :] = 1
        ids, attention = ids.to(device), attention.to(device)
        positions = (attention.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=policy.causal_lm.config.get_text_config())
        logits, version = self._logits(ids, attention, positions, cache)

        rows = [row for _, rows in prompts for row in rows]
        repeats = torch.tensor([len(rows) for _, rows in prompts], device=device)
        index = torch.repeat_interleave(torch.arange(len(prompts), device=device), repeats)
        if len(rows) != len(prompts):
            cache.batch_select_indices(index)
        logits, attention, position = logits[index], attention[index], positions[index, -1]
        uniforms = torch.nn.utils.rnn.pad_sequence([row.uniforms for row in rows], batch_first=True).to(device)
        alive = list(range(len(rows)))
        for step in range(uniforms.shape[1]):
            chosen, logprobs = _choose(logits, uniforms[:, step], settings)
            going = self._append(rows, alive, chosen.tolist(), logprobs.tolist(), version, settings)
            if not going:
                return
            if len(going) < len(alive):
                kept = torch.tensor(going, device=device)
                alive = [alive[i] for i in going]
                cache.batch_select_indices(kept)
                chosen, attention, position = chosen[kept], attention[kept], position[kept]
                uniforms = uniforms[kept]
            attention = torch.cat([attention, torch.ones_like(attention[:, :1])], dim=1)
            position = position + 1
            logits, version = self._logits(chosen[:, None], attention, position[:, None], cache)

    def _logits(self, ids: Tensor, attention: Tensor, positions: Tensor, cache: Any) -> tuple[Tensor, int]:
        """Float32 logits [B, V] of the last position, and the version of the weights that gave them."""
        kwargs = {"attention_mask": attention, "past_key_values": cache, "use_cache": True}
        # layers that are compiled for training would be compiled once more for each of them, because of their cache; a
        # copy has none, and what is said here holds for all threads, the trainer's too
        eager = nullcontext() if self.own_weights else torch.compiler.set_stance("force_eager")
        with self.lock, self._context(), eager:
            version = self._version
            if self.policy.has_linear_head:
                hidden = self.policy.hidden(ids, positions, **kwargs).last_hidden_state[:, -1]
                return self.policy.logits(hidden), version
            logits: Tensor = self.policy.full_logits(ids, positions, logits_to_keep=1, **kwargs).logits[:, -1]
        return logits if logits.dtype == torch.float64 else logits.float(), version

    def _append(
        self,
        rows: Sequence[_Row],
        alive: Sequence[int],
        tokens: Sequence[int],
        logprobs: Sequence[float],
        version: int,
        settings: _Settings,
    ) -> list[int]:
        """Append a token to each living row; returns the places in `alive` that go on, those still waited for."""
        going: list[int] = []
        stop_ids = self.policy.stop_ids
        for place, (index, token, logprob) in enumerate(zip(alive, tokens, logprobs, strict=True)):
            row = rows[index]
            row.token_ids.append(token)
            row.logprobs.append(logprob)
            row.versions.append(version)
            if row.request.future.cancelled():
                continue
            if token in stop_ids or (settings.stop and self._hit_stop(row, settings.stop)):
                row.finish_reason = "stop"
            elif len(row.token_ids) < row.max_tokens:
                going.append(place)
        return going

    def _hit_stop(self, row: _Row, stop: Sequence[str]) -> bool:
        # a stop string of n characters lies in the last n tokens, or reaches a little before them in byte vocabularies
        tail = row.token_ids[-4 * max(map(len, stop)) :]
        if not any(string in str(self.tokenizer.decode(tail)) for string in stop):
            return False
        text = str(self.tokenizer.decode(row.token_ids, skip_special_tokens=True))
        cuts = [text.find(string) for string in stop if string in text]
        row.text = text[: min(cuts)] if cuts else text
        return True


def _choose(logits: Tensor, uniforms: Tensor, settings: _Settings) -> tuple[Tensor, Tensor]:
    """Sample a token a row by inverse transform; returns tokens [B] and their logprobs [B].

    The uniform number of a row comes from the row's own seed, so what is sampled beside it changes nothing.
    """
    if settings.temperature == 0.0:
        chosen = logits.argmax(dim=1)
        return chosen, torch.zeros_like(logits[:, 0])  # a greedy choice is certain
    log_probs = (logits / settings.temperature).log_softmax(dim=1)
    if settings.top_k is not None and settings.top_k < logits.shape[1]:
        lowest = log_probs.topk(settings.top_k, dim=1).values[:, -1:]
        log_probs = log_probs.masked_fill(log_probs < lowest, -torch.inf).log_softmax(dim=1)
    if settings.top_p < 1.0:
        ordered, order = log_probs.sort(dim=1, descending=True, stable=True)
        before = ordered.exp().cumsum(dim=1) - ordered.exp()
        cut = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before >= settings.top_p)
        log_probs = log_probs.masked_fill(cut, -torch.inf).log_softmax(dim=1)
    mass = log_probs.exp().double().cumsum(dim=1)
    at = uniforms.to(mass)[:, None] * mass[:, -1:]
    chosen = torch.searchsorted(mass, at, right=True).clamp(max=logits.shape[1] - 1)
    return chosen.squeeze(1), log_probs.gather(1, chosen).squeeze(1)


def _settle(
    future: asyncio.Future[list[Completion]], result: list[Completion] | None, error: BaseException | None
) -> None:
    if future.done():  # cancelled by its caller
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result or [])
