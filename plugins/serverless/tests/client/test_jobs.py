"""A job on disk and at the service: submitted once, followed page by page, given up and taken up again."""

from __future__ import annotations

import gzip
import json
import math
import time
from collections import deque

import pytest

import fitrl
from fitrl.errors import CheckpointError
from fitrl_serverless import wire
from fitrl_serverless.calls import Call
from fitrl_serverless.client import (
    Connection,
    InvalidRequestError,
    JobCancelledError,
    JobFailedError,
    MalformedAnswerError,
    NotFoundError,
    Service,
    ServiceTimeoutError,
    UnreachableError,
)
from fitrl_serverless.client.jobs import JobOutcome
from fitrl_serverless.client.pending import PendingJob
from fitrl_serverless.run import Run
from helpers import group


def call(**arguments) -> Call:
    return Call(
        groups=wire.groups_to_wire([group([0.0, 1.0])]),
        config=wire.ExperimentalConfig(learning_rate=1e-3, **arguments),
        metrics={"reward/mean": 0.5, "odd": math.nan},
        dropped={"empty_groups": 1, "flat_groups": 2},
        num_empty=1,
        teaches=True,
    )


@pytest.fixture
def model(tmp_path) -> fitrl.TrainableModel:
    return fitrl.TrainableModel("policy", "jobs", "tiny", root=tmp_path)


@pytest.fixture
def open_run(foreign, model, key):
    """Open the model's run as a new process would."""
    opened = []

    def open_one(total_timeout_s: float = 60.0, **options) -> Run:
        service = Service(Connection(options.pop("url", foreign.url), key, **options))
        opened.append(service.connection)
        run = Run(service, model, None, total_timeout_s)
        opened.append(run)
        return run

    yield open_one
    for one in reversed(opened):
        one.close()


def never() -> bool:
    return False


def train(run: Run, what: Call | None, tell=lambda metrics: None, stops=never) -> JobOutcome:
    return run.train(what, 2e-3, tell=tell, stops=stops)


def left(model) -> list[str]:
    return sorted(path.name.split("-")[0] for path in model.run_dir.iterdir() if path.name.startswith("job"))


def test_what_is_sent_and_what_is_left(foreign, open_run, model) -> None:
    run = open_run()
    outcome = train(run, call(ppo=True, epsilon=0.3))
    body = next(body for _, path, _, body in foreign.seen if path == "/preview/training-jobs")
    assert body["experimental_config"] == {"ppo": True, "epsilon": 0.3, "learning_rate": 2e-3}
    assert wire.groups_from_wire([wire.Group.model_validate(g) for g in body["trajectory_groups"]])[0].rewards == [0, 1]
    assert (outcome.step, outcome.num_optimizer_steps) == (1, 1)
    assert outcome.dropped == {"empty_groups": 1, "flat_groups": 2}  # the service does not say, so the client does
    assert {"loss/train": 0.5, "loss/grad_norm": 2.0, "reward/mean": 0.5}.items() <= outcome.metrics.items()
    assert "note" not in outcome.metrics and left(model) == []


@pytest.mark.parametrize("page", [1, 2, 100])
def test_events_come_by_pages_and_are_told_once_each(foreign, open_run, page) -> None:
    foreign.page = page
    steps = [{"type": "gradient_step", "data": {"a": number, "b/max": number, "c": "NaN"}} for number in range(5)]
    foreign.script = [{"type": "training_started", "data": {}}, *steps, {"type": "training_ended", "data": {}}]
    told: list[dict[str, float]] = []
    outcome = train(open_run(), call(), told.append)
    assert [metrics["a"] for metrics in told] == [0, 1, 2, 3, 4] and outcome.num_optimizer_steps == 5
    assert outcome.metrics["a"] == 2.0 and outcome.metrics["b/max"] == 4.0 and math.isnan(outcome.metrics["c"])


def test_events_that_are_still_to_come(foreign, open_run) -> None:
    foreign.script = [{"type": "training_started", "data": {}}]
    told: list[dict[str, float]] = []

    def tell(metrics) -> None:
        told.append(metrics)
        foreign.jobs["job-0"]["events"].append({"id": "e2", "type": "training_ended", "data": {"step": 7}})

    def looks() -> bool:
        events = foreign.jobs["job-0"]["events"]
        if len(events) == 1:
            events.append({"id": "e1", "type": "gradient_step", "data": {"a": 1.0}})
        return False

    assert train(open_run(), call(), tell, looks).step == 7 and told == [{"a": 1.0}]


def test_a_job_that_fails(foreign, open_run, model) -> None:
    foreign.script = [{"type": "training_failed", "data": {"error_message": "out of luck"}}]
    run = open_run()
    with pytest.raises(JobFailedError, match="out of luck"):
        train(run, call())
    assert left(model) == [] and run.pending is None
    foreign.script = None
    assert train(run, call()).step == 1


@pytest.mark.parametrize(
    ("status", "outcome"), [("FAILED", JobFailedError), ("cancelled", JobCancelledError), ("succeeded", None)]
)
def test_an_end_without_its_event(foreign, open_run, model, status, outcome) -> None:
    foreign.script = []
    run = open_run()

    def ends() -> bool:
        foreign.jobs["job-0"]["status"] = status
        return False

    if outcome is None:
        assert train(run, call(), stops=ends).num_optimizer_steps == 0
    else:
        with pytest.raises(outcome):
            train(run, call(), stops=ends)
    assert left(model) == []


@pytest.mark.parametrize("data", [{"step": "seven"}, {"step": -1}, {"num_optimizer_steps": True}, {"dropped": 3}])
def test_an_end_that_says_something_else(foreign, open_run, data) -> None:
    foreign.script = [{"type": "training_ended", "data": data}]
    with pytest.raises(MalformedAnswerError, match="training_ended"):
        train(open_run(), call())


def test_a_job_that_takes_too_long_is_taken_up_later(foreign, open_run, model) -> None:
    foreign.script = [{"type": "training_started", "data": {}}]
    run = open_run(total_timeout_s=0.3)
    start = time.monotonic()
    with pytest.raises(ServiceTimeoutError, match=r"job job-0 did not end within 0.3 s; it goes on"):
        train(run, call())
    assert time.monotonic() - start < 10 and left(model) == ["job", "job.json"]
    run.close()
    foreign.jobs["job-0"]["events"].append({"id": "e1", "type": "training_ended", "data": {"step": 3}})
    again = open_run()
    assert again.is_pending(call()) and not again.is_pending(call(ppo=True))
    outcome = train(again, None)
    assert outcome.step == 3 and outcome.metrics["reward/mean"] == 0.5 and math.isnan(outcome.metrics["odd"])
    assert len(foreign.jobs) == 1 and left(model) == []


@pytest.mark.parametrize("fault", ["drop", "drop-after"])
def test_a_submission_without_an_answer_is_repeated_by_the_next_process(foreign, open_run, model, fault) -> None:
    run = open_run(retry_timeout_s=0.01)
    foreign.faults["/training-jobs"] = deque([fault])
    with pytest.raises(UnreachableError):
        train(run, call())
    assert left(model) == ["job", "job.json"] and len(foreign.jobs) == (fault == "drop-after")
    run.close()
    assert train(open_run(), None).step == 1
    assert len(foreign.jobs) == 1 and left(model) == []


def test_a_refused_submission_leaves_nothing(foreign, open_run, model) -> None:
    foreign.faults["/training-jobs"] = deque([422, 404])
    run = open_run()
    for error in (InvalidRequestError, NotFoundError):
        with pytest.raises(error, match="scripted 4"):
            train(run, call())
    assert left(model) == [] and run.pending is None and not foreign.jobs


def test_a_job_that_the_service_lost_is_kept_until_it_is_dropped(foreign, open_run, model) -> None:
    foreign.script = [{"type": "training_started", "data": {}}]
    run = open_run(total_timeout_s=0.2)
    with pytest.raises(ServiceTimeoutError):
        train(run, call())
    foreign.jobs.clear()
    for _ in range(2):
        with pytest.raises(NotFoundError, match=r"does not know job job-0.*trainer.forget\(model\) drops it"):
            train(run, None)
    run.forget()
    assert left(model) == []
    foreign.script = None
    assert train(run, call()).num_optimizer_steps == 1


def test_cancelling(foreign, open_run, model, monkeypatch) -> None:
    foreign.script = [{"type": "training_started", "data": {}}]
    run = open_run()

    async def cancel(service, job_id: str) -> bool:
        foreign.jobs[job_id]["events"].append({"id": "e1", "type": "training_cancelled", "data": {}})
        return True

    monkeypatch.setattr(Service, "cancel", cancel)
    with pytest.raises(JobCancelledError, match="was cancelled"):
        train(run, call(), stops=lambda: True)
    assert left(model) == []


def test_a_service_that_cannot_cancel_keeps_the_job(foreign, open_run, model) -> None:
    foreign.script = [{"type": "training_started", "data": {}}]
    run = open_run()
    with pytest.raises(JobCancelledError, match="job-0 cannot be cancelled.*goes on there.*picked up"):
        train(run, call(), stops=lambda: True)
    assert left(model) == ["job", "job.json"] and run.pending is not None


def test_an_interrupted_wait_keeps_the_job(foreign, open_run, model) -> None:
    """What a second Ctrl-C does: the exception comes out of the wait itself."""
    foreign.script = [{"type": "training_started", "data": {}}]
    run = open_run()

    def interrupted() -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(run, call(), stops=interrupted)
    assert left(model) == ["job", "job.json"]


# -- the files --------------------------------------------------------------------------------------------------------


def create(model, **changes) -> PendingJob:
    made = call()
    model.run_dir.mkdir(parents=True, exist_ok=True)
    options = {"groups": made.groups, "config": made.config, "metrics": made.metrics, "dropped": made.dropped}
    return PendingJob.create(
        model.run_dir, url="https://h", model_id="m", learning_rate=1.0, num_empty=1, **(options | changes)
    )


def test_the_record_reads_back(model) -> None:
    job = create(model)
    assert PendingJob.load(model.run_dir) is None  # it is the run's job once it is saved
    job = create(model)
    job.save(model.run_dir)
    job.job_id = "j"
    job.save(model.run_dir)
    again = PendingJob.load(model.run_dir)
    assert again is not None and repr(again) == repr(job)
    body = wire.CreateTrainingJob.model_validate_json(gzip.decompress(job.body(model.run_dir).read_bytes()))
    assert body.model_id == "m" and body.experimental_config.learning_rate == 1.0
    again.discard(model.run_dir)
    again.discard(model.run_dir)
    assert left(model) == [] and PendingJob.load(model.run_dir) is None


def test_bodies_that_no_record_names_are_cleared_away(model) -> None:
    first, second = create(model), create(model)
    second.save(model.run_dir)
    assert PendingJob.load(model.run_dir) is not None
    assert not first.body(model.run_dir).exists() and second.body(model.run_dir).exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"url": 1}'])
def test_a_damaged_record_is_named(model, text) -> None:
    create(model).save(model.run_dir)
    (model.run_dir / "job.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"job\.json names a job.*delete the file once you know"):
        PendingJob.load(model.run_dir)


def test_a_run_folder_has_one_service(foreign, open_run, model) -> None:
    create(model).save(model.run_dir)
    with pytest.raises(RuntimeError, match="has a job at https://h, and this trainer talks to http://127"):
        open_run()
    assert json.loads((model.run_dir / "job.json").read_text())["url"] == "https://h"


def test_a_job_of_another_model_is_not_taken_up(open_run, model, foreign) -> None:
    create(model).save(model.run_dir)
    record = PendingJob.load(model.run_dir)
    record.url = foreign.url
    record.save(model.run_dir)
    with pytest.raises(RuntimeError, match="has a job of the model m, and this one is me-jobs-policy"):
        open_run()
    Run.forget_in(model)
    assert open_run().pending is None


def test_the_schedule_does_not_make_other_groups(model) -> None:
    changed = call(ppo=True)
    prints = {
        create(model).fingerprint,
        create(model, config=changed.config).fingerprint,
        create(model, groups=wire.groups_to_wire([group([1.0, 0.0])])).fingerprint,
    }
    assert len(prints) == 3
    assert create(model).fingerprint == create(model, metrics={}).fingerprint
