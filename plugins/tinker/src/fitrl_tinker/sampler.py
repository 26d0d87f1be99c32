"""`TinkerSampler`: completions from the service, with token ids, logprobs and the version that answered."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fitrl.data.completion import Completion
from fitrl.errors import InvalidArgumentError, SamplerError, UnsupportedError
from fitrl.policy.loading import resolve_base_model
from fitrl.rollout.sampler import check_sampling
from fitrl_tinker.service import Service

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TinkerSampler:
    """Samples on the service, from saved weights or the base model; a `fitrl.Sampler`.

    Args:
        service: which.
        base_model: its name there.
        tokenizer: of the base model.
        stop_ids: tokens that end a completion.
        path: URI of the saved weights; None: the base model.
        version: optimizer steps that they have seen.
    """

    def __init__(
        self,
        service: Service,
        base_model: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop_ids: Sequence[int],
        path: str | None = None,
        version: int = 0,
    ) -> None:
        self._service = service
        self._base_model = base_model
        self.tokenizer = tokenizer
        self._stop_ids = tuple(stop_ids)
        self._client: Any = None
        self._session: object = None
        self._closed = False
        self._lock = threading.Lock()  # requests that come together need one client
        self.move(path, version)

    def __repr__(self) -> str:
        return f"TinkerSampler({self.path or self._base_model!r}, version={self._version})"

    @property
    def version(self) -> int:
        """Policy version (optimizer steps) of the weights that answer."""
        return self._version

    @property
    def path(self) -> str | None:
        """URI of the weights that answer; None: the base model."""
        return self._path

    def move(self, path: str | None, version: int) -> None:
        """Answer with other saved weights from now on; requests under way are answered with the old ones."""
        with self._lock:
            self._path, self._version, self._client = path, version, None

    def update(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Refuse: weights do not travel to the service, they are deployed there.

        Raises:
            UnsupportedError: always; it says what to do.
        """
        raise UnsupportedError(
            "the service's weights are not sent from here: fit_rl(..., deploy_checkpoint=True) or "
            "trainer.deploy(model) moves this sampler to new ones"
        )

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
        """Sample n completions of one prompt; see `fitrl.Sampler`.

        The service's logprobs are of the policy's own distribution. With another temperature than 1, top_p or top_k
        that is not the one that was sampled from: such completions carry no logprobs, and cannot be learned from.

        Raises:
            ServiceError: the service failed, or did not answer in time.
            InvalidArgumentError: an argument out of range.
        """
        self._check(prompt_ids, n, max_new_tokens, temperature, top_p, top_k, stop)
        import tinker

        request = f"sample {n} completions of {max_new_tokens} tokens at most"
        client, version = await asyncio.to_thread(self._connected)
        endings: list[int] | list[str] = list(self._stop_ids)
        if stop:  # a request takes ids or strings, not both
            endings = [*stop, *(str(self.tokenizer.decode([token])) for token in self._stop_ids)]
        parameters = tinker.SamplingParams(
            max_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=-1 if top_k is None else top_k,
            stop=endings or None,
            seed=seed,
        )
        try:
            future = client.sample(
                prompt=tinker.ModelInput.from_ints(list(prompt_ids)), num_samples=n, sampling_params=parameters
            )
            waiting = future.future() if hasattr(future, "future") else future
            async with asyncio.timeout(self._service.timeout):
                answer = await asyncio.wrap_future(waiting)
        except TimeoutError:
            raise self._service.too_late(request) from None
        except Exception as error:
            raise self._service.explain(request, error) from self._service.cause(error)
        told = temperature == 1.0 and top_p == 1.0 and top_k is None
        completions = []
        for sequence in answer.sequences:
            ids = tuple(int(token) for token in sequence.tokens)
            logprobs = None if sequence.logprobs is None else tuple(float(value) for value in sequence.logprobs)
            if told and (logprobs is None or len(logprobs) != len(ids)):
                raise SamplerError(f"the service returned {len(ids)} tokens and no logprob for each of them")
            completions.append(
                Completion(
                    message={"role": "assistant", "content": self._text(ids, stop)},
                    token_ids=ids,
                    logprobs=logprobs if told else None,
                    temperature=temperature,
                    prompt_ids=tuple(prompt_ids),
                    finish_reason=str(sequence.stop_reason),
                    version=version,
                    full_support=top_p == 1.0 and top_k is None,
                )
            )
        return completions

    def _connected(self) -> tuple[Any, int]:
        with self._lock:
            if self._client is None or self._session is not self._service.session:
                self._client = self._service.sampling_client(base_model=self._base_model, path=self._path)
                self._session = self._service.session
            return self._client, self._version

    def _text(self, ids: Sequence[int], stop: Sequence[str]) -> str:
        kept = list(ids[:-1]) if ids and ids[-1] in self._stop_ids else list(ids)
        text = str(self.tokenizer.decode(kept, skip_special_tokens=True))
        cuts = [text.find(string) for string in stop if string in text]
        return text[: min(cuts)] if cuts else text

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
        if not len(prompt_ids):
            raise InvalidArgumentError("prompt_ids is empty: a completion needs at least one token before it")
        check_sampling(n=n, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, stop=stop)


def stop_ids(base_model: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens that end a completion: the tokenizer's, and those of the model's generation settings if they are here."""
    from transformers import GenerationConfig

    found = {tokenizer.eos_token_id}
    try:
        configured = GenerationConfig.from_pretrained(resolve_base_model(base_model)[0]).eos_token_id
        found.update(configured if isinstance(configured, list) else [configured])
    except (OSError, ValueError):
        pass  # a model without any
    return tuple(sorted(token for token in found if isinstance(token, int)))
