"""Checkpoint folders are whole or absent."""

import pytest
import torch

from fitrl.errors import CheckpointError
from fitrl.policy.checkpoints import Manifest, list_checkpoints, read, write


def manifest(step: int, *, weights_only: bool = False) -> Manifest:
    return Manifest(step=step, base_model="tiny", adapter=False, weights_only=weights_only)


def weights(text: str):
    return lambda folder: (folder / "weights").write_text(text)


def test_round_trip(tmp_path) -> None:
    state = {"rng": torch.arange(3), "history": [(1, 0.5)], "nested": {"a": None}}
    write(tmp_path / "0001", manifest(1), weights("one"), state)
    found, restored = read(tmp_path / "0001")
    assert found == manifest(1) and restored["history"] == [(1, 0.5)] and torch.equal(restored["rng"], state["rng"])
    write(tmp_path / "0002", manifest(2, weights_only=True), weights("two"), None)
    assert read(tmp_path / "0002") == (manifest(2, weights_only=True), None)
    assert list_checkpoints(tmp_path) == [(1, tmp_path / "0001"), (2, tmp_path / "0002")]


def test_the_state_holds_no_pickled_classes(tmp_path) -> None:
    write(tmp_path / "0001", manifest(1), weights(""), {"odd": torch.nn.Linear(1, 1)})
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        read(tmp_path / "0001")


def test_a_failed_write_leaves_the_old_one_and_nothing_else(tmp_path) -> None:
    write(tmp_path / "0001", manifest(1), weights("old"), {})

    def full(folder) -> None:
        (folder / "weights").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left"):
        write(tmp_path / "0001", manifest(1), full, {})
    assert (tmp_path / "0001" / "weights").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["0001"]


def test_the_same_step_is_replaced(tmp_path) -> None:
    for text in ("old", "new"):
        write(tmp_path / "0001", manifest(1), weights(text), {})
    assert (tmp_path / "0001" / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["0001"]


def test_what_is_no_checkpoint(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        read(tmp_path)
    write(tmp_path / "0001", manifest(1), weights(""), {})
    (tmp_path / "0001" / "trainer_state.pt").write_bytes(b"cut short")
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        read(tmp_path / "0001")
    assert list_checkpoints(tmp_path / "absent") == []
