"""The `fitrl` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fitrl.errors import FitRLError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="fitrl", description="Teach language models by reinforcement.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="the bundled tiny policy learns single-digit addition, in about a minute on a CPU",
        description="The bundled tiny policy learns single-digit addition. Each demo is a new run.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--steps", type=_positive, default=200, help="optimizer steps")
    demo.add_argument("--seed", type=int, default=0, help="of the tasks drawn and of the sampling")
    demo.add_argument("--root", type=Path, default=Path(".fitrl"), help="folder of all projects")
    demo.add_argument("--no-progress", action="store_true", help="show no progress bar")
    options = parser.parse_args(arguments)
    from fitrl.demo import run

    try:
        print(run(steps=options.steps, seed=options.seed, root=options.root, progress=not options.no_progress))
    except FitRLError as error:
        print(f"fitrl: {error}", file=sys.stderr)
        return 1
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
