"""`TrainableModel`: which policy, and where its run lives. Holds no weights; trainers and services do.

A run folder is `<root>/<project>/<name>/`:
    checkpoints/<step>/           what `fit_rl` saves, see `checkpoints.py`
    history.jsonl                 one line per `log` call
    lock, holder.json             which trainer has the run open, see `lock.py`
    trajectories/<split>/<step>.jsonl   one group per line, token ids and logprobs kept; or .parquet
    config.yaml                   of runs of the command line
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from fitrl.data import ranks
from fitrl.data.groups import TrajectoryGroup
from fitrl.data.json_lines import number_to_json
from fitrl.errors import InvalidArgumentError
from fitrl.policy import trajectories as files
from fitrl.policy.checkpoints import is_whole, list_checkpoints, remove
from fitrl.policy.loading import LoraSettings
from fitrl.policy.migration import OlderCalls
from fitrl.policy.trajectories import TrajectoryFormat

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class TrainableModel(OlderCalls):
    """A model to train: what it starts from, and the folder of its run.

    The same (root, project, name) means the same run: a trainer that opens it resumes its newest checkpoint.

    Args:
        name: of the run; letters, digits, '.', '_' and '-'.
        project: that the run belongs to.
        base_model: a hub id, a local folder, a GGUF file, or "tiny", the bundled policy.
        lora: adapters to train; None trains all weights.
        root: folder of all projects.
        loggers: Lightning loggers that `log` also writes to. A logger may be the trainer's too: what the trainer
            has told it already is not told again.
        trajectory_format: "jsonl", or "parquet" for other tools' queries (`pip install 'fitrl[parquet]'`).

    Raises:
        InvalidArgumentError: a name that cannot be a folder, or an unknown format.
        MissingDependencyError: parquet without pyarrow.
    """

    def __init__(
        self,
        name: str,
        project: str,
        base_model: str,
        *,
        lora: LoraSettings | None = LoraSettings(),  # noqa: B008 - frozen
        root: str | Path | None = None,
        loggers: Sequence[Logger] = (),
        trajectory_format: TrajectoryFormat = "jsonl",
    ) -> None:
        for what, value in (("name", name), ("project", project)):
            if not _NAME.fullmatch(value):
                raise InvalidArgumentError(
                    f"{what} must be letters, digits, '.', '_' and '-', starting with a letter or digit, got {value!r}"
                )
        if not base_model:
            raise InvalidArgumentError("base_model must not be empty; 'tiny' is the bundled policy")
        self.name = name
        self.project = project
        self.base_model = base_model
        self.lora = lora
        self.root = Path(root if root is not None else ".fitrl").expanduser().resolve()
        self.loggers = tuple(loggers)
        self.trajectory_format = files.check_format(trajectory_format)
        self.told = Told()
        self.step = self.saved_step

    def __repr__(self) -> str:
        lora = "None" if self.lora is None else f"LoraSettings(rank={self.lora.rank})"
        return (
            f"TrainableModel(name={self.name!r}, project={self.project!r}, base_model={self.base_model!r}, "
            f"lora={lora}, step={self.step})"
        )

    @property
    def key(self) -> tuple[Path, str, str]:
        """What makes two models the same run."""
        return self.root, self.project, self.name

    @property
    def run_dir(self) -> Path:
        """The run folder; made when something is first written."""
        return self.root / self.project / self.name

    @property
    def checkpoints_dir(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.run_dir / "checkpoints"

    @property
    def saved_step(self) -> int:
        """Step of the newest checkpoint, where the run is resumed; 0 without one."""
        return max((step for step, _ in list_checkpoints(self.checkpoints_dir)), default=0)

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest step first."""
        return [path for _, path in list_checkpoints(self.checkpoints_dir)]

    def delete_checkpoints(self, *, best: str | None = None, mode: Literal["max", "min"] = "max") -> list[Path]:
        """Delete the checkpoints of all steps but the newest, and the best by a logged metric.

        Checkpoints under a name of your own (`save(name=...)`) are left alone.

        Args:
            best: a key that `log` wrote, "reward/mean" or "val/reward/mean" say; the step it was logged with counts.
                None: keep the newest only.
            mode: whether the highest or the lowest value is best.

        Returns:
            The deleted folders.

        Raises:
            InvalidArgumentError: no step that has a checkpoint was logged with this metric; nothing is deleted.
        """
        if mode not in ("max", "min"):
            raise InvalidArgumentError(f"mode must be 'max' or 'min', got {mode!r}")
        return [Path(path) for path in ranks.first(lambda: self._delete_checkpoints(best, mode))]

    def _delete_checkpoints(self, best: str | None, mode: str) -> list[str]:
        steps = {step: path for step, path in list_checkpoints(self.checkpoints_dir) if path.name == f"{step:04d}"}
        seen: dict[int, bool] = {}  # the steps whose files were read: those that could be kept

        def first_whole(order: list[int]) -> int | None:
            for step in order:
                if step not in seen:
                    seen[step] = is_whole(steps[step])
                if seen[step]:
                    return step
            return None

        keep = {first_whole(sorted(steps, reverse=True))}
        if best is not None:
            logged: dict[int, dict[str, float]] = {}
            for entry in self.history():
                logged.setdefault(entry["step"], {}).update(entry["metrics"])
            values = {step: logged[step][best] for step in steps if best in logged.get(step, {})}
            values = {step: value for step, value in values.items() if value == value}  # NaN is no better than anything
            if not values:
                known = sorted({key for metrics in logged.values() for key in metrics})
                raise InvalidArgumentError(
                    f"best={best!r} was not logged at any step that has a checkpoint; logged were: "
                    f"{', '.join(known) or 'no metrics'}"
                )
            sign = 1 if mode == "max" else -1
            keep.add(first_whole(sorted(values, key=lambda step: (sign * values[step], step), reverse=True)))
        if keep == {None}:
            return []  # nothing whole would be left
        # what was found damaged is left for a person to look at
        doomed = [path for step, path in steps.items() if step not in keep and seen.get(step, True)]
        for path in doomed:
            remove(path)
        return [str(path) for path in doomed]

    def log(
        self,
        groups: Iterable[TrajectoryGroup] = (),
        *,
        split: str = "train",
        metrics: Mapping[str, float] | None = None,
        step: int | None = None,
    ) -> dict[str, float]:
        """Append metrics to the run's history, keep the trajectories, and tell the loggers.

        In a job of several processes only the first one writes; the others return the same numbers.

        Args:
            groups: trajectories to keep, logprobs included; their rewards and own metrics are averaged.
            split: "train", "val", ...; names the trajectories' folder and prefixes the keys of other splits.
            metrics: further numbers, a `TrainResult`'s say; they win over the averages of the same name.
            step: policy version they belong to; None: the newest one that a trainer reported.

        Returns:
            The metrics as logged.

        Raises:
            InvalidArgumentError: a split that cannot be a folder.
        """
        if not _NAME.fullmatch(split):
            raise InvalidArgumentError(f"split must be letters, digits, '.', '_' and '-', got {split!r}")
        groups = list(groups)
        at = self.step if step is None else step
        numbers = _averages(groups) | {key: float(value) for key, value in (metrics or {}).items()}
        if split != "train":
            numbers = {f"{split}/{key}": value for key, value in numbers.items()}
        if getattr(rank_zero_only, "rank", 0) != 0:
            return numbers
        if groups:
            files.write(self._trajectories_dir(split), at, groups, self.trajectory_format)
        plain = {key: number_to_json(value) for key, value in numbers.items()}
        entry = {"step": at, "split": split, "time": time.time(), "metrics": plain}
        files.append_lines(self.run_dir / "history.jsonl", [json.dumps(entry) + "\n"])
        for logger in self.loggers:
            if news := self.told.news(logger, numbers, at):
                logger.log_metrics(news, step=at)
                logger.save()  # a crash loses nothing, and no one else closes these loggers
        return numbers

    def history(self) -> list[dict[str, Any]]:
        """Everything logged so far, oldest first: step, split, time, metrics.

        A line that a crash cut short is left out and named in a warning.
        """
        path = self.run_dir / "history.jsonl"
        return files.read_history(path)

    def trajectories(self, *, split: str = "train", step: int | None = None) -> list[TrajectoryGroup]:
        """The groups that `log` kept of a step, in either format.

        Args:
            split: as given to `log`.
            step: as given to `log`; None: the newest one that has trajectories.

        Raises:
            DataError: there are none.
            MissingDependencyError: a parquet file without pyarrow.
        """
        steps = self.trajectory_steps(split=split)
        newest = steps[-1] if steps else self.step
        return files.read(self._trajectories_dir(split), newest if step is None else step)

    def trajectory_steps(self, *, split: str = "train") -> list[int]:
        """Steps that have trajectories, in order."""
        return files.steps(self._trajectories_dir(split))

    def _trajectories_dir(self, split: str) -> Path:
        return self.run_dir / "trajectories" / split


class Told:
    """What a trainer has told its loggers of the newest step, so that `log` does not tell the same ones again."""

    def __init__(self) -> None:
        self._loggers: tuple[Logger, ...] = ()
        self._step = -1
        self._numbers: dict[str, float] = {}

    def note(self, loggers: Iterable[Logger], numbers: Mapping[str, float], step: int) -> None:
        """Remember what was told to whom."""
        self._loggers, self._numbers, self._step = tuple(loggers), dict(numbers), step

    def news(self, logger: Logger, numbers: Mapping[str, float], step: int) -> dict[str, float]:
        """The numbers that this logger does not have of this step."""
        knows = step == self._step and any(logger is other for other in self._loggers)
        known = self._numbers if knows else {}
        # repr: a NaN that was told is told
        return {key: value for key, value in numbers.items() if key not in known or repr(value) != repr(known[key])}


def _averages(groups: Sequence[TrajectoryGroup]) -> dict[str, float]:
    if not groups:
        return {}
    columns: dict[str, list[float]] = {}
    for group in groups:
        for key, value in group.metrics.items():
            columns.setdefault(f"group/{key}", []).append(float(value))
        for trajectory in group:
            columns.setdefault("reward/mean", []).append(float(trajectory.reward))
            for key, value in trajectory.metrics.items():
                columns.setdefault(f"trajectory/{key}", []).append(float(value))
    averages = {key: sum(values) / len(values) for key, values in columns.items()}
    return averages | {"data/num_exceptions": float(sum(len(group.exceptions) for group in groups))}
