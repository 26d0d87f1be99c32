"""From a microbatch to what the service reads, and back: `Datum` objects, and the logprobs that it returns.

A datum is one sequence: `tokens[:-1]` are read, `tokens[1:]` predicted, and every column of the loss has their length,
0 where nothing is trained. Turns of one trajectory that extend each other become one datum, so that the service
computes what they have in common once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fitrl.data.batch import Batch
from fitrl.errors import DataError, UnsupportedError

if TYPE_CHECKING:
    import tinker


@dataclass(slots=True, kw_only=True, eq=False)
class TokenSequence:
    """Tokens of one datum, and which of them are trained.

    Attributes:
        tokens: [N + 1] int64.
        rows: of the batch's loss, one per trained token.
        places: where in the N predictions each row is.
        trajectory: whose it is.
    """

    tokens: Tensor
    rows: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    trajectory: int


class Datums:
    """The sequences of a microbatch.

    Args:
        batch: packed or padded, without shared prefixes.

    Raises:
        UnsupportedError: histories share prefixes in it.
        DataError: tokens were sampled at another temperature than 1, at which the service has no logprobs.
    """

    def __init__(self, batch: Batch) -> None:
        if batch.layout == "shared":
            raise UnsupportedError(
                "a batch with shared prefixes cannot be sent to the service: pack it with layout='packed'; what turns "
                "of a trajectory have in common is sent once all the same"
            )
        targets = batch.loss_inputs
        trained = targets.mask.bool()
        warm = trained & (targets.temperature != 1.0)
        if bool(warm.any()):
            raise DataError(
                f"tokens were sampled at temperature {float(targets.temperature[warm][0]):g}: the service's logprobs "
                "are those of temperature 1, so that is what can be learned from"
            )
        self.size = len(targets.rows)
        self.sequences = _merged(_sequences(batch))

    @property
    def is_one_each(self) -> bool:
        """Whether every trajectory is one datum."""
        trajectories = [sequence.trajectory for sequence in self.sequences]
        return len(set(trajectories)) == len(trajectories)

    def build(self, columns: Mapping[str, Tensor]) -> list[tinker.Datum]:
        """Datums with these columns of the loss.

        Args:
            columns: [R] each, one entry per row of the batch's loss.
        """
        import tinker

        built = []
        for sequence in self.sequences:
            inputs = {"target_tokens": tinker.TensorData.from_torch(sequence.tokens[1:])}
            places = torch.tensor(sequence.places)
            for name, column in columns.items():
                dense = torch.zeros(len(sequence.tokens) - 1, dtype=torch.float32)
                dense[places] = column[sequence.rows].float()
                inputs[name] = tinker.TensorData.from_torch(dense)
            tokens = sequence.tokens[:-1].tolist()
            built.append(tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens), loss_fn_inputs=inputs))
        return built

    def gather(self, outputs: Sequence[Mapping[str, tinker.TensorData]]) -> Tensor:
        """The logprobs [R] float32 that the service returned, in the order of the batch's rows."""
        found = torch.zeros(self.size)
        for sequence, output in zip(self.sequences, outputs, strict=True):
            logprobs = torch.tensor(output["logprobs"].data, dtype=torch.float32)
            found[sequence.rows] = logprobs[sequence.places]
        return found


def _sequences(batch: Batch) -> list[TokenSequence]:
    """One sequence for each history with something to train, up to the last token that is."""
    inputs, targets = batch.model_inputs, batch.loss_inputs
    width = inputs.input_ids.shape[1]
    ids, segments = inputs.input_ids.flatten(), inputs.segment_ids.flatten().tolist()
    starts: dict[tuple[int, int], int] = {}  # of each history, which lies in one piece in its row
    for slot, segment in enumerate(segments):
        starts.setdefault((slot // width, segment), slot)
    found: dict[tuple[int, int], TokenSequence] = {}
    rows = targets.rows.tolist()
    masked_in, trajectories = targets.mask.tolist(), targets.trajectory_ids.tolist()
    for row, slot in enumerate(rows):
        if not masked_in[row]:
            continue
        key = (slot // width, segments[slot])
        if key not in found:
            found[key] = TokenSequence(tokens=ids[:0], trajectory=trajectories[row])
        found[key].rows.append(row)
        found[key].places.append(slot - starts[key])
    for key, sequence in found.items():
        last = max(sequence.places)
        target = targets.targets[sequence.rows[sequence.places.index(last)]]
        start = starts[key]
        sequence.tokens = torch.cat([ids[start : start + last + 1], target[None]])
    return list(found.values())


def _merged(sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
    """Sequences of one trajectory that extend each other put together, unless both train the same token."""
    kept: dict[int, list[TokenSequence]] = {}
    for sequence in sorted(sequences, key=lambda sequence: -len(sequence.tokens)):
        others = kept.setdefault(sequence.trajectory, [])
        longer = next((other for other in others if _goes_into(sequence, other)), None)
        if longer is None:
            others.append(sequence)
        else:
            longer.rows += sequence.rows
            longer.places += sequence.places
    return [sequence for trajectory in sorted(kept) for sequence in kept[trajectory]]


def _goes_into(shorter: TokenSequence, longer: TokenSequence) -> bool:
    begins_alike = torch.equal(longer.tokens[: len(shorter.tokens)], shorter.tokens)
    return begins_alike and not set(longer.places) & set(shorter.places)
