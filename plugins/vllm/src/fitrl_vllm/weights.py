"""From a trainer's named weights to folders that vLLM loads, written piece by piece."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fitrl.errors import UnsupportedError
from fitrl.policy.loading import LoraSettings

BUCKET_BYTES = 1 << 30
"""Most that is held in memory beside the trainer's own weights; files of this size."""

_MODULE = re.compile(r"\.([^.]+)\.lora_[AB]\.")


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
    """Write safetensors files with an index, one bucket after the other.

    Args:
        folder: is made.
        weights: under transformers' names.
        bucket_bytes: size of a file, and of what is held at once.
    """
    folder.mkdir(parents=True)
    bucket: dict[str, Tensor] = {}
    size = total = files = 0
    where: dict[str, str] = {}

    def flush() -> None:
        nonlocal bucket, size, files
        name = f"model-{files:05d}.safetensors"
        save_file(bucket, str(folder / name), metadata={"format": "pt"})
        where.update(dict.fromkeys(bucket, name))
        bucket, size, files = {}, 0, files + 1

    for name, tensor in weights:
        plain = _plain(tensor)
        if bucket and size + plain.nbytes > bucket_bytes:
            flush()
        bucket[name] = plain
        size, total = size + plain.nbytes, total + plain.nbytes
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def remove(folder: Path) -> None:
    """Remove what was written; it may be gone."""
    shutil.rmtree(folder, ignore_errors=True)


def _plain(tensor: Tensor) -> Tensor:
    """A copy on the CPU that shares memory with no other: safetensors refuses tied weights, trainers change theirs."""
    return torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format).copy_(tensor.detach())
