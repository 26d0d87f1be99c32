"""`TrainableModel`: names, the run folder, and what `log` keeps."""

import json

import pytest
from lightning.pytorch.loggers import CSVLogger

import fitrl
from fitrl.data.completion import Completion
from fitrl.errors import InvalidArgumentError
from helpers import trajectory


@pytest.fixture
def model(tmp_path) -> fitrl.TrainableModel:
    return fitrl.TrainableModel("run", "project", "tiny", root=tmp_path)


def group(*rewards: float) -> fitrl.TrajectoryGroup:
    return fitrl.TrajectoryGroup([trajectory(str(i), reward=r, metrics={"turns": i}) for i, r in enumerate(rewards)])


@pytest.mark.parametrize("wrong", ["", "../up", "a/b", ".hidden", "a b", "-x"])
def test_names_must_be_folder_names(wrong, tmp_path) -> None:
    with pytest.raises(InvalidArgumentError, match="name must be"):
        fitrl.TrainableModel(wrong, "project", "tiny", root=tmp_path)
    with pytest.raises(InvalidArgumentError, match="project must be"):
        fitrl.TrainableModel("name", wrong, "tiny", root=tmp_path)


def test_a_spec_writes_nothing(model, tmp_path, monkeypatch) -> None:
    assert model.run_dir == tmp_path / "project" / "run"
    assert not list(tmp_path.iterdir()) and model.history() == [] and model.checkpoints() == []
    monkeypatch.chdir(tmp_path)
    assert fitrl.TrainableModel("run", "project", "tiny").root == tmp_path / ".fitrl"
    with pytest.raises(InvalidArgumentError, match="base_model must not be empty"):
        fitrl.TrainableModel("run", "project", "")


def test_log_keeps_trajectories_with_their_logprobs(model) -> None:
    groups = [group(0.0, 1.0), group(0.5, 0.5)]
    logged = model.log(groups, metrics={"loss/train": 0.25}, step=3)
    assert logged["reward/mean"] == 0.5 and logged["trajectory/turns"] == 0.5 and logged["loss/train"] == 0.25
    lines = (model.run_dir / "trajectories" / "train" / "0003.jsonl").read_text().splitlines()
    restored = [fitrl.TrajectoryGroup.from_json(line) for line in lines]
    assert [g.to_dict() for g in restored] == [g.to_dict() for g in groups]
    said = restored[0].trajectories[0].completions()[0]
    assert isinstance(said, Completion) and said.logprobs == groups[0].trajectories[0].completions()[0].logprobs
    [line] = model.history()
    assert (line["step"], line["split"], line["metrics"]) == (3, "train", logged)


def test_metrics_given_win_and_splits_are_prefixed(model) -> None:
    assert model.log([group(1.0, 1.0)], metrics={"reward/mean": 0.1})["reward/mean"] == 0.1
    assert "val/reward/mean" in model.log([group(1.0)], split="val")
    assert (model.run_dir / "trajectories" / "val" / "0000.jsonl").is_file()
    with pytest.raises(InvalidArgumentError, match="split must be"):
        model.log([], split="../x")


def test_step_defaults_to_what_a_trainer_reported(model) -> None:
    model.step = 12
    model.log(metrics={"a": 1.0})
    assert model.history()[0]["step"] == 12 and not (model.run_dir / "trajectories").exists()


def test_loggers_are_told(tmp_path) -> None:
    table = CSVLogger(tmp_path / "csv")
    model = fitrl.TrainableModel("run", "project", "tiny", root=tmp_path, loggers=[table])
    model.log([group(0.0, 1.0)], step=1)
    table.save()
    header, row = next((tmp_path / "csv").rglob("metrics.csv")).read_text().splitlines()
    assert dict(zip(header.split(","), row.split(","), strict=True))["reward/mean"] == "0.5"


def test_newest_checkpoint_gives_the_step_and_half_written_ones_are_named(model, tmp_path, caplog_text) -> None:
    for name, manifest in (("0002", _manifest(2)), ("0010", _manifest(10)), ("0011", "{"), ("0012", '{"step": 12}')):
        folder = model.checkpoints_dir / name
        folder.mkdir(parents=True)
        (folder / "fitrl.json").write_text(manifest)
    (model.checkpoints_dir / "0013").mkdir()
    (model.checkpoints_dir / ".0014-x.tmp").mkdir()
    again = fitrl.TrainableModel("run", "project", "tiny", root=tmp_path)
    assert again.step == 10 and [path.name for path in again.checkpoints()] == ["0002", "0010"]
    assert "0011 is no whole checkpoint" in caplog_text() and "0013 is no whole checkpoint" in caplog_text()


def _manifest(step: int) -> str:
    return json.dumps({"step": step, "base_model": "tiny", "adapter": True, "weights_only": False})


@pytest.fixture
def caplog_text(caplog):
    return lambda: caplog.text
