"""`TrainableModel`: names, the run folder, and what `log` keeps."""

import json
import math

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import fitrl
from fitrl.data.completion import Completion
from fitrl.errors import InvalidArgumentError
from fitrl.policy.checkpoints import Manifest, write
from helpers import facts, token_history, token_trajectory, trajectory
from samples import make_groups


@pytest.fixture
def model(tmp_path) -> fitrl.TrainableModel:
    return fitrl.TrainableModel("run", "project", "tiny", root=tmp_path)


def group(*rewards: float, **fields) -> fitrl.TrajectoryGroup:
    attempts = [trajectory(str(i), reward=r, metrics={"turns": i}) for i, r in enumerate(rewards)]
    return fitrl.TrajectoryGroup(attempts, **fields)


def read_groups(path) -> list[fitrl.TrajectoryGroup]:
    return [fitrl.TrajectoryGroup.from_json(line) for line in path.read_text().splitlines()]


# -- the spec ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["", ".", "..", "../up", "a/b", "a\\b", ".hidden", "a b", "-x", "é", "a\n", "/abs"])
def test_names_must_be_folder_names(wrong, tmp_path) -> None:
    with pytest.raises(InvalidArgumentError, match="name must be"):
        fitrl.TrainableModel(wrong, "project", "tiny", root=tmp_path)
    with pytest.raises(InvalidArgumentError, match="project must be"):
        fitrl.TrainableModel("name", wrong, "tiny", root=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("right", ["a", "0", "Run-1.2_b", "20260101-101500"])
def test_names_that_are(right, tmp_path) -> None:
    model = fitrl.TrainableModel(right, right, "tiny", root=tmp_path)
    assert model.run_dir == tmp_path / right / right


def test_a_spec_writes_nothing(model, tmp_path) -> None:
    assert model.run_dir == tmp_path / "project" / "run"
    assert model.checkpoints_dir == tmp_path / "project" / "run" / "checkpoints"
    assert model.history() == [] and model.checkpoints() == [] and model.step == 0
    assert "'run'" in repr(model) and "'tiny'" in repr(model)
    with pytest.raises(InvalidArgumentError):
        model.log([group(1.0)], split="../x")
    assert not list(tmp_path.iterdir())
    with pytest.raises(InvalidArgumentError, match="base_model must not be empty"):
        fitrl.TrainableModel("run", "project", "")


def test_where_runs_live(model, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    default = fitrl.TrainableModel("run", "project", "tiny")
    assert default.root == tmp_path / ".fitrl" and not default.root.exists()
    assert fitrl.TrainableModel("run", "project", "tiny", root=".").key == model.key
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # a run does not move with the working directory
    assert default.root == tmp_path / ".fitrl"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fitrl.TrainableModel("run", "project", "tiny", root="~/runs").root == tmp_path / "runs"
    assert {
        fitrl.TrainableModel(*names, "tiny", root=tmp_path).key == model.key
        for names in (("run", "other"), ("other", "project"))
    } == {False}


def test_newest_checkpoint_gives_the_step_and_half_written_ones_are_named(model, tmp_path, caplog) -> None:
    for step in (10, 2):
        manifest = Manifest(step=step, base_model="tiny", adapter=True, weights_only=True)
        write(model.checkpoints_dir / f"{step:04d}", manifest, lambda folder: None, None)
    for name, content in (("0011", "{"), ("0012", '{"step": 12}')):
        (model.checkpoints_dir / name).mkdir()
        (model.checkpoints_dir / name / "fitrl.json").write_text(content)
    (model.checkpoints_dir / "0013").mkdir()
    (model.checkpoints_dir / ".0014-x.tmp").mkdir()
    (model.checkpoints_dir / "notes.txt").write_text("mine")
    again = fitrl.TrainableModel("run", "project", "tiny", root=tmp_path)
    assert again.step == 10 and [path.name for path in again.checkpoints()] == ["0002", "0010"]
    for half in ("0011", "0012", "0013"):
        assert f"{half} is no whole checkpoint" in caplog.text
    assert ".0014" not in caplog.text and "notes" not in caplog.text


def test_a_trained_run_is_resumed_by_name(tmp_path, model) -> None:
    with fitrl.LocalTrainer(accelerator="cpu", devices=1, enable_model_summary=False) as trainer:
        trainer.fit_rl(model, make_groups(seed=3))
        trainer.fit_rl(model, make_groups(seed=3), save_checkpoint=False)
    assert model.step == 2
    assert fitrl.TrainableModel("run", "project", "tiny", root=tmp_path).step == 1  # what was saved
    assert fitrl.TrainableModel("other", "project", "tiny", root=tmp_path).step == 0


# -- log --------------------------------------------------------------------------------------------------------------


def test_log_keeps_trajectories_with_their_logprobs(model) -> None:
    tokens = token_history([1, 2, 3, 4], [0, 1, 0, 1], logprobs=[0.0, -0.125, 0.0, -2.5], temperature=0.7)
    groups = [
        group(0.0, 1.0),
        fitrl.TrajectoryGroup(
            [token_trajectory(tokens, reward=0.5), token_trajectory(tokens, reward=0.5)], metadata={"task": "é\n1"}
        ),
    ]
    logged = model.log(groups, metrics={"loss/train": 0.25}, step=3)
    assert logged["reward/mean"] == 0.5 and logged["trajectory/turns"] == 0.5 and logged["loss/train"] == 0.25
    restored = read_groups(model.run_dir / "trajectories" / "train" / "0003.jsonl")
    assert [facts(g) for g in restored] == [facts(g) for g in groups]
    said = restored[0].trajectories[0].completions()[0]
    assert isinstance(said, Completion) and said.logprobs == groups[0].trajectories[0].completions()[0].logprobs
    kept = restored[1].trajectories[0].token_histories[0]
    assert (
        torch.equal(kept.logprobs[kept.mask], torch.tensor([-0.125, -2.5]))
        and kept.temperature[1] == tokens.temperature[1]
    )
    [line] = model.history()
    assert (line["step"], line["split"], line["metrics"]) == (3, "train", logged)
    assert line["time"] > 1.7e9


def test_what_was_logged_can_be_trained_on_again(model, tmp_path) -> None:
    groups = make_groups(seed=3)
    model.log(groups, step=1)
    restored = read_groups(model.run_dir / "trajectories" / "train" / "0001.jsonl")
    norms = []
    for name, taught in (("a", groups), ("b", restored)):
        other = fitrl.TrainableModel(name, "project", "tiny", lora=None, root=tmp_path)
        with fitrl.LocalTrainer(accelerator="cpu", devices=1, enable_model_summary=False) as trainer:
            norms.append(trainer.fit_rl(other, taught, save_checkpoint=False).metrics["loss/grad_norm"])
    assert norms[0] == norms[1] > 0


def test_every_log_adds_to_what_is_there(model, tmp_path) -> None:
    model.log([group(0.0)], step=1)
    again = fitrl.TrainableModel("run", "project", "tiny", root=tmp_path)
    again.log([group(1.0)], step=1)
    again.log(metrics={"a": 2.0}, step=2)
    assert [g.rewards for g in read_groups(model.run_dir / "trajectories" / "train" / "0001.jsonl")] == [[0.0], [1.0]]
    assert [line["step"] for line in model.history()] == [1, 1, 2]
    assert not (model.run_dir / "trajectories" / "train" / "0002.jsonl").exists()  # no groups, no file


def test_averages_are_over_trajectories(model) -> None:
    groups = [group(1.0, metrics={"seconds": 4.0}), group(0.0, 0.0, 0.0, metrics={"seconds": 2.0}), group()]
    logged = model.log(iter(groups))  # any iterable
    assert logged["reward/mean"] == 0.25 and logged["trajectory/turns"] == 0.75
    assert logged["group/seconds"] == 3.0 and logged["data/num_exceptions"] == 0.0
    assert read_groups(model.run_dir / "trajectories" / "train" / "0000.jsonl")[2].rewards == []


def test_exceptions_are_counted_and_kept(model) -> None:
    record = fitrl.ExceptionRecord.from_exception(TimeoutError("too slow"))
    logged = model.log([group(1.0, exceptions=[record]), group(0.0)])
    assert logged["data/num_exceptions"] == 1.0
    [kept] = read_groups(model.run_dir / "trajectories" / "train" / "0000.jsonl")[0].exceptions
    assert kept == record


def test_metrics_given_win_and_splits_are_prefixed(model) -> None:
    assert model.log([group(1.0, 1.0)], metrics={"reward/mean": 0.1})["reward/mean"] == 0.1
    logged = model.log([group(1.0)], split="val", metrics={"mine": 3.0})
    assert logged["val/reward/mean"] == 1.0 and logged["val/mine"] == 3.0
    assert all(key.startswith("val/") for key in logged)
    assert (model.run_dir / "trajectories" / "val" / "0000.jsonl").is_file()
    assert [line["split"] for line in model.history()] == ["train", "val"]
    for wrong in ("../x", "", "a/b", ".x"):
        with pytest.raises(InvalidArgumentError, match="split must be"):
            model.log([group(1.0)], split=wrong)
    assert len(model.history()) == 2


def test_step_defaults_to_what_a_trainer_reported(model) -> None:
    model.step = 12
    model.log(metrics={"a": 1.0})
    model.log(metrics={"a": 1.0}, step=0)  # 0 is a step too
    assert [line["step"] for line in model.history()] == [12, 0]
    assert not (model.run_dir / "trajectories").exists()


def test_numbers_of_any_kind_become_floats(model) -> None:
    metrics = {"loss": torch.tensor(0.5), "numpy": np.float32(0.25), "count": 3, "nothing": math.nan}
    logged = model.log([group(1.0)], metrics=metrics)
    [line] = model.history()
    for numbers in (logged, line["metrics"]):
        assert type(numbers["loss"]) is type(numbers["numpy"]) is float
        assert (numbers["loss"], numbers["numpy"], numbers["count"]) == (0.5, 0.25, 3)
        assert math.isnan(numbers["nothing"])


def test_a_log_that_fails_leaves_nothing_half_done(model) -> None:
    broken = group(1.0)
    broken.metadata["odd"] = object()
    with pytest.raises(fitrl.FitRLError):
        model.log([group(0.0), broken], metrics={"a": 1.0})
    assert not list(model.run_dir.rglob("*.jsonl"))


def test_loggers_are_told(tmp_path) -> None:
    table, board = CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "board")
    model = fitrl.TrainableModel("run", "project", "tiny", root=tmp_path / "runs", loggers=[table, board])
    assert not list(tmp_path.iterdir())
    model.log([group(0.0, 1.0)], step=1)
    model.log([group(1.0)], split="val", metrics={"loss/train": 0.25}, step=4)
    for logger in (table, board):
        logger.save()
        logger.finalize("success")
    header, *rows = next((tmp_path / "csv").rglob("metrics.csv")).read_text().splitlines()
    first, second = (dict(zip(header.split(","), row.split(","), strict=True)) for row in rows)
    assert (first["step"], first["reward/mean"], first["val/reward/mean"]) == ("1", "0.5", "")
    assert (second["step"], second["reward/mean"], second["val/loss/train"]) == ("4", "", "0.25")
    seen = EventAccumulator(board.log_dir)
    seen.Reload()
    assert {"reward/mean", "val/reward/mean", "val/loss/train"} <= set(seen.Tags()["scalars"])
    assert [(event.step, event.value) for event in seen.Scalars("val/loss/train")] == [(4, 0.25)]
    assert [(event.step, event.value) for event in seen.Scalars("reward/mean")] == [(1, 0.5)]


def test_history_is_readable_by_others(model) -> None:
    model.log([group(1.0)], metrics={"é": 1.0})
    [line] = (model.run_dir / "history.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["metrics"]["é"] == 1.0


def test_numbers_that_json_lacks_are_standard_json_and_come_back(model) -> None:
    model.log(metrics={"a": math.nan, "b": -math.inf})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    [line] = (model.run_dir / "history.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=refuse)["metrics"] == {"a": "NaN", "b": "-Infinity"}
    [entry] = model.history()
    assert math.isnan(entry["metrics"]["a"]) and entry["metrics"]["b"] == -math.inf
