"""`Ledger`: which groups of a pipeline are finished, handed out and trained, kept beside the run's checkpoints.

    <run>/pipeline/queue.json           which numbers are done, and the batches that no checkpoint holds yet
    <run>/pipeline/groups/<number>.json finished groups: those that wait, and those of these batches

A file is written under a temporary name, flushed and renamed. `queue.json` alone says what was handed out, so a crash
at any moment leaves the state before or the state after. A batch is kept until a checkpoint holds what was learned from
it: a run that goes back to an older checkpoint is handed the same batches again, also the one that it could not be
trained on, unless it has gone back from that one before, in the same process. One that could not be trained on at the
step of the newest checkpoint is handed out again by the next process, and not by the same one. One that a call was
stopped in the middle of counts as trained on. Groups that were under way are begun again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fitrl.data.groups import TrajectoryGroup
from fitrl.errors import CheckpointError, DataError
from fitrl.policy import checkpoints
from fitrl.policy.model import TrainableModel


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """Groups that were handed out together: the trainer's step then (None: before it is there) and their numbers."""

    step: int | None
    numbers: list[int]


class Ledger:
    """The books of a pipeline; without a model they are kept in memory only.

    Args:
        model: whose run folder they are kept in, as its trainer has opened it.
        keeps_waiting: also keep groups that were not handed out yet. Without, a step that was under way is sampled
            again as a whole, in the same batches, and so gives the same numbers to the last bit.

    Attributes:
        versions: policy versions of the newest steps, as they were when a batch was last handed out.
        replays: batches that were handed out and are in no checkpoint: to be handed out again, in order.
        waiting: groups that were finished and not handed out, by number.

    Raises:
        CheckpointError: what was kept cannot be read.
    """

    def __init__(self, model: TrainableModel | None, *, keeps_waiting: bool) -> None:
        self._model = model
        self._folder = None if model is None else model.run_dir / "pipeline"
        self._keeps_waiting = keeps_waiting and model is not None
        self._floor = 0  # every number below is done
        self._done: set[int] = set()
        self._dropped: set[int] = set()  # since the last batch
        self._batches: list[_Batch] = []  # the last ones are the replays
        self._newest_step = 0  # of a batch that was handed out
        self._went_back_from: list[int] | None = None  # groups of a batch
        self.versions: list[int] = []
        self.replays: list[list[TrajectoryGroup]] = []
        self.waiting: dict[int, TrajectoryGroup] = {}
        if model is not None:
            self._load()

    def next_number(self, taken: Collection[int]) -> int:
        """The lowest number that is neither done nor taken."""
        number = self._floor
        while number in self._done or number in taken:
            number += 1
        return number

    def keep(self, number: int, group: TrajectoryGroup) -> None:
        """Keep a finished group; it may run beside everything else.

        Raises:
            DataError: the group holds a value that JSON cannot hold.
            CheckpointError: it cannot be written.
        """
        if self._keeps_waiting:
            self._write_group(number, group)

    def drop(self, number: int) -> None:
        """Note that a group will not be handed out; kept with the next batch."""
        self._finish([number])
        self._dropped.add(number)

    def hand_out(self, groups: dict[int, TrajectoryGroup], versions: Iterable[int]) -> None:
        """Note a batch, by number; raises as `keep`."""
        self._finish(groups)
        self.versions = list(versions)
        if self._model is None or self._folder is None:
            return
        if not self._keeps_waiting:
            for number, group in groups.items():
                self._write_group(number, group)
        self._commit([*self._unsaved(), _Batch(step=self._model.step, numbers=list(groups))])
        self._newest_step = self._model.step

    def hand_out_again(self) -> list[TrajectoryGroup]:
        """Take the next of the replays, and note the step that it is trained at now; those after it have none yet.

        Raises:
            CheckpointError: the books cannot be written.
        """
        assert self._model is not None  # without books there are no replays
        index = len(self._batches) - len(self.replays)
        again = replace(self._batches[index], step=self._model.step)
        later = [replace(batch, step=None) for batch in self._batches[index + 1 :]]
        self._commit([*self._batches[:index], again, *later])
        self._newest_step = self._model.step
        return self.replays.pop(0)

    def look_back(self) -> int:
        """See whether the run has gone back to a checkpoint while it was open: then its batches are replayed, too.

        Returns:
            how many groups are left out, because the run went back from their batch before.
        """
        left_out = 0
        if self._model is not None and self._model.step < self._newest_step:
            handed_out = self._batches[: len(self._batches) - len(self.replays)]
            if handed_out:
                last = handed_out[-1].numbers  # what it went back from
                if last == self._went_back_from:  # and would again
                    self._commit([batch for batch in self._batches if batch.numbers != last])
                    left_out = len(last)
                self._went_back_from = last
            self._replay()
        return left_out

    def state(self) -> dict[str, Any]:
        """Which numbers are done: handed out or dropped; and the versions."""
        return {"floor": self._floor, "done": sorted(self._done), "versions": list(self.versions)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` said."""
        self._floor, self._done = int(state["floor"]), set(state["done"])
        self.versions = list(state["versions"])

    def _replay(self) -> None:
        """Have the batches handed out again that the weights as they are were not trained on, all of them the last."""
        assert self._model is not None
        self._newest_step = step = self._model.step
        again = [batch for batch in self._batches if batch.step is None or batch.step >= step]
        self.replays = [[self._read(number) for number in batch.numbers] for batch in again]

    def _unsaved(self) -> list[_Batch]:
        """The batches that no checkpoint is known to hold."""
        assert self._model is not None
        step = self._model.step
        saved = _is_saved(self._model, step)
        return [batch for batch in self._batches if not saved or batch.step is None or batch.step >= step]

    def _finish(self, numbers: Iterable[int]) -> None:
        self._done.update(numbers)
        while self._floor in self._done:
            self._done.remove(self._floor)
            self._floor += 1

    def _commit(self, batches: list[_Batch]) -> None:
        """Write the books with these batches, then delete the groups that are in none of them and done."""
        assert self._folder is not None
        gone = self._dropped.union(*(batch.numbers for batch in self._batches))
        state = self.state() | {"batches": [asdict(batch) for batch in batches]}
        _write(self._folder / "queue.json", json.dumps(state) + "\n")
        self._batches, self._dropped = batches, set()
        for number in gone.difference(*(batch.numbers for batch in batches)):
            self._path(number).unlink(missing_ok=True)

    def _load(self) -> None:
        assert self._folder is not None
        path = self._folder / "queue.json"
        if path.is_file():
            try:
                state = json.loads(path.read_text())
                self.load_state(state)
                self._batches = [_Batch(**batch) for batch in state["batches"]]
            except (OSError, ValueError, TypeError, KeyError) as error:
                raise CheckpointError(f"{path} cannot be read ({error!r}): delete its folder to begin anew") from error
            self._commit(self._unsaved())
            self._replay()
        handed_out = {number for batch in self._batches for number in batch.numbers}
        found = self._clear(keep=handed_out)
        self.waiting = {number: self._read(number) for number in sorted(found - handed_out)}

    def _clear(self, keep: Collection[int]) -> set[int]:
        """Delete what a crash left over, and groups that are done; returns the numbers of those that stay."""
        assert self._folder is not None
        found: set[int] = set()
        for path in sorted((self._folder / "groups").glob("*")):
            number = int(path.stem) if path.suffix == ".json" and path.stem.isdecimal() else None
            is_done = number is not None and (number < self._floor or number in self._done)
            if number is not None and (number in keep or (self._keeps_waiting and not is_done)):
                found.add(number)
            else:
                path.unlink()
        return found

    def _path(self, number: int) -> Path:
        assert self._folder is not None
        return self._folder / "groups" / f"{number:06d}.json"

    def _write_group(self, number: int, group: TrajectoryGroup) -> None:
        _write(self._path(number), group.to_json() + "\n")

    def _read(self, number: int) -> TrajectoryGroup:
        path = self._path(number)
        try:
            return TrajectoryGroup.from_json(path.read_text())
        except (OSError, DataError) as error:
            raise CheckpointError(
                f"{path}, which was handed out or waits, cannot be read ({error}): delete {path.parent.parent} to "
                "begin anew"
            ) from error


def _is_saved(model: TrainableModel, step: int) -> bool:
    """Whether a whole checkpoint of a step lies in the run folder."""
    try:
        return checkpoints.read_manifest(model.checkpoints_dir / f"{step:04d}").step == step
    except CheckpointError:
        return False


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all, also if the machine goes down."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error
