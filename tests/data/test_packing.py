"""Packing against a naive reading of the samples: what each row sees, predicts, and weighs."""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Sequence
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fitrl.data.bins import Layout, first_fit
from fitrl.data.histories import TokenHistory
from fitrl.data.packing import deal, microbatches, pack
from fitrl.data.samples import Sample
from fitrl.errors import InvalidArgumentError
from fitrl.policy.policy import Policy
from helpers import facts, sample, token_history
from reading import all_rows, rows

LAYOUTS: list[Layout] = ["auto", "padded", "packed"]


@st.composite
def _samples(draw: st.DrawFn, max_trajectories: int = 6, max_histories: int = 3) -> list[Sample]:
    shapes = draw(
        st.lists(st.lists(st.integers(2, 9), min_size=1, max_size=max_histories), min_size=1, max_size=max_trajectories)
    )
    advantages = draw(
        st.lists(st.sampled_from([-1.5, -0.1, 0.0, 0.7, 2.0]), min_size=len(shapes), max_size=len(shapes))
    )
    rng = random.Random(draw(st.integers(0, 2**32)))

    def history(length: int) -> TokenHistory:
        mask = [False, *(rng.random() < 0.5 for _ in range(length - 1))]
        mask[rng.randrange(1, length)] = True
        return token_history(
            [rng.randrange(1, 1000) for _ in range(length)],
            mask,
            logprobs=[-rng.random() for _ in range(length)],
            temperature=rng.choice([0.5, 1.0, 1.3]),
        )

    built = []
    for lengths, advantage in zip(shapes, advantages, strict=True):
        one = sample(*map(history, lengths), advantage=advantage, reference=True)
        one.old_logprobs = one.old_logprobs - 0.125  # as if recomputed by the trainer
        built.append(one)
    return built


def _padded_size(samples: Sequence[Sample]) -> int:
    lengths = [len(history) - 1 for one in samples for history in one.histories]
    return len(lengths) * max(lengths)


def _fitting_limit(samples: Sequence[Sample], layout: Layout, slack: int) -> int:
    """A limit that each trajectory alone keeps."""
    return slack + max(
        _padded_size([one]) if layout == "padded" else sum(len(history) - 1 for history in one.histories)
        for one in samples
    )


@given(_samples(), st.sampled_from(LAYOUTS), st.integers(0, 40), st.integers(1, 64))
def test_each_row_sees_its_own_history_and_predicts_its_own_token(
    samples: list[Sample], layout: Layout, slack: int, hidden_size: int
) -> None:
    batches = pack(samples, layout=layout, max_tokens=_fitting_limit(samples, layout, slack), hidden_size=hidden_size)

    for batch in batches:
        assert rows(batch) == all_rows(samples[index] for index in batch.members)
    assert sorted(index for batch in batches for index in batch.members) == list(range(len(samples)))


@given(_samples(), st.integers(1, 8))
def test_packed_and_padded_hold_the_same(samples: list[Sample], num_batches: int) -> None:
    padded = pack(samples, layout="padded", num_batches=num_batches)
    packed = pack(samples, layout="packed", num_batches=num_batches)

    assert {batch.layout for batch in padded} == {"padded"}
    assert {batch.layout for batch in packed} == {"packed"}
    assert [rows(batch) for batch in padded] == [rows(batch) for batch in packed]
    assert Counter(row for batch in packed for row in rows(batch)) == Counter(all_rows(samples))


@given(_samples(), st.sampled_from(LAYOUTS), st.integers(0, 40))
def test_max_tokens_is_kept_padding_included(samples: list[Sample], layout: Layout, slack: int) -> None:
    limit = _fitting_limit(samples, layout, slack)

    batches = pack(samples, layout=layout, max_tokens=limit)

    assert all(batch.model_inputs.input_ids.numel() <= limit for batch in batches)
    assert all(batch.num_positions == batch.model_inputs.input_ids.numel() for batch in batches)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_trajectory_that_cannot_fit_is_not_packed_silently(layout: Layout) -> None:
    """Two histories of 3 and 9 tokens: 10 inputs, and 16 positions when padded."""
    two = sample(token_history(range(3), [0, 1, 1]), token_history(range(9), [0] * 8 + [1]))

    with pytest.raises(InvalidArgumentError, match="max_tokens"):
        pack([two], layout=layout, max_tokens=12 if layout == "padded" else 9)


@given(_samples(), st.sampled_from(LAYOUTS), st.integers(0, 40))
def test_batches_are_filled(samples: list[Sample], layout: Layout, slack: int) -> None:
    """First fit leaves no two batches that would fit into one, by the size in the layout that it went by."""
    limit = _fitting_limit(samples, layout, slack)
    batches = pack(samples, layout=layout, max_tokens=limit)

    padded, packed = [], []
    for i, left in enumerate(batches):
        for right in batches[:i]:
            both = [samples[index] for index in (*left.members, *right.members)]
            padded.append(_padded_size(both) > limit)
            packed.append(sum(one.num_input_tokens for one in both) > limit)
    assert (layout != "packed" and all(padded)) or (layout != "padded" and all(packed))


def test_microbatches_are_filled_by_the_layout_that_is_cheapest_in_all() -> None:
    """20 histories fill more padded microbatches than packed ones, whose masks over long rows cost more than that."""
    samples = [sample(token_history(range(50), [0] * 20 + [1] * 30)) for _ in range(40)]

    batches = pack(samples, max_tokens=1000, hidden_size=16)

    assert {batch.layout for batch in batches} == {"padded"}
    assert {batch.layout for batch in pack(samples, max_tokens=1000, hidden_size=16, multiple_of=3)} == {"padded"}
    prompts = [[number] * 20 for number in range(4)]
    samples = [
        sample(token_history(prompt + [answer] * 30, [0] * 20 + [1] * 30)) for prompt in prompts for answer in range(20)
    ]
    shared = pack(samples, max_tokens=1000, hidden_size=16, share_prefixes=True)
    assert {batch.layout for batch in shared} == {"padded"}  # and not shared, where they fit only so
    assert all(len(batch.members) <= 20 for batch in shared)


def _naive_first_fit(samples: Sequence[Sample], limit: int, layout: Layout) -> list[list[int]]:
    """Widest first, each into the first batch that it fits into."""

    def size(members: Sequence[int]) -> int:
        chosen = [samples[index] for index in members]
        return _padded_size(chosen) if layout == "padded" else sum(one.num_input_tokens for one in chosen)

    def width(index: int) -> int:
        lengths = [len(history) - 1 for history in samples[index].histories]
        return max(lengths) if layout == "padded" else sum(lengths)

    bins: list[list[int]] = []
    for index in sorted(range(len(samples)), key=lambda index: (-width(index), index)):
        for members in bins:
            if size([*members, index]) <= limit:
                members.append(index)
                break
        else:
            bins.append([index])
    return [sorted(members) for members in bins]


@given(_samples(max_trajectories=20), st.sampled_from(LAYOUTS), st.integers(0, 60))
def test_each_trajectory_goes_into_the_first_batch_with_room(samples: list[Sample], layout: Layout, slack: int) -> None:
    limit = _fitting_limit(samples, layout, slack)

    batches = pack(samples, layout=layout, max_tokens=limit)

    sizes: list[Layout] = ["packed", "padded"] if layout == "auto" else [layout]
    assert [list(batch.members) for batch in batches] in [_naive_first_fit(samples, limit, size) for size in sizes]


@given(st.lists(st.integers(2, 30), min_size=1, max_size=40), st.integers(1, 9))
def test_the_next_largest_goes_onto_the_emptiest_batch(lengths: list[int], num_batches: int) -> None:
    samples = [sample(token_history(range(length), [0] * (length - 1) + [1])) for length in lengths]
    expected: list[list[int]] = [[] for _ in range(min(num_batches, len(samples)))]
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        min(expected, key=lambda members: sum(lengths[i] - 1 for i in members)).append(index)

    assert [list(batch.members) for batch in pack(samples, num_batches=num_batches)] == list(map(sorted, expected))


def test_many_trajectories_are_packed_in_steps_that_do_not_explode() -> None:
    """Sixteen times the trajectories, a little more than sixteen times the lines run; it was over a hundred times."""
    one = sample(token_history(range(12), [0] * 11 + [1]))

    def steps(count: int) -> int:
        lines = 0

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal lines
            lines += event == "line"
            return trace if frame.f_code is first_fit.__code__ else None

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            first_fit([one] * count, 11, "packed")
        finally:
            sys.settrace(before)
        return lines

    assert 0 < steps(4_000) < 32 * steps(250)


@given(_samples(), st.sampled_from(LAYOUTS), st.integers(1, 4))
def test_histories_of_a_trajectory_share_a_batch_and_an_id(
    samples: list[Sample], layout: Layout, num_batches: int
) -> None:
    for batch in pack(samples, layout=layout, num_batches=num_batches):
        expected = [
            place for place, index in enumerate(batch.members) for _ in range(samples[index].num_trainable_tokens)
        ]
        assert batch.loss_inputs.trajectory_ids.tolist() == expected


@given(_samples(), st.sampled_from(LAYOUTS))
def test_segments_positions_and_padding(samples: list[Sample], layout: Layout) -> None:
    [batch] = pack(samples, layout=layout)

    inputs = batch.model_inputs
    histories = [history for one in samples for history in one.histories]
    assert batch.num_input_tokens == sum(len(history) - 1 for history in histories)
    for number, history in enumerate(histories):
        own = inputs.segment_ids == number
        assert inputs.input_ids[own].tolist() == history.token_ids[:-1].tolist()
        if inputs.position_ids is not None:
            assert inputs.position_ids[own].tolist() == list(range(len(history) - 1))
    if batch.layout == "packed":
        assert inputs.input_ids.shape == (1, batch.num_input_tokens)
        assert (inputs.segment_ids.diff(dim=1) >= 0).all()
    else:
        assert inputs.position_ids is None
        assert inputs.input_ids.shape[0] == len(histories)
        padding = inputs.segment_ids < 0
        assert (padding.int().diff(dim=1) >= 0).all()  # on the right, where a causal mask hides it
        assert (inputs.input_ids[padding] == 0).all()


def test_dtypes_and_mask() -> None:
    [batch] = pack([sample(token_history([1, 2, 3], [0, 1, 1]), reference=True)], kl_mean=0.25, layout="packed")

    loss, inputs = batch.loss_inputs, batch.model_inputs
    floats = [loss.old_logprobs, loss.rollout_logprobs, loss.reference_logprobs, loss.advantages, loss.temperature]
    integers = [loss.rows, loss.targets, loss.trajectory_ids, inputs.input_ids, inputs.position_ids, inputs.segment_ids]
    assert [column.dtype for column in floats if column is not None] == [torch.float32] * 5
    assert [column.dtype for column in integers if column is not None] == [torch.int64] * 6
    assert loss.mask.tolist() == [True, True]
    assert float(loss.kl_mean) == 0.25  # type: ignore[arg-type]


# -- denominators ---------------------------------------------------------------------------------------------------


@given(_samples(), st.integers(1, 5), st.booleans())
def test_denominators_count_the_whole_step(samples: list[Sample], num_batches: int, compact: bool) -> None:
    tokens = sum(int(history.mask.sum()) for one in samples for history in one.histories)

    for batch in pack(samples, num_batches=num_batches, skip_zero_advantage=compact):
        assert float(batch.loss_inputs.num_tokens) == tokens
        assert float(batch.loss_inputs.num_sequences) == len(samples)


def test_denominators_of_other_ranks_are_taken_as_given() -> None:
    [batch] = pack([sample(token_history([1, 2], [0, 1]))], num_tokens=17.0, num_sequences=5.0)

    assert (float(batch.loss_inputs.num_tokens), float(batch.loss_inputs.num_sequences)) == (17.0, 5.0)
    assert batch.loss_inputs.kl_mean is None
    assert batch.loss_inputs.reference_logprobs is None


@given(_samples(), st.integers(1, 4))
def test_zero_advantages_can_be_left_out(samples: list[Sample], num_batches: int) -> None:
    batches = pack(samples, num_batches=num_batches, skip_zero_advantage=True)

    kept = [index for index, one in enumerate(samples) if one.advantage] or [0]  # never no batch at all
    assert sorted(index for batch in batches for index in batch.members) == kept
    for batch in batches:
        assert rows(batch) == all_rows(samples[index] for index in batch.members)


# -- how many, and the same each time -------------------------------------------------------------------------------


@given(_samples(), st.integers(1, 9))
def test_a_number_of_batches_is_kept_or_as_many_as_there_are_samples(samples: list[Sample], num_batches: int) -> None:
    batches = pack(samples, num_batches=num_batches)

    assert len(batches) == min(num_batches, len(samples))
    assert all(batch.members for batch in batches)


@given(st.lists(st.integers(2, 60), min_size=2, max_size=20), st.integers(1, 6))
def test_batches_are_of_about_equal_size(lengths: list[int], num_batches: int) -> None:
    samples = [sample(token_history(range(length), [0] * (length - 1) + [1])) for length in lengths]

    loads = [batch.num_input_tokens for batch in pack(samples, num_batches=num_batches, layout="packed")]

    assert max(loads) - min(loads) <= max(lengths) - 1  # one sample cannot be cut


@pytest.mark.parametrize("shared", [0, 300])
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_each_rank_has_as_much_work(num_ranks: int, shared: int) -> None:
    """Also where the number of batches that are filled to the brim divides the ranks, and the last one is small."""
    draw = random.Random(0)
    prompts = [[draw.randrange(200) for _ in range(shared)] for _ in range(8)]
    answers = [[draw.randrange(200) for _ in range(draw.randint(20, 300))] for _ in range(64)]
    samples = [
        sample(token_history(prompts[number % 8] + answer, [0] * shared + [1] * len(answer)))
        for number, answer in enumerate(answers)
    ]
    for limit in range(1000, 3000, 200):
        batches = pack(samples, max_tokens=limit, multiple_of=num_ranks, share_prefixes=bool(shared))
        assert len(batches) % num_ranks == 0 and max(batch.num_positions for batch in batches) <= limit
        loads = [sum(batch.num_positions for batch in batches[rank::num_ranks]) for rank in range(num_ranks)]
        assert max(loads) - sum(loads) / num_ranks < shared + 300  # no more than one trajectory


@given(_samples(), st.sampled_from(LAYOUTS), st.integers(0, 40))
def test_packing_is_deterministic(samples: list[Sample], layout: Layout, slack: int) -> None:
    limit = _fitting_limit(samples, layout, slack)

    def packed() -> list[Any]:
        return [
            (facts(batch.model_inputs), facts(batch.loss_inputs), batch.members)
            for batch in pack(samples, layout=layout, max_tokens=limit)
        ]

    first = packed()
    random.seed(1)
    torch.manual_seed(1)
    assert packed() == first


@given(_samples(), st.sampled_from([*LAYOUTS, "shared"]), st.integers(0, 40), st.booleans())
def test_what_is_counted_before_a_batch_is_made_is_true_of_it(
    samples: list[Sample], layout: Layout, slack: int, share: bool
) -> None:
    limit = max(_padded_size([one]) for one in samples) + slack
    made = microbatches(samples, max_tokens=limit, layout=layout, share_prefixes=share, kl_mean=0.5)
    batches = pack(samples, max_tokens=limit, layout=layout, share_prefixes=share, kl_mean=0.5)
    for microbatch, batch in zip([*made, made[0].filler()], [*batches, batches[0].filler()], strict=True):
        built = microbatch.build()
        assert facts(built.model_inputs) == facts(batch.model_inputs)
        assert facts(built.loss_inputs) == facts(batch.loss_inputs)
        for name in ("num_input_tokens", "num_positions", "num_tokens_saved"):
            assert getattr(microbatch, name) == getattr(batch, name), name


def test_nothing_to_pack() -> None:
    with pytest.raises(InvalidArgumentError, match="empty list of samples"):
        pack([])


def test_all_batches_of_a_step_say_whether_they_measure_the_mismatch() -> None:
    samples = [sample(token_history([1, 2, 3], [0, 1, 1])) for _ in range(3)]

    assert [batch.measures_mismatch for batch in pack(samples, num_batches=2, measures_mismatch=True)] == [True, True]
    assert [batch.measures_mismatch for batch in pack(samples, num_batches=2)] == [False, False]


# -- auto -----------------------------------------------------------------------------------------------------------


def test_auto_pads_where_it_wastes_little_and_packs_where_it_wastes_much() -> None:
    even = [sample(token_history(range(50), [0] * 49 + [1])) for _ in range(8)]
    uneven = [even[0], *(sample(token_history(range(4), [0, 0, 0, 1])) for _ in range(30))]

    assert [batch.layout for batch in pack(even)] == ["padded"]
    assert [batch.layout for batch in pack(uneven)] == ["packed"]


# -- the model agrees -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_model_gives_each_row_the_logprob_it_has_alone(tiny_policy: Policy) -> None:
    """Right positions and segments are those with which transformers cannot tell that others are beside them."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for lengths in ([5, 9], [17], [3], [12, 4, 7]):
        histories = []
        for length in lengths:
            ids = torch.randint(0, 256, (length,), generator=generator).tolist()
            histories.append(token_history(ids, [False, *[True] * (length - 1)]))
        samples.append(sample(*histories))
    expected = []
    for one in samples:
        for history in one.histories:
            logits = tiny_policy.causal_lm(input_ids=history.token_ids[None, :-1]).logits[0]
            expected.append(logits.log_softmax(-1).gather(1, history.token_ids[1:, None]).squeeze(1))

    for layout in ("padded", "packed"):
        [batch] = pack(samples, layout=layout)  # type: ignore[arg-type]
        inputs, loss = batch.model_inputs, batch.loss_inputs
        logits = tiny_policy.causal_lm(
            input_ids=inputs.input_ids, position_ids=inputs.position_ids, use_cache=False
        ).logits
        rows = logits.flatten(0, 1)[loss.rows].log_softmax(-1).gather(1, loss.targets[:, None]).squeeze(1)
        torch.testing.assert_close(rows, torch.cat(expected), atol=1e-4, rtol=0)


# -- deal -----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 5), st.integers(0, 9), st.integers(0, 3))
def test_whole_groups_are_dealt_once_and_evenly(
    num_groups: int, num_minibatches: int, seed: int, step: int, epoch: int
) -> None:
    dealt = deal(num_groups, num_minibatches, seed=seed, step=step, epoch=epoch)

    assert sorted(index for minibatch in dealt for index in minibatch) == list(range(num_groups))
    assert len(dealt) == min(num_groups, num_minibatches)
    sizes = [len(minibatch) for minibatch in dealt]
    assert max(sizes) - min(sizes) <= 1
    assert dealt == deal(num_groups, num_minibatches, seed=seed, step=step, epoch=epoch)


def test_dealing_depends_on_seed_step_and_epoch_and_on_nothing_else() -> None:
    def dealt(seed: int, step: int, epoch: int) -> list[list[int]]:
        return deal(50, 3, seed=seed, step=step, epoch=epoch)

    base = dealt(0, 0, 0)
    random.seed(7)
    torch.manual_seed(7)
    assert dealt(0, 0, 0) == base
    others = [dealt(1, 0, 0), dealt(0, 1, 0), dealt(0, 0, 1)]
    assert all(other != base for other in others)
    assert len({str(other) for other in others}) == 3


def test_nothing_to_deal() -> None:
    assert deal(0, 4, seed=0, step=0, epoch=0) == []
