"""Saved states: their names on the service, and the note of them in the run folder.

A state's name ends in the step that it was saved at, so that its URI alone says where to go on:
`tinker://<run>/weights/step-12`, `tinker://<run>/weights/mine-step-12-weights`. The note `tinker.json` says which are
this run's, and what its training run was created with.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from fitrl.errors import CheckpointError, InvalidArgumentError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_STEP = re.compile(r"step-(?P<step>\d+)(?P<weights>-weights)?$")
LAYERS = ("train_mlp", "train_attn", "train_unembed")


@dataclass(frozen=True, slots=True, kw_only=True)
class TinkerState:
    """Something saved on the service.

    Attributes:
        uri: `tinker://...`.
        step: optimizer steps that it has seen.
        kind: "training", exactly resumable; "weights", without the optimizer; "sampler", for sampling only.
    """

    uri: str
    step: int
    kind: Literal["training", "weights", "sampler"]


def state_name(name: str, step: int, *, weights_only: bool) -> str:
    """Name of a state on the service.

    Raises:
        InvalidArgumentError: the name is none.
    """
    if not _NAME.fullmatch(name):
        raise InvalidArgumentError(
            f"name must be letters, digits, '.', '_' and '-', starting with a letter or digit, got {name!r}"
        )
    full = name if name == f"step-{step}" else f"{name}-step-{step}"
    return f"{full}-weights" if weights_only else full


def read_uri(uri: str) -> TinkerState:
    """What a URI says of its state.

    Raises:
        CheckpointError: it is no URI of a state that fitrl saved.
    """
    match = _STEP.search(uri)
    if not uri.startswith("tinker://") or match is None:
        raise CheckpointError(
            f"{uri!r} is no state saved by fitrl: those are tinker://<run>/weights/<name>step-<N>, and the step is "
            "needed to go on from there"
        )
    kind: Literal["training", "weights", "sampler"] = "weights" if match["weights"] else "training"
    return TinkerState(uri=uri, step=int(match["step"]), kind="sampler" if "/sampler_weights/" in uri else kind)


@dataclass(slots=True)
class RunNote:
    """The note in a run folder.

    Attributes:
        path: of the file.
        created_with: base model, rank, seed and layers of the training run; empty before it is created.
        states: oldest first.
    """

    path: Path
    created_with: dict[str, Any] = field(default_factory=dict)
    states: list[TinkerState] = field(default_factory=list)

    @classmethod
    def of(cls, run_dir: Path) -> RunNote:
        """Read the note of a run folder; an empty one if there is none.

        Raises:
            CheckpointError: it cannot be read.
        """
        note = cls(run_dir / "tinker.json")
        if not note.path.exists():
            return note
        try:
            content = json.loads(note.path.read_text())
            note.created_with = dict(content["created_with"])
            note.states = [TinkerState(**state) for state in content["states"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{note.path} cannot be read: {error!r}") from error
        return note

    @property
    def newest(self) -> TinkerState | None:
        """The state to go on from: the last one saved that resumes exactly, unless weights alone went further since."""
        places = {state.kind: place for place, state in enumerate(self.states)}
        exact, weights = places.get("training", -1), places.get("weights", -1)
        if weights > exact and (exact < 0 or self.states[weights].step > self.states[exact].step):
            return self.states[weights]
        return self.states[exact] if exact >= 0 else None

    def add(self, state: TinkerState) -> None:
        """Note a state that was saved."""
        self.states = [known for known in self.states if known.uri != state.uri] + [state]
        self.write()

    def drop(self, uri: str) -> None:
        """Strike out a state that was deleted."""
        self.states = [state for state in self.states if state.uri != uri]
        self.write()

    def create(self, created_with: Mapping[str, Any]) -> None:
        """Note what the training run was created with."""
        self.created_with = dict(created_with)
        self.write()

    def write(self) -> None:
        """Write the note, whole or not at all."""
        content = {"created_with": self.created_with, "states": [asdict(state) for state in self.states]}
        beside = self.path.with_name(f".{self.path.name}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with beside.open("w") as file:
                file.write(json.dumps(content, indent=2) + "\n")
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self.path)
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be written: {error}") from error
