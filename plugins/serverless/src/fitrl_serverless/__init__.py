"""fitrl on another machine: the client of a training service, and a server of the same API."""

from fitrl_serverless.calls import Call, make_call
from fitrl_serverless.module import ServerlessModule
from fitrl_serverless.results import ServerlessTrainResult
from fitrl_serverless.sampler import ServerlessSampler
from fitrl_serverless.strategy import ServerlessStrategy
from fitrl_serverless.trainer import ServerlessTrainer

__all__ = [
    "Call",
    "ServerlessModule",
    "ServerlessSampler",
    "ServerlessStrategy",
    "ServerlessTrainResult",
    "ServerlessTrainer",
    "make_call",
]
