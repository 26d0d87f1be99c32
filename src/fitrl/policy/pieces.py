"""Tensors that lie in pieces on several ranks, on disk: each rank writes its own, any number of ranks reads them.

Enters: named tensors, `DTensor`s among them. Leaves: a folder of safetensors files, written and read by
`torch.distributed.checkpoint`, or tensors that were filled from one. A file holds numbers and a JSON header, which says
what part of which tensor they are; nothing in it is unpickled. Ranks tell each other who writes what over their process
group, as torch does, in pickles: the ranks of a job trust each other.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from fitrl.errors import CheckpointError


def write(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write this rank's pieces, flushed to disk; a collective. What several ranks hold, one of them writes.

    Args:
        folder: is there, on a file system of all ranks.
        tensors: the same names on every rank.

    Raises:
        CheckpointError: some rank could not write; raised by all.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        save(dict(tensors), storage_writer=writer)
    except CheckpointException as error:  # a BaseException
        raise CheckpointError(f"cannot write the checkpoint {folder}: {_told(error)}") from error


def names(folder: Path) -> list[str]:
    """Names of the tensors in a folder.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return list(HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} holds no pieces that can be read: {error!r}") from error


def read_whole(folder: Path) -> dict[str, Tensor]:
    """Everything in a folder, put together on this rank.

    Raises:
        CheckpointError: it cannot be read.
    """
    tensors = {}
    for name in names(folder):
        stored: Any = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata[name]
        tensors[name] = torch.empty(stored.size, dtype=stored.properties.dtype)
    read(folder, tensors)
    return tensors


def read(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors, whole or in pieces, with what a folder holds of them. No collective: each rank reads for itself.

    Raises:
        CheckpointError: it cannot be read, or a tensor has another shape there.
    """
    reader = HuggingFaceStorageReader(str(folder))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(dict(tensors), storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        raise CheckpointError(f"{folder} holds no pieces that can be read: {_told(error)}") from error


def _told(error: CheckpointException) -> str:
    """What went wrong first, on the lowest rank."""
    rank, (failure, _) = min(error.failures.items(), key=lambda item: item[0])
    return f"rank {rank}: {type(failure).__name__}: {failure}"
