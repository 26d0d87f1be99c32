"""The embedded sampler against transformers' own forward pass and generation."""

import asyncio
import copy
import dataclasses
import sys
import threading
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from torch._dynamo import eval_frame
from transformers import GPT2Config, GPT2LMHeadModel

from fitrl.errors import InvalidArgumentError, SamplerError
from fitrl.policy.layers import compile_layers, decoder_layers, recompute_layers
from fitrl.policy.lending import own_copy
from fitrl.policy.loading import LoraSettings, load_policy, trained_state
from fitrl.policy.policy import Policy
from fitrl.rollout.sampler import Sampler
from fitrl.rollout.transformers import TransformersSampler
from samples import reference_network

PROMPTS = [list(b"3+4="), list(b"a longer prompt than the first, "), [7]]


@pytest.fixture
def sampler(fresh_policy) -> TransformersSampler:
    return TransformersSampler(fresh_policy, version=3)


def ask(sampler, prompts=PROMPTS, **options):
    async def main():
        return await asyncio.gather(*(sampler.sample(prompt, **options) for prompt in prompts))

    return asyncio.run(main())


def test_is_a_sampler(sampler) -> None:
    assert isinstance(sampler, Sampler)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_logprobs_are_transformers_own(temperature, sampler) -> None:
    answers = ask(sampler, n=3, max_new_tokens=12, temperature=temperature, seed=5)
    for prompt, completions in zip(PROMPTS, answers, strict=True):
        assert len(completions) == 3
        for completion in completions:
            ids = torch.tensor([*prompt, *completion.token_ids])
            with torch.no_grad():
                logits = reference_network()(ids[None]).logits[0, :-1] / temperature
            truth = logits.log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)[len(prompt) - 1 :]
            assert float((torch.tensor(completion.logprobs) - truth).abs().max()) < 1e-4
            assert completion.prompt_ids == tuple(prompt) and completion.version == 3
            assert completion.temperature == temperature and completion.full_support
            assert max(completion.logprobs) <= 0.0


def test_greedy_is_transformers_greedy(sampler) -> None:
    for prompt, [completion] in zip(PROMPTS, ask(sampler, max_new_tokens=10, temperature=0.0), strict=True):
        ids = torch.tensor([prompt])
        generated = reference_network().generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False
        )
        assert list(completion.token_ids) == generated[0, len(prompt) :].tolist()


def test_a_seed_fixes_the_answer_whatever_else_is_sampled(sampler) -> None:
    options = {"n": 2, "max_new_tokens": 8, "seed": 11, "temperature": 3.0}
    together = ask(sampler, **options)
    alone = [ask(sampler, [prompt], **options)[0] for prompt in PROMPTS]
    small = ask(TransformersSampler(sampler.policy, max_batch_size=2), **options)
    ids = [[[c.token_ids for c in answer] for answer in run] for run in (together, alone, small)]
    assert ids[0] == ids[1] == ids[2]
    assert together[0][0].token_ids != together[0][1].token_ids


def test_without_a_seed_torchs_global_one_decides(sampler) -> None:
    runs = []
    for _ in range(2):
        torch.manual_seed(4)
        runs.append([c.token_ids for answer in ask(sampler, n=2, max_new_tokens=6) for c in answer])
    assert runs[0] == runs[1]


def test_what_is_sampled_follows_the_distribution(sampler) -> None:
    """First tokens of 4000 completions against the exact probabilities, by chi-square."""
    prompt = list(b"<>3+4=")
    [completions] = ask(sampler, [prompt], n=4000, max_new_tokens=1, temperature=1.3, seed=2)
    with torch.no_grad():
        probabilities = (reference_network()(torch.tensor([prompt])).logits[0, -1] / 1.3).softmax(-1)
    counts = torch.bincount(torch.tensor([c.token_ids[0] for c in completions]), minlength=len(probabilities))
    often = probabilities * 4000 >= 5
    expected = torch.cat([probabilities[often], probabilities[~often].sum()[None]]) * 4000
    observed = torch.cat([counts[often], counts[~often].sum()[None]])
    statistic = float(((observed - expected) ** 2 / expected).sum())
    degrees = len(expected) - 1
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5  # four standard deviations


@pytest.mark.parametrize(("options", "kept"), [({"top_k": 3}, 3), ({"top_p": 0.5}, None)])
def test_truncated_sampling_stays_in_its_support(options, kept, sampler) -> None:
    prompt = list(b"3+4=")
    [completions] = ask(sampler, [prompt], n=300, max_new_tokens=1, seed=1, **options)
    with torch.no_grad():
        probabilities = reference_network()(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    order = probabilities.argsort(descending=True)
    size = kept or int((probabilities[order].cumsum(0) < 0.5).sum()) + 1
    support = set(order[:size].tolist())
    mass = float(probabilities[order[:size]].sum())
    assert {c.token_ids[0] for c in completions} <= support
    for completion in completions:
        assert not completion.full_support
        expected = float((probabilities[completion.token_ids[0]] / mass).log())
        assert completion.logprobs[0] == pytest.approx(expected, abs=1e-4)


def test_ends(sampler) -> None:
    [[stopped]] = ask(sampler, [list(b"abc")], max_new_tokens=40, stop=["e", "t"], seed=3, temperature=2.0)
    assert stopped.finish_reason in ("stop", "length")
    [many] = ask(sampler, [[257, *b"3+4=", 260, 258]], n=50, max_new_tokens=6, seed=3)
    ended = [c for c in many if c.finish_reason == "stop"]
    assert len(ended) > 40 and all(c.token_ids[-1] == 260 and "<|end|>" not in c.text for c in ended)
    assert all(len(c.token_ids) == 6 for c in many if c.finish_reason == "length")


def test_stop_strings_end_the_text_before_them_and_keep_the_ids(sampler) -> None:
    [completions] = ask(sampler, [[257, *b"3+9=", 260, 258]], n=60, max_new_tokens=8, stop=["2"], seed=3)
    hit = [c for c in completions if bytes(i for i in c.token_ids if i < 256).endswith(b"2")]
    assert hit
    for completion in hit:
        assert completion.finish_reason == "stop" and "2" not in completion.text
        assert completion.token_ids.count(ord("2")) == 1


def test_context_bounds_each_completion_by_its_own_prompt(sampler) -> None:
    long = [ord("a")] * 508
    [short], [cut] = ask(sampler, [[7], long], max_new_tokens=9, seed=1, stop=["\x00never"], temperature=1.5)
    assert len(cut.token_ids) <= 4
    assert cut.finish_reason == "length" or cut.token_ids[-1] == 260
    alone = ask(sampler, [[7]], max_new_tokens=9, seed=1, stop=["\x00never"], temperature=1.5)[0][0]
    assert short.token_ids == alone.token_ids


def test_equal_prompts_are_computed_once_and_rows_together(sampler, monkeypatch) -> None:
    shapes = []
    hidden = type(sampler.policy).hidden
    monkeypatch.setattr(
        type(sampler.policy),
        "hidden",
        lambda self, ids, *args, **kwargs: (shapes.append(tuple(ids.shape)), hidden(self, ids, *args, **kwargs))[1],
    )
    ask(sampler, [list(b"3+")] * 5, max_new_tokens=2, seed=1, temperature=4.0)
    assert shapes == [(1, 2), (5, 1)]


BAD = [
    {"n": 0},
    {"max_new_tokens": 0},
    {"temperature": -0.1},
    {"temperature": float("inf")},
    {"top_p": 0.0},
    {"top_p": 1.1},
    {"top_k": 0},
]


@pytest.mark.parametrize("options", BAD, ids=str)
def test_bad_arguments(options, sampler) -> None:
    with pytest.raises(InvalidArgumentError, match=next(iter(options))):
        ask(sampler, [[1]], **options)


def test_bad_prompts(sampler) -> None:
    with pytest.raises(InvalidArgumentError, match="prompt_ids is empty"):
        ask(sampler, [[]])
    with pytest.raises(InvalidArgumentError, match="context is 512"):
        ask(sampler, [[1] * 512])
    sampler.close()
    with pytest.raises(SamplerError, match="closed"):
        ask(sampler)


def test_an_error_while_sampling_reaches_every_caller(sampler, monkeypatch) -> None:
    monkeypatch.setattr(type(sampler.policy), "hidden", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ask(sampler)


def test_update(sampler) -> None:
    before = ask(sampler, max_new_tokens=4, temperature=0.0)
    name, weight = "model.norm.weight", sampler.policy.network.state_dict()["model.norm.weight"]
    sampler.update([(name, -weight.clone())], 9)
    after = ask(sampler, max_new_tokens=4, temperature=0.0)
    assert sampler.version == 9 and after[0][0].version == 9
    assert [c.token_ids for a in before for c in a] != [c.token_ids for a in after for c in a]
    with pytest.raises(SamplerError, match="does not fit"):
        sampler.update([(name, torch.zeros(3))], 10)
    with pytest.raises(SamplerError, match="does not fit"):
        sampler.update([("no.such.weight", weight)], 10)


def test_sampling_leaves_the_network_in_its_mode(sampler) -> None:
    sampler.policy.network.train()
    ask(sampler, max_new_tokens=2)
    assert sampler.policy.network.training
    with pytest.raises(InvalidArgumentError, match="max_batch_size"):
        TransformersSampler(sampler.policy, max_batch_size=0)


# -- the distribution -----------------------------------------------------------------------------------------------


def test_later_tokens_follow_the_distribution_given_the_earlier_ones(sampler) -> None:
    """Pairs of tokens, sampled through the cache beside a longer prompt, against their exact probabilities."""
    prompt, number, temperature = [257, *b"3+4=", 260, 258], 3000, 1.2

    async def main():
        options = {"n": number, "max_new_tokens": 2, "temperature": temperature, "seed": 8}
        beside = sampler.sample([*b"something longer ", *prompt], **options)
        return (await asyncio.gather(sampler.sample(prompt, **options), beside))[0]

    counts = Counter(c.token_ids for c in asyncio.run(main()))
    with torch.no_grad():
        first = (reference_network()(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1)
        vocabulary = torch.arange(len(first))[:, None]
        longer = torch.cat([torch.tensor(prompt).expand(len(first), -1), vocabulary], dim=1)
        second = (reference_network()(longer).logits[:, -1] / temperature).softmax(-1)
    exact = {(a, b): float(first[a] * second[a, b]) for a in range(len(first)) for b in range(len(first)) if a != 260}
    exact[(260,)] = float(first[260])  # <|end|> ends it
    assert sum(exact.values()) == pytest.approx(1.0)
    often = [pair for pair, probability in exact.items() if probability * number >= 5]
    expected = [exact[pair] * number for pair in often]
    observed = [float(counts[pair]) for pair in often]
    expected.append(number - sum(expected))
    observed.append(number - sum(observed))
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    degrees = len(often)
    assert degrees > 20
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5


def test_completions_of_one_prompt_do_not_depend_on_each_other(sampler) -> None:
    """Neighbours agree as often as two independent draws do."""
    prompt = list(b"3+4=")
    [completions] = ask(sampler, [prompt], n=4000, max_new_tokens=1, temperature=1.3, seed=6)
    drawn = [c.token_ids[0] for c in completions]
    with torch.no_grad():
        probabilities = (reference_network()(torch.tensor([prompt])).logits[0, -1] / 1.3).softmax(-1)
    agree = float((probabilities**2).sum())
    rate = sum(a == b for a, b in zip(drawn[::2], drawn[1::2], strict=True)) / 2000
    assert rate == pytest.approx(agree, abs=4 * (agree * (1 - agree) / 2000) ** 0.5)


def test_truncation_is_by_the_tempered_distribution_top_k_first(sampler) -> None:
    prompt, temperature = list(b"3+4="), 2.5
    [completions] = ask(sampler, [prompt], n=400, max_new_tokens=1, seed=1, top_k=6, top_p=0.7, temperature=temperature)
    with torch.no_grad():
        logits = reference_network()(torch.tensor([prompt])).logits[0, -1] / temperature
    best = logits.topk(6)
    kept = best.values.softmax(-1)
    size = int((kept.cumsum(0) < 0.7).sum()) + 1
    logprobs = (kept[:size] / kept[:size].sum()).log()
    truth = dict(zip(best.indices[:size].tolist(), logprobs.tolist(), strict=True))
    assert {c.token_ids[0] for c in completions} == truth.keys()
    for completion in completions:
        assert completion.logprobs[0] == pytest.approx(truth[completion.token_ids[0]], abs=1e-4)


@pytest.mark.parametrize(("options", "full"), [({}, True), ({"top_p": 0.99}, False), ({"top_k": 50}, False)])
def test_full_support_is_told(options, full, sampler) -> None:
    assert ask(sampler, [[1]], max_new_tokens=1, **options)[0][0].full_support is full


def test_one_token_to_choose_from_is_the_greedy_one_and_certain(sampler) -> None:
    greedy = ask(sampler, max_new_tokens=5, temperature=0.0)
    for options in ({"top_k": 1}, {"top_p": 1e-9}):
        for [one], [other] in zip(ask(sampler, max_new_tokens=5, seed=1, **options), greedy, strict=True):
            assert one.token_ids == other.token_ids
            assert one.logprobs == pytest.approx([0.0] * len(one.token_ids), abs=1e-6)


def test_seeds_differ_and_attempts_of_one_seed_differ(sampler) -> None:
    runs = [ask(sampler, [[7]], n=3, max_new_tokens=8, temperature=3.0, seed=seed)[0] for seed in range(4)]
    assert len({c.token_ids for run in runs for c in run}) == 12


def test_more_attempts_begin_with_the_same_ones(sampler) -> None:
    few, many = (ask(sampler, [[7]], n=n, max_new_tokens=6, temperature=3.0, seed=1)[0] for n in (2, 5))
    assert [c.token_ids for c in few] == [c.token_ids for c in many[:2]]


@pytest.mark.parametrize("number", [0.0, 1.0 - 2.0**-24], ids=["least", "greatest"])
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.5}], ids=str)
def test_no_random_number_chooses_what_has_no_probability(number, options, sampler, monkeypatch) -> None:
    """One of 16 million is the least that there is: often enough in a long run."""
    monkeypatch.setattr(torch, "rand", lambda *size, **kwargs: torch.full(size, number))
    for [completion] in ask(sampler, max_new_tokens=4, seed=0, temperature=0.05, **options):
        assert min(completion.logprobs) > float("-inf")
    if options:
        likely = ask(sampler, [PROMPTS[0]], n=1, max_new_tokens=1, seed=0, **options)[0][0]
        assert likely.logprobs[0] > -8.0


# -- other networks -------------------------------------------------------------------------------------------------


def test_a_network_without_a_plain_head_samples_the_same(sampler) -> None:
    whole = TransformersSampler(dataclasses.replace(sampler.policy, has_linear_head=False))
    options = {"n": 2, "max_new_tokens": 6, "seed": 4, "temperature": 2.0}
    for one, other in zip(ask(sampler, **options), ask(whole, **options), strict=True):
        assert [c.token_ids for c in one] == [c.token_ids for c in other]
        for left, right in zip(one, other, strict=True):
            assert left.logprobs == pytest.approx(right.logprobs, abs=1e-5)


def test_a_network_that_knows_absolute_positions(tiny_tokenizer) -> None:
    """Padding on the left must not move a prompt; rotary positions would not show it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=262,
            n_positions=64,
            n_embd=32,
            n_layer=2,
            n_head=2,
            initializer_range=0.5,
            bos_token_id=None,
            eos_token_id=None,
        )
        network = GPT2LMHeadModel(config).eval()
    policy = Policy(network=network, tokenizer=tiny_tokenizer, has_linear_head=True)
    answers = ask(TransformersSampler(policy), n=2, max_new_tokens=6, seed=1)
    for prompt, completions in zip(PROMPTS, answers, strict=True):
        for completion in completions:
            ids = torch.tensor([*prompt, *completion.token_ids])
            with torch.no_grad():
                log_probs = network(ids[None]).logits[0, :-1].log_softmax(-1)
            truth = log_probs.gather(1, ids[1:, None]).squeeze(1)[len(prompt) - 1 :]
            torch.testing.assert_close(torch.tensor(completion.logprobs), truth, atol=1e-4, rtol=0)


def test_the_context_is_entered_around_every_forward_pass(fresh_policy, monkeypatch) -> None:
    inside = []
    passes = []

    @contextmanager
    def context():
        inside.append(True)
        yield
        inside.pop()

    hidden = type(fresh_policy).hidden
    monkeypatch.setattr(
        type(fresh_policy), "hidden", lambda *args, **kwargs: (passes.append(bool(inside)), hidden(*args, **kwargs))[1]
    )
    ask(TransformersSampler(fresh_policy, context=context), max_new_tokens=3, temperature=0.0)
    assert len(passes) >= 3 and all(passes)


def test_update_of_adapters() -> None:
    """Names are those of a saved adapter, as PEFT writes them."""
    from peft import get_peft_model_state_dict

    sampler = TransformersSampler(load_policy("tiny", LoraSettings(rank=2)))
    base = [c.token_ids for [c] in ask(sampler, max_new_tokens=4, temperature=0.0)]
    weights = get_peft_model_state_dict(sampler.policy.network)
    generator = torch.Generator().manual_seed(0)
    moved = {name: tensor + torch.randn(tensor.shape, generator=generator) for name, tensor in weights.items()}
    sampler.update(moved.items(), 1)
    answers = ask(sampler, max_new_tokens=4, temperature=0.0)
    assert [c.token_ids for [c] in answers] != base
    assert {c.version for [c] in answers} == {1}
    for name, tensor in get_peft_model_state_dict(sampler.policy.network).items():
        torch.testing.assert_close(tensor, moved[name], atol=0, rtol=0)
    with pytest.raises(SamplerError, match="does not fit"):
        sampler.update([("model.norm.weight", torch.zeros(96))], 2)
    assert sampler.version == 1


@pytest.mark.parametrize("stop", [None, "x", ("",)])
def test_stop_is_a_list_of_strings(sampler, stop) -> None:
    with pytest.raises(InvalidArgumentError, match="stop must be a list of strings"):
        asyncio.run(sampler.sample([1], stop=stop))


def test_update_never_asks_the_model_hub(monkeypatch) -> None:
    """PEFT would look there whether the vocabulary was resized: 46 s, with every call of `fit_rl`."""
    asked = []
    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", lambda *what: asked.append(what))
    policy = load_policy("tiny", LoraSettings(rank=4))
    for config in policy.network.peft_config.values():
        config.base_model_name_or_path = "nobody/nothing"
    sampler = TransformersSampler(policy)
    sampler.update((), 1)
    sampler.update([(name, tensor + 1) for name, tensor in trained_state(policy).items()], 2)
    assert not asked and sampler.version == 2


def test_update_without_weights_gathers_none(sampler, monkeypatch) -> None:
    monkeypatch.setattr(sys.modules[TransformersSampler.__module__], "trained_state", None)
    sampler.update((), 3)
    assert sampler.version == 3


def test_update_with_the_weights_it_has_already_changes_the_version_only(sampler) -> None:
    before = {name: tensor.clone() for name, tensor in sampler.policy.network.state_dict().items()}
    sampler.update(sampler.policy.network.state_dict().items(), 5)
    assert sampler.version == 5
    for name, tensor in sampler.policy.network.state_dict().items():
        torch.testing.assert_close(tensor, before[name], atol=0, rtol=0)


def test_update_waits_for_what_is_being_sampled(sampler, monkeypatch) -> None:
    """A completion never mixes two versions: its tokens, its logprobs and its version belong together."""
    [[before]] = ask(sampler, [[7]], max_new_tokens=3, temperature=0.0)
    started, go_on, updated = threading.Event(), threading.Event(), threading.Event()
    hidden = type(sampler.policy).hidden

    def slow(self, *args, **kwargs):
        started.set()
        assert go_on.wait(10)
        return hidden(self, *args, **kwargs)

    monkeypatch.setattr(type(sampler.policy), "hidden", slow)
    weight = sampler.policy.network.state_dict()["model.norm.weight"]

    def update() -> None:
        sampler.update([("model.norm.weight", -weight.clone())], 8)
        updated.set()

    async def main():
        answer = asyncio.create_task(sampler.sample([7], max_new_tokens=3, temperature=0.0))
        assert await asyncio.to_thread(started.wait, 10)
        other = threading.Thread(target=update)
        other.start()
        assert not updated.is_set()
        go_on.set()
        [completion] = await answer
        await asyncio.to_thread(other.join)
        return completion

    assert asyncio.run(main()) == before
    assert updated.is_set() and sampler.version == 8


# -- requests -------------------------------------------------------------------------------------------------------


def test_requests_of_one_turn_are_prefilled_together_whatever_their_length(sampler, monkeypatch) -> None:
    shapes = []
    hidden = type(sampler.policy).hidden
    monkeypatch.setattr(
        type(sampler.policy),
        "hidden",
        lambda self, ids, *args, **kwargs: (shapes.append(tuple(ids.shape)), hidden(self, ids, *args, **kwargs))[1],
    )
    ask(sampler, max_new_tokens=1, n=4)
    assert shapes == [(len(PROMPTS), max(map(len, PROMPTS)))]


def test_max_batch_size_bounds_every_pass(fresh_policy, monkeypatch) -> None:
    rows = []
    hidden = type(fresh_policy).hidden
    monkeypatch.setattr(
        type(fresh_policy),
        "hidden",
        lambda self, ids, *args, **kwargs: (rows.append(len(ids)), hidden(self, ids, *args, **kwargs))[1],
    )
    answers = ask(TransformersSampler(fresh_policy, max_batch_size=3), n=7, max_new_tokens=2, temperature=3.0)
    assert max(rows) == 3
    assert [len(answer) for answer in answers] == [7, 7, 7]


def test_requests_with_other_settings_keep_theirs(sampler) -> None:
    async def main():
        return await asyncio.gather(
            sampler.sample([7], max_new_tokens=3, temperature=0.0),
            sampler.sample([7], max_new_tokens=5, temperature=2.0, seed=1, n=2),
            sampler.sample([7], max_new_tokens=2, top_k=2, seed=1),
        )

    greedy, hot, narrow = asyncio.run(main())
    assert [len(greedy), len(hot), len(narrow)] == [1, 2, 1]
    assert (greedy[0].temperature, hot[0].temperature, narrow[0].temperature) == (0.0, 2.0, 1.0)
    assert max(len(c.token_ids) for c in hot) > 3 >= len(greedy[0].token_ids)
    assert [c.full_support for c in (greedy[0], hot[0], narrow[0])] == [True, True, False]
    assert hot == ask(sampler, [[7]], max_new_tokens=5, temperature=2.0, seed=1, n=2)[0]


def test_a_caller_that_gives_up_disturbs_nobody(sampler) -> None:
    async def main():
        impatient = asyncio.create_task(sampler.sample([7], max_new_tokens=3))
        patient = asyncio.create_task(sampler.sample([7], max_new_tokens=3, temperature=0.0))
        await asyncio.sleep(0)
        impatient.cancel()
        with pytest.raises(asyncio.CancelledError):
            await impatient
        return await patient

    assert asyncio.run(main()) == ask(sampler, [[7]], max_new_tokens=3, temperature=0.0)[0]
    assert len(ask(sampler)) == len(PROMPTS)


def test_event_loops_do_not_wait_for_each_other(sampler) -> None:
    """A notebook's loop stands still while a blocking `rollout` runs another one in its thread."""
    first = asyncio.new_event_loop()
    try:
        asked = first.create_task(sampler.sample([7], max_new_tokens=2, temperature=0.0))
        first.call_soon(first.stop)
        first.run_forever()  # one turn: the request is there, and has not been answered yet

        async def second():
            return await asyncio.wait_for(sampler.sample([8], max_new_tokens=2, temperature=0.0), 5)

        answer = asyncio.run(second())
        late = first.run_until_complete(asyncio.wait_for(asked, 5))
    finally:
        first.run_until_complete(first.shutdown_default_executor())
        first.close()
    alone = ask(sampler, [[7], [8]], max_new_tokens=2, temperature=0.0)
    assert [late, answer] == alone


def test_a_loop_that_ends_before_its_request_is_served_blocks_nobody(sampler) -> None:
    first = asyncio.new_event_loop()
    abandoned = first.create_task(sampler.sample([7]))
    first.call_soon(first.stop)
    first.run_forever()
    abandoned._log_destroy_pending = False  # as when a script is interrupted
    first.close()

    async def second():
        return await asyncio.wait_for(sampler.sample([8], max_new_tokens=2), 5)

    assert len(asyncio.run(second())) == 1


@pytest.mark.parametrize("prompt", [[262], [1, 10**6], [-1]])
def test_a_prompt_outside_the_vocabulary_is_refused_alone(prompt, sampler) -> None:
    """On a GPU, an index out of range ends the process: it must not get so far."""

    async def main():
        return await asyncio.gather(
            sampler.sample([7], max_new_tokens=2), sampler.sample(prompt, max_new_tokens=2), return_exceptions=True
        )

    fine, refused = asyncio.run(main())
    assert isinstance(refused, InvalidArgumentError) and "prompt_ids" in str(refused)
    assert len(fine[0].token_ids) > 0


@pytest.mark.parametrize("stop", ["12", [""], ["a", ""]])
def test_bad_stop_strings(stop, sampler) -> None:
    """One string would be read as its letters; an empty one is in every text."""
    with pytest.raises(InvalidArgumentError, match="stop"):
        ask(sampler, [[7]], stop=stop)


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**70, -(2**65)])
def test_any_whole_number_is_a_seed(seed, sampler) -> None:
    one, two = (ask(sampler, [[7]], max_new_tokens=6, temperature=3.0, seed=seed)[0][0] for _ in range(2))
    assert one == two


def test_a_sampler_that_was_closed_answers_what_it_was_asked_before(sampler) -> None:
    async def main():
        asked = asyncio.create_task(sampler.sample([7], max_new_tokens=2))
        await asyncio.sleep(0)
        sampler.close()
        with pytest.raises(SamplerError, match=r"ask trainer\.sampler\(model\)"):
            await sampler.sample([7])
        return await asked

    assert len(asyncio.run(main())) == 1


# -- ends -----------------------------------------------------------------------------------------------------------


def test_a_stop_string_over_several_tokens_and_characters_of_several_bytes(fresh_policy, monkeypatch) -> None:
    """The sampler says what it is told to, so that the stop string comes where the test wants it."""
    script = list("naïve — stop".encode())
    sampler = TransformersSampler(fresh_policy)
    turn = iter(script)

    def scripted(logits, uniforms, settings):
        token = torch.full((len(logits),), next(turn))
        return token, torch.zeros(len(logits))

    monkeypatch.setattr(sys.modules[TransformersSampler.__module__], "_choose", scripted)
    [[completion]] = ask(sampler, [[7]], max_new_tokens=50, stop=["xyz", "ïve —"])
    assert completion.text == "na"
    assert bytes(completion.token_ids).decode() == "naïve —"
    assert len(completion.logprobs) == len(completion.token_ids)
    assert completion.finish_reason == "stop"


def test_the_text_ends_before_the_stop_string_that_comes_first(fresh_policy, monkeypatch) -> None:
    turn = iter(b"one two")

    def scripted(logits, uniforms, settings):
        return torch.full((len(logits),), next(turn)), torch.zeros(len(logits))

    monkeypatch.setattr(sys.modules[TransformersSampler.__module__], "_choose", scripted)
    [[completion]] = ask(TransformersSampler(fresh_policy), [[7]], max_new_tokens=50, stop=["two", " tw", "o"])
    assert (completion.text, bytes(completion.token_ids)) == ("", b"o")


def test_every_end_of_turn_of_the_generation_config_ends_a_completion(fresh_policy) -> None:
    fresh_policy.causal_lm.generation_config.eos_token_id = [260, ord("1")]
    prompt = [257, *b"3+9=", 260, 258]
    [completions] = ask(TransformersSampler(fresh_policy), [prompt], n=20, max_new_tokens=5, seed=0)
    ended = [c for c in completions if c.finish_reason == "stop"]
    assert any(c.token_ids[-1] == ord("1") for c in ended)
    assert all(ord("1") not in c.token_ids[:-1] and "1" not in c.text for c in ended)


# -- weights of its own -----------------------------------------------------------------------------------------------


def moved(policy: Policy) -> dict[str, torch.Tensor]:
    """Weights some steps later."""
    torch.manual_seed(0)
    return {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in trained_state(policy).items()}


def test_new_weights_are_taken_between_two_tokens_and_each_token_has_its_version(fresh_policy) -> None:
    weights, calls = moved(fresh_policy), []
    prompt, old = PROMPTS[1], copy.deepcopy(fresh_policy.network)

    @contextmanager
    def context():
        calls.append(None)
        if len(calls) == 4:  # before the fourth token is computed
            sampler.update(weights.items(), 9)
        yield

    sampler = TransformersSampler(fresh_policy, version=3, own_weights=True, context=context)
    [[said]] = ask(sampler, [prompt], max_new_tokens=8, temperature=1.5, seed=2)
    assert len(said.token_ids) == 8 and said.versions == (3, 3, 3, 9, 9, 9, 9, 9)
    assert said.version == 3 and said.policy_versions == (3, 9)
    new = copy.deepcopy(old)
    new.load_state_dict(weights)
    # the same by transformers: keys and values of what was read under the old weights stay as they are
    cache, ids, logprobs = None, torch.tensor([prompt]), []
    for token, version in zip(said.token_ids, said.versions, strict=True):
        with torch.no_grad():
            out = (old if version == 3 else new)(ids, past_key_values=cache, use_cache=True)
        logprobs.append((out.logits[0, -1] / 1.5).log_softmax(-1)[token])
        cache, ids = out.past_key_values, torch.tensor([[token]])
    assert torch.tensor(said.logprobs) == pytest.approx(torch.stack(logprobs), abs=1e-4)


def test_a_whole_completion_of_one_version_says_so(fresh_policy) -> None:
    sampler = TransformersSampler(fresh_policy, own_weights=True)
    sampler.update(moved(fresh_policy).items(), 4)
    [[said]] = ask(sampler, [PROMPTS[0]], max_new_tokens=4, seed=1)
    assert said.version == 4 and said.versions is None


def test_what_nobody_waits_for_is_not_sampled_to_its_end(fresh_policy) -> None:
    calls, third, cancelled = [], threading.Event(), threading.Event()

    @contextmanager
    def context():
        calls.append(None)
        if len(calls) == 3:
            third.set()
            assert cancelled.wait(60.0)
        yield

    sampler = TransformersSampler(fresh_policy, own_weights=True, context=context)

    async def main() -> None:
        asked = asyncio.ensure_future(sampler.sample(PROMPTS[1], max_new_tokens=200, temperature=3.0, seed=2))
        await asyncio.to_thread(third.wait, 60.0)
        asked.cancel()
        await asyncio.wait([asked])
        cancelled.set()

    asyncio.run(main())  # waits for the sampler's thread
    assert len(calls) <= 4


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=4)])
def test_a_copy_has_trained_weights_of_its_own_and_says_the_same(lora) -> None:
    policy = load_policy("tiny", lora)
    copied = own_copy(policy)
    trained, theirs = trained_state(policy), trained_state(copied)
    assert trained.keys() == theirs.keys()
    assert not {t.data_ptr() for t in trained.values()} & {t.data_ptr() for t in theirs.values()}
    frozen = {id(p) for p in policy.network.parameters() if not p.requires_grad}
    assert frozen == {id(p) for p in copied.network.parameters()} & {id(p) for p in policy.network.parameters()}
    options = {"n": 2, "max_new_tokens": 6, "seed": 3}
    before = ask(TransformersSampler(policy), **options)
    sampler = TransformersSampler(copied, own_weights=True)
    assert ask(sampler, **options) == before
    with torch.no_grad():
        for tensor in trained.values():
            tensor.add_(0.1)
    assert ask(sampler, **options) == before
    sampler.update(trained.items(), 0)
    assert ask(sampler, **options) == ask(TransformersSampler(policy), **options) != before


def test_a_copy_of_compiled_layers_is_not_compiled_and_leaves_the_trainers_alone() -> None:
    policy = load_policy("tiny")
    compile_layers(policy)
    recompute_layers(policy, keep_attention=False)
    copied = own_copy(policy)
    assert all("forward" in vars(layer) for layer in decoder_layers(policy))
    assert not any("forward" in vars(layer) for layer in decoder_layers(copied))
    stances = []

    @contextmanager
    def context():
        yield
        stances.append(eval_frame._stance.stance)

    sampler = TransformersSampler(copied, own_weights=True, context=context)
    assert ask(sampler, max_new_tokens=3, seed=1) == ask(
        TransformersSampler(load_policy("tiny")), max_new_tokens=3, seed=1
    )
    assert set(stances) == {"default"}
