"""From conversations to token ids: chat templates, sampled ids kept as they are, logprobs beside them.

Enters: a `Trajectory` of messages and completions. Leaves: its `TokenHistory` list. Sampled ids are never
re-tokenised. If a later turn was sampled after ids that do not extend the earlier ones (a template that drops
reasoning, say), the history is split there and the split is counted.
"""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, TypeAlias

import jinja2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fitrl.data.completion import Completion, Message, Tool
from fitrl.data.groups import Trajectory
from fitrl.data.histories import History, TokenHistory
from fitrl.errors import DataError, TokenizationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# log_softmax in low precision can end a little above zero; more than this is not a logarithm of a probability
_LOGPROB_TOLERANCE = 1e-3
_Array: TypeAlias = npt.NDArray[Any]


@dataclass(slots=True)
class Tokenized:
    """A trajectory as token ids, and how often one of its histories had to be split."""

    histories: list[TokenHistory]
    num_splits: int = 0

    def __len__(self) -> int:
        return sum(len(history) for history in self.histories)


def tokenize(trajectory: Trajectory, tokenizer: PreTrainedTokenizerBase, *, train_unsampled: bool = False) -> Tokenized:
    """Turn a trajectory into token histories.

    Args:
        trajectory: messages and completions; `token_histories`, where given, are taken as they are.
        tokenizer: the policy's; needs a chat template unless every completion carries `prompt_ids`.
        train_unsampled: also learn from assistant messages that come as plain dicts, and accept
            completions without logprobs. Their logprobs are NaN.

    Raises:
        DataError: logprobs missing, NaN, positive or of wrong length; temperature missing or 0; nothing
            that the policy said.
        TokenizationError: no chat template, or token strings that fit no id or several.
    """
    [tokenized] = finish([read_tokens(trajectory, tokenizer, train_unsampled=train_unsampled)])
    check(tokenized.histories, need_logprobs=not train_unsampled)
    return tokenized


def read_tokens(trajectory: Trajectory, tokenizer: PreTrainedTokenizerBase, *, train_unsampled: bool = False) -> Draft:
    """What `tokenize` does for a trajectory alone; `finish` and `check` are faster for many together."""
    if trajectory.token_histories:
        return Draft(given=list(trajectory.token_histories))
    draft = Draft()
    for history in trajectory.histories():
        segments = _tokenize_history(history, tokenizer, train_unsampled)
        draft.segments += segments
        draft.num_splits += max(len(segments) - 1, 0)
    if not draft.segments:
        raise DataError(
            "a trajectory holds nothing that the policy said: put fitrl.Completion or OpenAI Choice objects into "
            "messages_and_choices, or pass allow_training_without_logprobs=True to learn from assistant messages"
        )
    return draft


def finish(drafts: Sequence[Draft]) -> list[Tokenized]:
    """Token histories of trajectories that were read: one tensor a column for all, of which each history is a part."""
    segments = [segment for draft in drafts for segment in draft.segments]
    lengths = [segment.length for segment in segments]

    def column(parts: Iterable[Sequence[_Array]], dtype: type[np.generic]) -> tuple[Tensor, ...]:
        values = np.concatenate([*chain.from_iterable(parts)], dtype=dtype)
        return torch.split_with_sizes(torch.from_numpy(values), lengths)

    def stretched(runs: Iterable[Sequence[tuple[int, Any]]], dtype: type[np.generic]) -> tuple[Tensor, ...]:
        counts, values = zip(*chain.from_iterable(runs), strict=True)
        return torch.split_with_sizes(torch.from_numpy(np.repeat(np.array(values, dtype), np.array(counts))), lengths)

    if not segments:
        return [Tokenized(draft.given) for draft in drafts]
    columns = zip(
        column((segment.token_ids for segment in segments), np.int64),
        stretched((segment.said for segment in segments), np.bool_),
        column((segment.logprobs for segment in segments), np.float32),
        stretched((segment.temperature for segment in segments), np.float32),
        stretched((segment.versions for segment in segments), np.int64),
        segments,
        strict=True,
    )
    histories = (
        TokenHistory(
            token_ids=token_ids,
            mask=mask,
            logprobs=logprobs,
            temperature=temperature,
            versions=versions,
            full_support=segment.full_support,
        )
        for token_ids, mask, logprobs, temperature, versions, segment in columns
    )
    return [Tokenized([*draft.given, *islice(histories, len(draft.segments))], draft.num_splits) for draft in drafts]


def check(histories: Sequence[TokenHistory], *, need_logprobs: bool, vocabulary_size: int | None = None) -> None:
    """Check the numbers of token histories.

    Raises:
        DataError: a token id is outside the vocabulary, a logprob is missing, positive or infinite, a temperature is
            not above 0, or the first token of a history is to be trained on.
    """
    if not histories:
        return
    if vocabulary_size is not None:
        ids = torch.cat([history.token_ids for history in histories])
        low, high = torch.aminmax(ids) if len(ids) else (ids.new_zeros(()), ids.new_zeros(()))
        if low < 0 or high >= vocabulary_size:
            outside = int(ids[(ids < 0) | (ids >= vocabulary_size)][0])
            raise DataError(
                f"token id {outside} is outside the policy's vocabulary, 0 to {vocabulary_size - 1}: was "
                "the trajectory sampled from another model?"
            )
    mask = torch.cat([history.mask for history in histories])
    lengths = torch.tensor([len(history) for history in histories])
    if bool(mask[(lengths.cumsum(0) - lengths)[lengths > 0]].any()):
        raise DataError("the first token of a history cannot be trained on: nothing predicts it")
    logprobs = torch.cat([history.logprobs for history in histories])
    missing = logprobs.isnan() & mask
    if need_logprobs and bool(missing.any()):
        raise DataError(
            f"{int(missing.sum())} of {int(mask.sum())} sampled tokens have no logprob (NaN): ask the sampler for "
            "logprobs, or pass allow_training_without_logprobs=True"
        )
    wrong = ((logprobs > _LOGPROB_TOLERANCE) | logprobs.isinf()) & mask
    if bool(wrong.any()):
        raise DataError(
            f"{float(logprobs[wrong][0])} is no logprob: the logarithm of a probability is finite and at most 0"
        )
    temperature = torch.cat([history.temperature for history in histories])
    refused = (~(temperature > 0) | temperature.isinf()) & mask
    if bool(refused.any()):
        raise DataError(
            f"temperature {float(temperature[refused][0])} cannot be trained on: a greedy choice has no probability to "
            "learn from; sample with temperature > 0"
        )


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: list[Tool] | None = None
) -> list[int]:
    """Token ids of a conversation that the assistant is about to continue."""
    return _render(tokenizer, messages, tools, add_generation_prompt=True)


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    tools: list[Tool] | None,
    *,
    add_generation_prompt: bool,
) -> list[int]:
    _require_template(tokenizer)
    return list(_apply(tokenizer, messages, tools, add_generation_prompt=add_generation_prompt, return_dict=False))


def _apply(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: list[Tool] | None, **options: Any
) -> Any:
    render: Any = tokenizer.apply_chat_template
    try:
        return render(messages, tools=tools, tokenize=True, **options)
    except jinja2.TemplateError as error:
        raise TokenizationError(f"the chat template refuses the conversation: {error}") from error


def _require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise TokenizationError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template: set tokenizer.chat_template, use an "
            "instruction-tuned base_model, or give every Completion its prompt_ids"
        )


@dataclass(slots=True)
class _Segment:
    """A token history under construction: columns in parts; those of few different values as pairs of count and value.

    The logprobs of what the policy only read are NaN.
    """

    length: int = 0
    token_ids: list[_Array] = field(default_factory=list)
    said: list[tuple[int, bool]] = field(default_factory=list)
    logprobs: list[_Array] = field(default_factory=list)
    temperature: list[tuple[int, float]] = field(default_factory=list)
    versions: list[tuple[int, int]] = field(default_factory=list)
    full_support: bool = True

    def begins(self, prompt: _Array) -> bool:
        """Whether a prompt goes on from here."""
        start = 0
        for part in self.token_ids:
            if not np.array_equal(prompt[start : start + len(part)], part):
                return False
            start += len(part)
        return True

    def context(self, ids: _Array) -> None:
        """Append ids that the policy read."""
        self._append(ids, np.full(len(ids), math.nan), said=False, temperature=1.0, versions=[(len(ids), -1)])

    def sampled(self, ids: _Array, logprobs: _Array, temperature: float, versions: list[tuple[int, int]]) -> None:
        """Append ids that the policy said."""
        self._append(ids, logprobs, said=True, temperature=temperature, versions=versions)

    def _append(
        self, ids: _Array, logprobs: _Array, *, said: bool, temperature: float, versions: list[tuple[int, int]]
    ) -> None:
        self.length += len(ids)
        self.token_ids.append(ids)
        self.said.append((len(ids), said))
        self.logprobs.append(logprobs)
        self.temperature.append((len(ids), temperature))
        self.versions += versions


@dataclass(slots=True)
class Draft:
    """A trajectory that was read, before `finish` makes its histories: those that it came with, and segments."""

    given: list[TokenHistory] = field(default_factory=list)
    segments: list[_Segment] = field(default_factory=list)
    num_splits: int = 0


def _tokenize_history(history: History, tokenizer: PreTrainedTokenizerBase, train_unsampled: bool) -> list[_Segment]:
    items = history.items()

    def before(stop: int) -> list[Message]:
        return [item.message if isinstance(item, Completion) else item for item in items[:stop]]

    segments: list[_Segment] = []
    for index, item in enumerate(items):
        if isinstance(item, Completion):
            prompt = item.columns.prompt_ids
            if prompt is None:
                prompt = np.array(render_prompt(tokenizer, before(index), history.tools), np.int32)
            if train_unsampled and item.token_ids is None and item.token_bytes is None:
                ids = _assistant_ids(tokenizer, before(index + 1), history.tools, prompt)
                logprobs: _Array = np.full(len(ids), math.nan)
            else:
                ids, logprobs = _sampled(item, tokenizer, train_unsampled)
            temperature = _temperature(item, history)
            versions, full_support = _versions(item, len(ids)), item.full_support
        elif train_unsampled and item.get("role") == "assistant":
            prompt = np.array(render_prompt(tokenizer, before(index), history.tools), np.int32)
            ids = _assistant_ids(tokenizer, before(index + 1), history.tools, prompt)
            logprobs = np.full(len(ids), math.nan)
            temperature, versions, full_support = 1.0, [(len(ids), -1)], True
        else:
            continue
        if not segments or not segments[-1].begins(prompt):
            segments.append(_Segment())
        segment = segments[-1]
        segment.context(prompt[segment.length :])
        segment.sampled(ids, logprobs, temperature, versions)
        segment.full_support &= full_support
    return segments


def _sampled(
    completion: Completion, tokenizer: PreTrainedTokenizerBase, train_unsampled: bool
) -> tuple[_Array, _Array]:
    ids, logprobs = completion.columns.token_ids, completion.columns.logprobs
    if ids is None:
        if completion.token_bytes is None:
            raise DataError(
                f"a completion has neither token ids nor logprobs ({completion.text[:60]!r}): ask the server for "
                "logprobs=True, or pass allow_training_without_logprobs=True"
            )
        ids = np.array([_id_of(raw, tokenizer) for raw in completion.token_bytes], np.int32)
    if logprobs is None:
        if not train_unsampled:
            raise DataError(
                f"a completion has no logprobs ({completion.text[:60]!r}): ask the sampler for them, or pass "
                "allow_training_without_logprobs=True"
            )
        return ids, np.full(len(ids), math.nan)
    if len(logprobs) != len(ids):
        raise DataError(
            f"a completion has {len(ids)} token ids but {len(logprobs)} logprobs ({completion.text[:60]!r})"
        )
    return ids, logprobs


def _versions(completion: Completion, num_tokens: int) -> list[tuple[int, int]]:
    if completion.versions is None:
        return [(num_tokens, completion.version)]
    if len(completion.versions) != num_tokens:
        raise DataError(
            f"a completion has {num_tokens} tokens but {len(completion.versions)} versions ({completion.text[:60]!r})"
        )
    return [(1, version) for version in completion.versions]


def _temperature(completion: Completion, history: History) -> float:
    temperature = completion.temperature if completion.temperature is not None else history.temperature
    if temperature is None:
        raise DataError(
            f"a completion does not say its sampling temperature ({completion.text[:60]!r}): OpenAI choices do not "
            "carry it, so pass Trajectory(temperature=...) or Completion.from_choice(..., temperature=...)"
        )
    return temperature


def _assistant_ids(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: list[Tool] | None, prompt: _Array
) -> _Array:
    """Ids of the last assistant message: by the template's generation marks, else whatever follows the prompt."""
    template = tokenizer.chat_template
    if isinstance(template, str) and re.search(r"\{%-?\s*generation", template):
        rendered = _apply(tokenizer, messages, tools, return_dict=True, return_assistant_tokens_mask=True)
        full = list(rendered["input_ids"])
        marked = [i for i, flag in enumerate(rendered["assistant_masks"]) if flag and i >= len(prompt)]
        full = full[: marked[-1] + 1] if marked else full
    else:
        full = _render(tokenizer, messages, tools, add_generation_prompt=False)
    if full[: len(prompt)] != prompt.tolist() or len(full) == len(prompt):
        raise TokenizationError(
            "the chat template renders an assistant message differently from its generation prompt, so its tokens "
            "cannot be told apart; sample it with a sampler that returns token ids"
        )
    return np.array(full[len(prompt) :], np.int32)


# Token strings -> ids. One table per tokenizer, kept as long as the tokenizer lives.
_TABLES: weakref.WeakKeyDictionary[Any, dict[bytes, list[int]]] = weakref.WeakKeyDictionary()


def _id_of(raw: bytes, tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer not in _TABLES:
        _TABLES[tokenizer] = _bytes_table(tokenizer)
    ids = _TABLES[tokenizer].get(raw, [])
    if len(ids) == 1:
        return ids[0]
    fault = f"fits {len(ids)} ids: {ids[:8]}" if ids else "is in no vocabulary entry"
    raise TokenizationError(
        f"the token string {raw!r} {fault}; ask the server for token ids (vLLM: return_tokens_as_token_ids=True)"
    )


def _bytes_table(tokenizer: PreTrainedTokenizerBase) -> dict[bytes, list[int]]:
    """Vocabulary by the bytes of each entry; byte-level BPE, sentencepiece pieces and plain strings."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    byte_of = _byte_level_alphabet()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    byte_level = "ByteLevel" in str(backend.decoder) if backend is not None else "Ġ" in vocabulary
    table: dict[bytes, list[int]] = {}
    for piece, token_id in vocabulary.items():
        if piece in added:
            raw = piece.encode()
        elif byte_level and all(char in byte_of for char in piece):
            raw = bytes(byte_of[char] for char in piece)
        elif match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece):
            raw = bytes([int(match[1], 16)])
        else:
            raw = piece.replace("\u2581", " ").encode()
        table.setdefault(raw, []).append(token_id)
    return table


def _byte_level_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level BPE vocabularies.

    Printable Latin-1 bytes stand for themselves; the others, in order, take the characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
