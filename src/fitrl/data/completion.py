"""Completions: what the policy said, with its token ids, logprobs and temperature.

Enters: what a sampler sampled, or a `Choice` of an OpenAI client. Leaves: a `Completion`, which histories keep.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt

from fitrl.data.json_lines import number_from_json, numbers_to_json
from fitrl.errors import DataError

Message: TypeAlias = dict[str, Any]
Tool: TypeAlias = dict[str, Any]

_TOKEN_ID_PREFIX = "token_id:"
_Number = TypeVar("_Number", bound=np.generic)


@runtime_checkable
class OpenAIChoice(Protocol):
    """The part of `openai.types.chat.chat_completion.Choice` that is read here."""

    @property
    def message(self) -> Any:
        """The assistant's message."""

    @property
    def logprobs(self) -> Any:
        """`ChoiceLogprobs` or None."""

    @property
    def finish_reason(self) -> Any:
        """Why sampling ended."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Columns:
    """A completion's numbers as arrays, made when it is sampled: while others still are, not while a GPU waits.

    Attributes:
        token_ids: [T] int32, or None.
        logprobs: [T] float32, or None.
        prompt_ids: [P] int32, or None.
    """

    token_ids: npt.NDArray[np.int32] | None
    logprobs: npt.NDArray[np.float32] | None
    prompt_ids: npt.NDArray[np.int32] | None

    @classmethod
    def of(cls, completion: Completion) -> Columns:
        """Those of a completion."""
        return cls(
            token_ids=_column(completion.token_ids, np.int32, "token_ids"),
            logprobs=_column(completion.logprobs, np.float32, "logprobs"),
            prompt_ids=_column(completion.prompt_ids, np.int32, "prompt_ids"),
        )

    def to_bytes(self) -> dict[str, bytes | None]:
        """Each by its name: to be compared."""
        columns = {"token_ids": self.token_ids, "logprobs": self.logprobs, "prompt_ids": self.prompt_ids}
        return {name: None if column is None else column.tobytes() for name, column in columns.items()}


def _column(values: tuple[Any, ...] | None, dtype: type[_Number], name: str) -> npt.NDArray[_Number] | None:
    if values is None:
        return None
    try:
        return np.fromiter(values, dtype=dtype, count=len(values))
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{name} of a completion: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One message sampled from the policy: what a sampler returns and a history keeps.

    Attributes:
        message: the message as chat code sees it, `{"role": "assistant", "content": ...}`.
        token_ids: [T] the sampled ids, the end-of-turn id included; never re-tokenised. None when a
            server gave token strings only (`token_bytes`).
        token_bytes: [T] the bytes of each sampled token, from a server that tells no ids.
        logprobs: [T] natural logarithm of each id's probability under the distribution it was sampled
            from, temperature included. None when the server gave none.
        temperature: sampling temperature; 0 is greedy and cannot be trained on.
        prompt_ids: the ids that the completion was sampled after; None asks the chat template.
        finish_reason: "stop", "length", "tool_calls", ...
        version: policy version (optimizer steps) that sampled it; the first of several.
        versions: [T] the version that sampled each token, where the weights changed on the way; None: it is one.
        full_support: False after top_p < 1 or top_k, which change the distribution's support.
        columns: the long ones of these as arrays.

    Raises:
        DataError: a token id or a logprob is no number, or an id does not fit into 32 bits.
    """

    message: Message
    token_ids: tuple[int, ...] | None = None
    token_bytes: tuple[bytes, ...] | None = None
    logprobs: tuple[float, ...] | None = None
    temperature: float | None = None
    prompt_ids: tuple[int, ...] | None = None
    finish_reason: str = "stop"
    version: int = 0
    versions: tuple[int, ...] | None = None
    full_support: bool = True
    columns: Columns = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", Columns.of(self))

    @property
    def policy_versions(self) -> tuple[int, int]:
        """First and last policy version that sampled a token."""
        versions = self.versions or (self.version,)
        return min(versions), max(versions)

    @property
    def text(self) -> str:
        """The message's text."""
        return str(self.message.get("content") or "")

    @classmethod
    def from_choice(
        cls,
        choice: OpenAIChoice,
        *,
        temperature: float | None = None,
        version: int = 0,
        full_support: bool = True,
    ) -> Completion:
        """Read an OpenAI `Choice`; logprob tokens are `token_id:N` or token strings with their bytes.

        Args:
            choice: a choice of a chat completion asked with `logprobs=True`.
            temperature: the request's temperature; the choice does not carry it.
            version: policy version that the server answered with.
            full_support: False when the request had top_p < 1 or top_k.
        """
        message = choice.message
        as_dict = message.model_dump(exclude_none=True) if hasattr(message, "model_dump") else dict(message)
        entries = getattr(choice.logprobs, "content", None) if choice.logprobs is not None else None
        ids: tuple[int, ...] | None = None
        raw: tuple[bytes, ...] | None = None
        logprobs: tuple[float, ...] | None = None
        if entries is not None:
            logprobs = tuple(float(entry.logprob) for entry in entries)
            if all(_is_token_id(entry.token) for entry in entries):
                ids = tuple(int(entry.token.removeprefix(_TOKEN_ID_PREFIX)) for entry in entries)
            else:
                raw = tuple(
                    bytes(entry.bytes) if getattr(entry, "bytes", None) is not None else entry.token.encode()
                    for entry in entries
                )
        return cls(
            message=as_dict,
            token_ids=ids,
            token_bytes=raw,
            logprobs=logprobs,
            temperature=temperature,
            finish_reason=str(choice.finish_reason or "stop"),
            version=version,
            full_support=full_support,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "message": self.message,
            "token_ids": None if self.token_ids is None else list(self.token_ids),
            "token_bytes": None if self.token_bytes is None else [list(raw) for raw in self.token_bytes],
            "logprobs": None if self.logprobs is None else numbers_to_json(self.logprobs),
            "temperature": self.temperature,
            "prompt_ids": None if self.prompt_ids is None else list(self.prompt_ids),
            "finish_reason": self.finish_reason,
            "version": self.version,
            "versions": None if self.versions is None else list(self.versions),
            "full_support": self.full_support,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Completion:
        """Inverse of `to_dict`."""
        raw, logprobs, versions = data["token_bytes"], data["logprobs"], data.get("versions")
        return cls(
            message=data["message"],
            token_ids=None if data["token_ids"] is None else tuple(data["token_ids"]),
            token_bytes=None if raw is None else tuple(bytes(token) for token in raw),
            logprobs=None if logprobs is None else tuple(number_from_json(value) for value in logprobs),
            temperature=data["temperature"],
            prompt_ids=None if data["prompt_ids"] is None else tuple(data["prompt_ids"]),
            finish_reason=data["finish_reason"],
            version=data["version"],
            versions=None if versions is None else tuple(versions),
            full_support=data["full_support"],
        )


def _is_token_id(token: str) -> bool:
    return token.startswith(_TOKEN_ID_PREFIX) and token.removeprefix(_TOKEN_ID_PREFIX).isdecimal()
