"""Models and their checkpoints: who owns them, where they lie, which steps there are.

A model's run folder is named by its id, which the server made: no part of a path comes from a request.
"""

from __future__ import annotations

import json
import secrets
import shutil
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fitrl
from fitrl.errors import InvalidArgumentError
from fitrl_serverless import wire
from fitrl_serverless.server.answers import Once, do_once
from fitrl_serverless.server.database import Database
from fitrl_serverless.server.errors import RefusedError, not_found
from fitrl_serverless.server.settings import Settings

_PROJECT = "models"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredModel:
    """A row of the table of models."""

    id: str
    owner: str
    entity: str
    project: str
    name: str
    base_model: str
    lora: fitrl.LoraSettings | None

    @classmethod
    def of(cls, row: sqlite3.Row) -> StoredModel:
        """Read a row."""
        values = {name: row[name] for name in ("id", "owner", "entity", "project", "name", "base_model")}
        return cls(**values, lora=_lora_from_json(row["lora"]))

    def body(self) -> wire.Model:
        """As an answer."""
        return wire.Model(
            id=self.id,
            entity=self.entity,
            project=self.project,
            name=self.name,
            base_model=self.base_model,
            run_id=self.id,
        )


class Registry:
    """The models of all owners; every call names the owner that asks.

    Args:
        database: of the server.
        settings: of the server.
    """

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = settings

    def create(self, owner: str, body: wire.CreateModel, once: Once) -> wire.Model:
        """Make a model, at step 0: its base model.

        Raises:
            RefusedError: 403, another's entity or a base model that is not on the list; 409, there is one of this name;
                429, the owner has as many as it may have.
        """
        if body.entity not in (None, owner):
            raise RefusedError(403, f"the entity of this key is {owner!r}: leave entity out, or pass it")
        if body.base_model not in self._settings.base_models:
            known = ", ".join(sorted(self._settings.base_models))
            raise RefusedError(403, f"base_model must be one of this server's: {known}")
        lora = _lora_of(body.lora)

        def work(connection: sqlite3.Connection) -> Any:
            place = (owner, owner, body.project, body.name)
            row = connection.execute(
                "SELECT * FROM models WHERE owner = ? AND entity = ? AND project = ? AND name = ?", place
            ).fetchone()
            if row is not None:
                return self._existing(StoredModel.of(row), body, lora)
            (count,) = connection.execute("SELECT count(*) FROM models WHERE owner = ?", (owner,)).fetchone()
            if count >= self._settings.limits.models:
                raise RefusedError(429, f"{count} models are as many as one owner may have: delete one")
            made = StoredModel(
                id=f"model-{secrets.token_hex(12)}",
                owner=owner,
                entity=owner,
                project=body.project,
                name=body.name,
                base_model=body.base_model,
                lora=lora,
            )
            connection.execute(
                "INSERT INTO models (id, owner, entity, project, name, base_model, lora, created) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (made.id, *place, made.base_model, _lora_to_json(lora), time.time()),
            )
            connection.execute("INSERT INTO checkpoints (model_id, step, metrics) VALUES (?, 0, '{}')", (made.id,))
            return made.body().model_dump(mode="json")

        return wire.Model.model_validate(do_once(self._database, once, work))

    @staticmethod
    def _existing(model: StoredModel, body: wire.CreateModel, lora: fitrl.LoraSettings | None) -> Any:
        if not body.return_existing:
            raise RefusedError(
                409, f"there is a model {model.project}/{model.name}: pass return_existing=true to get it"
            )
        if model.base_model != body.base_model or (body.lora is not None and model.lora != lora):
            raise RefusedError(
                409,
                f"the model {model.project}/{model.name} was made with base_model={model.base_model!r} and "
                f"lora={model.lora}: pass the same, or give this one another name",
            )
        return model.body().model_dump(mode="json")

    def get(self, owner: str, model_id: str) -> StoredModel:
        """An owner's model, by its id.

        Raises:
            RefusedError: 404.
        """
        row = self._database.row("SELECT * FROM models WHERE id = ? AND owner = ?", model_id, owner)
        if row is None:
            raise not_found("model of this id")
        return StoredModel.of(row)

    def find(self, owner: str, artifact: wire.Artifact) -> tuple[StoredModel, int]:
        """An owner's model by its name, and the step that is meant.

        Raises:
            RefusedError: 404, no such model or no such step.
        """
        row = self._database.row(
            "SELECT * FROM models WHERE owner = ? AND entity = ? AND project = ? AND name = ?",
            owner,
            artifact.entity,
            artifact.project,
            artifact.name,
        )
        if row is None:
            raise not_found("model of this name")
        model = StoredModel.of(row)
        if artifact.step is None:
            return model, self.newest_step(model)
        self.require_step(model, artifact.step)
        return model, artifact.step

    def newest_step(self, model: StoredModel) -> int:
        """Step of a model's newest checkpoint."""
        row = self._database.row("SELECT max(step) AS step FROM checkpoints WHERE model_id = ?", model.id)
        return int(row["step"] or 0) if row is not None else 0

    def run(self, model: StoredModel) -> fitrl.TrainableModel:
        """The model as trainers take it."""
        return fitrl.TrainableModel(
            name=model.id,
            project=_PROJECT,
            base_model=self._settings.base_models[model.base_model],
            lora=model.lora,
            root=self._settings.state,
        )

    def delete(self, owner: str, model_id: str, once: Once) -> wire.DeletedModel:
        """Delete a model with everything that belongs to it.

        Raises:
            RefusedError: 404; 409, a job of it is waiting or running.
        """
        folder = self.root / model_id

        def work(connection: sqlite3.Connection) -> Any:
            known = connection.execute("SELECT 1 FROM models WHERE id = ? AND owner = ?", (model_id, owner))
            if known.fetchone() is None:
                raise not_found("model of this id")
            busy = connection.execute(
                "SELECT count(*) FROM jobs WHERE model_id = ? AND status IN ('queued', 'running')", (model_id,)
            ).fetchone()[0]
            if busy:
                raise RefusedError(409, f"{busy} training jobs of this model are not at their end: cancel them first")
            (steps,) = connection.execute(
                "SELECT count(*) FROM checkpoints WHERE model_id = ? AND step > 0", (model_id,)
            ).fetchone()
            connection.execute("DELETE FROM models WHERE id = ?", (model_id,))
            return {"model_id": model_id, "deleted_checkpoints": steps, "deleted_run": folder.is_dir()}

        deleted = wire.DeletedModel.model_validate(do_once(self._database, once, work))
        shutil.rmtree(folder, ignore_errors=True)  # what is left after a crash goes at the next start
        return deleted

    @property
    def root(self) -> Path:
        """Folder of all run folders."""
        return self._settings.state / _PROJECT

    def folder(self, model: StoredModel, step: int) -> Path:
        """Folder of a checkpoint; step 0 has none."""
        return self.root / model.id / "checkpoints" / f"{step:04d}"

    def require_step(self, model: StoredModel, step: int) -> None:
        """See that a model has a checkpoint of a step.

        Raises:
            RefusedError: 404.
        """
        row = self._database.row("SELECT 1 FROM checkpoints WHERE model_id = ? AND step = ?", model.id, step)
        if row is None:
            raise not_found(f"step {step} of this model")


def _lora_of(body: Any) -> fitrl.LoraSettings | None:
    if body is None:
        return fitrl.LoraSettings()
    if body is False:
        return None
    modules = body.target_modules
    try:
        return fitrl.LoraSettings(
            rank=body.rank,
            alpha=body.alpha,
            target_modules=modules if isinstance(modules, str) else tuple(modules),
            seed=body.seed,
        )
    except InvalidArgumentError as error:
        raise RefusedError(422, str(error)) from error


def _lora_to_json(lora: fitrl.LoraSettings | None) -> str:
    if lora is None:
        return "null"
    return json.dumps(
        {"rank": lora.rank, "alpha": lora.alpha, "target_modules": lora.target_modules, "seed": lora.seed}
    )


def _lora_from_json(text: str) -> fitrl.LoraSettings | None:
    data = json.loads(text)
    if data is None:
        return None
    modules = data["target_modules"]
    return fitrl.LoraSettings(**data | {"target_modules": modules if isinstance(modules, str) else tuple(modules)})
