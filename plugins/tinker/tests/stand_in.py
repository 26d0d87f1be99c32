"""The Tinker service in this process: the sum losses of its documentation in torch, behind the SDK's own types.

It takes the place of `tinker.ServiceClient` and `tinker.RestClient`. Its network is transformers', in float64, and all
of its weights are trained, so that its numbers can be compared with a local trainer's in float64; what a LoRA run was
asked for is noted. Whatever crosses the wire is float32, as in the SDK. Requests are computed in the order of
submission, and their futures tell a log when they are waited for.
"""

from __future__ import annotations

import copy
import functools
import importlib.resources
import math
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import tinker
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

KEY = "tml-a-key-of-the-tests-0123456789"
_ACCOUNTS: dict[Path, StandIn] = {}


def status_error(kind: type[tinker.APIStatusError], status: int, text: str = "on purpose") -> tinker.APIStatusError:
    """An error as the SDK raises it, with the key in the request's headers as there."""
    request = httpx.Request("POST", "https://tinker.invalid/api/v1/x", headers={"X-API-Key": KEY})
    return kind(text, response=httpx.Response(status, request=request), body=None)


class StandIn:
    """The service: accounts' saved states, the runs that are live, and what is to go wrong.

    Attributes:
        log: requests as they are submitted, and "wait <request>" when a future is asked for its result.
        created: arguments of every run that was created.
        faults: by request, what the next ones of its kind do: an exception fails the request before it is computed,
            "lost" computes it and never answers, an exception in a tuple computes it and answers with the exception,
            "nan" tells a norm that is none, None lets it pass.
        tells_norm: whether optim_step tells the gradient's norm.
        averages: whether it averages over tokens instead of summing, as a foreign server may.
        context: longest sequence that it says it takes.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.created: list[dict[str, Any]] = []
        self.steps: list[tinker.AdamParams] = []
        self.sent: list[tuple[str, dict[str, float] | None, list[tinker.Datum]]] = []
        self.faults: dict[str, list[Any]] = {}
        self.saved: dict[str, tuple[dict, dict | None]] = {}
        self.tells_norm = True
        self.averages = False
        self.context: int | None = None
        self.keys: set[str | None] = set()
        self.sessions = 0
        self._runs = 0

    @classmethod
    def at(cls, folder: Path) -> StandIn:
        """A service that knows what was saved there for the same folder."""
        return _ACCOUNTS.setdefault(folder, cls())

    @contextmanager
    def installed(self) -> Iterator[StandIn]:
        """Let the SDK's entry points lead here."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TINKER_API_KEY", KEY)
            patch.setattr(tinker, "ServiceClient", lambda **options: _Session(self, **options))
            patch.setattr(tinker, "RestClient", _rest_client(self))
            yield self

    def fail_next(self, request: str, *faults: Any) -> None:
        """Let the next requests of a kind go wrong."""
        self.faults.setdefault(request, []).extend(faults)

    def new_run(self) -> str:
        """Name of a training run."""
        self._runs += 1
        return f"run{self._runs}"

    def answer(self, request: str, compute: Callable[[], Any]) -> _Answer:
        """Compute a request now, and its future; or what is to go wrong with it."""
        self.log.append(request)
        waiting = self.faults.get(request) or []
        fault = waiting.pop(0) if waiting else None
        if isinstance(fault, BaseException):
            return _Answer(self, request, error=fault)
        try:
            value = compute()
        except Exception as error:
            return _Answer(self, request, error=error)
        if fault == "lost":
            return _Answer(self, request, error=TimeoutError())
        if fault == "nan":
            return _Answer(self, request, value=tinker.OptimStepResponse(metrics={"grad_norm": math.nan}))
        if isinstance(fault, tuple):
            return _Answer(self, request, error=fault[0])
        return _Answer(self, request, value=value)


class _Answer:
    """A future as the SDK's are: `result` with a time limit, `future` for asyncio."""

    def __init__(self, service: StandIn, request: str, *, value: Any = None, error: Any = None) -> None:
        self._service, self._request = service, request
        self._future: Future[Any] = Future()
        if error is None:
            self._future.set_result(value)
        else:
            self._future.set_exception(error)

    def result(self, timeout: float | None = None) -> Any:
        assert timeout is not None and math.isfinite(timeout), f"{self._request} is waited for without a time limit"
        self._service.log.append(f"wait {self._request}")
        return self._future.result(timeout)

    def future(self) -> Future[Any]:
        self._service.log.append(f"wait {self._request}")
        return self._future


class _Session:
    """In place of `tinker.ServiceClient`."""

    def __init__(self, service: StandIn, *, base_url: str | None, api_key: str | None) -> None:
        service.keys.add(api_key)
        service.sessions += 1
        service.log.append("session")
        self._service = service

    def create_lora_training_client(self, **options: Any) -> _Answer:
        def create() -> _Run:
            self._service.created.append(options)
            return _Run(self._service)

        return self._service.answer("create", create)

    def create_training_client_from_state(self, path: str) -> _Answer:
        return self._service.answer("load", lambda: _Run(self._service, path, with_optimizer=False))

    def create_training_client_from_state_with_optimizer(self, path: str) -> _Answer:
        return self._service.answer("load", lambda: _Run(self._service, path))

    def create_sampling_client(self, *, base_model: str | None = None, model_path: str | None = None) -> _Answer:
        return self._service.answer("sampler", lambda: _Sampling(self._service, model_path))

    def close(self, status: str) -> _Answer:
        return self._service.answer("close", lambda: None)


def _network() -> Any:
    return copy.deepcopy(_base())


@functools.cache
def _base() -> Any:
    folder = importlib.resources.files("fitrl.assets") / "tiny"
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float64).train()


class _Run:
    """In place of `tinker.TrainingClient`: one policy and its optimizer."""

    def __init__(self, service: StandIn, path: str | None = None, *, with_optimizer: bool = True) -> None:
        self._service = service
        self.name = service.new_run()
        self.network = _network()
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=0.0)
        if path is not None:
            if path not in service.saved:
                raise status_error(tinker.NotFoundError, 404, f"no state {path}")
            weights, optimizer = copy.deepcopy(service.saved[path])
            self.network.load_state_dict(weights)
            if with_optimizer and optimizer is not None:
                self.optimizer.load_state_dict(optimizer)

    def forward(self, data: Sequence[tinker.Datum], loss_fn: str, config: Any = None) -> _Answer:
        def compute() -> Any:
            with torch.no_grad():
                return self._pass(data, loss_fn, config)[1]

        return self._service.answer("forward", compute)

    def forward_backward(self, data: Sequence[tinker.Datum], loss_fn: str, config: Any = None) -> _Answer:
        def compute() -> Any:
            self._service.sent.append((loss_fn, config, list(data)))
            loss, output = self._pass(data, loss_fn, config)
            loss.backward()
            return output

        return self._service.answer("forward_backward", compute)

    def optim_step(self, parameters: tinker.AdamParams) -> _Answer:
        def compute() -> Any:
            self._service.steps.append(parameters)
            limit = parameters.grad_clip_norm or math.inf
            norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), limit)
            for group in self.optimizer.param_groups:
                group.update(
                    lr=parameters.learning_rate,
                    betas=(parameters.beta1, parameters.beta2),
                    eps=parameters.eps,
                    weight_decay=parameters.weight_decay,
                )
            self.optimizer.step()
            self.optimizer.zero_grad()
            return tinker.OptimStepResponse(metrics={"grad_norm": float(norm)} if self._service.tells_norm else {})

        return self._service.answer("optim_step", compute)

    def save_state(self, name: str, overwrite: bool = False) -> _Answer:
        return self._service.answer("save_state", lambda: self._save("weights", name, overwrite))

    def save_weights_for_sampler(self, name: str, ttl_seconds: int | None = None) -> _Answer:
        return self._service.answer("save_weights_for_sampler", lambda: self._save("sampler_weights", name, False))

    def _save(self, kind: str, name: str, overwrite: bool) -> Any:
        path = f"tinker://{self.name}/{kind}/{name}"
        if path in self._service.saved and not overwrite:
            raise status_error(tinker.ConflictError, 409, f"{path} exists")
        optimizer = self.optimizer.state_dict() if kind == "weights" else None
        self._service.saved[path] = copy.deepcopy((self.network.state_dict(), optimizer))
        return SimpleNamespace(path=path)

    def _pass(self, data: Sequence[tinker.Datum], loss_fn: str, config: Any) -> tuple[Tensor, Any]:
        if not data:
            raise ValueError("No data provided")
        total, outputs = torch.zeros((), dtype=torch.float64), []
        for datum in data:
            ids = torch.tensor(datum.model_input.to_ints())
            inputs = {name: torch.tensor(column.tolist()) for name, column in datum.loss_fn_inputs.items()}
            targets = inputs.pop("target_tokens")
            assert all(column.shape == ids.shape for column in [targets, *inputs.values()])
            logits = self.network(ids[None], use_cache=False).logits[0]
            p = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
            loss = _LOSSES[loss_fn](p, config, **{name: column.double() for name, column in inputs.items()})
            total = total + (loss / len(ids) if self._service.averages else loss)
            outputs.append({"logprobs": tinker.TensorData.from_torch(p.detach().float())})
        metrics = {"loss:sum": float(total.detach())}
        return total, tinker.ForwardBackwardOutput(
            loss_fn_output_type="scalar", loss_fn_outputs=outputs, metrics=metrics
        )


# -- the losses, each as the service's documentation writes it ------------------------------------------------------


def _cross_entropy(p: Tensor, config: Any, weights: Tensor) -> Tensor:
    return -(p * weights).sum()


def _cispo(p: Tensor, config: dict[str, float], logprobs: Tensor, advantages: Tensor) -> Tensor:
    ratio = torch.exp(p - logprobs)
    clipped = torch.clamp(ratio, config["clip_low_threshold"], config["clip_high_threshold"])
    return -(clipped.detach() * p * advantages).sum()


def _ppo(p: Tensor, config: dict[str, float], logprobs: Tensor, advantages: Tensor) -> Tensor:
    ratio = torch.exp(p - logprobs)
    clipped = torch.clamp(ratio, config["clip_low_threshold"], config["clip_high_threshold"])
    return -torch.min(ratio * advantages, clipped * advantages).sum()


def _gspo(
    p: Tensor, config: dict[str, float], logprobs: Tensor, advantages: Tensor, sequence_ratio_mask: Tensor
) -> Tensor:
    in_ratio = sequence_ratio_mask != 0
    log_ratio = (p.detach() - logprobs)[in_ratio].mean()
    ratio = torch.exp(log_ratio + p - p.detach())
    clipped = torch.clamp(ratio, config["clip_low_threshold"], config["clip_high_threshold"])
    return -torch.min(ratio * advantages, clipped * advantages).sum()


_LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": _cross_entropy,
    "cispo": _cispo,
    "ppo": _ppo,
    "gspo": _gspo,
}


class _Sampling:
    """In place of `tinker.SamplingClient`."""

    def __init__(self, service: StandIn, path: str | None) -> None:
        self._service, self.path = service, path
        self.network = _network().eval()
        if path is not None:
            if path not in service.saved:
                raise status_error(tinker.NotFoundError, 404, f"no weights {path}")
            self.network.load_state_dict(service.saved[path][0])

    def sample(self, *, prompt: tinker.ModelInput, num_samples: int, sampling_params: tinker.SamplingParams) -> _Answer:
        return self._service.answer(
            "sample",
            lambda: SimpleNamespace(
                sequences=[self._one(prompt.to_ints(), sampling_params, number) for number in range(num_samples)]
            ),
        )

    @torch.no_grad()
    def _one(self, ids: list[int], parameters: tinker.SamplingParams, number: int) -> Any:
        seed = random.randrange(2**31) if parameters.seed is None else parameters.seed
        generator = torch.Generator().manual_seed(seed + number)
        said: list[int] = []
        logprobs: list[float] = []
        reason = "length"
        while len(said) < (parameters.max_tokens or 1):
            row = self.network(torch.tensor([ids + said])).logits[0, -1]
            plain = row.log_softmax(-1)
            if parameters.temperature:
                chosen = int(torch.multinomial((row / parameters.temperature).softmax(-1), 1, generator=generator))
            else:
                chosen = int(row.argmax())
            said.append(chosen)
            logprobs.append(float(plain[chosen].float()))
            if chosen in (parameters.stop or ()):
                reason = "stop"
                break
        return SimpleNamespace(tokens=said, logprobs=logprobs, stop_reason=reason)


def _rest_client(service: StandIn) -> type:
    class RestClient:
        """In place of `tinker.RestClient`."""

        def __init__(self, base_url: str | None = None, api_key: str | None = None) -> None:
            service.keys.add(api_key)

        def get_server_capabilities(self) -> _Answer:
            model = SimpleNamespace(model_name="tiny", max_context_length=service.context)
            return service.answer("capabilities", lambda: SimpleNamespace(supported_models=[model]))

        def list_checkpoints(self, run: str) -> _Answer:
            found = [
                SimpleNamespace(tinker_path=path, time=datetime.now(UTC))
                for path in service.saved
                if path.startswith(f"tinker://{run}/")
            ]
            return service.answer("list", lambda: SimpleNamespace(checkpoints=found))

        def delete_checkpoint_from_tinker_path(self, path: str) -> _Answer:
            return service.answer("delete", lambda: service.saved.pop(path) and None)

    return RestClient
