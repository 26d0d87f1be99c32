"""Random trajectories that begin alike."""

from __future__ import annotations

import random

from hypothesis import strategies as st

from fitrl.data.histories import TokenHistory
from fitrl.data.samples import Sample
from helpers import sample, token_history


@st.composite
def trees(draw: st.DrawFn, max_trajectories: int = 8, max_histories: int = 3) -> list[Sample]:
    """Trajectories whose histories go on from where others stood, at any token, or are the same once more."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    counts = draw(st.lists(st.integers(1, max_histories), min_size=1, max_size=max_trajectories))
    words = draw(st.sampled_from([2, 3, 250]))
    known: list[list[int]] = [[]]

    def history() -> TokenHistory:
        stem = rng.choice(known)
        ids = stem[: rng.randint(0, len(stem))]
        ids = ids + [rng.randrange(1, words + 1) for _ in range(rng.randint(max(0, 2 - len(ids)), 6))]
        known.append(ids)
        mask = [False, *(rng.random() < 0.5 for _ in ids[1:])]
        mask[rng.randrange(1, len(ids))] = True
        return token_history(ids, mask, logprobs=[-rng.random() for _ in ids], temperature=rng.choice([0.5, 1.0, 1.3]))

    samples = [
        sample(*(history() for _ in range(count)), advantage=rng.choice([-1.5, 0.3, 2.0]), reference=True)
        for count in counts
    ]
    rng.shuffle(samples)
    return samples
