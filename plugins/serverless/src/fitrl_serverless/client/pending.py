"""The job under way, on disk: a client that died, whenever it did, picks the job up again and trains nothing twice.

In the run folder lie `job.json` and, beside it, the gzipped body that is or was submitted. The body is whole before
`job.json` names it, and the idempotency key is there before the first submission, so that one which was not answered
can be repeated by another process. Both go when the job has ended and its outcome is known.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from fitrl.data.json_lines import number_from_json, number_to_json
from fitrl.errors import CheckpointError
from fitrl_serverless import wire

_RECORD = "job.json"
_COMPRESSION = 3  # token ids and logprobs shrink little more with higher levels, which take far longer


@dataclass(slots=True, kw_only=True)
class PendingJob:
    """A job whose outcome this run does not know yet.

    Attributes:
        url: of the service that has it.
        model_id: of the service.
        key: idempotency key of its submission, and a part of its body's file name.
        fingerprint: which groups and arguments these are.
        metrics: that the client knew of the groups.
        dropped: groups that were left out, by reason.
        num_empty: groups that were not even sent, having no trajectories.
        job_id: of the service; None: its submission was not answered.
    """

    url: str
    model_id: str
    key: str
    fingerprint: str
    metrics: dict[str, float]
    dropped: dict[str, int]
    num_empty: int
    job_id: str | None = None

    def body(self, run_dir: Path) -> Path:
        """The gzipped body."""
        return _body(run_dir, self.key)

    @classmethod
    def create(
        cls,
        run_dir: Path,
        *,
        url: str,
        model_id: str,
        groups: Sequence[wire.Group],
        config: wire.ExperimentalConfig,
        learning_rate: float,
        metrics: Mapping[str, float],
        dropped: Mapping[str, int],
        num_empty: int,
    ) -> Self:
        """Write the body; `save` makes it the run's job, `discard` takes it away again.

        Args:
            run_dir: the run's folder.
            url: of the service.
            model_id: of the service.
            groups: to learn from.
            config: the arguments of the call, as its caller gave them.
            learning_rate: of the job, after any schedule.
            metrics: that the client knows.
            dropped: what was left out.
            num_empty: groups that are not sent.

        Raises:
            CheckpointError: the folder cannot be written to.
        """
        key = uuid.uuid4().hex
        told = config.model_copy(update={"learning_rate": learning_rate})
        try:
            with gzip.open(_body(run_dir, key), "wb", compresslevel=_COMPRESSION) as file:
                for part in _parts(model_id, groups, told):
                    file.write(part)
            _flush(_body(run_dir, key))
        except OSError as error:
            _body(run_dir, key).unlink(missing_ok=True)
            raise CheckpointError(f"the groups cannot be written to {run_dir}: {error}") from error
        return cls(
            url=url,
            model_id=model_id,
            key=key,
            fingerprint=fingerprint(model_id, groups, config),
            metrics=dict(metrics),
            dropped=dict(dropped),
            num_empty=num_empty,
        )

    @classmethod
    def load(cls, run_dir: Path) -> Self | None:
        """The run's job, if it has one; bodies that no job names, of a client that died early, are cleared away.

        Raises:
            CheckpointError: there is one, and it cannot be read.
        """
        path = run_dir / _RECORD
        record: Self | None = None
        try:
            if path.is_file():
                said: dict[str, Any] = json.loads(path.read_text())
                said["metrics"] = {name: number_from_json(value) for name, value in said["metrics"].items()}
                record = cls(**said)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"{path} names a job of the service and cannot be read ({error}): delete the file once you know that "
                "the job has ended"
            ) from error
        for body in run_dir.glob(_body(run_dir, "*").name):
            if record is None or body != record.body(run_dir):
                body.unlink(missing_ok=True)
        return record

    def save(self, run_dir: Path) -> None:
        """Make this the run's job, in one step."""
        said = asdict(self) | {"metrics": {name: number_to_json(value) for name, value in self.metrics.items()}}
        temporary = run_dir / f".{_RECORD}-{uuid.uuid4().hex[:8]}.tmp"
        _write_through(temporary, json.dumps(said).encode())
        temporary.replace(run_dir / _RECORD)
        _flush(run_dir)

    def discard(self, run_dir: Path) -> None:
        """Forget the job: its outcome is known."""
        if (run_dir / _RECORD).is_file() and json.loads((run_dir / _RECORD).read_text())["key"] == self.key:
            (run_dir / _RECORD).unlink()
        self.body(run_dir).unlink(missing_ok=True)


def fingerprint(model_id: str, groups: Sequence[wire.Group], config: wire.ExperimentalConfig) -> str:
    """Tell the same groups and arguments from others; where a schedule stands does not count."""
    digest = hashlib.sha256()
    for part in _parts(model_id, groups, config):
        digest.update(part)
    return digest.hexdigest()


def _body(run_dir: Path, key: str) -> Path:
    return run_dir / f"job-{key}.json.gz"


def _parts(model_id: str, groups: Sequence[wire.Group], config: wire.ExperimentalConfig) -> Iterator[bytes]:
    """A `CreateTrainingJob`, group by group."""
    yield b'{"model_id":' + json.dumps(model_id).encode()
    yield b',"experimental_config":' + config.model_dump_json(exclude_none=True).encode()
    yield b',"trajectory_groups":'
    yield from wire.groups_json(groups)
    yield b"}"


def _write_through(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _flush(path: Path) -> None:
    """Have a file or folder on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
