"""From a trainer's named weights to folders that vLLM loads, written piece by piece."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors.torch import save_file
from torch import Tensor

from fitrl.errors import UnsupportedError
from fitrl.policy.loading import LoraSettings

BUCKET_BYTES = 1 << 30
"""Size of a file."""

_MODULE = re.compile(r"\.([^.]+)\.lora_[AB]\.")
_HEADER_BYTES = 1 << 18  # of a file, filled up with spaces: what it holds is known only once it is written
_LENGTH_BYTES = 8
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write_adapter(folder: Path, weights: Iterable[tuple[str, Tensor]], lora: LoraSettings) -> None:
    """Write a PEFT folder, as vLLM and PEFT load it.

    Args:
        folder: is made.
        weights: under PEFT's names.
        lora: what they were trained with.

    Raises:
        UnsupportedError: something beside adapters is trained.
    """
    held = {name: _plain(tensor) for name, tensor in weights}
    modules = {name: _MODULE.search(name) for name in held}
    for name, found in modules.items():
        if found is None:
            raise UnsupportedError(f"{name} is no adapter of a linear layer, and vLLM loads those only")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": sorted({found[1] for found in modules.values() if found is not None}),
        "bias": "none",
        "inference_mode": True,
    }
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(held, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})


def write_model(folder: Path, weights: Iterable[tuple[str, Tensor]], *, bucket_bytes: int = BUCKET_BYTES) -> None:
    """Write safetensors files with an index, each tensor as it comes: no more than one is held beside the trainer's.

    Args:
        folder: is made.
        weights: under transformers' names.
        bucket_bytes: size of a file.

    Raises:
        UnsupportedError: weights of a kind that is not trained.
    """
    folder.mkdir(parents=True)
    where: dict[str, str] = {}
    files: list[_File] = []
    try:
        for name, tensor in weights:
            if not files or not files[-1].has_room(name, tensor, bucket_bytes):
                if files:
                    files[-1].close()
                files.append(_File(folder / f"model-{len(files):05d}.safetensors"))
            files[-1].add(name, tensor)
            where[name] = files[-1].path.name
    finally:
        if files:
            files[-1].close()
    index = {"metadata": {"total_size": sum(file.size for file in files)}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


class _File:
    """A safetensors file, written in one pass.

    The format begins with a table of what follows (https://huggingface.co/docs/safetensors, "Format"), which may be
    filled up with spaces: so it is written last, into room that was left for it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._table: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._table_bytes = len(json.dumps(self._table))
        self._out: BinaryIO = path.open("wb")
        self._out.seek(_LENGTH_BYTES + _HEADER_BYTES)

    def has_room(self, name: str, tensor: Tensor, most: int) -> bool:
        """Whether the tensor fits; also not where readers could not map it, which wants it aligned."""
        fits = not self.size or self.size + tensor.nbytes <= most
        return fits and not self.size % tensor.itemsize and self._table_bytes + len(name) + 256 < _HEADER_BYTES

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor."""
        if tensor.dtype not in _DTYPES:
            raise UnsupportedError(f"{name} has dtype {tensor.dtype}; handed over are {', '.join(map(str, _DTYPES))}")
        plain = tensor.detach().cpu().contiguous()
        self._out.write(plain.view(-1).view(torch.uint8).numpy().data)
        row = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self.size, self.size + plain.nbytes],
        }
        self._table[name] = row
        self._table_bytes += len(json.dumps({name: row}))
        self.size += plain.nbytes

    def close(self) -> None:
        """Write the table."""
        self._out.seek(0)
        self._out.write(_HEADER_BYTES.to_bytes(_LENGTH_BYTES, "little"))
        self._out.write(json.dumps(self._table).encode().ljust(_HEADER_BYTES))
        self._out.close()


def remove(folder: Path) -> None:
    """Remove what was written; it may be gone."""
    shutil.rmtree(folder, ignore_errors=True)


def _plain(tensor: Tensor) -> Tensor:
    """A copy on the CPU that shares memory with no other: the trainer's own may be gone once the next is asked for."""
    return torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format).copy_(tensor.detach())
