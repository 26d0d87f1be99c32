"""Common prefixes against a naive reading: the same rows as without sharing, each token of the tree held once."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fitrl.data import layouts
from fitrl.data.histories import TokenHistory
from fitrl.data.packing import pack
from fitrl.data.prefixes import Prefixes, Row, separate_row
from fitrl.data.samples import Sample
from helpers import facts, sample, token_history
from reading import all_rows, rows
from trees import trees


def _histories(samples: Sequence[Sample]) -> list[TokenHistory]:
    return [history for one in samples for history in one.histories]


def _tree_size(samples: Sequence[Sample]) -> int:
    """Different beginnings, of one input or more: the tokens of a tree that holds each once."""
    inputs = [tuple(history.token_ids[:-1].tolist()) for history in _histories(samples)]
    return len({ids[: length + 1] for ids in inputs for length in range(len(ids))})


@given(trees())
def test_a_shared_row_shows_and_predicts_what_separate_rows_do(samples: list[Sample]) -> None:
    [batch] = pack(samples, layout="shared")

    assert rows(batch) == all_rows(samples)


@given(trees())
def test_each_token_of_the_tree_is_held_once(samples: list[Sample]) -> None:
    [batch] = pack(samples, layout="shared")

    inputs = sum(len(history) - 1 for history in _histories(samples))
    assert batch.num_positions == batch.num_input_tokens == _tree_size(samples)
    assert batch.num_tokens_saved == inputs - _tree_size(samples)
    assert batch.layout == ("shared" if batch.num_tokens_saved else "packed")


@given(trees())
def test_ends_nest_and_segments_are_runs_that_are_seen_alike(samples: list[Sample]) -> None:
    [batch] = pack(samples, layout="shared")

    inputs = batch.model_inputs
    assert inputs.ends is not None and inputs.position_ids is not None
    ends, positions, segments = inputs.ends[0].tolist(), inputs.position_ids[0].tolist(), inputs.segment_ids[0].tolist()
    for place, end in enumerate(ends):
        assert place < end <= len(ends)
        for later in range(place, end):
            assert ends[later] <= end  # a subtree lies inside its parent's
    for place in range(1, len(ends)):
        goes_on = ends[place] == ends[place - 1] and positions[place] == positions[place - 1] + 1
        assert segments[place] - segments[place - 1] == (0 if goes_on else 1)
    assert inputs.longest == max(len(history) - 1 for history in _histories(samples))


@given(trees())
def test_grow_counts_what_a_row_would_take(samples: list[Sample]) -> None:
    prefixes = Prefixes(_histories(samples))
    ranks: list[int] = []
    size = number = 0
    for index, one in enumerate(samples):
        before = list(ranks)
        grown, tokens = prefixes.grow(ranks, range(number, number + len(one.histories)))
        assert ranks == before  # left alone, so that it can be tried
        ranks, size, number = grown, size + tokens, number + len(one.histories)
        assert size == _tree_size(samples[: index + 1])


@given(trees())
def test_some_histories_in_any_order(samples: list[Sample]) -> None:
    histories = _histories(samples)
    prefixes = Prefixes(histories)
    chosen = random.Random(len(histories)).sample(range(len(histories)), (len(histories) + 1) // 2)

    _check_row(prefixes.row(chosen), [histories[index] for index in chosen])


def _check_row(row: Row, histories: Sequence[TokenHistory]) -> None:
    """Each history lies in the row token by token, and its tokens see those before them and nothing else."""
    held: dict[int, int] = {}
    start = 0
    for history in histories:
        length = len(history) - 1
        places = row.slots[start : start + length]
        for place, token in zip(places.tolist(), history.token_ids.tolist(), strict=False):
            assert held.setdefault(place, token) == token
        assert row.positions[places].tolist() == list(range(length))
        last = places[-1] if length else 0
        seen = [place for place in range(int(last) + 1) if row.ends[place] > last]
        assert seen == places.tolist()
        start += length
    assert start == len(row.slots)
    assert sorted(held) == list(range(len(row.positions)))


def test_the_example_of_the_docstring() -> None:
    one, other = token_history([5, 6, 7, 8, 1], [0, 0, 1, 1, 1]), token_history([5, 6, 9, 1], [0, 0, 1, 1])

    [batch] = pack([sample(one), sample(other)], layout="shared")

    inputs = batch.model_inputs
    assert inputs.ends is not None and inputs.position_ids is not None
    assert inputs.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert inputs.position_ids.tolist() == [[0, 1, 2, 3, 2]]
    assert inputs.segment_ids.tolist() == [[0, 0, 1, 1, 2]]
    assert inputs.ends.tolist() == [[5, 5, 4, 4, 5]]
    assert batch.loss_inputs.rows.tolist() == [1, 2, 3, 1, 4]  # both first tokens are predicted at the same place
    assert batch.loss_inputs.targets.tolist() == [7, 8, 1, 9, 1]


def test_nothing_in_common_is_laid_out_like_separate_histories() -> None:
    histories = [token_history([i, i, i], [0, 0, 1]) for i in (1, 2, 3)]

    def columns(row: Row) -> list[torch.Tensor]:
        return [row.slots, row.positions, row.ends, row.segments]

    assert facts(columns(Prefixes(histories).row([0, 1, 2]))) == facts(columns(separate_row(histories)))


# -- which samples share a microbatch -------------------------------------------------------------------------------


@given(trees(), st.integers(0, 12), st.integers(1, 3))
def test_shared_positions_count_once_against_max_tokens(samples: list[Sample], slack: int, multiple_of: int) -> None:
    limit = slack + max(one.num_input_tokens for one in samples)

    batches = pack(samples, layout="shared", max_tokens=limit, multiple_of=multiple_of)

    assert all(batch.num_positions <= limit for batch in batches)
    assert sorted(index for batch in batches for index in batch.members) == list(range(len(samples)))
    assert len(batches) % multiple_of == 0 or len(samples) < multiple_of or len(batches) > len(samples) - multiple_of
    for batch in batches:
        assert rows(batch) == all_rows(samples[index] for index in batch.members)


@given(trees(), st.integers(0, 12), st.integers(1, 64), st.booleans())
def test_auto_keeps_max_tokens_whatever_it_takes(samples: list[Sample], slack: int, hidden: int, gpu: bool) -> None:
    limit = slack + max(one.num_input_tokens for one in samples)

    batches = pack(samples, share_prefixes=True, max_tokens=limit, hidden_size=hidden, on_gpu=gpu)

    for batch in batches:
        assert batch.num_positions <= limit
        assert rows(batch) == all_rows(samples[index] for index in batch.members)


@given(trees(), st.integers(1, 9))
def test_a_number_of_shared_batches_is_kept(samples: list[Sample], num_batches: int) -> None:
    batches = pack(samples, layout="shared", num_batches=num_batches)

    assert len(batches) == min(num_batches, len(samples))
    assert sorted(index for batch in batches for index in batch.members) == list(range(len(samples)))


def _groups(num_groups: int, group_size: int, prompt: int, answer: int) -> list[Sample]:
    """Groups of answers to their own prompts, dealt out so that neighbours are of different groups."""
    rng = random.Random(0)
    prompts = [[rng.randrange(1000) for _ in range(prompt)] for _ in range(num_groups)]
    return [
        sample(token_history([*ids, *(rng.randrange(1000) for _ in range(answer))], [0] * prompt + [1] * answer))
        for _ in range(group_size)
        for ids in prompts
    ]


def test_the_samples_of_a_group_share_a_microbatch() -> None:
    samples = _groups(num_groups=6, group_size=4, prompt=50, answer=10)

    batches = pack(samples, share_prefixes=True, max_tokens=50 + 4 * 10)

    assert sorted(sorted({index % 6 for index in batch.members}) for batch in batches) == [[i] for i in range(6)]
    assert {batch.num_positions for batch in batches} == {50 + 4 * 9 - 1 + 1}
    assert sum(batch.num_tokens_saved for batch in batches) == 6 * 3 * 50


def test_shared_batches_are_of_about_equal_size() -> None:
    samples = _groups(num_groups=5, group_size=7, prompt=30, answer=12)

    sizes = [batch.num_positions for batch in pack(samples, share_prefixes=True, num_batches=4)]

    assert max(sizes) - min(sizes) <= 30 + 12


def test_sharing_has_to_save_enough() -> None:
    """One token in twenty of the arithmetic is not worth a tree; one in eight is."""
    few, many = (_groups(num_groups=1, group_size=20, prompt=prompt, answer=20) for prompt in (1, 4))

    assert {batch.layout for batch in pack(few, share_prefixes=True)} != {"shared"}
    assert {batch.layout for batch in pack(many, share_prefixes=True)} == {"shared"}
    assert {batch.layout for batch in pack(many)} != {"shared"}  # not asked for
    assert pack(many, layout="packed", share_prefixes=True)[0].layout == "packed"


def test_attention_that_skips_makes_packing_cheap() -> None:
    """A long history beside short ones: masks over a packed row cost more than padding, lengths cost nothing."""
    samples = [sample(token_history(range(1, length + 1), [0] * (length - 1) + [1])) for length in (100, 60, 60, 60)]

    assert pack(samples, hidden_size=4)[0].layout == "padded"
    with mock.patch.dict(layouts.LAUNCHES, dict.fromkeys(layouts.LAUNCHES, 0.0)):
        assert pack(samples, hidden_size=4, on_gpu=True)[0].layout == "packed"


def test_a_gpu_takes_the_fewest_launches_for_a_small_batch_and_the_least_arithmetic_for_a_large_one() -> None:
    """8 answers of 30 to each of 32 prompts of 40 tokens: a small model waits for the host, a larger one computes."""
    samples = _groups(num_groups=32, group_size=8, prompt=40, answer=30)

    assert pack(samples, share_prefixes=True, hidden_size=576, on_gpu=True)[0].layout == "packed"
    assert pack(samples, share_prefixes=True, hidden_size=2048, on_gpu=True)[0].layout == "shared"


@given(trees(), st.floats(0.01, 4.0))
def test_what_is_not_worth_sharing_is_held_by_each_branch(samples: list[Sample], query_cost: float) -> None:
    histories = _histories(samples)
    prefixes = Prefixes(histories)

    row = prefixes.row(range(len(histories)), query_cost=query_cost)

    _check_row(row, histories)
    assert _tree_size(samples) <= len(row.positions) <= sum(prefixes.lengths)


def test_a_beginning_is_shared_if_it_saves_enough_for_each_query_behind_it() -> None:
    """3 groups of 2 behind a system message of 4: that saves 8 tokens for 72 queries; each prompt of 10, 10 for 4."""
    histories = [
        token_history([*[1] * 4, *[10 + group] * 10, 20 + answer, 21, 0], [0] * 14 + [1] * 3)
        for group in range(3)
        for answer in range(2)
    ]
    prefixes = Prefixes(histories)

    def size(query_cost: float) -> int:
        return len(prefixes.row(range(6), query_cost=query_cost).positions)

    assert size(0.0) == 4 + 3 * (10 + 2 * 2)
    assert size(8 / 42 - 0.01) == 4 + 3 * (10 + 2 * 2)
    assert size(8 / 42 + 0.01) == 3 * (14 + 2 * 2)
    assert size(14 / 4 - 0.01) == 3 * (14 + 2 * 2)
    assert size(14 / 4 + 0.01) == 6 * 16


@given(trees())
def test_sharing_is_deterministic(samples: list[Sample]) -> None:
    first = [(facts(batch.model_inputs), facts(batch.loss_inputs)) for batch in pack(samples, layout="shared")]
    random.seed(3)
    assert [(facts(b.model_inputs), facts(b.loss_inputs)) for b in pack(samples, layout="shared")] == first


def test_many_trajectories_are_shared_in_time_that_does_not_explode() -> None:
    def seconds(count: int) -> float:
        samples = _groups(num_groups=count // 8, group_size=8, prompt=30, answer=10)
        start = time.perf_counter()
        pack(samples, share_prefixes=True, max_tokens=500, multiple_of=3)
        return time.perf_counter() - start

    assert seconds(4_000) < 40 * seconds(400)


@pytest.mark.parametrize("layout", ["auto", "shared"])
def test_one_history_alone(layout: str) -> None:
    [batch] = pack([sample(token_history([1, 2], [0, 1]))], layout=layout, share_prefixes=True)  # type: ignore[arg-type]

    assert batch.num_tokens_saved == 0
    assert batch.loss_inputs.rows.tolist() == [0]
