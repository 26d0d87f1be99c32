"""Names that torchtitan 0.3.0 imports and torch 2.11 does not have yet; none is used with the plan that fitrl takes."""

from __future__ import annotations

import torch.distributed.fsdp as fsdp


def lend_names() -> None:
    """Let torchtitan be imported."""
    if not hasattr(fsdp, "DataParallelMeshDims"):
        setattr(fsdp, "DataParallelMeshDims", type("DataParallelMeshDims", (), {}))  # noqa: B010 - a type to mypy
