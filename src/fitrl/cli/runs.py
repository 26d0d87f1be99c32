"""Run folders by name: `RUN` on the command line is a folder, or project/name under the root."""

from __future__ import annotations

import argparse
from pathlib import Path

from fitrl.errors import InvalidArgumentError

_MARKS = ("history.jsonl", "config.yaml", "trajectories", "checkpoints")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of a sub-command that reads a run."""
    parser.add_argument("run", metavar="RUN", help="a run folder, or project/name under the root")
    parser.add_argument("--root", type=Path, default=Path(".fitrl"), help="folder of all projects")


def find_run(run: str, root: Path) -> Path:
    """The run folder, absolute.

    Raises:
        InvalidArgumentError: there is none; the message names runs that there are.
    """
    root = root.expanduser().resolve()
    for folder in (Path(run).expanduser(), root / run):
        if any((folder / mark).exists() for mark in _MARKS):
            return folder.resolve()
    there = sorted(
        {mark.parent for name in _MARKS for mark in root.glob(f"*/*/{name}")},
        key=lambda folder: folder.stat().st_mtime,
        reverse=True,
    )
    names = [str(folder.relative_to(root)) for folder in there[:5]]
    newest = f"the newest there: {', '.join(names)}" if names else "there is none"
    raise InvalidArgumentError(f"{run!r} is neither a run folder nor project/name under {root}; {newest}")
