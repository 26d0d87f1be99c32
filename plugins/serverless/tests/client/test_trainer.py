"""`ServerlessTrainer` against a foreign service: the same client, one warning, and what Lightning sees of a job."""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import threading
import warnings
from collections import deque
from io import StringIO

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from rich.console import Console

import fitrl
from fitrl.discovery import trainer_class
from fitrl.errors import CheckpointError, InvalidArgumentError, RunLockedError, SessionError, UnsupportedError
from fitrl.testing.listeners import Hooks, Rows
from fitrl_serverless import ServerlessModule, ServerlessStrategy, ServerlessTrainer, ServerlessTrainResult, make_call
from fitrl_serverless.client import JobCancelledError, JobFailedError, NotFoundError, ServiceTimeoutError
from fitrl_serverless.client.service import Service
from helpers import group

# DESIGN.md's column, in words of our own: a second list, which the signature is held to
ARGUMENTS = {
    "learning_rate": 5e-6,
    "ppo": False,
    "epsilon": None,
    "epsilon_high": None,
    "advantage_balance": 0.0,
    "scale_rewards": True,
    "importance_sampling_level": "token",
    "max_negative_advantage_importance_sampling_weight": None,
    "mask_prob_ratio": False,
    "kimi_k2_tau": None,
    "precalculate_logprobs": False,
}
STEP = {"type": "gradient_step", "data": {"loss/train": 0.25, "reward/mean": 0.5}}


@pytest.fixture(autouse=True)
def one_warning_is_expected():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the service at .* is not fitrl's")
        yield


@pytest.fixture
def new_trainer(foreign, key):
    """Make trainers that are closed after the test."""
    made = []

    def make(**options) -> ServerlessTrainer:
        made.append(ServerlessTrainer(**({"url": foreign.url, "key": key} | options)))
        return made[-1]

    yield make
    for trainer in made:
        trainer.close()


@pytest.fixture
def new_model(tmp_path):
    def make(name: str = "policy", **options) -> fitrl.TrainableModel:
        return fitrl.TrainableModel(name, "trainer", "tiny", root=tmp_path, **options)

    return make


def submitted(foreign) -> list[dict]:
    return [body for _, path, _, body in foreign.seen if path == "/preview/training-jobs"]


# -- arguments --------------------------------------------------------------------------------------------------------


def test_exactly_the_arguments_of_this_backend() -> None:
    assert trainer_class("serverless") is ServerlessTrainer
    found = inspect.signature(ServerlessTrainer.fit_rl).parameters
    keywords = {name: p.default for name, p in found.items() if p.kind is p.KEYWORD_ONLY}
    assert keywords == ARGUMENTS
    assert issubclass(ServerlessTrainer, fitrl.BackendTrainer | lightning.Trainer)
    for verbs in (fitrl.Trains, fitrl.Scores, fitrl.ExportsWeights):
        assert not isinstance(ServerlessStrategy.__new__(ServerlessStrategy), verbs)
    assert issubclass(ServerlessTrainer, fitrl.SupportsFitRL)


def test_every_argument_is_sent(foreign, new_trainer, new_model) -> None:
    others = {
        "learning_rate": 1e-4,
        "ppo": True,
        "epsilon": 0.1,
        "epsilon_high": 0.3,
        "advantage_balance": 0.5,
        "scale_rewards": False,
        "importance_sampling_level": "sequence",
        "max_negative_advantage_importance_sampling_weight": 2.0,
        "mask_prob_ratio": True,
        "kimi_k2_tau": 0.1,
        "precalculate_logprobs": True,
    }
    trainer, model = new_trainer(), new_model()
    trainer.fit_rl(model, [group([0, 1])])
    trainer.fit_rl(model, [group([0, 1])], **others)
    first, second = (body["experimental_config"] for body in submitted(foreign))
    assert first == {name: value for name, value in ARGUMENTS.items() if value is not None}
    assert second == others and others.keys() == ARGUMENTS.keys()


@pytest.mark.parametrize(
    "wrong",
    [{"learning_rate": -1.0}, {"advantage_balance": 2.0}, {"importance_sampling_level": "word"}, {"epsilon": -0.1}],
)
def test_wrong_values_are_refused_before_anything_is_sent(foreign, new_trainer, new_model, wrong) -> None:
    with pytest.raises(InvalidArgumentError, match=next(iter(wrong))):
        new_trainer().fit_rl(new_model(), [group([0, 1])], **wrong)
    assert not foreign.seen


@pytest.mark.parametrize(
    "option",
    [
        {"precision": "bf16-mixed"},
        {"gradient_clip_val": 1.0},
        {"devices": 2},
        {"num_nodes": 2},
        {"accelerator": "gpu"},
        {"strategy": "fitrl_local"},
    ],
)
def test_options_that_a_service_cannot_be_told(new_trainer, option) -> None:
    with pytest.raises(InvalidArgumentError, match=f"{next(iter(option))}=.*has no effect on a service"):
        new_trainer(**option)


def test_address_and_key_come_from_the_environment_too(foreign, key, monkeypatch, new_trainer) -> None:
    for name in ("FITRL_SERVERLESS_URL", "FITRL_SERVERLESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InvalidArgumentError, match="pass url=..., or set FITRL_SERVERLESS_URL"):
        ServerlessTrainer()
    monkeypatch.setenv("FITRL_SERVERLESS_URL", foreign.url)
    with pytest.raises(InvalidArgumentError, match="pass key=..., or set FITRL_SERVERLESS_KEY"):
        ServerlessTrainer()
    monkeypatch.setenv("FITRL_SERVERLESS_KEY", f"{key}\n")
    trainer = new_trainer(url=None, key=None)
    assert trainer.service_strategy.settings.url == foreign.url
    assert key not in repr(trainer.service_strategy.settings)
    with pytest.raises(InvalidArgumentError, match="total_timeout_s must be a finite number of seconds above 0"):
        ServerlessTrainer(total_timeout_s=float("inf"))


def test_weights_that_a_foreign_service_cannot_be_told_of(new_trainer, new_model) -> None:
    for lora in (None, fitrl.LoraSettings(rank=2)):
        with pytest.raises(UnsupportedError, match="decides itself which weights"):
            new_trainer().open(new_model(lora=lora))


# -- results ----------------------------------------------------------------------------------------------------------


def test_the_result_and_the_one_warning(foreign, key, new_model) -> None:
    model = new_model()
    with (
        pytest.warns(RuntimeWarning, match="not fitrl's: its mathematics are its own") as told,
        ServerlessTrainer(url=foreign.url, key=key, entity="team") as trainer,
    ):
        results = [trainer.fit_rl(model, [group([0, 1])], learning_rate=1e-3) for _ in range(3)]
        trainer.fit_rl(new_model("another"), [group([0, 1])])
    assert len([w for w in told if "not fitrl's" in str(w.message)]) == 1
    assert [type(result) for result in results] == [ServerlessTrainResult] * 3
    assert [result.step for result in results] == [1, 2, 3]
    assert [result.artifact_name for result in results] == [f"team/trainer/policy:step{step}" for step in (1, 2, 3)]
    assert all(result.metrics["objective/exact"] == 0.0 and result.num_optimizer_steps == 1 for result in results)
    assert results[0].metrics["reward/mean"] == 0.5


def test_nothing_to_learn_from_is_not_sent(foreign, new_trainer, new_model) -> None:
    trainer, model = new_trainer(), new_model()
    result = trainer.fit_rl(model, [group([1, 1]), group([2]), fitrl.TrajectoryGroup()])
    assert (result.num_optimizer_steps, result.step, result.artifact_name) == (0, 0, None)
    assert result.dropped == {"flat_groups": 2, "empty_groups": 1} and result.metrics["reward/mean"] == 4 / 3
    assert not submitted(foreign)
    # with a term that needs no advantage a flat group teaches
    assert trainer.fit_rl(model, [group([1, 1])], kimi_k2_tau=0.1).num_optimizer_steps == 1
    # empty groups are not sent, flat ones are: the service counts them
    trainer.fit_rl(model, [group([1, 1]), group([0, 1]), fitrl.TrajectoryGroup()])
    assert [len(body["trajectory_groups"]) for body in submitted(foreign)] == [1, 2]


def test_the_step_is_the_services(foreign, new_trainer, new_model) -> None:
    foreign.steps["me-trainer-policy"] = [40, 41]
    trainer, model = new_trainer(), new_model()
    trainer.open(model)
    assert model.step == 41 == trainer.global_step
    assert trainer.fit_rl(model, [group([0, 1])]).step == 42 == model.step == trainer.global_step


def test_a_failed_job_leaves_everything_as_it_was(foreign, new_trainer, new_model) -> None:
    trainer, model = new_trainer(), new_model()
    foreign.script = [{"type": "training_failed", "data": {"error_message": "tokens of another model"}}]
    with pytest.raises(JobFailedError, match="tokens of another model"):
        trainer.fit_rl(model, [group([0, 1])])
    assert (model.step, trainer.global_step) == (0, 0)
    foreign.script = None
    assert trainer.fit_rl(model, [group([0, 1])]).step == 1 == trainer.global_step


def test_one_trainer_per_run(new_trainer, new_model) -> None:
    first, second = new_trainer(), new_trainer()
    first.open(new_model())
    with pytest.raises(RunLockedError):
        second.open(new_model())
    with pytest.raises(SessionError, match="the same run with other settings"):
        first.open(new_model(lora=fitrl.LoraSettings(rank=4)))
    first.open(new_model("another"))
    second.open(new_model())


def test_older_calls_work_here_too(foreign, new_trainer, new_model) -> None:
    trainer, model = new_trainer(), new_model()

    async def older() -> ServerlessTrainResult:
        await model.register(trainer)
        return await model.train([group([0, 1])], fitrl.TrainConfig(learning_rate=1e-3), {"ppo": True})

    with pytest.warns(DeprecationWarning, match="ServerlessTrainer.fit_rl|trainer.fit_rl"):
        result = asyncio.run(older())
    assert result.artifact_name == "me/trainer/policy:step1"
    assert submitted(foreign)[0]["experimental_config"].items() >= {"ppo": True, "learning_rate": 1e-3}.items()
    with pytest.raises(TypeError, match="'serverless' takes"), pytest.warns(DeprecationWarning):
        asyncio.run(model.train([group([0, 1])], _config={"plot_tensors": True}))


# -- Lightning --------------------------------------------------------------------------------------------------------


def test_rate_schedule_loggers_and_progress_bar_hear_each_gradient_step(foreign, new_trainer, new_model) -> None:
    foreign.script = [{"type": "training_started", "data": {}}, STEP]
    console = Console(file=StringIO(), force_terminal=True, width=120)
    rows, bar = Rows(), fitrl.RewardProgressBar(2, console=console)
    trainer = new_trainer(
        logger=rows, callbacks=[LearningRateMonitor("step"), bar], lr_schedule=lambda step: 1 / (1 + step)
    )
    model = new_model()
    lines: list[str] = []

    def ends(job: str) -> None:
        """Let a job end once its gradient step was logged and drawn."""
        if any("loss/train" in row for row in rows.rows) and len(foreign.jobs[job]["events"]) == 2:
            lines.append(bar._drawn.tasks[0].fields["numbers"])
            foreign.jobs[job]["events"].append({"id": "e2", "type": "training_ended", "data": {"step": 1}})

    trainer._is_cancelled = lambda: bool(ends("job-0"))  # asked while the client waits
    told = trainer.fit_rl(model, [group([0, 1])], learning_rate=1e-3)
    assert lines == ["reward 0.500"] and bar.completed == 1
    live = rows.having("loss/train")
    assert [(row["step"], row["loss/train"]) for row in live] == [(1, 0.25)]
    assert {k: v for row in rows.rows for k, v in row.items() if k in told.metrics} == told.metrics
    assert float(trainer.callback_metrics["loss/train"]) == 0.25
    foreign.script = None
    trainer.fit_rl(model, [group([0, 1])], learning_rate=1e-3)
    rates = [value for row in rows.rows for key, value in row.items() if key.startswith("lr-")]
    assert rates == pytest.approx([1e-3, 0.5e-3])
    assert [body["experimental_config"]["learning_rate"] for body in submitted(foreign)] == pytest.approx(rates)
    assert rows.finalized == 0
    trainer.close()
    assert rows.finalized == 1


def test_early_stopping_is_heard_and_limits_are_kept(foreign, new_trainer, new_model) -> None:
    stops = EarlyStopping("loss/train", patience=1, mode="min", check_on_train_epoch_end=True)
    trainer, model = new_trainer(callbacks=[stops], max_steps=3), new_model()
    heard = []
    for _ in range(3):
        trainer.fit_rl(model, [group([0, 1])])
        heard.append(trainer.should_stop)
    assert heard == [False, True, True]
    with pytest.raises(InvalidArgumentError, match="max_steps=3 is exhausted"):
        trainer.fit_rl(model, [group([0, 1])])


def test_a_callback_that_raises_before_the_step_keeps_the_job_at_home(foreign, new_trainer, new_model) -> None:
    hooks = Hooks()
    trainer, model = new_trainer(callbacks=[hooks]), new_model()
    for hook in ("on_train_start", "on_train_batch_start", "on_before_zero_grad"):
        hooks.raises = hook
        with pytest.raises(ArithmeticError, match="on purpose"):
            trainer.fit_rl(model, [group([0, 1])])
        assert not submitted(foreign) and trainer.global_step == 0
    assert trainer.fit_rl(model, [group([0, 1])]).step == 1


def test_under_a_stock_trainer(foreign, key, monkeypatch, new_model, tmp_path) -> None:
    """One batch is one job; a checkpoint names the service's artifact and is refused once that has moved on."""
    monkeypatch.setenv("FITRL_SERVERLESS_URL", foreign.url)
    monkeypatch.setenv("FITRL_SERVERLESS_KEY", key)
    calls = [make_call([group([0, 1])], ppo=True) for _ in range(2)] + [make_call([group([0, 1])], learning_rate=2e-3)]

    def stock(**options) -> lightning.Trainer:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 1}
        return lightning.Trainer(strategy="fitrl_serverless", accelerator="cpu", **(quiet | options))

    keep = ModelCheckpoint(dirpath=tmp_path / "kept", save_last=True)
    trainer = stock(callbacks=[keep])
    trainer.fit(ServerlessModule(new_model(), learning_rate=1e-3), fitrl.Feed(calls))
    configs = [body["experimental_config"] for body in submitted(foreign)]
    assert trainer.global_step == 3 and [config["ppo"] for config in configs] == [True, True, False]
    assert [config["learning_rate"] for config in configs] == [1e-3, 1e-3, 2e-3]
    saved = torch.load(keep.last_model_path, weights_only=True)
    assert saved["artifact_name"] == "me/trainer/policy:step3" and saved["state_dict"] == {}
    again = stock(max_epochs=2, enable_checkpointing=False)
    again.fit(ServerlessModule(new_model()), fitrl.Feed(calls[:1]), ckpt_path=keep.last_model_path)
    assert again.global_step == 4
    with pytest.raises(CheckpointError, match="policy:step3, and the service stands at me/trainer/policy:step4"):
        stock(max_epochs=3, enable_checkpointing=False).fit(
            ServerlessModule(new_model()), fitrl.Feed(calls[:1]), ckpt_path=keep.last_model_path
        )
    for wrong in ({"accumulate_grad_batches": 2}, {"gradient_clip_val": 1.0}):
        with pytest.raises(InvalidArgumentError, match="a job is one step of the service"):
            stock(enable_checkpointing=False, **wrong).fit(ServerlessModule(new_model()), fitrl.Feed(calls))


# -- stopping, and taking up again ------------------------------------------------------------------------------------


@pytest.fixture
def signal_when_started(foreign, monkeypatch):
    """Send this process a signal once its job is under way."""

    def arrange(number: int) -> None:
        foreign.script = [{"type": "training_started", "data": {}}]
        events = Service.events
        sent = []

        async def watched(service, job_id, *, after=None):
            async for event in events(service, job_id, after=after):
                yield event
            if not sent:
                sent.append(os.kill(os.getpid(), number))

        monkeypatch.setattr(Service, "events", watched)

    return arrange


def test_ctrl_c_cancels_the_job(foreign, new_trainer, new_model, signal_when_started, monkeypatch) -> None:
    async def cancel(service, job_id: str) -> bool:
        foreign.jobs[job_id]["events"].append({"id": "e1", "type": "training_cancelled", "data": {}})
        return True

    monkeypatch.setattr(Service, "cancel", cancel)
    signal_when_started(signal.SIGINT)
    trainer, model = new_trainer(), new_model()
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as caught:
        trainer.fit_rl(model, [group([0, 1])])
    assert isinstance(caught.value.__cause__, JobCancelledError)
    assert signal.getsignal(signal.SIGINT) is before and not (model.run_dir / "job.json").exists()
    foreign.script = None
    assert trainer.fit_rl(model, [group([0, 1])]).step == 1  # the session is usable


def test_ctrl_c_that_comes_too_late_keeps_the_step(foreign, new_trainer, new_model, signal_when_started, monkeypatch):
    async def cancel(service, job_id: str) -> bool:
        foreign.jobs[job_id]["events"].append({"id": "e1", "type": "training_ended", "data": {"step": 1}})
        return True

    monkeypatch.setattr(Service, "cancel", cancel)
    signal_when_started(signal.SIGINT)
    trainer, model = new_trainer(), new_model()
    with pytest.raises(KeyboardInterrupt):
        trainer.fit_rl(model, [group([0, 1])])
    assert model.step == 1 and not (model.run_dir / "job.json").exists()


def test_sigterm_leaves_the_job_to_be_picked_up(foreign, new_trainer, new_model, signal_when_started) -> None:
    signal_when_started(signal.SIGTERM)
    trainer, model = new_trainer(), new_model()
    with pytest.raises(SystemExit) as caught:
        trainer.fit_rl(model, [group([0, 1])])
    assert caught.value.code == 128 + signal.SIGTERM and (model.run_dir / "job.json").exists()
    assert not [path for _, path, _, _ in foreign.seen if path.endswith("/cancel")]


def leave_a_job(foreign, new_trainer, model) -> None:
    """A client that gives up on a job, which then ends without it."""
    foreign.script = [{"type": "training_started", "data": {}}]
    with new_trainer(total_timeout_s=0.2) as trainer, pytest.raises(ServiceTimeoutError):
        trainer.fit_rl(model, [group([0, 1, 2])], learning_rate=1e-3)
    events = foreign.jobs["job-0"]["events"]
    events += [{"id": "e1"} | STEP, {"id": "e2", "type": "training_ended", "data": {}}]
    foreign.steps["me-trainer-policy"].append(1)
    foreign.script = None


def test_the_same_groups_are_not_trained_twice(foreign, new_trainer, new_model, capsys) -> None:
    leave_a_job(foreign, new_trainer, new_model())
    trainer, model = new_trainer(), new_model()
    result = trainer.fit_rl(model, [group([0, 1, 2])], learning_rate=1e-3)
    assert (result.step, result.metrics["loss/train"], result.metrics["reward/mean"]) == (1, 0.25, 1.0)
    assert len(foreign.jobs) == 1 and trainer.picked_up is None
    assert trainer.fit_rl(model, [group([0, 1, 2])], learning_rate=1e-3).step == 2  # asked for again, on purpose


def test_other_groups_wait_for_the_job_that_was_left(foreign, new_trainer, new_model, capsys) -> None:
    leave_a_job(foreign, new_trainer, new_model())
    trainer, model = new_trainer(), new_model()
    result = trainer.fit_rl(model, [group([0, 1])])
    assert result.step == 2 and len(foreign.jobs) == 2
    assert trainer.picked_up is not None and trainer.picked_up.step == 1
    assert "job-0" in capsys.readouterr().err


def test_opening_waits_for_the_job_that_was_left(foreign, new_trainer, new_model) -> None:
    """So a loop that asks `model.step` how far it is makes as many steps as it would have made undisturbed."""
    leave_a_job(foreign, new_trainer, new_model())
    trainer, model = new_trainer(), new_model()
    assert trainer.sampler(model).version == 1 == model.step
    assert trainer.picked_up.artifact_name == "me/trainer/policy:step1"
    again = trainer.fit_rl(model, [group([0, 1, 2])], learning_rate=1e-3)
    assert again == trainer.picked_up and len(foreign.jobs) == 1


def test_a_job_that_failed_meanwhile_is_told(foreign, new_trainer, new_model) -> None:
    leave_a_job(foreign, new_trainer, new_model())
    foreign.jobs["job-0"]["events"][1:] = [{"id": "e1", "type": "training_failed", "data": {"error_message": "no"}}]
    trainer, model = new_trainer(), new_model()
    with pytest.warns(RuntimeWarning, match="the job of an earlier process failed: no"):
        trainer.open(model)
    assert trainer.fit_rl(model, [group([0, 1])]).num_optimizer_steps == 1


def test_a_lost_job_can_be_dropped(foreign, new_trainer, new_model) -> None:
    leave_a_job(foreign, new_trainer, new_model())
    foreign.jobs.clear()
    trainer, model = new_trainer(), new_model()
    with pytest.raises(NotFoundError, match=r"trainer\.forget\(model\)"):
        trainer.open(model)
    trainer.forget(model)
    assert trainer.fit_rl(model, [group([0, 1])]).num_optimizer_steps == 1
    leave_a_job_record = model.run_dir / "job.json"
    assert not leave_a_job_record.exists()


def test_async_calls_queue_and_a_cancelled_one_cancels_its_job(foreign, new_trainer, new_model, monkeypatch) -> None:
    started = threading.Event()

    async def cancel(service, job_id: str) -> bool:
        foreign.jobs[job_id]["events"].append({"id": "e9", "type": "training_cancelled", "data": {}})
        return True

    monkeypatch.setattr(Service, "cancel", cancel)
    trainer, model = new_trainer(), new_model()

    async def work() -> None:
        both = [trainer.fit_rl_async(model, [group([0, rate])], learning_rate=rate) for rate in (1.0, 2.0)]
        first, second = map(asyncio.create_task, both)
        assert [(await first).step, (await second).step] == [1, 2]
        foreign.script = [{"type": "training_started", "data": {}}]
        create = foreign.create
        monkeypatch.setattr(foreign, "create", lambda *args: (create(*args), started.set())[0])
        stuck = asyncio.create_task(trainer.fit_rl_async(model, [group([0, 3])]))
        await asyncio.to_thread(started.wait)
        stuck.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stuck

    asyncio.run(work())
    assert [body["experimental_config"]["learning_rate"] for body in submitted(foreign)][:2] == [1.0, 2.0]
    assert model.step == 2 and not (model.run_dir / "job.json").exists()


# -- checkpoints and logs ---------------------------------------------------------------------------------------------


def test_checkpoints(foreign, new_trainer, new_model, tmp_path) -> None:
    trainer, model = new_trainer(), new_model()
    foreign.steps["me-trainer-policy"] = list(range(1, 8))
    foreign.page = 3
    assert [found.step for found in trainer.checkpoints(model)] == list(range(1, 8))
    assert trainer.delete_checkpoints(model, [2, 3, 99]) == [2, 3]
    assert [found.step for found in trainer.checkpoints(model)] == [1, 4, 5, 6, 7]
    with pytest.raises(NotFoundError):  # this service has no such call
        trainer.download_checkpoint(model, folder=tmp_path / "here")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trainer"]
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="is there already"):
        trainer.download_checkpoint(model, folder=tmp_path / "there")


def test_logging_to_the_service(foreign, new_trainer, new_model) -> None:
    trainer, model = new_trainer(), new_model()
    foreign.faults["/log"] = deque([503])
    trainer.log(model, [group([0, 1])], split="val")
    [body] = [body for _, path, _, body in foreign.seen if path.endswith("/log")]
    assert (body["model_id"], body["split"], len(body["trajectory_groups"])) == ("me-trainer-policy", "val", 1)
