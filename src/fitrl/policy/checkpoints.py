"""Checkpoint folders: one per saved step, whole or absent, loadable by transformers and PEFT as they are.

    <run>/checkpoints/0012/   model.safetensors or adapter_model.safetensors, configuration, tokenizer,
                              (model-00001-of-00002.safetensors and so on, where each rank writes a part)
                              trainer_state.pt (optimizer, schedule, RNG, reward history),
                              moments/ (the optimizer's, where each rank holds and writes a part of them),
                              fitrl.json (the manifest: step, kind, size and SHA-256 of every other file)

A folder is written under a temporary name, flushed to disk and renamed, so a crash at any moment leaves the old
folder or the new one. What a crash leaves beside them is cleared by `tidy` when the run is opened next.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle  # its error only; nothing is unpickled
import re
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError

from fitrl.errors import CheckpointError

_log = logging.getLogger(__name__)
_MANIFEST = "fitrl.json"
_STATE = "trainer_state.pt"
MOMENTS = "moments"
_LEFTOVER = re.compile(r"\.(?P<name>.+)-[0-9a-f]{8}\.(?P<kind>tmp|old)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a checkpoint folder holds.

    Attributes:
        step: optimizer steps the weights have seen.
        base_model: what the policy started from.
        adapter: whether the weights are adapters.
        weights_only: whether the optimizer's state is left out.
        files: size in bytes and SHA-256 of every other file, by its path in the folder; filled in by `write`.
    """

    step: int
    base_model: str
    adapter: bool
    weights_only: bool
    files: Mapping[str, tuple[int, str]] = field(default_factory=dict)


def begin(folder: Path) -> Path:
    """Make the temporary folder of a checkpoint, for ranks to write into before `write` is called.

    Raises:
        CheckpointError: it cannot be made.
    """
    temporary = _beside(folder, "tmp")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"cannot write the checkpoint {folder}: {error}") from error
    return temporary


def discard(temporary: Path) -> None:
    """Delete what was begun."""
    shutil.rmtree(temporary, ignore_errors=True)


def write(
    folder: Path,
    manifest: Manifest,
    write_weights: Callable[[Path], None],
    state: dict[str, Any] | None,
    *,
    begun: Path | None = None,
    sums: Mapping[str, tuple[int, str]] = MappingProxyType({}),
) -> None:
    """Write a checkpoint folder atomically, in place of an older one of the same name.

    Args:
        folder: where it will be.
        manifest: what it holds.
        write_weights: writes weights, configuration and tokenizer into the folder it is given.
        state: the resumable state, primitives and tensors only; None for weights only.
        begun: what `begin` made, where ranks have written; None: nothing was begun.
        sums: size and SHA-256 of what was written there, where they are known; `checksums` gives them.

    Raises:
        CheckpointError: it could not be written; nothing that was there before is lost.
    """
    temporary = _beside(folder, "tmp") if begun is None else begun
    replaced = None
    try:
        temporary.mkdir(parents=True, exist_ok=begun is not None)
        write_weights(temporary)
        if state is not None:
            torch.save(state, temporary / _STATE)
        others = [name for name in _files(temporary) if name not in sums]
        manifest = replace(manifest, files=dict(sums) | checksums(temporary, others))
        (temporary / _MANIFEST).write_text(json.dumps(asdict(manifest), indent=2) + "\n")
        for path in (*_files(temporary).values(), temporary / _MANIFEST):
            _flush(path)
        for path in temporary.rglob("*"):
            if path.is_dir():
                _flush(path)
        _flush(temporary)
        if folder.exists():
            replaced = folder.rename(_beside(folder, "old"))
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


def checksums(folder: Path, names: Sequence[str]) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of files, by their paths in the folder."""
    return {name: ((folder / name).stat().st_size, _sha256(folder / name)) for name in names}


def moments_of(folder: Path, manifest: Manifest) -> Path | None:
    """The folder of moments of a checkpoint that was verified; None where they are a part of its state.

    Raises:
        CheckpointError: it holds a file that was not written with it.
    """
    found = {name for name in _files(folder) if name.startswith(f"{MOMENTS}/")}
    if more := sorted(found - manifest.files.keys()):
        raise CheckpointError(f"{folder} is no whole checkpoint: {more[0]} is none of what was written")
    return folder / MOMENTS if found else None


def verify(folder: Path) -> Manifest:
    """Read a checkpoint's manifest and compare every file with it.

    Raises:
        CheckpointError: it says nothing that can be read, or a file is missing, cut or changed.
    """
    manifest = read_manifest(folder)
    for name, (_, checksum) in manifest.files.items():
        try:
            found = _sha256(folder / name)
        except OSError as error:
            raise CheckpointError(f"{folder} is no whole checkpoint: {error}") from error
        if found != checksum:
            raise CheckpointError(f"{folder} is no whole checkpoint: {name} is not as it was written (checksum)")
    return manifest


def read(folder: Path) -> tuple[Manifest, dict[str, Any] | None]:
    """Verify a checkpoint and read its resumable state; the state is None in a weights-only one.

    Raises:
        CheckpointError: it is no whole checkpoint.
    """
    manifest = verify(folder)
    return manifest, None if manifest.weights_only else read_state(folder)


def read_state(folder: Path) -> dict[str, Any]:
    """Read the resumable state of a checkpoint that was verified.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        state: dict[str, Any] = torch.load(folder / _STATE, map_location="cpu", weights_only=True)
    except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{folder} is no whole checkpoint: {error}") from error
    return state


def read_manifest(folder: Path) -> Manifest:
    """Read what a checkpoint says of itself, and see that its files are there in their sizes; reads no weights.

    Raises:
        CheckpointError: it says nothing that can be read, or a file is missing or cut.
    """
    try:
        content = json.loads((folder / _MANIFEST).read_text())
        content["files"] = {
            str(name): (int(size), str(checksum)) for name, (size, checksum) in content["files"].items()
        }
        manifest = Manifest(**content)
        for name, (size, _) in manifest.files.items():
            found = (folder / name).stat().st_size
            if found != size:
                raise CheckpointError(f"{folder} is no whole checkpoint: {name} has {found} bytes, written were {size}")
    except OSError as error:
        raise CheckpointError(f"{folder} is no whole checkpoint: {error}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder} is no whole checkpoint, its {_MANIFEST} cannot be read: {error!r}") from error
    return manifest


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Step and folder of the whole checkpoints in a folder, oldest step first; others are named in a warning.

    Whole means `read_manifest`: files of the right size. `newest` also reads them.
    """
    found: list[tuple[int, bool, float, Path]] = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.startswith(".") or not path.is_dir():
            continue
        try:
            manifest = read_manifest(path)
            # of the same step, one that resumes exactly comes after one of the weights alone
            found.append((manifest.step, not manifest.weights_only, (path / _MANIFEST).stat().st_mtime, path))
        except (CheckpointError, OSError) as error:
            _log.warning("skipped: %s", error)
    return [(step, path) for step, *_, path in sorted(found)]


def newest(folder: Path) -> Path | None:
    """The newest checkpoint in a folder whose every file is as it was written; others are named in a warning."""
    return next((path for _, path in reversed(list_checkpoints(folder)) if is_whole(path)), None)


def is_whole(folder: Path) -> bool:
    """Whether every file of a checkpoint is as it was written; one that is not is named in a warning."""
    try:
        verify(folder)
    except CheckpointError as error:
        _log.warning("skipped: %s", error)
        return False
    return True


def remove(folder: Path) -> None:
    """Delete a checkpoint folder; a crash on the way leaves none of it under its name."""
    doomed = folder.rename(_beside(folder, "tmp"))
    shutil.rmtree(doomed, ignore_errors=True)


def tidy(folder: Path) -> None:
    """Clear what a crash left in a folder of checkpoints; only for the run's one trainer.

    A crash between the two renames of `write` leaves the older folder under its aside name: it gets its name back.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = _LEFTOVER.fullmatch(path.name)
        if match is None or not path.is_dir():
            continue
        if match["kind"] == "old" and not (folder / match["name"]).exists():
            path.rename(folder / match["name"])
        else:
            shutil.rmtree(path, ignore_errors=True)


def _beside(folder: Path, kind: str) -> Path:
    """A hidden name for a folder on its way in or out."""
    return folder.parent / f".{folder.name}-{uuid.uuid4().hex[:8]}.{kind}"


def _files(folder: Path) -> dict[str, Path]:
    """Every file of a checkpoint folder but its manifest, by its path in the folder."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    found.pop(_MANIFEST, None)
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
