"""A log call that fails on the way is not there, without any process; being killed on the way is in test_faults."""

from __future__ import annotations

from pathlib import Path

import pytest

import fitrl
from fitrl.policy import trajectories
from fitrl_serverless import wire
from fitrl_serverless.server.answers import Once
from fitrl_serverless.server.database import Database
from fitrl_serverless.server.errors import RefusedError
from fitrl_serverless.server.logs import Logs
from fitrl_serverless.server.registry import Registry
from fitrl_serverless.server.settings import Settings
from helpers import group


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_log_call_is_kept_whole_and_once_or_not_at_all(tmp_path, monkeypatch) -> None:
    settings = Settings(state=tmp_path)
    database = Database(settings.database)
    try:
        registry = Registry(database, settings)
        logs = Logs(database, registry)
        made = registry.create(
            "alice", wire.CreateModel(project="p", name="n", base_model="tiny"), Once.of("alice", None)
        )
        folder = registry.root / made.id

        def keep(number: int, split: str = "train") -> None:
            body = wire.LogGroups(
                model_id=made.id, trajectory_groups=wire.groups_to_wire([group([0, number])]), split=split
            )
            logs.keep("alice", body, Once.of("alice", f"{number}-{split}", b""))

        keep(1)
        for split in ("train", "val"):  # files that are there already, and a file that is not
            before = files_of(folder)
            assert len(before) == 2
            with monkeypatch.context() as patched:
                append, calls = trajectories.append_lines, []

                def full(path, lines, append=append, calls=calls):
                    calls.append(path)
                    append(path, [line[:20] for line in lines] if len(calls) == 2 else lines)
                    if len(calls) == 2:
                        raise OSError("no space left on the device")

                patched.setattr(trajectories, "append_lines", full)
                with pytest.raises(OSError, match="no space left"):
                    keep(2, split)
                assert len(calls) == 2
            assert files_of(folder) == before
        for _ in range(2):
            keep(2)
        run = fitrl.TrainableModel(made.id, "models", "tiny", root=tmp_path)
        assert [kept.rewards for kept in run.trajectories()] == [[0, 1], [0, 2]] and len(run.history()) == 2
        registry.delete("alice", made.id, Once.of("alice", None))
        with pytest.raises(RefusedError, match="no model of this id"):
            keep(3)
        assert not folder.exists()
    finally:
        database.close()
