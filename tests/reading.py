"""A naive reading of batches and samples, to compare packing with: what each row sees, predicts, and weighs."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fitrl.data.batch import Batch
from fitrl.data.samples import Sample

Row = tuple[tuple[int, ...], int, float, float, float, float, float]


def _expected_rows(one: Sample) -> list[Row]:
    """For each token to learn: all tokens before it in its history, itself, old, rollout, reference, A, T."""
    found: list[Row] = []
    start = 0
    assert one.reference_logprobs is not None
    for history in one.histories:
        ids = history.token_ids.tolist()
        for t in range(len(ids)):
            if history.mask[t]:
                found.append(
                    (
                        tuple(ids[:t]),
                        ids[t],
                        float(one.old_logprobs[start + t]),
                        float(history.logprobs[t]),
                        float(one.reference_logprobs[start + t]),
                        float(torch.tensor(one.advantage)),
                        float(history.temperature[t]),
                    )
                )
        start += len(ids)
    return found


def _seen_by(batch: Batch, place: int) -> tuple[int, ...]:
    """Tokens that a causal model sees at a position: those before it in its row, as far as they are in sight."""
    inputs = batch.model_inputs
    row, column = divmod(place, inputs.input_ids.shape[1])
    ids = inputs.input_ids[row].tolist()
    ends = [len(ids)] * len(ids) if inputs.ends is None else inputs.ends[row].tolist()
    seen = [i for i in range(column + 1) if column < ends[i]]
    if inputs.position_ids is not None:
        assert inputs.position_ids[row][seen].tolist() == list(range(len(seen)))
    return tuple(ids[i] for i in seen)


def rows(batch: Batch) -> list[Row]:
    loss = batch.loss_inputs
    assert loss.reference_logprobs is not None
    return [
        (
            _seen_by(batch, int(loss.rows[i])),
            int(loss.targets[i]),
            float(loss.old_logprobs[i]),
            float(loss.rollout_logprobs[i]),
            float(loss.reference_logprobs[i]),
            float(loss.advantages[i]),
            float(loss.temperature[i]),
        )
        for i in range(len(loss.rows))
    ]


def all_rows(samples: Iterable[Sample]) -> list[Row]:
    return [row for one in samples for row in _expected_rows(one)]
