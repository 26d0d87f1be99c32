"""Trajectories on disk: what is logged in either format comes back as it was."""

import importlib.util
import math
import random

import pytest
import torch

import fitrl
from fitrl.errors import DataError, InvalidArgumentError, MissingDependencyError
from fitrl.policy import trajectories as files
from helpers import completion, facts, group, token_history, token_trajectory, trajectory, user
from samples import make_groups

FORMATS = ("jsonl", "parquet")


@pytest.fixture(params=FORMATS)
def model(request, tmp_path) -> fitrl.TrainableModel:
    return fitrl.TrainableModel("run", "project", "tiny", root=tmp_path, trajectory_format=request.param)


def every_kind() -> list[fitrl.TrajectoryGroup]:
    failed = fitrl.ExceptionRecord.from_exception(TimeoutError("too slow"))
    whole = trajectory(
        "é\n\x00",
        reward=-math.inf,
        metrics={"turns": 2},
        metadata={"deep": [1, {"a": None}]},
        logs=["said"],
        exceptions=[failed],
        additional_histories=[fitrl.History(messages_and_choices=[user("aside"), completion("ok")])],
        tools=[{"type": "function", "function": {"name": "f"}}],
    )
    tokens = token_trajectory(token_history([1, 2, 3], [0, 1, 1], logprobs=[0.0, -0.125, -2.5], temperature=0.7))
    return [
        fitrl.TrajectoryGroup([whole, tokens], metadata={"task": "é\n1"}, metrics={"seconds": 1.5}, logs=["of group"]),
        fitrl.TrajectoryGroup([], exceptions=[failed]),  # all of it failed
        fitrl.TrajectoryGroup([fitrl.Trajectory(reward=math.nan)]),
        group([0.0, 1.0]),
        fitrl.TrajectoryGroup(),
    ]


def test_every_kind_comes_back(model) -> None:
    groups = every_kind()
    model.log(groups, step=7)
    assert [facts(g) for g in model.trajectories(step=7)] == [facts(g) for g in groups]


def test_random_ones_come_back_exactly(model) -> None:
    groups = make_groups(seed=random.Random(0).getrandbits(20), num_groups=5)
    model.log(groups, step=1)
    for ours, theirs in zip(groups, model.trajectories(), strict=True):
        for one, two in zip(ours, theirs, strict=True):
            a, b = one.token_histories[0], two.token_histories[0]
            assert torch.equal(a.logprobs[a.mask], b.logprobs[b.mask]) and torch.equal(a.token_ids, b.token_ids)


def test_the_newest_step_and_the_splits(model) -> None:
    for step in (2, 10, 9):
        model.log([group([float(step)])], step=step)
    model.log([group([0.5])], split="val", step=4)
    assert model.trajectory_steps() == [2, 9, 10] and model.trajectory_steps(split="val") == [4]
    assert model.trajectories()[0].rewards == [10.0] and model.trajectories(step=9)[0].rewards == [9.0]
    assert model.trajectories(split="val")[0].rewards == [0.5]
    with pytest.raises(DataError, match="no trajectories of step 3 .* holds 3 steps from 2 to 10"):
        model.trajectories(step=3)
    with pytest.raises(DataError, match="which holds nothing"):
        model.trajectories(split="test")


def test_a_step_that_is_logged_again_is_added_to(model) -> None:
    for reward in range(12):
        model.log([group([float(reward)])], step=1)
    assert [g.rewards for g in model.trajectories(step=1)] == [[float(reward)] for reward in range(12)]
    assert model.trajectory_steps() == [1]


def test_the_format_may_change_on_the_way(tmp_path) -> None:
    for step, trajectory_format in enumerate(FORMATS):
        one = fitrl.TrainableModel("run", "project", "tiny", root=tmp_path, trajectory_format=trajectory_format)
        one.log([group([float(step)])], step=step)
    assert [one.trajectories(step=step)[0].rewards for step in one.trajectory_steps()] == [[0.0], [1.0]]


def test_nothing_is_left_of_a_log_that_fails(model) -> None:
    broken = group([1.0])
    broken.metadata["odd"] = object()
    with pytest.raises(DataError, match="JSON cannot hold"):
        model.log([group([0.0]), broken], metrics={"a": 1.0})
    assert not list(model.root.rglob("*"))


def test_parquet_can_be_queried_by_others(tmp_path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    model = fitrl.TrainableModel("run", "project", "tiny", root=tmp_path, trajectory_format="parquet")
    model.log([group([0.0, 1.0]), group([0.5])], step=3)
    table = parquet.read_table(tmp_path / "project" / "run" / "trajectories" / "train" / "0003.parquet")
    assert table["reward"].to_pylist() == [0.0, 1.0, 0.5] and table["step"].to_pylist() == [3, 3, 3]
    assert table["group"].to_pylist() == [0, 0, 1] and table["index"].to_pylist() == [0, 1, 0]
    assert table["completion"].to_pylist() == ["0", "1", "0"]
    assert table["prompt"].to_pylist()[0] == '[{"role": "user", "content": "3+4="}]'
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_line_that_a_crash_has_cut_is_skipped_and_named(tmp_path, caplog) -> None:
    model = fitrl.TrainableModel("run", "project", "tiny", root=tmp_path)
    model.log([group([0.0]), group([1.0])], step=1)
    path = model.run_dir / "trajectories" / "train" / "0001.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    model.log([group([2.0])], step=1)
    assert [g.rewards for g in model.trajectories(step=1)] == [[0.0], [2.0]]
    assert "line 2 of" in caplog.text and "0001.jsonl is cut" in caplog.text


def test_files_of_something_else(tmp_path) -> None:
    model = fitrl.TrainableModel("run", "project", "tiny", root=tmp_path)
    folder = model.run_dir / "trajectories" / "train"
    folder.mkdir(parents=True)
    (folder / "0001.jsonl").write_text('{"a": 1}\n')
    (folder / "0002.parquet").write_bytes(b"PAR1 not really")
    (folder / "notes.txt").write_text("mine")
    (folder / ".0003.parquet-x.tmp").write_text("")
    assert model.trajectory_steps() == [1, 2]
    with pytest.raises(DataError, match="0001.jsonl holds something else"):
        model.trajectories(step=1)
    with pytest.raises(DataError, match="0002.parquet cannot be read"):
        model.trajectories(step=2)


def test_formats_that_cannot_be_written(tmp_path, monkeypatch) -> None:
    with pytest.raises(InvalidArgumentError, match="must be 'jsonl' or 'parquet', got 'csv'"):
        fitrl.TrainableModel("run", "project", "tiny", root=tmp_path, trajectory_format="csv")
    written = fitrl.TrainableModel("run", "project", "tiny", root=tmp_path, trajectory_format="parquet")
    written.log([group([1.0])], step=1)
    real = importlib.util.find_spec
    monkeypatch.setattr(files.importlib.util, "find_spec", lambda name: None if name == "pyarrow" else real(name))
    for attempt in (
        lambda: fitrl.TrainableModel("run", "project", "tiny", root=tmp_path, trajectory_format="parquet"),
        lambda: fitrl.TrainableModel("run", "project", "tiny", root=tmp_path).trajectories(),
    ):
        with pytest.raises(MissingDependencyError, match=r"pip install 'fitrl\[parquet\]'"):
            attempt()
