"""Errors: one root, each one also a standard error, each message saying what, which value, what to do."""


class FitRLError(Exception):
    """Root of everything that fitrl raises on purpose."""


class InvalidArgumentError(FitRLError, ValueError):
    """An argument has a value that cannot be used, or one that could have no effect."""


class UnknownArgumentError(FitRLError, TypeError):
    """`fit_rl` was given a keyword that this backend does not take."""


class DataError(FitRLError, ValueError):
    """A trajectory, group or task cannot be trained on as it is."""


class TokenizationError(DataError):
    """A conversation cannot be turned into token ids without guessing."""


class GroupError(FitRLError, RuntimeError):
    """More rollouts raised than `max_exceptions` allows; `exceptions` holds all of them."""

    def __init__(self, message: str, exceptions: list[BaseException]) -> None:
        super().__init__(message)
        self.exceptions = exceptions


class ModelNotFoundError(FitRLError, FileNotFoundError):
    """`base_model` names nothing that can be loaded."""


class CheckpointError(FitRLError, RuntimeError):
    """A checkpoint cannot be read or written."""


class RunLockedError(FitRLError, RuntimeError):
    """Another trainer has the run folder open; the message names it."""


class RankError(FitRLError, RuntimeError):
    """Another process of the job failed; the message says which one and how."""


class RankLostError(RankError):
    """Another process of the job has died; the message names it. This one cannot go on and has to end."""


class NothingAccumulatedError(FitRLError, RuntimeError):
    """`optim_step` was called before any `forward_backward`."""


class NonFiniteGradientError(FitRLError, ArithmeticError):
    """A gradient was infinite or NaN; the message names the step."""


class OutOfMemoryError(FitRLError, MemoryError):
    """A microbatch does not fit into the device's memory and cannot be made smaller."""


class SessionError(FitRLError, RuntimeError):
    """The trainer has no open model, or the open one cannot do what was asked."""


class SamplerError(FitRLError, RuntimeError):
    """A sampler cannot serve a request."""


class UnsupportedError(FitRLError, NotImplementedError):
    """This backend cannot do it; the message names one that can."""


class MissingDependencyError(FitRLError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""
