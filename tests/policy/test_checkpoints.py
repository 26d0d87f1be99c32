"""Checkpoint folders are whole or absent."""

import dataclasses
import hashlib
import json
import os
import pickle
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import fitrl
from fitrl.errors import CheckpointError, FitRLError
from fitrl.policy.checkpoints import (
    Manifest,
    list_checkpoints,
    newest,
    read,
    read_manifest,
    remove,
    tidy,
    verify,
    write,
)
from fitrl.policy.loading import save_weights
from samples import make_groups


def manifest(step: int, *, weights_only: bool = False) -> Manifest:
    return Manifest(step=step, base_model="tiny", adapter=False, weights_only=weights_only)


def weights(text: str):
    return lambda folder: (folder / "weights").write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def disk_full_after(num_bytes: int):
    """Let no file grow beyond so many bytes: what writes then see is an error of the operating system."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# -- write and read ---------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path) -> None:
    state = {"rng": torch.arange(3), "history": [(1, 0.5)], "nested": {"a": None}}
    write(tmp_path / "0001", manifest(1), weights("one"), state)
    found, restored = read(tmp_path / "0001")
    assert dataclasses.replace(found, files={}) == manifest(1) and found == read_manifest(tmp_path / "0001")
    assert restored["history"] == [(1, 0.5)] and torch.equal(restored["rng"], state["rng"])
    assert restored["nested"] == {"a": None}
    write(tmp_path / "0002", manifest(2, weights_only=True), weights("two"), None)
    assert read(tmp_path / "0002") == (read_manifest(tmp_path / "0002"), None)
    assert names(tmp_path / "0002") == ["fitrl.json", "weights"]
    assert list_checkpoints(tmp_path) == [(1, tmp_path / "0001"), (2, tmp_path / "0002")]


def test_folders_above_are_made(tmp_path) -> None:
    write(tmp_path / "a" / "b" / "0001", manifest(1), weights("one"), {})
    assert list_checkpoints(tmp_path / "a" / "b") == [(1, tmp_path / "a" / "b" / "0001")]


def test_the_same_step_is_replaced(tmp_path) -> None:
    write(tmp_path / "0001", manifest(1), lambda folder: (folder / "only in the old one").touch(), {"a": 1})
    write(tmp_path / "0001", manifest(1, weights_only=True), weights("new"), None)
    assert names(tmp_path / "0001") == ["fitrl.json", "weights"]
    assert names(tmp_path) == ["0001"]


def test_everything_is_flushed_before_it_gets_its_name(tmp_path, monkeypatch) -> None:
    flushed = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        flushed.append((os.readlink(f"/proc/self/fd/{descriptor}"), (tmp_path / "0001").exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    write(tmp_path / "0001", manifest(1), weights("one"), {"a": 1})
    before = {Path(path).name for path, has_its_name in flushed if not has_its_name}
    assert {"weights", "fitrl.json", "trainer_state.pt"} <= before
    assert any(path == str(tmp_path) and has_its_name for path, has_its_name in flushed)  # the rename itself


# -- the state holds data, no code ------------------------------------------------------------------------------------


def test_the_state_of_a_run_is_primitives_and_tensors(tmp_path) -> None:
    model = fitrl.TrainableModel("run", "tests", "tiny", lora=fitrl.LoraSettings(rank=2), root=tmp_path)
    with fitrl.LocalTrainer(accelerator="cpu", devices=1, enable_model_summary=False) as trainer:
        folder = trainer.fit_rl(model, make_groups(seed=1)).checkpoint_path
    with torch.serialization.safe_globals([]):
        state = torch.load(folder / "trainer_state.pt", weights_only=True)
    assert {"optimizer", "schedulers", "rng", "reward_history"} <= state.keys()
    moments = state["optimizer"]["state"]
    assert moments and all(float(entry["step"]) == 1.0 for entry in moments.values())


def test_classes_in_the_state_are_refused(tmp_path) -> None:
    write(tmp_path / "0001", manifest(1), weights(""), {"odd": torch.nn.Linear(1, 1)})
    with pytest.raises(CheckpointError, match="0001 is no whole checkpoint"):
        read(tmp_path / "0001")


class Trap:
    """Would write a file when it is unpickled."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_in_the_state_is_ever_run(tmp_path) -> None:
    write(tmp_path / "0001", manifest(1), weights(""), {"odd": Trap(tmp_path / "sprung")})
    with pytest.raises(CheckpointError, match="0001 is no whole checkpoint"):
        read(tmp_path / "0001")
    (tmp_path / "0001" / "trainer_state.pt").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(CheckpointError, match="0001 is no whole checkpoint"):
        read(tmp_path / "0001")
    assert not (tmp_path / "sprung").exists()


# -- writes that fail -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("existing", [True, False])
def test_a_failed_write_leaves_the_old_one_and_nothing_else(existing, tmp_path) -> None:
    if existing:
        write(tmp_path / "0001", manifest(1), weights("old"), {"a": 1})

    def full(folder) -> None:
        (folder / "weights").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="cannot write the checkpoint .*0001.*No space left"):
        write(tmp_path / "0001", manifest(1), full, {})
    assert names(tmp_path) == ["0001"] * existing
    if existing:
        assert (tmp_path / "0001" / "weights").read_text() == "old" and read(tmp_path / "0001")[1] == {"a": 1}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ArithmeticError])
def test_other_errors_are_passed_on_and_leave_nothing_either(error, tmp_path) -> None:
    def stopped(folder) -> None:
        (folder / "weights").write_text("half")
        raise error

    with pytest.raises(error):
        write(tmp_path / "0001", manifest(1), stopped, {})
    assert names(tmp_path) == []


@pytest.mark.parametrize("what", ["weights", "state", "manifest"])
def test_a_full_disk(what, tmp_path, tiny_policy) -> None:
    """safetensors and torch report a full disk with errors of their own, which are no OSError."""
    write(tmp_path / "0001", manifest(1), weights("old"), {"a": 1})
    write_weights = {"weights": lambda folder: save_weights(tiny_policy, folder)}.get(what, weights("new"))
    state = {"state": {"big": torch.zeros(100_000)}, "weights": {}}.get(what)
    limit = {"weights": 200_000, "state": 200_000, "manifest": 10}[what]
    with disk_full_after(limit), pytest.raises(CheckpointError, match="cannot write the checkpoint .*0001"):
        write(tmp_path / "0001", manifest(1), write_weights, state)
    assert names(tmp_path) == ["0001"]
    assert (tmp_path / "0001" / "weights").read_text() == "old" and read(tmp_path / "0001")[1] == {"a": 1}


def test_a_folder_that_cannot_be_made(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write the checkpoint"):
        write(tmp_path / "file" / "0001", manifest(1), weights("one"), {})


def test_an_old_checkpoint_survives_a_rename_that_fails(tmp_path, monkeypatch) -> None:
    write(tmp_path / "0001", manifest(1), weights("old"), {"a": 1})
    rename = Path.rename

    def fails(self, target):
        if self.suffix == ".tmp":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(CheckpointError, match="Input/output error"):
        write(tmp_path / "0001", manifest(1), weights("new"), {})
    monkeypatch.undo()
    assert list_checkpoints(tmp_path) == [(1, tmp_path / "0001")]
    assert (tmp_path / "0001" / "weights").read_text() == "old"
    assert names(tmp_path) == ["0001"]


def test_a_trainer_lives_on_after_a_full_disk(tmp_path) -> None:
    model = fitrl.TrainableModel("run", "tests", "tiny", lora=fitrl.LoraSettings(rank=4), root=tmp_path)
    with fitrl.LocalTrainer(accelerator="cpu", devices=1, enable_model_summary=False) as trainer:
        first = trainer.fit_rl(model, make_groups(seed=1)).checkpoint_path
        with disk_full_after(20_000), pytest.raises(FitRLError):
            trainer.fit_rl(model, make_groups(seed=1))
        assert model.checkpoints() == [first] and names(model.checkpoints_dir) == [first.name]
        assert trainer.global_step == model.step == 2  # the step was taken; it is not saved
        third = trainer.fit_rl(model, make_groups(seed=1))
        assert third.step == 3 and model.checkpoints() == [first, third.checkpoint_path]


# -- what is no checkpoint --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [None, "", "{", "[1]", "3", "null", '{"step": 1}', '{"step": 1, "odd": 2}', "\xff\xfe"],
)
def test_manifests_that_cannot_be_read(content, tmp_path) -> None:
    write(tmp_path / "0001", manifest(1), weights(""), {})
    if content is None:
        (tmp_path / "0001" / "fitrl.json").unlink()
    else:
        (tmp_path / "0001" / "fitrl.json").write_text(content, encoding="latin-1")
    for reads in (read, read_manifest):
        with pytest.raises(CheckpointError, match="0001 is no whole checkpoint"):
            reads(tmp_path / "0001")
    assert list_checkpoints(tmp_path) == []


@pytest.mark.parametrize("content", [None, b"", b"cut short", b"PK\x03\x04"])
def test_states_that_cannot_be_read(content, tmp_path) -> None:
    write(tmp_path / "0001", manifest(1), weights(""), {"a": torch.zeros(3)})
    state = tmp_path / "0001" / "trainer_state.pt"
    if content is None:
        state.unlink()
    else:
        state.write_bytes(content)
    with pytest.raises(CheckpointError, match="0001 is no whole checkpoint"):
        read(tmp_path / "0001")


def test_a_state_cut_anywhere(tmp_path) -> None:
    write(tmp_path / "0001", manifest(1), weights(""), {"a": torch.zeros(30), "b": [1, 2.0, "three"]})
    state = tmp_path / "0001" / "trainer_state.pt"
    whole = state.read_bytes()
    for length in range(0, len(whole), len(whole) // 20):
        state.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="no whole checkpoint"):
            read(tmp_path / "0001")


def test_what_is_not_there(tmp_path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match="no whole checkpoint"):
            read(folder)
    assert list_checkpoints(tmp_path / "absent") == [] == list_checkpoints(tmp_path)


# -- lists ------------------------------------------------------------------------------------------------------------


def test_lists_run_from_the_oldest_step_to_the_newest(tmp_path) -> None:
    for step in (10000, 2, 10, 0):
        write(tmp_path / f"{step:04d}", manifest(step), weights(""), {})
    write(tmp_path / "best", manifest(5), weights(""), {})
    assert [path.name for _, path in list_checkpoints(tmp_path)] == ["0000", "0002", "best", "0010", "10000"]
    assert [step for step, _ in list_checkpoints(tmp_path)] == [0, 2, 5, 10, 10000]


def test_of_the_same_step_the_one_written_last_is_newest(tmp_path) -> None:
    for name, time in (("a", 3000), ("b", 1000), ("c", 2000)):
        write(tmp_path / name, manifest(1), weights(""), {})
        os.utime(tmp_path / name / "fitrl.json", (time, time))
    assert [path.name for _, path in list_checkpoints(tmp_path)] == ["b", "c", "a"]


def test_half_written_folders_are_passed_over(tmp_path, caplog) -> None:
    write(tmp_path / "0001", manifest(1), weights(""), {})
    # what a process leaves that is killed while it writes: everything there, but not its name
    (tmp_path / "0001").rename(tmp_path / ".0002-abcd.tmp")
    write(tmp_path / "0001", manifest(1), weights(""), {})
    (tmp_path / "0003").mkdir()  # what a copy leaves that was cut short
    (tmp_path / "0003" / "weights").write_text("half")
    (tmp_path / "0004").write_text("a file")
    assert list_checkpoints(tmp_path) == [(1, tmp_path / "0001")]
    assert "0003 is no whole checkpoint" in caplog.text
    assert ".0002" not in caplog.text and "0004" not in caplog.text
    write(tmp_path / "0003", manifest(3), weights("whole"), {})  # and it can be written again
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1, 3]


def test_manifests_are_plain_json(tmp_path) -> None:
    write(tmp_path / "0001", manifest(1), weights(""), {})
    assert json.loads((tmp_path / "0001" / "fitrl.json").read_text()) == {
        "step": 1,
        "base_model": "tiny",
        "adapter": False,
        "weights_only": False,
        "files": {
            name: [size, hashlib.sha256((tmp_path / "0001" / name).read_bytes()).hexdigest()]
            for name, size in (
                ("trainer_state.pt", (tmp_path / "0001" / "trainer_state.pt").stat().st_size),
                ("weights", 0),
            )
        },
    }


# -- what a crash, a bad disk or a careless hand leaves ---------------------------------------------------------------


@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_damaged_files_are_named_and_the_one_before_is_taken(damage, tmp_path, caplog) -> None:
    for step in (1, 2):
        write(tmp_path / f"{step:04d}", manifest(step), weights("some weights"), {"step": step})
    file = tmp_path / "0002" / "weights"
    match damage:
        case "changed":
            file.write_text("some Weights")
        case "cut":
            file.write_text("some")
        case "gone":
            file.unlink()
    with pytest.raises(CheckpointError, match=r"0002 is no whole checkpoint.*weights"):
        verify(tmp_path / "0002")
    with caplog.at_level("WARNING"):
        assert newest(tmp_path) == tmp_path / "0001"
    assert "0002" in caplog.text and "weights" in caplog.text


def test_nothing_whole_is_no_checkpoint(tmp_path) -> None:
    assert newest(tmp_path / "absent") is None
    write(tmp_path / "0001", manifest(1), weights("some weights"), {})
    (tmp_path / "0001" / "weights").write_text("other weight")
    assert newest(tmp_path) is None


def test_subfolders_are_part_of_the_manifest(tmp_path) -> None:
    def nested(folder: Path) -> None:
        (folder / "inner").mkdir()
        (folder / "inner" / "part").write_text("one")

    write(tmp_path / "0001", manifest(1), nested, None)
    assert set(verify(tmp_path / "0001").files) == {"inner/part"}
    (tmp_path / "0001" / "inner" / "part").write_text("two")
    with pytest.raises(CheckpointError, match="inner/part"):
        verify(tmp_path / "0001")


def test_tidy_clears_what_a_crash_left(tmp_path) -> None:
    write(tmp_path / "0001", manifest(1), weights("one"), {})
    write(tmp_path / "0002", manifest(2), weights("two"), {})
    (tmp_path / ".0003-0123abcd.tmp").mkdir()
    (tmp_path / ".0003-0123abcd.tmp" / "weights").write_text("half")
    # killed between the two renames of a replacement: the older folder is whole, under its aside name
    (tmp_path / "0002").rename(tmp_path / ".0002-0123abcd.old")
    # killed after both: the older one is only in the way
    (tmp_path / ".0001-0123abcd.old").mkdir()
    (tmp_path / ".mine").mkdir()
    tidy(tmp_path)
    assert names(tmp_path) == [".mine", "0001", "0002"]
    assert verify(tmp_path / "0002").step == 2
    tidy(tmp_path / "absent")


def test_removed_is_gone(tmp_path) -> None:
    write(tmp_path / "0001", manifest(1), weights("one"), {})
    remove(tmp_path / "0001")
    assert names(tmp_path) == []
