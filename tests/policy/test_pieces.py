"""Folders of pieces: what is written is read, by whoever holds other parts; what is no such folder is an error."""

from __future__ import annotations

import pickle

import pytest
import torch
from safetensors import safe_open

from fitrl.errors import CheckpointError
from fitrl.policy import pieces

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
TENSORS = {"0.exp_avg": torch.arange(6.0).reshape(2, 3), "10.exp_avg": torch.tensor([1e-300], dtype=torch.float64)}


def test_round_trip(tmp_path) -> None:
    pieces.write(tmp_path, TENSORS)
    assert sorted(pieces.names(tmp_path)) == sorted(TENSORS)
    found = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    pieces.read(tmp_path, found)
    told = pieces.read_whole(tmp_path)
    assert told.keys() == TENSORS.keys()
    assert all(torch.equal(told[name], TENSORS[name]) and told[name].dtype == TENSORS[name].dtype for name in told)
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


def test_a_file_holds_numbers_and_a_json_header(tmp_path) -> None:
    pieces.write(tmp_path, TENSORS)
    [file] = tmp_path.iterdir()
    with safe_open(file, framework="pt") as content:
        assert set(content.keys()) == TENSORS.keys()
        assert all(isinstance(value, str) for value in content.metadata().values())


@pytest.mark.parametrize("content", [b"", b"\x10\0\0\0\0\0\0\0{}", pickle.dumps({"a": 1})])
def test_what_is_no_safetensors_file_is_refused(content, tmp_path) -> None:
    (tmp_path / "shard-00001-model-00001-of-00001.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="holds no pieces that can be read"):
        pieces.names(tmp_path)


def test_another_shape_or_name_is_refused(tmp_path) -> None:
    pieces.write(tmp_path, TENSORS)
    for wanted in ({"0.exp_avg": torch.zeros(3, 3)}, {"1.exp_avg": torch.zeros(2, 3)}):
        with pytest.raises(CheckpointError, match="holds no pieces that can be read: rank 0"):
            pieces.read(tmp_path, wanted)


def test_a_folder_that_cannot_be_written_is_an_error_that_says_so(tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot write the checkpoint"):
        pieces.write(tmp_path / "file", TENSORS)
