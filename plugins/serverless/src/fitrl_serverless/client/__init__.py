"""The client's half: requests, jobs, checkpoints and samples of a service that speaks the training API."""

from fitrl_serverless.client.connection import Connection
from fitrl_serverless.client.errors import (
    AuthenticationError,
    BusyError,
    ConflictError,
    InvalidRequestError,
    JobCancelledError,
    JobFailedError,
    MalformedAnswerError,
    NotFoundError,
    PermissionDeniedError,
    ServerFaultError,
    ServiceError,
    ServiceTimeoutError,
    UnreachableError,
    UntrustedError,
)
from fitrl_serverless.client.service import Service

__all__ = [
    "AuthenticationError",
    "BusyError",
    "Connection",
    "ConflictError",
    "InvalidRequestError",
    "JobCancelledError",
    "JobFailedError",
    "MalformedAnswerError",
    "NotFoundError",
    "PermissionDeniedError",
    "ServerFaultError",
    "Service",
    "ServiceError",
    "ServiceTimeoutError",
    "UnreachableError",
    "UntrustedError",
]
