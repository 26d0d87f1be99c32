"""`fitrl plot RUN`: metrics of a run's history as a picture."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from fitrl.cli.runs import add_run_arguments, find_run
from fitrl.errors import DataError
from fitrl.policy.plots import plot_metrics
from fitrl.policy.trajectories import read_history

REWARD = "reward/mean"


def make_parser() -> argparse.ArgumentParser:
    """The options of `fitrl plot`."""
    parser = argparse.ArgumentParser(
        prog="fitrl plot",
        description="Draw metrics of a run, one below the other, from its history.jsonl.",
        epilog="example: fitrl plot demo/adder-20260101-120000 --metric reward/mean --metric mismatch/kl",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_run_arguments(parser)
    parser.add_argument(
        "--metric",
        action="append",
        metavar="KEY",
        help=f"a metric key, as `model.log` returns it; may be given several times (default: {REWARD})",
        default=argparse.SUPPRESS,
    )
    parser.add_argument("--output", type=Path, metavar="PNG", help="default: <run>/<key>.png, or <run>/metrics.png")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Draw the picture and print its path."""
    options = make_parser().parse_args(arguments)
    keys = list(dict.fromkeys(getattr(options, "metric", [REWARD])))
    run = find_run(options.run, options.root)
    name = re.sub(r"\W+", "-", keys[0]) if len(keys) > 1 or keys != [REWARD] else "reward"
    output = options.output or run / ("metrics.png" if len(keys) > 1 else f"{name}.png")
    print(plot_metrics(read_series(run, keys), output, title=f"{run.parent.name}/{run.name}"))
    return 0


def read_series(run: Path, keys: Sequence[str]) -> dict[str, dict[int, float]]:
    """Each metric by step; of a step that was logged twice, as after resuming an older checkpoint, the newest.

    Raises:
        DataError: the run has no such metric; the message names those that it has.
    """
    series: dict[str, dict[int, float]] = {key: {} for key in keys}
    there: set[str] = set()
    for line in read_history(run / "history.jsonl"):
        there |= line["metrics"].keys()
        for key in keys:
            if key in line["metrics"]:
                series[key][int(line["step"])] = line["metrics"][key]
    absent = [key for key in keys if not series[key]]
    if absent:
        raise DataError(f"{run} has logged no {', '.join(absent)}; it has: {', '.join(sorted(there)) or 'nothing'}")
    return series
