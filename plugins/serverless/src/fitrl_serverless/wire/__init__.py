"""The training API's bodies, for client and server."""

from fitrl_serverless.wire.artifacts import Artifact
from fitrl_serverless.wire.base import ErrorBody, WireModel
from fitrl_serverless.wire.chat import ChatCompletion, ChatRequest, Usage
from fitrl_serverless.wire.conversion import explain, groups_from_wire, groups_to_wire
from fitrl_serverless.wire.groups import (
    Choice,
    ChoiceLogprobs,
    ExceptionRecord,
    Group,
    History,
    Message,
    TokenHistory,
    TokenLogprob,
    Trajectory,
)
from fitrl_serverless.wire.jobs import (
    ENDED,
    CreatedTrainingJob,
    CreateTrainingJob,
    Event,
    EventPage,
    ExperimentalConfig,
    TrainingJob,
)
from fitrl_serverless.wire.models import (
    Checkpoint,
    CheckpointFile,
    CheckpointFiles,
    CheckpointPage,
    CreateModel,
    DeleteCheckpoints,
    DeletedCheckpoints,
    DeletedModel,
    LogGroups,
    Lora,
    Model,
)

__all__ = [
    "ENDED",
    "Artifact",
    "ChatCompletion",
    "ChatRequest",
    "Checkpoint",
    "CheckpointFile",
    "CheckpointFiles",
    "CheckpointPage",
    "Choice",
    "ChoiceLogprobs",
    "CreateModel",
    "CreateTrainingJob",
    "CreatedTrainingJob",
    "DeleteCheckpoints",
    "DeletedCheckpoints",
    "DeletedModel",
    "ErrorBody",
    "Event",
    "EventPage",
    "ExceptionRecord",
    "ExperimentalConfig",
    "Group",
    "History",
    "LogGroups",
    "Lora",
    "Message",
    "Model",
    "TokenHistory",
    "TokenLogprob",
    "TrainingJob",
    "Trajectory",
    "Usage",
    "WireModel",
    "explain",
    "groups_from_wire",
    "groups_to_wire",
]
