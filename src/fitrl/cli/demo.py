"""`fitrl demo`: see `fitrl.demo`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fitrl.cli.numbers import positive


def make_parser() -> argparse.ArgumentParser:
    """The options of `fitrl demo`."""
    parser = argparse.ArgumentParser(
        prog="fitrl demo",
        description="The bundled tiny policy learns single-digit addition. Each demo is a new run.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=positive, default=200, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0, help="of the tasks drawn and of the sampling")
    parser.add_argument("--root", type=Path, default=Path(".fitrl"), help="folder of all projects")
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run the demo and print what it leaves behind."""
    options = make_parser().parse_args(arguments)
    from fitrl.demo import run

    print(run(steps=options.steps, seed=options.seed, root=options.root, progress=not options.no_progress))
    return 0
