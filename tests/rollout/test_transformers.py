"""The embedded sampler against transformers' own forward pass and generation."""

import asyncio

import pytest
import torch

from fitrl.errors import InvalidArgumentError, SamplerError
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
