"""Whatever the service does: nothing is trained twice, the count is true, the job goes on from the newest state."""

from __future__ import annotations

from typing import Any

import pytest
import tinker
from stand_in import status_error

from fitrl import LoraSettings, TrainableModel
from fitrl.data.packing import pack
from fitrl.errors import CheckpointError, NonFiniteGradientError
from fitrl_tinker import ServiceError, ServiceTimeoutError, TinkerTrainer
from samples import make_groups, make_samples

MACHINE = ("time/", "throughput/")
POISONED = RuntimeError(
    "A previous request failed; this TrainingClient is poisoned and cannot accept further requests."
)
EXPIRED = status_error(tinker.NotFoundError, 404, "Session not found")
FAULTS: dict[str, Any] = {
    "poisoned": POISONED,
    "expired": EXPIRED,
    "finished": status_error(tinker.APIStatusError, 410, "session has finished"),
    "400 as a plain error": ValueError("invalid request"),
    "401": status_error(tinker.AuthenticationError, 401),
    "402": status_error(tinker.BillingError, 402),
    "409": status_error(tinker.ConflictError, 409),
    "429": status_error(tinker.RateLimitError, 429),
    "500": status_error(tinker.InternalServerError, 500),
    "failed": tinker.RequestFailedError("it failed", "request-1", "server"),  # type: ignore[arg-type]
    "answer lost": "lost",
    "500 after it was done": (status_error(tinker.InternalServerError, 500),),
}


def make_model(root: Any, name: str = "policy") -> TrainableModel:
    return TrainableModel(name, "faults", "tiny", lora=LoraSettings(rank=4), root=root)


@pytest.fixture
def trainer(service) -> Any:
    with TinkerTrainer(enable_model_summary=False, timeout=30) as trainer:
        yield trainer


def call(trainer: TinkerTrainer, model: TrainableModel, seed: int, **arguments: Any) -> dict[str, float]:
    result = trainer.fit_rl(model, make_groups(seed=seed), learning_rate=1e-3, **arguments)
    return {key: value for key, value in result.metrics.items() if not key.startswith(MACHINE)} | {"step": result.step}


@pytest.mark.parametrize("request_", ["forward_backward", "optim_step"])
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_step_that_fails_is_taken_once(fault, request_, service, trainer, tmp_path) -> None:
    """The call that failed, made again, is to the last bit the one of a job that nothing happened to."""
    undisturbed, disturbed = make_model(tmp_path, "undisturbed"), make_model(tmp_path, "disturbed")
    expected = [call(trainer, undisturbed, seed) for seed in (1, 2, 3)]
    found = [call(trainer, disturbed, 1)]
    service.fail_next(request_, fault)
    with pytest.raises(ServiceError) as caught:
        call(trainer, disturbed, 2)
    assert "step 2" in str(caught.value)  # says which request
    assert (trainer.global_step, disturbed.step) == (1, 1)
    found += [call(trainer, disturbed, seed) for seed in (2, 3)]
    assert found == expected


def test_several_steps_go_back_together(service, trainer, tmp_path) -> None:
    """A call of four steps whose third fails: the steps before it were not saved, so the call counts for nothing."""
    undisturbed, disturbed = make_model(tmp_path, "undisturbed"), make_model(tmp_path, "disturbed")
    arguments = {"num_minibatches": 2, "num_epochs": 2}
    expected = [call(trainer, undisturbed, seed, **arguments) for seed in (1, 2)]
    found = [call(trainer, disturbed, 1, **arguments)]
    assert trainer.global_step == 4
    service.fail_next("optim_step", None, None, "lost")
    with pytest.raises(ServiceTimeoutError, match="within 30 s when asked to take step 7"):
        call(trainer, disturbed, 2, **arguments)
    assert trainer.global_step == 4
    found.append(call(trainer, disturbed, 2, **arguments))
    assert found == expected and trainer.global_step == 8


def test_a_restart_in_the_middle_of_a_step(service, trainer, tmp_path) -> None:
    """While the service is away every call says so and changes nothing; then the job goes on."""
    model = make_model(tmp_path)
    first = call(trainer, model, 1)
    away = status_error(tinker.InternalServerError, 503)
    service.fail_next("optim_step", "lost")
    service.fail_next("load", away, away)
    for _ in range(3):
        with pytest.raises(ServiceError):
            call(trainer, model, 2)
        assert (trainer.global_step, model.step) == (1, 1)
    sessions = service.sessions
    assert call(trainer, model, 2)["step"] == 2 and sessions > 1
    assert first["step"] == 1


def test_another_process_goes_on_from_the_newest_state(service, tmp_path) -> None:
    with TinkerTrainer(enable_model_summary=False) as trainer:
        expected = [call(trainer, make_model(tmp_path, "whole"), seed) for seed in (1, 2, 3)]
    found = []
    with TinkerTrainer(enable_model_summary=False) as trainer:
        found += [call(trainer, make_model(tmp_path, "parts"), seed) for seed in (1, 2)]
        service.fail_next("forward_backward", EXPIRED)
        with pytest.raises(ServiceError):
            call(trainer, make_model(tmp_path, "parts"), 3)
    with TinkerTrainer(enable_model_summary=False) as trainer:
        found.append(call(trainer, make_model(tmp_path, "parts"), 3))
    assert found == expected


def test_without_a_saved_state_it_begins_again(service, trainer, tmp_path) -> None:
    model = make_model(tmp_path)
    first = call(trainer, model, 1, save_checkpoint=False)
    service.fail_next("optim_step", "lost")
    with pytest.raises(ServiceTimeoutError):
        call(trainer, model, 2, save_checkpoint=False)
    assert trainer.global_step == 0
    assert call(trainer, model, 1, save_checkpoint=False) == first


@pytest.mark.parametrize("request_", ["save_state", "save_weights_for_sampler"])
def test_what_was_trained_outlives_a_failed_save(request_, service, trainer, tmp_path) -> None:
    model = make_model(tmp_path)
    service.fail_next(request_, status_error(tinker.InternalServerError, 500))
    with pytest.raises(ServiceError, match="save step-1"):
        call(trainer, model, 1, deploy_checkpoint=True)
    assert trainer.global_step == 1 and trainer.open(model).save().endswith("step-1")


def test_a_failed_creation_is_no_step(service, trainer, tmp_path) -> None:
    service.fail_next("create", status_error(tinker.BillingError, 402))
    with pytest.raises(ServiceError, match="create a training run of 'tiny'.*402.*billing") as caught:
        call(trainer, make_model(tmp_path), 1)
    assert caught.value.status == 402 and trainer.global_step == 0
    assert call(trainer, make_model(tmp_path), 1)["step"] == 1


def test_a_gradient_that_is_not_finite_is_gone_back_from(service, trainer, tmp_path) -> None:
    model = make_model(tmp_path)
    call(trainer, model, 1)
    expected = call(trainer, make_model(tmp_path, "other"), 1)
    service.fail_next("optim_step", "nan")
    with pytest.raises(NonFiniteGradientError):
        call(trainer, model, 2)
    assert model.step == 1 and expected["step"] == 1
    assert call(trainer, model, 2)["step"] == 2


# -- order and time limits -------------------------------------------------------------------------------------------


def test_a_step_is_submitted_whole_before_anything_is_waited_for(service, trainer, tmp_path) -> None:
    """And the next step is submitted before the answer to this one: the service is never idle."""
    model = make_model(tmp_path)
    call(trainer, model, 1)
    service.log.clear()
    call(trainer, model, 2, num_minibatches=3, save_checkpoint=False)
    asked, told = ["forward_backward", "optim_step"], ["wait forward_backward", "wait optim_step"]
    assert service.log == [*asked, *asked, *told, *asked, *told, *told]


def test_microbatches_of_a_step_are_submitted_together(service, trainer, tmp_path) -> None:
    verbs = trainer.open(make_model(tmp_path))
    batches = pack(make_samples(seed=1, num_trajectories=6), num_batches=3, layout="packed")
    results = [verbs.forward_backward(batch) for batch in batches]
    service.log.clear()
    assert verbs.optim_step(learning_rate=1e-3).accumulated_microbatches == 3
    kept = [entry for entry in service.log if "create" not in entry and entry != "session"]
    assert kept == ["forward_backward"] * 3 + ["optim_step"] + ["wait forward_backward"] * 3 + ["wait optim_step"]
    assert all(isinstance(result.loss, float) for result in results)


def test_a_callback_that_stops_leaves_no_step_open(service, trainer, tmp_path) -> None:
    """The loop of fit ends after one of three steps, and its numbers are those of the step that was taken."""
    model = make_model(tmp_path)
    call(trainer, model, 1)
    strategy = trainer.tinker_strategy
    submit = strategy.submit

    def stop_after(*arguments: Any) -> Any:
        trainer.should_stop = True
        return submit(*arguments)

    strategy.submit = stop_after  # type: ignore[method-assign]
    metrics = call(trainer, model, 2, num_minibatches=3)
    assert metrics["step"] == trainer.global_step == 2 and metrics["loss/train"] == metrics["loss/train"]
    assert service.log.count("wait optim_step") == service.log.count("optim_step") == 2


def test_names_and_uris_are_checked(service, trainer, tmp_path) -> None:
    verbs = trainer.open(make_model(tmp_path))
    with pytest.raises(ValueError, match="letters, digits"):
        verbs.save("a/b")
    for uri in ("tinker://run1/weights/final", "/tmp/step-3"):
        with pytest.raises(CheckpointError, match="no state saved by fitrl"):
            verbs.load(uri)
    with pytest.raises(ServiceError, match="load tinker://run9/weights/step-3.*404"):
        verbs.load("tinker://run9/weights/step-3")
    with pytest.raises(ValueError, match="sampled from"):
        verbs.load("tinker://run9/sampler_weights/step-3")
    assert verbs.get_status().step == 0
