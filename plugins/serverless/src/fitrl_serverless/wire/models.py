"""Bodies of `/preview/models`: models, their checkpoints and the files of a checkpoint."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fitrl_serverless.wire.artifacts import NAME_PATTERN
from fitrl_serverless.wire.base import ClosedModel, WireModel
from fitrl_serverless.wire.groups import Group
from fitrl_serverless.wire.numbers import Count, Number

Name = Annotated[str, Field(pattern=NAME_PATTERN)]
_LayerName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]{1,128}$")]


class Lora(ClosedModel):
    """`fitrl.LoraSettings`. Layers are named one by one: a single string would be a pattern to PEFT."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 8
    alpha: Annotated[int, Field(ge=1, le=4096)] = 16
    target_modules: Literal["all-linear"] | Annotated[list[_LayerName], Field(min_length=1, max_length=256)] = (
        "all-linear"
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


class CreateModel(WireModel):
    """POST /preview/models.

    Attributes:
        entity: who the model belongs to; None: the key's owner.
        project: as in `TrainableModel`.
        name: as in `TrainableModel`.
        base_model: one of the service's.
        return_existing: answer with a model of this name that is there already, instead of an error.
        lora: adapters to train; False trains all weights; None: the service's default, adapters as fitrl has them.
            fitrl's own key.
    """

    entity: Name | None = None
    project: Name
    name: Name
    base_model: Annotated[str, Field(min_length=1, max_length=256)]
    return_existing: bool = False
    lora: Lora | Literal[False] | None = None


class Model(WireModel):
    """A model of the service."""

    id: str
    entity: str
    project: str
    name: str
    base_model: str
    run_id: str | None = None


class DeletedModel(WireModel):
    """What DELETE /preview/models/{id} did."""

    model_id: str
    deleted_checkpoints: Count
    deleted_run: bool


class Checkpoint(WireModel):
    """A saved step; step 0 is the base model."""

    id: str
    step: Count
    metrics: dict[str, Number] = {}


class CheckpointPage(WireModel):
    """Some of a model's checkpoints; the next page is asked for with `after=last_id`."""

    object: Literal["list"] = "list"
    data: list[Checkpoint]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False


class DeleteCheckpoints(ClosedModel):
    """DELETE /preview/models/{id}/checkpoints."""

    steps: Annotated[list[Count], Field(max_length=10_000)]


class DeletedCheckpoints(WireModel):
    """What it did."""

    deleted_count: Count
    not_found_steps: list[Count] = []


class CheckpointFile(WireModel):
    """A file of a checkpoint.

    Attributes:
        name: the last part of its address, and its plain file name.
        size: in bytes.
        sha256: of its bytes, in hexadecimal.
    """

    name: str
    size: Count
    sha256: str


class CheckpointFiles(WireModel):
    """GET /preview/models/{id}/checkpoints/{step}/files: what transformers and PEFT need to load the step."""

    object: Literal["list"] = "list"
    step: Count
    data: list[CheckpointFile]


class LogGroups(WireModel):
    """POST /preview/models/{id}/log."""

    model_id: str
    trajectory_groups: list[Group]
    split: Name = "train"
