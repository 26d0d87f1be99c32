"""What the next worker makes of a job that was running, without any process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from asking import job_body
from safetensors.torch import load_file

import fitrl
from fitrl_serverless import wire
from fitrl_serverless.server.answers import Once, forget_old_answers
from fitrl_serverless.server.checkpoints import Checkpoints
from fitrl_serverless.server.database import Database
from fitrl_serverless.server.errors import RefusedError
from fitrl_serverless.server.job import Job, Outcome
from fitrl_serverless.server.orders import Orders
from fitrl_serverless.server.paging import Page
from fitrl_serverless.server.queue import Queue
from fitrl_serverless.server.registry import Registry
from fitrl_serverless.server.settings import Limits, Settings
from fitrl_serverless.server.training import Training
from fitrl_serverless.server.worker import recover
from helpers import group

NEVER = Once.of("alice", None)
OUTCOME = Outcome(step=1, num_optimizer_steps=1, dropped={}, metrics={"loss/train": 0.5, "ratio/max": "NaN"})


@dataclass(frozen=True)
class Parts:
    settings: Settings
    database: Database
    registry: Registry
    queue: Queue

    def make_model(self, name: str = "m") -> str:
        body = wire.CreateModel(project="tests", name=name, base_model="tiny")
        return self.registry.create("alice", body, NEVER).id

    def submit(self, model: str, most: int = 64) -> str:
        text = job_body(model).encode()
        return self.queue.submit("alice", wire.CreateTrainingJob.model_validate_json(text), text, NEVER, most)

    def claim(self) -> Job:
        job = self.queue.claim(None, 30.0)
        assert job is not None
        return job

    def kinds(self, job_id: str) -> list[str]:
        return [event.type for event in self.queue.events("alice", job_id, Page(limit=100)).data]


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[Parts]:
    settings = Settings(state=tmp_path, limits=Limits(attempts=2))
    database = Database(settings.database)
    yield Parts(settings, database, Registry(database, settings), Queue(database))
    database.close()


def test_a_job_that_was_saved_is_at_its_end(parts) -> None:
    model = parts.make_model()
    parts.submit(model)
    job = parts.claim()
    parts.queue.begin(job, 0)
    assert parts.queue.settle(job, OUTCOME)
    groups = wire.groups_from_wire(parts.queue.groups_body(job.id).trajectory_groups)
    with fitrl.LocalTrainer(accelerator="cpu", devices=1, enable_model_summary=False) as trainer:
        trainer.fit_rl(fitrl.TrainableModel(model, "models", "tiny", root=parts.settings.state), groups)
    recover(parts.queue, parts.registry, parts.settings)
    assert parts.queue.get("alice", job.id).status == "succeeded"
    assert parts.kinds(job.id) == ["training_started", "gradient_step", "training_ended"]
    page = Checkpoints(parts.database, parts.registry).page("alice", model, Page())
    assert [checkpoint.step for checkpoint in page.data] == [0, 1]
    assert page.data[1].metrics["loss/train"] == 0.5 and page.data[1].metrics["ratio/max"] != 0
    json.loads(page.model_dump_json())


def test_a_job_of_which_nothing_is_left_waits_again_in_its_place(parts) -> None:
    model = parts.make_model()
    first, second = parts.submit(model), parts.submit(model)
    job = parts.claim()
    parts.queue.begin(job, 0)
    assert parts.queue.settle(job, OUTCOME)
    recover(parts.queue, parts.registry, parts.settings)
    again = parts.claim()
    assert (job.id, again.id, again.attempts) == (first, first, 2)
    assert again.start_step is None and again.outcome is None
    assert parts.kinds(first) == ["training_started"]
    parts.queue.succeed(again, OUTCOME)
    assert parts.claim().id == second


def test_a_job_that_takes_its_workers_down_is_failed(parts) -> None:
    job_id = parts.submit(parts.make_model())
    for _ in range(2):
        parts.queue.begin(parts.claim(), 0)
        recover(parts.queue, parts.registry, parts.settings)
    job = parts.queue.get("alice", job_id)
    assert job.status == "failed" and "ended 2 times" in str(job.error_message)
    assert parts.kinds(job_id) == ["training_started", "training_failed"]
    assert not parts.queue.has_work()


def test_a_job_that_runs_for_too_long_is_failed_unless_it_is_saved(parts) -> None:
    model = parts.make_model()
    late, saved, left = (parts.submit(model) for _ in range(3))
    assert not parts.queue.condemn(-1.0)  # none of them runs
    for job in (parts.claim(), parts.claim()):
        parts.queue.begin(job, 0 if job.id == saved else 1)
    assert not parts.queue.condemn(60.0) and parts.queue.condemn(-1.0)  # now every time is too long
    parts.queue.begin(parts.claim(), 1)  # taken afterwards
    groups = wire.groups_from_wire(parts.queue.groups_body(saved).trajectory_groups)
    with fitrl.LocalTrainer(accelerator="cpu", devices=1, enable_model_summary=False) as trainer:
        trainer.fit_rl(fitrl.TrainableModel(model, "models", "tiny", root=parts.settings.state), groups)
    recover(parts.queue, parts.registry, parts.settings)
    jobs = [parts.queue.get("alice", job_id) for job_id in (late, saved, left)]
    assert [job.status for job in jobs] == ["failed", "succeeded", "queued"]
    assert "ran for longer than" in str(jobs[0].error_message) and jobs[1].error_message is None
    assert parts.kinds(late) == ["training_started", "training_failed"]


def test_the_key_of_a_job_is_kept_as_long_as_the_job(parts) -> None:
    """A client that was not answered comes back after months, and trains nothing again."""
    model = parts.make_model()
    text = job_body(model).encode()
    body = wire.CreateTrainingJob.model_validate_json(text)

    def submit() -> str:
        return parts.queue.submit("alice", body, text, Once.of("alice", "unanswered", text), 64)

    job = submit()
    other = wire.CreateModel(project="tests", name="other", base_model="tiny")
    once = Once.of("alice", "other")
    parts.registry.create("alice", other, once)
    with parts.database.transaction() as connection:
        connection.execute("UPDATE answers SET created = created - 365 * 24 * 3600")
    forget_old_answers(parts.database)
    assert submit() == job
    with pytest.raises(RefusedError, match="there is a model"):  # this key is forgotten, and still nothing is doubled
        parts.registry.create("alice", other, once)
    parts.queue.cancel("alice", job)
    assert submit() == job and not parts.queue.has_work()
    parts.registry.delete("alice", model, NEVER)
    forget_old_answers(parts.database)
    with pytest.raises(RefusedError, match="no model of this id"):
        submit()


def test_a_cancelled_job_is_not_taken_up_again(parts) -> None:
    job_id = parts.submit(parts.make_model())
    job = parts.claim()
    parts.queue.begin(job, 0)
    assert parts.queue.cancel("alice", job_id).status == "running"
    assert not parts.queue.settle(job, OUTCOME)
    recover(parts.queue, parts.registry, parts.settings)
    assert parts.queue.get("alice", job_id).status == "cancelled"


def test_a_job_that_is_cancelled_while_it_trains_leaves_no_trace(parts) -> None:
    model = parts.make_model()
    ids = [parts.submit(model) for _ in range(3)]
    orders = Orders(parts.database, "worker", is_first=True)
    with fitrl.LocalTrainer(accelerator="cpu", devices=1, enable_model_summary=False) as trainer:
        training = Training(trainer, parts.database, parts.registry, parts.queue, orders)
        for place, job_id in enumerate(ids):
            job = parts.claim()
            if place == 1:
                parts.queue.cancel("alice", job_id)  # it has begun, so it is asked when its step was taken
            training.train(job, training.read(job))
    assert [parts.queue.get("alice", job_id).status for job_id in ids] == ["succeeded", "cancelled", "succeeded"]
    assert [parts.queue.get("alice", job_id).step for job_id in ids] == [1, None, 2]
    assert parts.kinds(ids[1]) == ["training_started", "training_cancelled"]
    with fitrl.LocalTrainer(accelerator="cpu", devices=1, enable_model_summary=False) as trainer:
        twin = fitrl.TrainableModel("twin", "tests", "tiny", root=parts.settings.state / "twin")
        for _ in range(2):
            trainer.fit_rl(twin, [group([0, 1, 0, 1])], learning_rate=1e-3)
    for folder in (parts.settings.state / "models" / model, twin.run_dir):
        assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["0001", "0002"]
    weights, expected = (
        load_file(folder / "checkpoints" / "0002" / "adapter_model.safetensors")
        for folder in (parts.settings.state / "models" / model, twin.run_dir)
    )
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-6, atol=1e-8)


def test_the_open_model_goes_first_for_as_long_as_the_oldest_has_patience(parts) -> None:
    one, two = parts.make_model("one"), parts.make_model("two")
    jobs = [parts.submit(model) for model in (one, two, one, two)]
    order = []
    for open_model, patience in ((None, 30.0), (one, 30.0), (one, 30.0), (one, 0.0)):
        job = parts.queue.claim(open_model, patience)
        order.append(jobs.index(job.id))
        parts.queue.succeed(job, Outcome(step=0, num_optimizer_steps=0, dropped={}, metrics={}))
    assert order == [0, 2, 1, 3]


def test_payloads_go_with_their_jobs(parts) -> None:
    model = parts.make_model()
    for _ in range(3):
        parts.submit(model)
    parts.queue.succeed(parts.claim(), OUTCOME)
    parts.queue.fail(parts.claim(), "no")
    parts.queue.cancel("alice", parts.claim().id)
    assert parts.database.row("SELECT count(*) AS n FROM payloads")["n"] == 1


def test_leftovers_of_deleted_models_and_steps_are_cleared(parts) -> None:
    model = parts.make_model()
    stray = parts.settings.state / "models" / "model-gone"
    stray.mkdir(parents=True)
    (parts.settings.state / "models" / model).mkdir()
    Checkpoints(parts.database, parts.registry).tidy()
    assert not stray.exists() and (parts.settings.state / "models" / model).exists()
