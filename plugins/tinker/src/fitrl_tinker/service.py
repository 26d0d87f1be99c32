"""`Service`: the SDK behind one door, which knows time limits, two SDK versions and how to say what went wrong.

Enters: requests. Leaves: their answers, within the time limit, or a `ServiceError` that names the request. A session on
the service is begun when it is first needed, and anew after `forget`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from fitrl.errors import InvalidArgumentError
from fitrl_tinker.credentials import Access
from fitrl_tinker.errors import ServiceError, ServiceTimeoutError

if TYPE_CHECKING:
    import tinker

_HEALTH_S = 10.0  # how long the service may take to say that it is there
_CLOSE_S = 10.0
_HINTS = {
    400: "the service says that the request itself is wrong",
    401: "the API key was refused: check TINKER_API_KEY",
    402: "the account has a billing issue",
    403: "the account may not do this",
    404: "the service does not know it: a session that ended, or a state that was deleted",
    409: "it contradicts the service's state",
    410: "the session on the service has ended",
    429: "too many requests at once",
}


class Service:
    """The service as one account sees it.

    Args:
        access: where it is, and the key.
        timeout: most seconds that any request may take.
    """

    def __init__(self, access: Access, timeout: float) -> None:
        if not timeout > 0:
            raise InvalidArgumentError(f"timeout must be a number of seconds above 0, got {timeout}")
        self.access = access
        self.timeout = timeout
        self._client: Any = None
        self._lock = threading.Lock()
        self._said = _LastWarning()

    def __repr__(self) -> str:
        return f"Service({self.access!r}, timeout={self.timeout:g})"

    # -- what it can do -----------------------------------------------------------------------------------------

    def create(self, base_model: str, *, rank: int, seed: int, layers: Mapping[str, bool]) -> tinker.TrainingClient:
        """Begin a training run of new adapters on a base model."""
        made: tinker.TrainingClient = self._client_of(
            f"create a training run of {base_model!r}",
            lambda client: client.create_lora_training_client(base_model=base_model, rank=rank, seed=seed, **layers),
        )
        return made

    def resume(self, uri: str, *, with_optimizer: bool) -> tinker.TrainingClient:
        """Begin a training run from a saved state."""

        def make(client: Any) -> Any:
            if with_optimizer:
                return client.create_training_client_from_state_with_optimizer(uri)
            return client.create_training_client_from_state(uri)

        made: tinker.TrainingClient = self._client_of(f"load {uri}", make)
        return made

    def sampling_client(self, *, base_model: str, path: str | None) -> tinker.SamplingClient:
        """A sampler of saved weights, or of the base model."""
        chosen = {"base_model": base_model} if path is None else {"model_path": path}
        made: tinker.SamplingClient = self._client_of(
            f"create a sampler of {path or base_model!r}", lambda client: client.create_sampling_client(**chosen)
        )
        return made

    def context_length(self, base_model: str) -> int | None:
        """Longest sequence of a base model in tokens; None if the service does not tell."""

        def ask() -> Any:
            if (rest := self._rest()) is not None:
                return rest.get_server_capabilities()
            return self._connected().get_server_capabilities()

        answer: Any = self.call("list its models", ask)
        found = [model for model in answer.supported_models if model.model_name == base_model]
        length = getattr(found[0], "max_context_length", None) if found else None
        return None if length is None else int(length)

    def states(self, run_id: str) -> list[str]:
        """URIs of everything that a training run has saved."""
        answer: Any = self.call(
            f"list the states of the run {run_id}", lambda: self._any_rest().list_checkpoints(run_id)
        )
        return [checkpoint.tinker_path for checkpoint in answer.checkpoints]

    def delete(self, uri: str) -> None:
        """Delete what was saved under a URI."""
        self.call(f"delete {uri}", lambda: self._any_rest().delete_checkpoint_from_tinker_path(uri))

    # -- sessions -----------------------------------------------------------------------------------------------

    @property
    def session(self) -> object:
        """What tells one session from the next; clients do not outlive theirs."""
        return self._client

    def forget(self) -> None:
        """Drop the session; the next request begins another."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            # the service may not answer, and nothing depends on it: the SDK's heartbeat ends with the client
            threading.Thread(target=_close, args=(client,), daemon=True, name="fitrl-tinker-close").start()

    def close(self) -> None:
        """End the session."""
        self._said.stop()
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            closing = threading.Thread(target=_close, args=(client,), daemon=True, name="fitrl-tinker-close")
            closing.start()
            closing.join(_CLOSE_S)

    # -- requests -----------------------------------------------------------------------------------------------

    def call(self, request: str, ask: Callable[[], Any]) -> Any:
        """Ask, and wait for the answer; what blocks in the SDK itself is waited for no longer either.

        Args:
            request: named in errors, "load tinker://..." say.
            ask: returns the answer, or a future of it.
        """
        asked: Future[Any] = Future()

        def run() -> None:
            try:
                asked.set_result(ask())
            except BaseException as error:  # noqa: B036 - it is raised in the thread that waits
                asked.set_exception(error)

        threading.Thread(target=run, daemon=True, name="fitrl-tinker-call").start()
        answer = self.wait(request, asked)
        return self.wait(request, answer) if _is_future(answer) else answer

    def wait(self, request: str, future: Any) -> Any:
        """Wait for an answer.

        Raises:
            ServiceTimeoutError: it did not come in time.
            ServiceError: it is an error.
        """
        try:
            return future.result(timeout=self.timeout)
        except TimeoutError:
            raise self.too_late(request) from None
        except Exception as error:
            raise self.explain(request, error) from self.cause(error)

    def too_late(self, request: str) -> ServiceTimeoutError:
        """The error for an answer that did not come in time."""
        said = f"; the SDK's last warning: {self.access.without_key(self._said.text)}" if self._said.text else ""
        return ServiceTimeoutError(
            f"the service did not answer within {self.timeout:g} s when asked to {request}{said}. It may have done it "
            "all the same"
        )

    def explain(self, request: str, error: BaseException) -> ServiceError:
        """The error for a request that failed."""
        if isinstance(error, ServiceError):
            return error
        status = getattr(error, "status_code", None)
        code = "" if status is None else f" ({status}: {_HINTS.get(status, 'the service failed')})"
        text = self.access.without_key(f"{type(error).__name__}: {error}")
        if (cause := error.__cause__) is not None:
            text += f" because of {self.access.without_key(f'{type(cause).__name__}: {cause}')}"
        return ServiceError(f"the service was asked to {request} and failed{code}: {text}", status)

    def cause(self, error: BaseException) -> BaseException | None:
        """The error to chain; none if it repeats the key."""
        seen: BaseException | None = error
        while seen is not None:
            if self.access.without_key(f"{seen!r} {seen}") != f"{seen!r} {seen}":
                return None
            seen = seen.__cause__ or seen.__context__
        return error

    # -- the SDK ------------------------------------------------------------------------------------------------

    def _client_of(self, request: str, make: Callable[[Any], Any]) -> Any:
        """A client that the SDK makes; older versions return it, newer ones a future of it."""
        return self.call(request, lambda: make(self._connected()))

    def _connected(self) -> Any:
        with self._lock:
            if self._client is None:
                import tinker

                self._said.listen()
                self._check_health()
                self._client = tinker.ServiceClient(base_url=self.access.base_url, api_key=self.access.api_key)
            return self._client

    def _check_health(self) -> None:
        """See that something answers: the SDK tries for minutes to reach what is not there."""
        if self.access.base_url is None:
            return
        import httpx

        url = self.access.base_url.rstrip("/") + "/api/v1/healthz"
        try:
            answer = httpx.get(url, timeout=_HEALTH_S)
        except httpx.HTTPError as error:
            raise ServiceError(
                f"there is no service at {self.access.base_url}: {type(error).__name__}: {error}"
            ) from error
        if answer.status_code == 404:
            raise ServiceError(f"{self.access.base_url} answers, but is no Tinker service", 404)

    def _rest(self) -> Any:
        """The REST client of newer SDKs, which needs no session; None with an older one."""
        import tinker

        kind: Any = getattr(tinker, "RestClient", None)
        if kind is None:
            return None
        self._check_health()
        return kind(base_url=self.access.base_url, api_key=self.access.api_key)

    def _any_rest(self) -> Any:
        rest = self._rest()
        return self._connected().create_rest_client() if rest is None else rest


def _is_future(answer: Any) -> bool:
    return callable(getattr(answer, "result", None))


def _close(client: Any) -> None:
    """End a session as the SDK's version can."""
    try:
        if callable(close := getattr(client, "close", None)):
            close("success").result(timeout=_CLOSE_S)
        else:
            client.holder.close()
    except Exception as error:  # the session ends by itself when its heartbeat stops
        logging.getLogger(__name__).debug("the session was not closed: %s", type(error).__name__)


class _LastWarning(logging.Handler):
    """Keeps the SDK's last warning: why it is still trying is said nowhere else."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.text = ""

    def listen(self) -> None:
        """Hear the SDK; safe to call again."""
        logging.getLogger("tinker").addHandler(self)

    def stop(self) -> None:
        """Hear no more."""
        logging.getLogger("tinker").removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.text = record.getMessage()
