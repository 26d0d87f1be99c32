"""Conversations to token ids: against transformers' own rendering and masks, and vocabularies made by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionMessage
from openai.types.chat.chat_completion import Choice, ChoiceLogprobs
from openai.types.chat.chat_completion_token_logprob import ChatCompletionTokenLogprob
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fitrl.data.completion import Completion
from fitrl.data.groups import Trajectory
from fitrl.data.histories import History, TokenHistory
from fitrl.data.tokens import finish, read_tokens, render_prompt, tokenize
from fitrl.errors import DataError, TokenizationError
from fitrl.rollout.rollout import prompt_ids
from helpers import END, completion, decode, facts, token_history, token_trajectory, trajectory, user

# reasoning of earlier turns is dropped, as by the templates of reasoning models
STRIPPING = """\
{%- for message in messages %}
    {%- set content = message['content'] %}
    {%- if message['role'] == 'assistant' and not loop.last %}
        {%- set content = content.split('</think>')[-1] %}
    {%- endif %}
    {{- '<|' ~ message['role'] ~ '|>' ~ content ~ '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"""

# no generation marks, and a newline after each message, as in ChatML
UNMARKED = """\
{%- for message in messages %}{{- '<|' ~ message['role'] ~ '|>' ~ message['content'] ~ '<|end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"""

# the prompt opens a thought that the finished message does not have
MISMATCHED = """\
{%- for message in messages %}{{- '<|' ~ message['role'] ~ '|>' ~ message['content'] ~ '<|end|>' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|><think>' }}{%- endif %}"""

CONTENT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda text: "<|" not in text)


@pytest.fixture
def with_template(tiny_tokenizer: PreTrainedTokenizerBase) -> Callable[[str | None], PreTrainedTokenizerBase]:
    """The bundled tokenizer with another chat template."""

    def change(template: str | None) -> PreTrainedTokenizerBase:
        changed = copy.deepcopy(tiny_tokenizer)
        changed.chat_template = template
        return changed

    return change


@pytest.fixture(scope="module")
def merging_tokenizer(tiny_tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Byte-level, like the bundled one, and with merges, so that a text has several tokenisations."""
    vocabulary = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for merged in ("ab", "Ġa"):
        vocabulary[merged] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b"), ("Ġ", "a")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", chat_template=tiny_tokenizer.chat_template
    )


def _sentencepiece_like(*more_pieces: str) -> PreTrainedTokenizerBase:
    """Pieces with a visible space, bytes as a fallback: the layout of Llama 2 and Gemma."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "a", "b", "c", "▁a", "ab", "▁ab", "é", *more_pieces]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b")]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


def _choice(*entries: tuple[str, float] | tuple[str, float, bytes], text: str = "7") -> Choice:
    """What the openai client gives for logprob tokens, with bytes where given."""
    content = [
        ChatCompletionTokenLogprob(
            token=entry[0], logprob=entry[1], bytes=list(entry[2]) if len(entry) > 2 else None, top_logprobs=[]
        )
        for entry in entries
    ]
    return Choice(
        index=0,
        finish_reason="stop",
        message=ChatCompletionMessage(role="assistant", content=text),
        logprobs=ChoiceLogprobs(content=content),
    )


def _asked(*items: Any, **fields: Any) -> Trajectory:
    return Trajectory(messages_and_choices=[user("3+4="), *items], **fields)


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[Any], **options: Any) -> tuple[list[int], list[bool]]:
    """Ids and assistant mask by transformers alone."""
    out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True, **options)
    return list(out["input_ids"]), [bool(flag) for flag in out["assistant_masks"]]


def _masked(history: TokenHistory) -> list[int]:
    return history.token_ids[history.mask].tolist()


# -- one history ----------------------------------------------------------------------------------------------------


def test_columns_of_one_answer(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    said = completion("12", logprobs=(-0.1, -0.2, -0.3), temperature=0.7, version=5)

    tokens = tokenize(_asked(said), tiny_tokenizer)

    [history] = tokens.histories
    prompt = tiny_tokenizer.encode("<|user|>3+4=<|end|><|assistant|>")
    assert history.token_ids.tolist() == [*prompt, ord("1"), ord("2"), END]
    assert history.mask.tolist() == [False] * len(prompt) + [True] * 3
    assert history.logprobs[history.mask].tolist() == pytest.approx([-0.1, -0.2, -0.3])
    assert history.logprobs[~history.mask].isnan().all()
    assert history.temperature[history.mask].tolist() == pytest.approx([0.7] * 3)
    assert history.temperature[~history.mask].tolist() == [1.0] * len(prompt)
    assert history.versions.tolist() == [-1] * len(prompt) + [5] * 3
    assert history.full_support
    assert (tokens.num_splits, len(tokens)) == (0, len(prompt) + 3)
    assert [history.token_ids.dtype, history.mask.dtype, history.logprobs.dtype] == [
        torch.int64,
        torch.bool,
        torch.float32,
    ]


@given(st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=4))
def test_turns_that_extend_each_other_are_one_history(
    tiny_tokenizer: PreTrainedTokenizerBase, turns: list[tuple[str, str]]
) -> None:
    conversation: list[Any] = []
    for question, answer in turns:
        conversation += [user(question), completion(answer)]
    held = Trajectory(messages_and_choices=conversation)

    tokens = tokenize(held, tiny_tokenizer)

    ids, mask = _rendered(tiny_tokenizer, held.messages())
    assert tokens.num_splits == 0
    assert [history.token_ids.tolist() for history in tokens.histories] == [ids]
    assert tokens.histories[0].mask.tolist() == mask


def test_tool_messages_between_turns_are_context(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    held = _asked(completion("add(3,4)"), {"role": "tool", "content": "7"}, completion("7"), tools=tools)

    [history] = tokenize(held, tiny_tokenizer).histories

    ids, mask = _rendered(tiny_tokenizer, held.messages(), tools=tools)
    assert history.token_ids.tolist() == ids
    assert history.mask.tolist() == mask
    assert '"name": "add"' in decode(tiny_tokenizer, history.token_ids)


def test_assistant_messages_that_were_not_sampled_are_context(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    example = [user("1+1="), {"role": "assistant", "content": "2"}]
    held = Trajectory(messages_and_choices=[*example, user("3+4="), completion("7")])

    [history] = tokenize(held, tiny_tokenizer).histories

    assert _masked(history) == [ord("7"), END]
    assert history.token_ids.tolist() == _rendered(tiny_tokenizer, held.messages())[0]


def test_what_comes_after_the_last_answer_is_left_out(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    [history] = tokenize(_asked(completion("7"), user("thanks")), tiny_tokenizer).histories

    assert history.token_ids.tolist()[-2:] == [ord("7"), END]


def test_one_truncated_support_marks_the_history(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    held = _asked(completion("7", full_support=False), user("1+1="), completion("2"))

    assert not tokenize(held, tiny_tokenizer).histories[0].full_support


def test_additional_histories_are_histories_of_their_own(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    extra = History(messages_and_choices=[user("summarise"), completion("ok")])

    tokens = tokenize(trajectory("7", additional_histories=[extra]), tiny_tokenizer)

    assert [_masked(history) for history in tokens.histories] == [[ord("7"), END], [*b"ok", END]]
    assert tokens.num_splits == 0  # two conversations, neither of them split


def test_token_histories_are_taken_as_they_are(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    given_ids = token_history([1, 2, 3], [0, 1, 1])

    assert tokenize(token_trajectory(given_ids), tiny_tokenizer).histories == [given_ids]


def test_many_trajectories_have_the_columns_that_each_has_alone(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    many = [
        _asked(completion("12", temperature=0.7, version=5)),
        token_trajectory(token_history([1, 2, 3], [0, 1, 1]), token_history([4, 5], [0, 1])),
        _asked(completion("1", versions=(3, 4)), user("and?"), completion("2", full_support=False)),
        trajectory("7", additional_histories=[History(messages_and_choices=[user("summarise"), completion("ok")])]),
    ]

    together = finish([read_tokens(one, tiny_tokenizer) for one in many])

    alone = [tokenize(one, tiny_tokenizer) for one in many]
    assert [tokens.num_splits for tokens in together] == [tokens.num_splits for tokens in alone]
    assert [len(tokens.histories) for tokens in together] == [1, 2, 1, 2]
    for ours, theirs in zip(together, alone, strict=True):
        assert [facts(history) for history in ours.histories] == [facts(history) for history in theirs.histories]
    versions = together[2].histories[0].versions
    assert versions[versions >= 0].tolist() == [3, 4, 0, 0]
    assert not together[2].histories[0].full_support and together[0].histories[0].full_support
    assert finish([]) == []


# -- sampled ids stay -----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 255), min_size=1, max_size=8))
def test_any_sampled_ids_survive(tiny_tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> None:
    """Random bytes are mostly no text: encoding what they decode to gives other ids."""
    said = completion(decode(tiny_tokenizer, ids), token_ids=[*ids, END])

    [history] = tokenize(_asked(said), tiny_tokenizer).histories

    assert _masked(history) == [*ids, END]


def test_a_tokenisation_that_the_tokenizer_would_not_choose_survives(
    merging_tokenizer: PreTrainedTokenizerBase,
) -> None:
    a, b, ab, end = merging_tokenizer.convert_tokens_to_ids(["a", "b", "ab", "<|end|>"])
    assert merging_tokenizer.encode("ab") == [ab]

    [history] = tokenize(_asked(completion("ab", token_ids=[a, b, end])), merging_tokenizer).histories

    assert _masked(history) == [a, b, end]


def test_a_later_turn_that_was_rendered_from_text_splits_and_is_counted(
    merging_tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Without prompt ids, the policy must have read what the template renders: other ids than it had said."""
    a, b, ab, end = merging_tokenizer.convert_tokens_to_ids(["a", "b", "ab", "<|end|>"])
    held = _asked(completion("ab", token_ids=[a, b, end]), user("again"), completion("ab", token_ids=[ab, end]))

    tokens = tokenize(held, merging_tokenizer)

    first, second = tokens.histories
    assert tokens.num_splits == 1
    assert (_masked(first), _masked(second)) == ([a, b, end], [ab, end])
    assert second.token_ids.tolist() == _rendered(merging_tokenizer, held.messages())[0]


def test_prompt_ids_keep_the_sampled_ids_over_turns(merging_tokenizer: PreTrainedTokenizerBase) -> None:
    a, b, ab, end = merging_tokenizer.convert_tokens_to_ids(["a", "b", "ab", "<|end|>"])
    conversation: list[Any] = [user("say ab")]
    seen = prompt_ids(merging_tokenizer, conversation)
    assert seen == render_prompt(merging_tokenizer, conversation)
    for said in ([a, b, end], [ab, end], [a, b, a, b, end]):
        text = decode(merging_tokenizer, said[:-1])
        conversation += [completion(text, token_ids=said, prompt_ids=tuple(seen)), user("say ab ab")]
        longer = prompt_ids(merging_tokenizer, conversation)
        assert longer[: len(seen) + len(said)] == seen + said
        plain = [item.message if isinstance(item, Completion) else item for item in conversation]
        assert decode(merging_tokenizer, longer) == decode(merging_tokenizer, render_prompt(merging_tokenizer, plain))
        seen = longer

    conversation[-1] = completion("ab", token_ids=[a, b, end], prompt_ids=tuple(seen))
    tokens = tokenize(Trajectory(messages_and_choices=conversation), merging_tokenizer)

    [history] = tokens.histories
    assert tokens.num_splits == 0
    assert _masked(history) == [a, b, end, ab, end, a, b, a, b, end, a, b, end]


def test_prompt_ids_close_a_message_that_was_cut_short(merging_tokenizer: PreTrainedTokenizerBase) -> None:
    a, b, end = merging_tokenizer.convert_tokens_to_ids(["a", "b", "<|end|>"])
    first = prompt_ids(merging_tokenizer, [user("say ab")])
    cut = completion("ab", token_ids=[a, b], prompt_ids=tuple(first), finish_reason="length")

    second = prompt_ids(merging_tokenizer, [user("say ab"), cut, user("go on")])

    assert second[: len(first) + 3] == [*first, a, b, end]


def test_prompt_ids_are_rendered_anew_when_the_message_is_not_what_was_sampled(
    merging_tokenizer: PreTrainedTokenizerBase,
) -> None:
    """A stop string is among the sampled ids, but not in the message."""
    first = prompt_ids(merging_tokenizer, [user("say ab")])
    stopped = completion("ab", token_ids=merging_tokenizer.encode("ab;"), prompt_ids=tuple(first), finish_reason="stop")
    conversation: list[Any] = [user("say ab"), stopped, user("go on")]

    second = prompt_ids(merging_tokenizer, conversation)
    tokens = tokenize(
        Trajectory(messages_and_choices=[*conversation, completion("b", prompt_ids=tuple(second))]), merging_tokenizer
    )

    plain = [user("say ab"), stopped.message, user("go on")]
    assert second == render_prompt(merging_tokenizer, plain)
    assert (len(tokens.histories), tokens.num_splits) == (2, 1)


def test_prompt_ids_of_half_a_character(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    """A completion may end within a character; its text then holds a replacement character, its ids do not."""
    first = prompt_ids(tiny_tokenizer, [user("?")])
    ids = [0xC3, END]
    half = completion(decode(tiny_tokenizer, ids[:1]), token_ids=ids, prompt_ids=tuple(first))

    second = prompt_ids(tiny_tokenizer, [user("?"), half, user("!")])

    assert second == [*first, *ids, *tiny_tokenizer.encode("<|user|>!<|end|><|assistant|>")]


def test_prompt_ids_add_no_space_that_the_template_does_not_render() -> None:
    """A sentencepiece tokenizer puts a space before whatever it is given."""
    tokenizer = _sentencepiece_like()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}</s>{% endfor %}"
    a, b, end = tokenizer.convert_tokens_to_ids(["a", "b", "</s>"])
    first = prompt_ids(tokenizer, [user("ab")])
    said = completion("ab", token_ids=[a, b, end], prompt_ids=tuple(first))

    second = prompt_ids(tokenizer, [user("ab"), said, user("ab")])

    assert second[: len(first) + 3] == [*first, a, b, end]
    rendered = render_prompt(tokenizer, [user("ab"), said.message, user("ab")])
    assert decode(tokenizer, second) == decode(tokenizer, rendered)


def test_a_template_that_drops_earlier_content_splits_and_is_counted(
    with_template: Callable[[str | None], PreTrainedTokenizerBase],
) -> None:
    tokenizer = with_template(STRIPPING)
    held = Trajectory(
        messages_and_choices=[
            user("3+4="),
            completion("<think>easy</think>7"),
            user("1+1="),
            completion("<think>hm</think>2"),
            user("2+2="),
            completion("4"),
        ]
    )

    tokens = tokenize(held, tokenizer)

    texts = [decode(tokenizer, history.token_ids) for history in tokens.histories]
    assert texts == [
        "<|user|>3+4=<|end|><|assistant|><think>easy</think>7<|end|>",
        "<|user|>3+4=<|end|><|assistant|>7<|end|><|user|>1+1=<|end|><|assistant|><think>hm</think>2<|end|>",
        "<|user|>3+4=<|end|><|assistant|>7<|end|><|user|>1+1=<|end|><|assistant|>2<|end|>"
        "<|user|>2+2=<|end|><|assistant|>4<|end|>",
    ]
    said = [decode(tokenizer, _masked(history)) for history in tokens.histories]
    assert said == ["<think>easy</think>7<|end|>", "<think>hm</think>2<|end|>", "4<|end|>"]
    assert tokens.num_splits == 2


def test_each_sampled_token_is_learned_from_once(
    with_template: Callable[[str | None], PreTrainedTokenizerBase],
) -> None:
    answers = ["<think>a</think>7", "2", "<think>b</think>4", "5"]
    conversation: list[Any] = []
    for answer in answers:
        conversation += [user("?"), completion(answer)]

    tokens = tokenize(Trajectory(messages_and_choices=conversation), with_template(STRIPPING))

    assert [i for history in tokens.histories for i in _masked(history)] == [
        i for answer in answers for i in [*answer.encode(), END]
    ]
    assert (len(tokens.histories), tokens.num_splits) == (3, 2)


# -- assistant messages that were not sampled -----------------------------------------------------------------------


def _plain_conversation() -> list[dict[str, Any]]:
    return [
        {"role": "system", "content": "Add."},
        user("3+4="),
        {"role": "assistant", "content": "7"},
        user("1+1="),
        {"role": "assistant", "content": "2"},
    ]


def test_generation_marks_say_what_to_learn(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    messages = _plain_conversation()

    [history] = tokenize(Trajectory(messages_and_choices=messages), tiny_tokenizer, train_unsampled=True).histories  # type: ignore[arg-type]

    ids, mask = _rendered(tiny_tokenizer, messages)
    assert history.token_ids.tolist() == ids
    assert history.mask.tolist() == mask
    assert history.logprobs.isnan().all()
    assert (history.versions == -1).all()


def test_generation_marks_leave_out_what_the_template_adds(
    with_template: Callable[[str | None], PreTrainedTokenizerBase],
) -> None:
    marked = UNMARKED.replace(
        "message['content'] ~ '<|end|>\\n' }}",
        "'' }}{%- generation %}{{- message['content'] ~ '<|end|>' }}{%- endgeneration %}{{- '\\n' }}",
    )
    tokenizer = with_template(marked)
    messages = _plain_conversation()[-2:]

    [history] = tokenize(Trajectory(messages_and_choices=messages), tokenizer, train_unsampled=True).histories  # type: ignore[arg-type]

    assert decode(tokenizer, _masked(history)) == "2<|end|>"


def test_without_generation_marks_what_follows_the_prompt_is_learned(
    with_template: Callable[[str | None], PreTrainedTokenizerBase],
) -> None:
    tokenizer = with_template(UNMARKED)
    messages = _plain_conversation()

    tokens = tokenize(Trajectory(messages_and_choices=messages), tokenizer, train_unsampled=True)  # type: ignore[arg-type]

    [history] = tokens.histories
    ids = list(tokenizer.apply_chat_template(messages, return_dict=False))
    assert history.token_ids.tolist() == ids
    assert decode(tokenizer, _masked(history)) == "7<|end|>\n2<|end|>\n"


def test_a_prompt_that_the_finished_message_does_not_start_with_is_an_error(
    with_template: Callable[[str | None], PreTrainedTokenizerBase],
) -> None:
    with pytest.raises(TokenizationError, match="renders an assistant message differently from its generation prompt"):
        tokenize(
            Trajectory(messages_and_choices=_plain_conversation()),  # type: ignore[arg-type]
            with_template(MISMATCHED),
            train_unsampled=True,
        )


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": "7"},
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "add"}}]},
    ],
    ids=["text", "tool call"],
)
def test_a_completion_without_ids_is_learned_as_the_template_renders_it(
    tiny_tokenizer: PreTrainedTokenizerBase, message: dict[str, Any]
) -> None:
    """An OpenAI choice without logprobs says the same as the plain message."""
    sampled = _asked(Completion(message=message, temperature=1.0))
    plain = _asked(message)

    [history] = tokenize(sampled, tiny_tokenizer, train_unsampled=True).histories
    [expected] = tokenize(plain, tiny_tokenizer, train_unsampled=True).histories

    assert decode(tiny_tokenizer, history.token_ids) == decode(tiny_tokenizer, expected.token_ids)
    assert history.mask.tolist() == expected.mask.tolist()


def test_logprobs_that_are_there_are_kept_when_they_may_be_missing(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    unknown = Completion(
        message={"role": "assistant", "content": "2"}, token_ids=(ord("2"), END), temperature=1.0, version=3
    )
    held = _asked(completion("7", logprobs=(-0.5, -0.25)), user("1+1="), unknown)

    [history] = tokenize(held, tiny_tokenizer, train_unsampled=True).histories

    logprobs = history.logprobs[history.mask]
    assert logprobs[:2].tolist() == [-0.5, -0.25]
    assert logprobs[2:].isnan().all()


# -- OpenAI choices -------------------------------------------------------------------------------------------------


def test_a_choice_with_token_ids(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    held = _asked(_choice(("token_id:55", -0.5), ("token_id:260", -0.25)), temperature=1.0)

    [history] = tokenize(held, tiny_tokenizer).histories

    assert _masked(history) == [55, END]
    assert history.logprobs[history.mask].tolist() == [-0.5, -0.25]


@given(st.text(min_size=1, max_size=6))
def test_a_choice_with_token_strings_and_bytes(tiny_tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """A byte is a token; servers show a byte that is no character as a replacement character."""
    raw = text.encode(errors="surrogatepass")
    entries = [(bytes([byte]).decode(errors="replace"), -0.5, bytes([byte])) for byte in raw]
    entries.append(("<|end|>", -0.5, b"<|end|>"))

    [history] = tokenize(_asked(_choice(*entries, text=text), temperature=1.0), tiny_tokenizer).histories

    assert _masked(history) == [*raw, END]


def test_a_choice_with_token_strings_without_bytes(merging_tokenizer: PreTrainedTokenizerBase) -> None:
    expected = merging_tokenizer.convert_tokens_to_ids(["ab", "Ġa", "b", "<|end|>"])

    [history] = tokenize(
        _asked(_choice(("ab", -1), (" a", -1), ("b", -1), ("<|end|>", -1), text="ab ab"), temperature=1.0),
        merging_tokenizer,
    ).histories

    assert _masked(history) == expected


@pytest.mark.parametrize("more_pieces", [(), ("Ġ", "Ã©")], ids=["small", "with the letters that byte-level BPE uses"])
def test_a_sentencepiece_vocabulary(more_pieces: tuple[str, ...]) -> None:
    """Large multilingual vocabularies hold `Ġ`, a Maltese letter; that makes them no byte-level ones."""
    tokenizer = _sentencepiece_like(*more_pieces)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    pieces = ["▁ab", "é", "<0xC3>", "<0xBC>", "</s>"]
    entries = [(" ab", -1.0), ("é", -1.0), ("\ufffd", -1.0, b"\xc3"), ("\ufffd", -1.0, b"\xbc"), ("</s>", -1.0)]

    [history] = tokenize(_asked(_choice(*entries), temperature=1.0), tokenizer).histories

    assert tokenizer.convert_ids_to_tokens(_masked(history)) == pieces


def test_a_string_that_fits_several_ids_is_an_error() -> None:
    """`c` is a piece and also a fallback byte: which of them was sampled cannot be told."""
    tokenizer = _sentencepiece_like()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"

    with pytest.raises(TokenizationError, match=r"b'c' fits 2 ids.*ask the server for token ids") as caught:
        tokenize(_asked(_choice(("c", -1.0)), temperature=1.0), tokenizer)
    for token_id in tokenizer.convert_tokens_to_ids(["c", "<0x63>"]):
        assert str(token_id) in str(caught.value)


def test_a_string_that_fits_no_id_is_an_error(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(TokenizationError, match=r"b'seven' is in no vocabulary entry; ask the server for token ids"):
        tokenize(_asked(_choice(("seven", -1.0)), temperature=1.0), tiny_tokenizer)
    with pytest.raises(TokenizationError, match="no vocabulary entry"):
        tokenize(_asked(_choice(("7", -1.0), ("\ufffd", -1.0)), temperature=1.0), tiny_tokenizer)


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (completion(temperature=None), "does not say its sampling temperature.*'7'"),
        (completion(temperature=0.0), r"temperature 0\.0 cannot be trained on"),
        (completion(temperature=-1.0), r"temperature -1\.0 cannot be trained on"),
        (completion(temperature=math.nan), "temperature nan cannot be trained on"),
        (completion(temperature=math.inf), "temperature inf cannot be trained on"),
        (completion(logprobs=(-0.5,)), "2 token ids but 1 logprobs.*'7'"),
        (completion(logprobs=(-0.5, -0.5, -0.5)), "2 token ids but 3 logprobs"),
        (
            completion(logprobs=(-0.5, math.nan)),
            r"1 of 2 sampled tokens have no logprob \(NaN\).*allow_training_without",
        ),
        (completion(logprobs=(-0.5, 0.5)), r"0\.5 is no logprob"),
        (completion(logprobs=(-0.5, math.inf)), "inf is no logprob"),
        (completion(logprobs=(-math.inf, -0.5)), "-inf is no logprob"),
        (
            Completion(message={"role": "assistant", "content": "7"}, token_ids=(55,), temperature=1.0),
            "no logprobs.*'7'.*allow_training_without_logprobs=True",
        ),
        (
            Completion(message={"role": "assistant", "content": "7"}, temperature=1.0),
            "neither token ids nor logprobs.*logprobs=True",
        ),
    ],
)
def test_what_cannot_be_trained_on_says_why(
    tiny_tokenizer: PreTrainedTokenizerBase, said: Completion, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        tokenize(_asked(said), tiny_tokenizer)


def test_rounding_above_zero_is_no_error(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    tokenize(_asked(completion(logprobs=(1e-6, -0.5))), tiny_tokenizer)


@pytest.mark.parametrize("logprobs", [(0.5, -0.5), (-0.5,), (-math.inf, -0.5)])
def test_wrong_logprobs_are_errors_even_where_none_are_needed(
    tiny_tokenizer: PreTrainedTokenizerBase, logprobs: tuple[float, ...]
) -> None:
    with pytest.raises(DataError, match="logprob"):
        tokenize(_asked(completion(logprobs=logprobs)), tiny_tokenizer, train_unsampled=True)


def test_the_error_about_the_temperature_names_a_way_that_works(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    """It says: pass Trajectory(temperature=...)."""
    said = Completion.from_choice(_choice(("token_id:55", -0.5)))
    with pytest.raises(DataError, match=r"pass Trajectory\(temperature=\.\.\.\)"):
        tokenize(_asked(said), tiny_tokenizer)

    [history] = tokenize(_asked(said, temperature=0.5), tiny_tokenizer).histories

    assert history.temperature[history.mask].tolist() == [0.5]


@pytest.mark.parametrize("held", [Trajectory(), Trajectory(messages_and_choices=[user("3+4=")])])
def test_a_trajectory_without_the_policy_is_an_error(tiny_tokenizer: PreTrainedTokenizerBase, held: Trajectory) -> None:
    with pytest.raises(DataError, match="nothing that the policy said"):
        tokenize(held, tiny_tokenizer)


def test_the_first_token_of_a_history_cannot_be_learned(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="first token.*nothing predicts it"):
        tokenize(token_trajectory(token_history([1, 2], [1, 1])), tiny_tokenizer)
    with pytest.raises(DataError, match="first token"):
        tokenize(Trajectory(messages_and_choices=[completion(prompt_ids=())]), tiny_tokenizer)


def test_a_mask_that_is_no_mask_is_an_error(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    """A mask of 0 and 1 as integers would be read as indices."""
    whole = token_history([1, 2, 3, 4], [0, 0, 1, 1])
    with pytest.raises(DataError, match="bool"):
        tokenize(
            token_trajectory(
                TokenHistory(
                    token_ids=whole.token_ids,
                    mask=whole.mask.long(),
                    logprobs=whole.logprobs,
                    temperature=whole.temperature,
                    versions=whole.versions,
                )
            ),
            tiny_tokenizer,
        )


def test_no_chat_template(with_template: Callable[[str | None], PreTrainedTokenizerBase]) -> None:
    tokenizer = with_template(None)

    with pytest.raises(TokenizationError, match=r"no chat template.*tokenizer\.chat_template.*prompt_ids"):
        tokenize(trajectory(), tokenizer)
    with pytest.raises(TokenizationError, match="no chat template"):
        tokenize(Trajectory(messages_and_choices=_plain_conversation()), tokenizer, train_unsampled=True)  # type: ignore[arg-type]


def test_no_chat_template_is_needed_where_the_prompt_ids_are_known(
    with_template: Callable[[str | None], PreTrainedTokenizerBase],
) -> None:
    [history] = tokenize(_asked(completion("7", prompt_ids=(1, 2, 3))), with_template(None)).histories

    assert history.token_ids.tolist() == [1, 2, 3, ord("7"), END]


def test_a_template_that_refuses_a_conversation_is_a_typed_error(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(TokenizationError, match="Unknown role: narrator"):
        tokenize(
            Trajectory(messages_and_choices=[{"role": "narrator", "content": "?"}, completion("7")]), tiny_tokenizer
        )


def test_errors_about_tokens_are_data_errors() -> None:
    assert issubclass(TokenizationError, DataError)
    assert issubclass(DataError, ValueError)


@pytest.mark.parametrize(
    ("column", "values"),
    [("token_ids", (None,)), ("token_ids", (2**40,)), ("logprobs", ("x",)), ("prompt_ids", (1, None))],
)
def test_what_is_no_number_is_refused_where_it_was_sampled(column: str, values: tuple[Any, ...]) -> None:
    with pytest.raises(DataError, match=f"{column} of a completion"):
        Completion(message={"role": "assistant", "content": "7"}, **{column: values})
