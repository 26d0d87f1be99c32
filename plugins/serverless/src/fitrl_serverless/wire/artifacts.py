"""Names of trained models: `entity/project/name:step<N>`, and `wandb-artifact:///...` where a chat asks for one."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fitrl.errors import InvalidArgumentError

PREFIX = "wandb-artifact:///"
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"  # of entity, project and model: no path can be made of them
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_ARTIFACT = re.compile(rf"({_PART})/({_PART})/({_PART})(?::step(\d{{1,15}}))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A trained model, at one step or at its newest.

    Attributes:
        entity: who it belongs to.
        project: as in `TrainableModel`.
        name: as in `TrainableModel`.
        step: of the checkpoint; None: the newest.
    """

    entity: str
    project: str
    name: str
    step: int | None = None

    def __str__(self) -> str:
        pinned = "" if self.step is None else f":step{self.step}"
        return f"{self.entity}/{self.project}/{self.name}{pinned}"

    @property
    def model(self) -> str:
        """The name that `/chat/completions` takes as `model`."""
        return f"{PREFIX}{self}"

    @classmethod
    def parse(cls, text: str) -> Artifact:
        """Read an artifact's name, with or without the prefix.

        Raises:
            InvalidArgumentError: it is none.
        """
        found = _ARTIFACT.fullmatch(text.removeprefix(PREFIX))
        if found is None:
            raise InvalidArgumentError(
                f"a trained model is named {PREFIX}entity/project/name or {PREFIX}entity/project/name:step<N>, "
                f"got {text!r:.200}"
            )
        entity, project, name, step = found.groups()
        return cls(entity=entity, project=project, name=name, step=None if step is None else int(step))
