"""Where a run of `fitrl fit_rl` lies: a folder of its own, or that of the run that it resumes."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path
from typing import Any

from fitrl.cli.runs import find_run

_KEY = "fitrl/run"
_stores: list[Any] = []


def name_run(config: Any) -> tuple[Path, str, str]:
    """Root, project and name of a parsed configuration's run.

    Raises:
        InvalidArgumentError: the run to resume is not there.
    """
    root = Path(config.model.root or ".fitrl").expanduser().resolve()
    if config.resume is not None:
        run = find_run(config.resume, root)
        return run.parents[1], run.parent.name, run.name
    return root, config.model.project, agree(f"{config.model.name}-{datetime.now():%Y%m%d-%H%M%S-%f}")


def agree(name: str) -> str:
    """The same name on every rank of a `torchrun`, and after each of its restarts: that of the first who asks."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        return name
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(iter(rendezvous("env://")))
    _stores.append(store)  # rank 0 may be serving it
    return str(store.compare_set(_KEY, "", name).decode())
