"""The fast paths learn what the plain one does: SmolLM2 on sums, three ways, several seeds, one GPU.

Each run is `smollm2_arithmetic.py` in its own process, with `--path fast` (compiled, each batch laid out as takes least
time), `--path shared` (compiled, always packed with shared prefixes) or `--path plain` (padded batches, not compiled).
The runs that learn go side by side, because only their rewards are read; three more, one after the other, are timed.

    python benchmarks/learning_curves.py [--steps 60] [--seeds 3] [--max_seconds 300] [--base_model PATH.gguf]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PATHS = ("fast", "shared", "plain")
RECIPE = Path(__file__).with_name("smollm2_arithmetic.py")


def main() -> None:
    """Run all, print a table, write it down with a picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/recipes/smollm2_arithmetic.yaml"))
    parser.add_argument("--base_model", help="as of the recipe")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each path")
    parser.add_argument(
        "--max_seconds", type=float, default=1e5, help="of each run's training; what all reached counts"
    )
    parser.add_argument("--timed_steps", type=int, default=20, help="optimizer steps of the timed runs")
    parser.add_argument("--at_once", type=int, default=6, help="runs side by side: each takes up to 22 GiB")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as root:
        runs = [(path, seed) for seed in range(options.seeds) for path in PATHS]
        found: dict[tuple[str, int], dict[str, Any]] = {}
        for first in range(0, len(runs), options.at_once):
            some = runs[first : first + options.at_once]
            started = [(run, start(*run, options.steps, Path(root) / "{}-{}".format(*run), options)) for run in some]
            found |= {run: finish(process, Path(root) / "{}-{}".format(*run)) for run, process in started}
        timed = {}
        for path in PATHS:
            folder = Path(root) / f"timed-{path}"
            timed[path] = finish(start(path, 0, options.timed_steps, folder, options), folder)
    shortest = min(len(report["rewards"]) for report in found.values())
    for report in found.values():  # the rewards of the steps that all reached
        del report["rewards"][shortest:]
    text = summary(found, timed, options)
    print(text)
    (options.output / "learning_curves.md").write_text(text)
    kept = {f"{path}, seed {seed}": report["rewards"] for (path, seed), report in found.items()}
    told = {path: timed[path]["update_seconds"] for path in PATHS}
    (options.output / "learning_curves.json").write_text(json.dumps({"rewards": kept, "update_seconds": told}) + "\n")
    draw(found, options.output / "learning_curves.png")


def start(path: str, seed: int, steps: int, folder: Path, options: argparse.Namespace) -> subprocess.Popen[bytes]:
    """One run of the recipe, in its own process."""
    folder.mkdir(parents=True)
    model = ["--base_model", options.base_model] if options.base_model else []
    told = (folder / "log").open("wb")
    return subprocess.Popen(
        [sys.executable, str(RECIPE), "--config", str(options.config), "--path", path, "--seed", str(seed)]
        + ["--steps", str(steps), "--max_seconds", str(options.max_seconds), "--output", str(folder), *model],
        stdout=told,
        stderr=subprocess.STDOUT,
    )


def finish(process: subprocess.Popen[bytes], folder: Path) -> dict[str, Any]:
    """Wait for a run and read what it wrote."""
    if process.wait():
        raise SystemExit((folder / "log").read_text()[-3000:])
    [path] = folder.glob("*.json")
    report: dict[str, Any] = json.loads(path.read_text())
    return report


def summary(found: dict[tuple[str, int], Any], timed: dict[str, Any], options: argparse.Namespace) -> str:
    """The report as markdown."""
    steps = len(next(iter(found.values()))["rewards"])
    tail = max(1, steps // 4)
    lines = [
        "# The fast paths learn what the plain one does",
        "",
        f"SmolLM2-135M-Instruct, sums, all weights: {options.seeds} seeds of {steps} steps. Reward: mean of the last "
        f"{tail} steps, over seeds, and its standard error; held out: after the {_range(found)} steps of the "
        "whole run. Seconds, of a run alone on the GPU: median of an update, the first two left out, and with the "
        "mean of a rollout.",
        "",
        "| path | reward | held out, greedy | update s | whole step s |",
        "|---|---|---|---|---|",
    ]
    for path in PATHS:
        reports = [report for (kind, _), report in found.items() if kind == path]
        last = [statistics.mean(report["rewards"][-tail:]) for report in reports]
        held = [report["after"]["greedy"]["mean"] for report in reports]
        seconds, alone = timed[path]["seconds"], timed[path]["update_seconds"]
        update = statistics.median(alone[2:] or alone)
        whole = seconds["rollout"] / len(alone) + update
        lines.append(f"| {path} | {_spread(last)} | {_spread(held)} | {update:.3f} | {whole:.2f} |")
    ends = {run: statistics.mean(report["rewards"][-tail:]) for run, report in found.items()}
    differences = {
        path: _spread([ends[path, seed] - ends["plain", seed] for seed in range(options.seeds)]) for path in PATHS[:-1]
    }
    one = next(iter(found.values()))
    lines += [
        "",
        "Rewards less those of the plain path, seed by seed: "
        + ", ".join(f"{path} {difference}" for path, difference in differences.items())
        + ".",
        "",
        "![rewards](learning_curves.png)",
        "",
        f"* hardware: {one['hardware']}",
        "* versions: " + ", ".join(f"{name} {version}" for name, version in one["versions"].items()),
        f"* commit: {one['commit']}",
        f"* command: `python {' '.join(sys.argv)}`",
        "",
    ]
    return "\n".join(lines)


def _range(found: dict[tuple[str, int], Any]) -> str:
    steps = [report["steps"] for report in found.values()]
    return f"{min(steps)}" if min(steps) == max(steps) else f"{min(steps)} to {max(steps)}"


def _spread(values: list[float]) -> str:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.3f} ± {error:.3f}"


def draw(found: dict[tuple[str, int], Any], path: Path) -> None:
    """Each run's rewards, averaged over 5 steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for (kind, seed), report in found.items():
        rewards = report["rewards"]
        smooth = [statistics.mean(rewards[max(0, i - 4) : i + 1]) for i in range(len(rewards))]
        axes.plot(range(1, len(smooth) + 1), smooth, color=f"C{PATHS.index(kind)}", label=None if seed else kind)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("mean reward")
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main()
