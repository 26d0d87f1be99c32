"""`fitrl_tinker`: Lightning drives, the Tinker service computes.

An optimizer step is its forward_backward requests and one optim_step, submitted together. If their answer does not
come, nobody knows whether the step was taken: the training run is left alone, and the next request begins another one
from the newest saved state. So nothing is trained twice, and the step count is that of the state.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import lightning
from typing_extensions import override

from fitrl.data.batch import Batch
from fitrl.errors import CheckpointError, InvalidArgumentError, UnsupportedError
from fitrl.objective.objective import CustomObjective, Objective
from fitrl.policy.batch_loss import batch_loss
from fitrl.policy.loading import LoraSettings
from fitrl.policy.model import TrainableModel
from fitrl.protocols.results import TokenLogprobs
from fitrl.strategies.remote import RemoteStep, RemoteStepResult, RemoteStrategy
from fitrl_tinker.credentials import find_access
from fitrl_tinker.datums import Datums
from fitrl_tinker.errors import ServiceError
from fitrl_tinker.losses import ServiceLoss, gradient_as_weights, is_the_sum, own_loss
from fitrl_tinker.sampler import TinkerSampler, stop_ids
from fitrl_tinker.service import Service
from fitrl_tinker.states import LAYERS, RunNote, TinkerState, read_uri, state_name

if TYPE_CHECKING:
    import tinker

DEFAULT_TIMEOUT_S = 600.0  # a large model may take minutes to be loaded
DEFAULT_LAYERS = {"train_mlp": True, "train_attn": True, "train_unembed": False}
_PASSING_S = 24 * 3600  # weights that are sampled from until the next step only
_NORM_KEYS = ("grad_norm", "grad_norm:mean", "unclipped_grad_l2:mean", "skyrl.ai/grad_norm")  # servers differ


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A microbatch that is ready to be sent."""

    batch: Batch
    objective: Objective | CustomObjective
    datums: Datums
    loss: ServiceLoss | None


class TinkerStrategy(RemoteStrategy):
    """Trains LoRA adapters on the Tinker service; registered as `fitrl_tinker`.

    Args:
        base_url: address; None: TINKER_BASE_URL, else the hosted service.
        api_key: None: TINKER_API_KEY. A server on this machine may go without.
        lora_seed: of the adapters' random half; None: `TrainableModel.lora.seed`.
        timeout: most seconds that any request may take.

    Raises:
        InvalidArgumentError: no key, or one that is none; see `find_access`.
    """

    strategy_name = "fitrl_tinker"

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        lora_seed: int | None = None,
        timeout: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        super().__init__()
        self.service = Service(find_access(base_url, api_key), timeout)
        self._lora_seed = lora_seed
        self._layers: dict[str, bool] | None = None  # asked for; None: nobody did
        self._note: RunNote | None = None
        self._client: tinker.TrainingClient | None = None
        self._stands_on: TinkerState | None = None  # the newest state that was saved or loaded in this session
        self._names: dict[str, str] = {}  # of what this run has saved, with the URIs
        self._sampler: TinkerSampler | None = None
        self._context_length: tuple[str, int | None] | None = None
        self._warned = False

    # -- the training run ---------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: lightning.Trainer) -> None:
        is_new = not self.is_live
        if is_new:
            _check_model(self.policy_module.model)
            if self.policy_module.optimizer_settings.moments != "float32":
                raise InvalidArgumentError(
                    f"moments={self.policy_module.optimizer_settings.moments!r} has no effect: the service holds them"
                )
        super().setup(trainer)
        if is_new:
            self._note = RunNote.of(self.policy_module.model.run_dir)
            self._forget_run()
            self.saved_step = 0

    @override
    def teardown(self) -> None:
        if not self.keep_alive:
            if self._sampler is not None:
                self._sampler.close()
            self._sampler, self._layers = None, None
            self._forget_run()
            self.service.close()
        super().teardown()

    @property
    def note(self) -> RunNote:
        """What the run folder knows of the service."""
        if self._note is None:
            self._note = RunNote.of(self.policy_module.model.run_dir)
        return self._note

    def train_layers(self, layers: Mapping[str, bool]) -> None:
        """Say which layers get adapters, before the training run is created.

        Args:
            layers: `train_mlp`, `train_attn`, `train_unembed`.

        Raises:
            InvalidArgumentError: none of them, or others than the run was created with.
        """
        if not any(layers.values()):
            raise InvalidArgumentError(f"one of {', '.join(LAYERS)} has to be True: nothing would be trained")
        created = {name: self.note.created_with[name] for name in LAYERS if name in self.note.created_with}
        if created and created != dict(layers):
            changed = ", ".join(f"{name}={layers[name]}" for name in LAYERS if layers[name] != created.get(name))
            raise InvalidArgumentError(
                f"{changed}: this run was created with {created}, and its adapters stay as they are; use another name "
                "for the model"
            )
        self._layers = dict(layers)

    def _training_client(self) -> tinker.TrainingClient:
        """The training run's client; made from the state where we stand, or the base model."""
        if self._client is None:
            if self._stands_on is not None:
                state = self._stands_on
                self._client = self.service.resume(state.uri, with_optimizer=state.kind == "training")
            else:
                self._client = self._create()
        return self._client

    def _create(self) -> tinker.TrainingClient:
        model = self.policy_module.model
        lora = model.lora
        assert lora is not None  # checked in setup
        seed = lora.seed if self._lora_seed is None else self._lora_seed
        layers = self._layers or {name: bool(self.note.created_with.get(name, DEFAULT_LAYERS[name])) for name in LAYERS}
        client = self.service.create(model.base_model, rank=lora.rank, seed=seed, layers=layers)
        self.note.create({"base_model": model.base_model, "rank": lora.rank, "seed": seed, **layers})
        return client

    def _forget_run(self) -> None:
        self._client, self._stands_on, self._names = None, None, {}

    # -- RemoteStrategy -----------------------------------------------------------------------------------------

    @override
    def submit(
        self, microbatches: Sequence[tuple[Batch, Objective | CustomObjective]], step: RemoteStep
    ) -> Callable[[], RemoteStepResult]:
        import tinker

        prepared = []
        for batch, objective in microbatches:
            datums = Datums(batch)
            prepared.append(_Prepared(batch, objective, datums, own_loss(batch, objective, datums)))
        parameters = tinker.AdamParams(
            learning_rate=step.learning_rate,
            beta1=step.betas[0],
            beta2=step.betas[1],
            eps=step.eps,
            weight_decay=step.weight_decay,
            grad_clip_norm=step.grad_clip_norm or 0.0,
        )
        number = self.policy_module.trainer.global_step + 1
        try:
            client = self._training_client()
            losses = [item.loss or self._second_pass(item) for item in prepared]
            futures = [
                client.forward_backward(
                    item.datums.build(loss.columns), loss.name, *([loss.config] if loss.config else [])
                )
                if item.datums.sequences
                else None
                for item, loss in zip(prepared, losses, strict=True)
            ]
            stepped = client.optim_step(parameters)
        except ServiceError:
            self._go_back()
            raise

        def answer() -> RemoteStepResult:
            outputs = [
                None if future is None else self.service.wait(f"compute gradients for step {number}", future)
                for future in futures
            ]
            taken = self.service.wait(f"take step {number}", stepped)
            return self._result(prepared, losses, outputs, taken)

        return answer

    def _second_pass(self, item: _Prepared) -> ServiceLoss:
        """The gradient of an objective that no loss of the service is: the logprobs are asked for first."""
        return gradient_as_weights(item.batch, self._logprobs(item.datums), item.objective)

    def _logprobs(self, datums: Datums) -> Any:
        import torch

        if not datums.sequences:
            return torch.zeros(datums.size)
        weights = {"weights": torch.zeros(datums.size)}
        future = self._training_client().forward(datums.build(weights), "cross_entropy")
        return datums.gather(self.service.wait("compute logprobs", future).loss_fn_outputs)

    def _result(
        self, prepared: Sequence[_Prepared], losses: Sequence[ServiceLoss], outputs: Sequence[Any], taken: Any
    ) -> RemoteStepResult:
        import torch

        exact = True
        values, metrics, all_logprobs = [], [], []
        for item, loss, output in zip(prepared, losses, outputs, strict=True):
            empty = output is None
            logprobs = torch.zeros(item.datums.size) if empty else item.datums.gather(output.loss_fn_outputs)
            result = batch_loss(item.batch, logprobs.double(), item.objective)
            values.append(float(result.loss))
            metrics.append({name: float(value) for name, value in result.metrics.items()})
            all_logprobs.append(logprobs)
            told = None if empty else output.metrics.get("loss:sum")
            if not empty and (told is None or not is_the_sum(loss, logprobs, values[-1], told)):
                exact = False
                self._warn(loss, told, values[-1])
        told_metrics = getattr(taken, "metrics", None) or {}
        norm = next((float(told_metrics[key]) for key in _NORM_KEYS if key in told_metrics), None)
        return RemoteStepResult(losses=values, metrics=metrics, grad_norm=norm, logprobs=all_logprobs, exact=exact)

    def _warn(self, loss: ServiceLoss, told: float | None, value: float) -> None:
        if self._warned:
            return
        self._warned = True
        what = "no loss:sum" if told is None else f"loss:sum {told:.6g} where the objective is {value:.6g}"
        warnings.warn(
            f"the service tells {what} for {loss.name!r}: it does not, or not provably, sum over tokens as the Tinker "
            "service does, so its gradient is not exactly the objective's; objective/exact is 0",
            stacklevel=2,
        )

    @override
    def remote_save(self, name: str, weights_only: bool) -> str:
        step = self.policy_module.trainer.global_step
        full = state_name(name, step, weights_only=weights_only)
        client = self._training_client()
        if full not in self._names:
            future = client.save_state(full, overwrite=True)
            self._names[full] = str(self.service.wait(f"save {full}", future).path)
        state = TinkerState(uri=self._names[full], step=step, kind="weights" if weights_only else "training")
        self.note.add(state)
        if not weights_only:
            self._stands_on = state
        return state.uri

    @override
    def remote_load(self, uri: str) -> int:
        state = read_uri(uri)
        if state.kind == "sampler":
            raise InvalidArgumentError(f"{uri} can only be sampled from: load one of /weights/")
        self._check_created_with(uri)
        client = self.service.resume(uri, with_optimizer=state.kind == "training")
        self._forget_run()
        self._client, self._stands_on = client, state
        return state.step

    def _check_created_with(self, uri: str) -> None:
        """Refuse to go on with another base model or rank than the run was created with: they would have no effect."""
        model, created = self.policy_module.model, self.note.created_with
        asked = {"base_model": model.base_model, "rank": None if model.lora is None else model.lora.rank}
        held = {name: created[name] for name in asked if name in created}
        if held and held != asked and uri in {state.uri for state in self.note.states}:
            raise CheckpointError(
                f"{uri} was created with {held}, the open model asks for {asked}; use the same, or another name for "
                "the model"
            )

    @override
    def newest(self) -> str | None:
        newest = self.note.newest
        return None if newest is None else newest.uri

    @override
    def lost(self) -> int:
        state = self._stands_on
        self._forget_run()
        self._stands_on = state
        self.service.forget()
        return 0 if state is None else state.step

    # -- Scores -------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch) -> TokenLogprobs:
        """Logprobs of the batch's targets, without a gradient."""
        self.wait()
        return TokenLogprobs(logprobs=self._logprobs(Datums(batch)))

    # -- sampling -----------------------------------------------------------------------------------------------

    @property
    @override
    def context_length(self) -> int | None:
        name = self.policy_module.model.base_model
        if self._context_length is None or self._context_length[0] != name:
            self._context_length = (name, self.service.context_length(name))
        return self._context_length[1]

    def deployed_sampler(self) -> TinkerSampler:
        """The sampler, on the weights that were deployed last; at first on the newest."""
        step = self.policy_module.trainer.global_step
        if self._sampler is None or self._sampler.version > step:  # the latter of a step that was gone back from
            self._move_sampler(for_good=False)
        assert self._sampler is not None
        return self._sampler

    @override
    def newest_sampler(self) -> TinkerSampler:
        step = self.policy_module.trainer.global_step
        if self._sampler is None or self._sampler.version != step:
            self._move_sampler(for_good=False)
        assert self._sampler is not None
        return self._sampler

    def deploy(self) -> str | None:
        """Move the sampler to the weights as they are; returns their URI, None for the base model."""
        self._move_sampler(for_good=True)
        assert self._sampler is not None
        return self._sampler.path

    def _move_sampler(self, *, for_good: bool) -> None:
        """Let the sampler answer with the weights as they are, kept on the service for good or for a day."""
        self.wait()
        model, step = self.policy_module.model, self.policy_module.trainer.global_step
        path = self._save_for_sampler(step, for_good) if step else None
        if self._sampler is None:
            ends = stop_ids(model.base_model, self.tokenizer)
            self._sampler = TinkerSampler(self.service, model.base_model, self.tokenizer, stop_ids=ends)
        self._sampler.move(path, step)

    def _save_for_sampler(self, step: int, for_good: bool) -> str:
        name = f"step-{step}" if for_good else f"passing-step-{step}"
        key = f"sampler/{name}"
        if key not in self._names:
            client = self._training_client()
            future = client.save_weights_for_sampler(name, ttl_seconds=None if for_good else _PASSING_S)
            self._names[key] = str(self.service.wait(f"save {name} for sampling", future).path)
            if for_good:
                self.note.add(TinkerState(uri=self._names[key], step=step, kind="sampler"))
        return self._names[key]


def _check_model(model: TrainableModel) -> None:
    """Refuse what the service does not train."""
    if model.lora is None:
        raise UnsupportedError("the Tinker service trains LoRA adapters, not all weights: pass lora=LoraSettings(...)")
    plain = LoraSettings()
    for name in ("alpha", "target_modules"):
        if getattr(model.lora, name) != getattr(plain, name):
            raise InvalidArgumentError(
                f"LoraSettings.{name}={getattr(model.lora, name)!r} has no effect: the Tinker service has its own; say "
                "which layers are trained with fit_rl(train_mlp, train_attn, train_unembed)"
            )
