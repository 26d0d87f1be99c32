"""Checkpoints of models: listed, deleted, downloaded.

What the database lists is what there is. A folder that it does not list is on its way out, or a running job's.
"""

from __future__ import annotations

import json
import logging
import shutil
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fitrl.errors import CheckpointError
from fitrl.policy.checkpoints import read_manifest, remove
from fitrl_serverless import wire
from fitrl_serverless.server.answers import Once, do_once
from fitrl_serverless.server.database import Database
from fitrl_serverless.server.errors import RefusedError, not_found
from fitrl_serverless.server.paging import Page, cut
from fitrl_serverless.server.registry import Registry, StoredModel

_RESUMABLE_ONLY = ("trainer_state.pt",)  # the optimizer's: of use to this server alone
_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of all models; every call names the owner that asks.

    Args:
        database: of the server.
        registry: of the server.
    """

    def __init__(self, database: Database, registry: Registry) -> None:
        self._database = database
        self._registry = registry

    def page(self, owner: str, model_id: str, page: Page) -> wire.CheckpointPage:
        """Some of a model's checkpoints, by step."""
        model = self._registry.get(owner, model_id)
        rows = self._database.rows("SELECT step FROM checkpoints WHERE model_id = ? ORDER BY step", model.id)
        found = cut([wire.Checkpoint(id=f"{model.id}:{row['step']}", step=row["step"]) for row in rows], page)
        found["data"] = [self._with_metrics(model, checkpoint) for checkpoint in found["data"]]
        return wire.CheckpointPage.model_validate(found)

    def delete(self, owner: str, model_id: str, steps: Sequence[int], once: Once) -> wire.DeletedCheckpoints:
        """Delete checkpoints.

        Raises:
            RefusedError: 404; 409, one of them is the newest, from which training goes on; nothing is deleted then.
        """
        model = self._registry.get(owner, model_id)

        def work(connection: sqlite3.Connection) -> Any:
            known = {
                row["step"]
                for row in connection.execute("SELECT step FROM checkpoints WHERE model_id = ?", (model.id,))
            }
            newest = max(known, default=0)
            if newest in steps:
                raise RefusedError(
                    409, f"step {newest} is the newest, from which training goes on: delete the model, or other steps"
                )
            doomed = sorted(known & set(steps))
            connection.executemany(
                "DELETE FROM checkpoints WHERE model_id = ? AND step = ?", [(model.id, step) for step in doomed]
            )
            return {"deleted": doomed, "not_found_steps": sorted(set(steps) - known)}

        done = do_once(self._database, once, work)
        for step in done["deleted"]:
            folder = self._registry.folder(model, step)
            if folder.is_dir():
                remove(folder)
        return wire.DeletedCheckpoints(deleted_count=len(done["deleted"]), not_found_steps=done["not_found_steps"])

    def files(self, owner: str, model_id: str, step: int) -> wire.CheckpointFiles:
        """What there is to download of a checkpoint.

        Raises:
            RefusedError: 404, no such step, or step 0, which is the base model.
        """
        model = self._registry.get(owner, model_id)
        self._registry.require_step(model, step)
        try:
            manifest = read_manifest(self._registry.folder(model, step))
        except CheckpointError as error:
            raise not_found(f"file of step {step}: step 0 is the base model") from error
        files = [
            wire.CheckpointFile(name=name, size=size, sha256=checksum)
            for name, (size, checksum) in sorted(manifest.files.items())
            if name not in _RESUMABLE_ONLY and "/" not in name
        ]
        return wire.CheckpointFiles(step=step, data=files)

    def file(self, owner: str, model_id: str, step: int, name: str) -> Path:
        """One of the files that `files` lists.

        Raises:
            RefusedError: 404, it is not on the list.
        """
        if name not in {entry.name for entry in self.files(owner, model_id, step).data}:
            raise not_found("file of this name")
        return self._registry.folder(self._registry.get(owner, model_id), step) / name

    def tidy(self) -> None:
        """Clear the folders of models that are not there any more; at the start, before anything else runs."""
        known = {row["id"] for row in self._database.rows("SELECT id FROM models")}
        folder = self._registry.root
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.name not in known:
                _log.info("cleared what was left of the deleted %s", path.name)
                shutil.rmtree(path, ignore_errors=True)
        for row in self._database.rows("SELECT * FROM models"):
            self._tidy_steps(StoredModel.of(row))

    def _tidy_steps(self, model: StoredModel) -> None:
        """Clear checkpoints that were deleted, but for a crash on the way; newer ones are a running job's."""
        known = {
            row["step"] for row in self._database.rows("SELECT step FROM checkpoints WHERE model_id = ?", model.id)
        }
        newest = max(known, default=0)
        folder = self._registry.folder(model, 0).parent
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.name.isdecimal() and int(path.name) < newest and int(path.name) not in known:
                remove(path)

    def _with_metrics(self, model: StoredModel, checkpoint: wire.Checkpoint) -> wire.Checkpoint:
        row = self._database.row(
            "SELECT metrics FROM checkpoints WHERE model_id = ? AND step = ?", model.id, checkpoint.step
        )
        metrics = {} if row is None else json.loads(row["metrics"])
        return wire.Checkpoint.model_validate({"id": checkpoint.id, "step": checkpoint.step, "metrics": metrics})
