"""`fitrl show RUN` and `fitrl plot RUN`: what a run holds, for a person to read."""

import math
import os
from pathlib import Path

import pytest

import fitrl
from fitrl.cli.plot import read_series
from fitrl_command import main
from helpers import completion, group, token_history, token_trajectory, trajectory, user


@pytest.fixture(params=["jsonl", "parquet"])
def model(request, tmp_path) -> fitrl.TrainableModel:
    """A run of three steps, in either format."""
    model = fitrl.TrainableModel("run", "project", "tiny", root=tmp_path, trajectory_format=request.param)
    for step in (1, 2, 3):
        groups = [
            fitrl.TrajectoryGroup(
                [trajectory(f"said {step}-{i}", reward=i + 10 * (step == 2), prompt=f"ask {step}") for i in range(3)]
            )
        ]
        model.log(groups, metrics={"loss/train": step / 2}, step=step)
    return model


def run(capsys, *arguments: str) -> str:
    assert main([*arguments]) == 0
    return capsys.readouterr().out


# -- show -------------------------------------------------------------------------------------------------------------


def test_best_worst_and_newest(model, capsys) -> None:
    told = run(capsys, "show", str(model.run_dir))
    best, worst, newest = told.split("╭")[1:]
    assert "best: reward 12, step 2, group 0, attempt 2" in best and "said 2-2" in best and "ask 2" in best
    assert "worst: reward 0, step 1, group 0, attempt 0" in worst and "said 1-0" in worst
    assert "newest: reward 2, step 3, group 0, attempt 2" in newest and "said 3-2" in newest
    assert "user" in best and "assistant (sampled)" in best


def test_how_many_and_of_which_step(model, capsys) -> None:
    told = run(capsys, "show", "project/run", "--root", str(model.root), "--best", "4", "--worst", "0", "--newest", "0")
    rewards = [line.split("reward ")[1].split(",")[0] for line in told.splitlines() if "best:" in line]
    assert rewards == ["12", "11", "10", "2"] and "worst" not in told and "newest" not in told
    told = run(capsys, "show", str(model.run_dir), "--step", "1", "--newest", "2")
    assert told.count("newest:") == 2 and "step 1" in told and "step 2" not in told and "step 3" not in told


def test_splits(model, capsys) -> None:
    model.log([group([0.5])], split="val", step=9)
    assert "best: reward 0.5, step 9" in run(capsys, "show", str(model.run_dir), "--split", "val")
    assert main(["show", str(model.run_dir), "--split", "test"]) == 1
    assert "no trajectories of split 'test'; it has: train, val" in capsys.readouterr().err


def test_what_a_policy_says_does_not_steer_the_terminal(tmp_path, capsys) -> None:
    model = fitrl.TrainableModel("run", "project", "tiny", root=tmp_path)
    nasty = "\x1b[2J\x07 [red]not markup[/red] \x9b1m \r over"
    failed = fitrl.ExceptionRecord(type="Error", message="\x1b[31m", traceback="")
    model.log([fitrl.TrajectoryGroup([trajectory(nasty, reward=1.0, exceptions=[failed])])], step=1)
    told = run(capsys, "show", str(model.run_dir))
    assert not set(told) & {"\x1b", "\x07", "\x9b", "\r"}
    assert "\\x1b[2J\\x07 [red]not markup[/red] \\x9b1m \\x0d over" in told and "survived Error: \\x1b[31m" in told


def test_every_kind_of_trajectory_is_shown(tmp_path, capsys) -> None:
    model = fitrl.TrainableModel("run", "project", "tiny", root=tmp_path)
    call = {"function": {"name": "add", "arguments": '{"a": 1}'}}
    tools = fitrl.Trajectory(
        messages_and_choices=[user("sum"), {"role": "assistant", "content": None, "tool_calls": [call]}],
        additional_histories=[fitrl.History(messages_and_choices=[user("aside"), completion("ok")])],
        reward=2.0,
    )
    tokens = token_trajectory(token_history([1, 2, 3], [0, 1, 1]), reward=1.0)
    unrated = trajectory("?", reward=math.nan)
    model.log([fitrl.TrajectoryGroup([tools, tokens, unrated])], step=1)
    told = run(capsys, "show", str(model.run_dir), "--best", "9", "--worst", "0")
    for text in ('calls add({"a": 1})', "aside", "ok", "3 token ids, 2 of them sampled"):
        assert text in told
    assert told.count("best:") == 2 and "newest: reward nan" in told  # a reward that is no number is neither


def test_a_run_without_trajectories(tmp_path, capsys) -> None:
    model = fitrl.TrainableModel("run", "project", "tiny", root=tmp_path)
    model.log(metrics={"a": 1.0}, step=1)
    assert main(["show", str(model.run_dir)]) == 1
    assert "has no trajectories of split 'train'; it has: none at all" in capsys.readouterr().err
    model.log([group([1.0])], step=1)
    assert main(["show", str(model.run_dir), "--step", "7"]) == 1
    assert "no trajectories of step 7" in capsys.readouterr().err


# -- which run --------------------------------------------------------------------------------------------------------


def test_no_such_run_names_those_that_are_there(model, capsys, monkeypatch) -> None:
    (model.root / "project" / "empty").mkdir()
    for command in ("show", "plot"):
        assert main([command, "project/other", "--root", str(model.root)]) == 1
        told = capsys.readouterr().err
        assert told.startswith("fitrl: 'project/other' is neither") and told.endswith("there: project/run\n")
        assert main([command, "project/empty", "--root", str(model.root)]) == 1
        assert "is neither" in capsys.readouterr().err
    monkeypatch.chdir(model.root)
    assert main(["plot", "project/run/"]) == 0  # a folder, relative
    assert main(["plot", "x", "--root", str(model.root / "nothing")]) == 1
    assert capsys.readouterr().err.endswith("there is none\n")


# -- plot -------------------------------------------------------------------------------------------------------------


def test_the_reward_curve_is_drawn_beside_the_run(model, capsys) -> None:
    path = Path(run(capsys, "plot", str(model.run_dir)).strip())
    assert path == model.run_dir / "reward.png" and path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 5000


def test_any_metrics_anywhere(model, capsys, tmp_path) -> None:
    one = Path(run(capsys, "plot", str(model.run_dir), "--metric", "loss/train").strip())
    assert one == model.run_dir / "loss-train.png"
    several = ["--metric", "loss/train", "--metric", "reward/mean"]
    both = Path(run(capsys, "plot", str(model.run_dir), *several).strip())
    assert both == model.run_dir / "metrics.png"
    elsewhere = tmp_path / "new" / "x.png"
    assert run(capsys, "plot", str(model.run_dir), *several, "--output", str(elsewhere)) == f"{elsewhere}\n"
    assert elsewhere.read_bytes() == both.read_bytes() != one.read_bytes()


def test_an_unknown_metric_names_those_that_are_there(model, capsys) -> None:
    assert main(["plot", str(model.run_dir), "--metric", "loss/trian"]) == 1
    told = capsys.readouterr().err
    assert "logged no loss/trian; it has: data/num_exceptions, loss/train, reward/mean" in told
    assert not list(model.run_dir.glob("*.png"))


def test_the_newest_value_of_a_step_counts(model) -> None:
    model.log(metrics={"loss/train": 7.0}, step=2)
    assert read_series(model.run_dir, ["loss/train"]) == {"loss/train": {1: 0.5, 2: 7.0, 3: 1.5}}


def test_a_history_that_was_cut_by_a_crash_is_drawn_without_its_end(model, caplog) -> None:
    path = model.run_dir / "history.jsonl"
    os.truncate(path, path.stat().st_size - 9)
    assert list(read_series(model.run_dir, ["loss/train"])["loss/train"]) == [1, 2]
    assert "line 3 of" in caplog.text
    model.log(metrics={"loss/train": 9.0}, step=4)  # what follows is not glued to it
    assert [line["step"] for line in model.history()] == [1, 2, 4]
