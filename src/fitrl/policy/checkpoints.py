"""Checkpoint folders: one per saved step, written atomically, loadable by transformers and PEFT as they are.

    <run>/checkpoints/0012/   model.safetensors or adapter_model.safetensors, configuration, tokenizer,
                              trainer_state.pt (optimizer, schedule, RNG, reward history), fitrl.json

A folder is written under a temporary name, flushed to disk and renamed, so it is either whole or absent.
"""

from __future__ import annotations

import json
import logging
import os
import pickle  # its error only; nothing is unpickled
import shutil
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from fitrl.errors import CheckpointError

_log = logging.getLogger(__name__)
_MANIFEST = "fitrl.json"
_STATE = "trainer_state.pt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a checkpoint folder holds.

    Attributes:
        step: optimizer steps the weights have seen.
        base_model: what the policy started from.
        adapter: whether the weights are adapters.
        weights_only: whether the optimizer's state is left out.
    """

    step: int
    base_model: str
    adapter: bool
    weights_only: bool


def write(
    folder: Path, manifest: Manifest, write_weights: Callable[[Path], None], state: dict[str, Any] | None
) -> None:
    """Write a checkpoint folder atomically, in place of an older one of the same name.

    Args:
        folder: where it will be.
        manifest: what it holds.
        write_weights: writes weights, configuration and tokenizer into the folder it is given.
        state: the resumable state, primitives and tensors only; None for weights only.

    Raises:
        CheckpointError: it could not be written; nothing that was there before is lost.
    """
    temporary = folder.parent / f".{folder.name}-{uuid.uuid4().hex[:8]}.tmp"
    replaced = None
    try:
        temporary.mkdir(parents=True)
        write_weights(temporary)
        if state is not None:
            torch.save(state, temporary / _STATE)
        (temporary / _MANIFEST).write_text(json.dumps(asdict(manifest), indent=2) + "\n")
        for file in temporary.rglob("*"):
            if file.is_file():
                _flush(file)
        _flush(temporary)
        if folder.exists():
            replaced = folder.rename(temporary.with_suffix(".old"))
        temporary.rename(folder)
        _flush(folder.parent)
        if replaced is not None:
            shutil.rmtree(replaced, ignore_errors=True)
    except BaseException as error:
        if replaced is not None and not folder.exists():
            replaced.rename(folder)
        shutil.rmtree(temporary, ignore_errors=True)
        # a full disk is a SafetensorError while weights are written, a RuntimeError of torch while the state is
        if isinstance(error, OSError | SafetensorError | RuntimeError):
            raise CheckpointError(f"cannot write the checkpoint {folder}: {error}") from error
        raise


def read(folder: Path) -> tuple[Manifest, dict[str, Any] | None]:
    """Read a checkpoint's manifest and resumable state; the state is None in a weights-only one.

    Raises:
        CheckpointError: it is no whole checkpoint.
    """
    manifest = read_manifest(folder)
    if manifest.weights_only:
        return manifest, None
    try:
        state: dict[str, Any] = torch.load(folder / _STATE, map_location="cpu", weights_only=True)
    except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{folder} is no whole checkpoint: {error}") from error
    return manifest, state


def read_manifest(folder: Path) -> Manifest:
    """Read what a checkpoint says of itself.

    Raises:
        CheckpointError: it says nothing that can be read.
    """
    try:
        return Manifest(**json.loads((folder / _MANIFEST).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder} is no whole checkpoint: {error}") from error


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Step and folder of the whole checkpoints in a folder, oldest step first; others are named in a warning."""
    found: list[tuple[int, float, Path]] = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.startswith(".") or not path.is_dir():
            continue
        try:
            found.append((read_manifest(path).step, (path / _MANIFEST).stat().st_mtime, path))
        except CheckpointError as error:
            _log.warning("skipped: %s", error)
    return [(step, path) for step, _, path in sorted(found)]


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
