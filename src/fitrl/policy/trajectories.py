"""Trajectories of a run on disk, as JSONL or parquet: written by `model.log`, read by `model.trajectories`.

Enters: groups and a step. Leaves: `<run>/trajectories/<split>/<step>.jsonl`, one group per line, or
`<step>.parquet`, one trajectory per row, with columns that other tools can query. Both read back without loss.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from fitrl.data.groups import Trajectory, TrajectoryGroup
from fitrl.data.json_lines import dump, number_from_json
from fitrl.errors import DataError, InvalidArgumentError, MissingDependencyError

TrajectoryFormat: TypeAlias = Literal["jsonl", "parquet"]
_log = logging.getLogger(__name__)
_FILE = re.compile(r"(\d+)(?:-(\d+))?\.(jsonl|parquet)")


def check_format(trajectory_format: str) -> TrajectoryFormat:
    """The format, if it is one and can be written here.

    Raises:
        InvalidArgumentError: there is no such format.
        MissingDependencyError: parquet without pyarrow.
    """
    if trajectory_format not in get_args(TrajectoryFormat):
        raise InvalidArgumentError(f"trajectory_format must be 'jsonl' or 'parquet', got {trajectory_format!r}")
    if trajectory_format == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise MissingDependencyError("trajectory_format='parquet' needs pyarrow: pip install 'fitrl[parquet]'")
    return trajectory_format  # type: ignore[return-value]


def write(folder: Path, step: int, groups: Sequence[TrajectoryGroup], trajectory_format: TrajectoryFormat) -> Path:
    """Add groups to what a folder holds of a step; returns the file.

    Raises:
        DataError: a group that JSON cannot hold; nothing is written then.
    """
    if trajectory_format == "jsonl":
        lines = [group.to_json() + "\n" for group in groups]  # before anything is written
        path = folder / f"{step:04d}.jsonl"
        append_lines(path, lines)
        return path
    rows = [row for number, group in enumerate(groups) for row in _rows(number, group)]
    folder.mkdir(parents=True, exist_ok=True)
    part = sum(found[0] == step and path.suffix == ".parquet" for found, path in _files(folder))
    path = folder / (f"{step:04d}-{part}.parquet" if part else f"{step:04d}.parquet")  # parquet cannot be appended to
    _write_parquet(path, step, rows)
    return path


def steps(folder: Path) -> list[int]:
    """Steps that a folder holds trajectories of, in order."""
    return sorted({key[0] for key, _ in _files(folder)})


def read(folder: Path, step: int) -> list[TrajectoryGroup]:
    """The groups of a step, in the order in which they were logged.

    Raises:
        DataError: a file that cannot be read, or no trajectories of this step.
        MissingDependencyError: a parquet file without pyarrow.
    """
    paths = [path for key, path in sorted(_files(folder)) if key[0] == step]
    if not paths:
        known = steps(folder)
        there = f"{len(known)} steps from {known[0]} to {known[-1]}" if known else "nothing"
        raise DataError(f"there are no trajectories of step {step} in {folder}, which holds {there}")
    groups: list[TrajectoryGroup] = []
    for path in paths:
        groups += _read_parquet(path) if path.suffix == ".parquet" else _read_jsonl(path)
    return groups


def append_lines(path: Path, lines: Sequence[str]) -> None:
    """Append whole lines in one write, also after one that a crash cut short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        end = file.seek(0, os.SEEK_END)
        cut = False
        if end:
            file.seek(end - 1)
            cut = file.read(1) != b"\n"
        file.write((b"\n" if cut else b"") + "".join(lines).encode())


def read_history(path: Path) -> list[dict[str, Any]]:
    """The entries of a run's `history.jsonl`, oldest first; none without a file."""
    entries: list[dict[str, Any]] = list(whole_lines(path)) if path.is_file() else []
    for entry in entries:
        entry["metrics"] = {key: number_from_json(value) for key, value in entry["metrics"].items()}
    return entries


def whole_lines(path: Path) -> Iterator[Any]:
    """The values of a JSONL file; a line that a crash has cut is skipped with a warning that names it."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield json.loads(line)
            except ValueError:
                _log.warning("skipped: line %d of %s is cut", number, path)


def _files(folder: Path) -> list[tuple[tuple[int, int], Path]]:
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := _FILE.fullmatch(path.name):
            found.append(((int(match[1]), int(match[2] or 0)), path))
    return found


def _read_jsonl(path: Path) -> list[TrajectoryGroup]:
    try:
        return [TrajectoryGroup.from_dict(value) for value in whole_lines(path)]
    except (DataError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} holds something else than trajectory groups: {error!r}") from error


def _rows(number: int, group: TrajectoryGroup) -> Iterator[dict[str, Any]]:
    """A row per trajectory; what belongs to the group is in its first row, which a group of none has too."""
    data = group.to_dict()
    trajectories = data.pop("trajectories")
    for index, trajectory in enumerate(group) if trajectories else ((None, None),):
        row: dict[str, Any] = {"group": number, "index": index, "group_data": None}
        if trajectory is not None:
            completions = trajectory.completions()
            row |= {
                "reward": float(trajectory.reward),
                "trajectory": trajectory.to_json(),  # first: it names what JSON cannot hold
                "prompt": json.dumps(_before_first_completion(trajectory)),
                "completion": completions[-1].text if completions else None,
            }
        if not index:
            row["group_data"] = dump(data, "group")
        yield row


def _before_first_completion(trajectory: Trajectory) -> list[dict[str, Any]]:
    messages = []
    for item in trajectory.messages_and_choices:
        if not isinstance(item, dict):
            break
        messages.append(item)
    return messages


def _write_parquet(path: Path, step: int, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    from pyarrow import parquet

    text = pyarrow.string()
    schema = pyarrow.schema(
        [
            ("step", pyarrow.int64()),
            ("group", pyarrow.int32()),
            ("index", pyarrow.int32()),
            ("reward", pyarrow.float64()),
            ("prompt", text),  # messages before the first completion, JSON
            ("completion", text),  # the last one's text
            ("trajectory", text),  # all of it, JSON
            ("group_data", text),  # metadata, metrics, logs and exceptions of the group, JSON
        ]
    )
    table = pyarrow.Table.from_pylist([{"step": step} | row for row in rows], schema=schema)
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        parquet.write_table(table, temporary, compression="zstd")
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_parquet(path: Path) -> list[TrajectoryGroup]:
    check_format("parquet")
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.read_table(path, columns=["group_data", "trajectory"]).to_pylist()
    except (pyarrow.ArrowException, KeyError) as error:
        raise DataError(f"{path} cannot be read as trajectories: {error}") from error
    groups: list[TrajectoryGroup] = []
    for row in rows:
        if row["group_data"] is not None:
            data = json.loads(row["group_data"])
            groups.append(TrajectoryGroup.from_dict({"trajectories": [], **data}))
        if row["trajectory"] is not None:
            groups[-1].trajectories.append(Trajectory.from_json(row["trajectory"]))
    return groups
