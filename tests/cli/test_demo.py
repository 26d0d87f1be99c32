"""`fitrl demo`, as a user types it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import fitrl
from fitrl_command import main

COMMAND = [str(Path(sys.executable).parent / "fitrl")]
MODULE = [sys.executable, "-m", "fitrl"]


def run(command: list[str], *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, cwd=cwd)


def test_demo_prints_the_rise_and_where_things_lie(tmp_path) -> None:
    """Once as the command, told where to write and to be quiet, once as the module, in the working directory."""
    quiet = run(COMMAND, "demo", "--steps", "4", "--root", str(tmp_path / ".fitrl"), "--no-progress")
    shown = run(MODULE, "demo", "--steps", "3", cwd=tmp_path)
    runs = []
    for done, steps in ((quiet, 4), (shown, 3)):
        assert done.returncode == 0, done.stderr
        rise, *paths = done.stdout.splitlines()
        found = re.fullmatch(rf"reward (\d\.\d{{3}}) -> (\d\.\d{{3}}) in {steps} steps, \d+\.\d s", rise)
        assert found
        assert [line.split()[0] for line in paths] == ["curve", "trajectories", "checkpoint"]
        curve, trajectories, checkpoint = (Path(line.split()[-1]) for line in paths)
        assert curve.read_bytes().startswith(b"\x89PNG") and curve.stat().st_size > 5000
        files = sorted(trajectories.glob("*.jsonl"))
        assert [int(file.stem) for file in files] == list(range(1, steps + 1))
        group = fitrl.TrajectoryGroup.from_json(files[0].read_text().splitlines()[0])
        assert len(group) == 8 and all(completion.logprobs for t in group for completion in t.completions())
        assert checkpoint.name == f"{steps:04d}"
        AutoModelForCausalLM.from_pretrained(checkpoint)
        run_dir = checkpoint.parents[1]
        assert run_dir.parent == tmp_path / ".fitrl" / "demo"
        history = [json.loads(line) for line in (run_dir / "history.jsonl").read_text().splitlines()]
        rewards = [line["metrics"]["reward/mean"] for line in history]
        assert [line["step"] for line in history] == list(range(1, steps + 1))
        assert (f"{rewards[0]:.3f}", f"{rewards[-1]:.3f}") == found.groups()
        runs.append(run_dir)
    assert runs[0] != runs[1]  # each demo is a new run
    assert "reward 0." in shown.stderr and "3/3" in shown.stderr
    assert "Traceback" not in shown.stderr and "Warning" not in shown.stderr
    assert quiet.stderr == ""


BAD = {
    "no steps": (["--steps", "0"], "must be at least 1, got 0"),
    "negative steps": (["--steps", "-3"], "must be at least 1, got -3"),
    "steps that are no number": (["--steps", "x"], "invalid value: 'x'"),
    "half a step": (["--steps", "1.5"], "invalid value: '1.5'"),
    "a seed that is no number": (["--seed", "x"], "invalid int value: 'x'"),
    "an unknown option": (["--devices", "2"], "unrecognized arguments: --devices"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case, capsys, monkeypatch, tmp_path) -> None:
    arguments, complaint = BAD[case]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["demo", *arguments])
    told = capsys.readouterr()
    assert stop.value.code == 2 and told.out == ""
    assert told.err.startswith("usage: fitrl demo") and re.search(complaint, told.err)
    assert not list(tmp_path.iterdir())


def test_help(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--help"])
    described = capsys.readouterr().out
    assert stop.value.code == 0
    for option in (
        "--steps",
        "--seed",
        "--root",
        "--no-progress",
        "default: 200",
        "default: .fitrl",
        "optimizer steps",
    ):
        assert option in described


def test_options_reach_the_demo(capsys, monkeypatch, tmp_path) -> None:
    seen = {}
    monkeypatch.setattr("fitrl.demo.run", lambda **options: seen.update(options) or "reward")
    assert main(["demo", "--steps", "7", "--seed", "3", "--root", str(tmp_path), "--no-progress"]) == 0
    assert seen == {"steps": 7, "seed": 3, "root": tmp_path, "progress": False}
    assert main(["demo"]) == 0
    assert seen == {"steps": 200, "seed": 0, "root": Path(".fitrl"), "progress": True}
    assert capsys.readouterr().out == "reward\n" * 2


def test_a_root_that_is_no_folder(tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("")
    assert main(["demo", "--steps", "1", "--root", str(tmp_path / "file"), "--no-progress"]) == 1
    assert re.fullmatch("fitrl: .*file.*\n", capsys.readouterr().err)
