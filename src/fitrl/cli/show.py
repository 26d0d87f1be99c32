"""`fitrl show RUN`: what the policy said, best, worst and newest."""

from __future__ import annotations

import argparse
import heapq
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fitrl.cli.numbers import not_negative
from fitrl.cli.runs import add_run_arguments, find_run
from fitrl.data.completion import Completion
from fitrl.data.groups import Trajectory
from fitrl.errors import DataError
from fitrl.policy import trajectories as files

# all but tab and newline: what a policy says must not steer the terminal
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A trajectory and where it was found."""

    step: int
    group: int
    index: int
    trajectory: Trajectory

    @property
    def reward(self) -> float:
        """The trajectory's reward."""
        return float(self.trajectory.reward)


def make_parser() -> argparse.ArgumentParser:
    """The options of `fitrl show`."""
    parser = argparse.ArgumentParser(
        prog="fitrl show",
        description="Print the best, worst and newest trajectories that `model.log` kept of a run.",
        epilog="example: fitrl show demo/adder-20260101-120000 --best 3 --worst 3 --newest 0",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_run_arguments(parser)
    for kind in ("best", "worst", "newest"):
        parser.add_argument(f"--{kind}", type=not_negative, default=1, metavar="N", help=f"how many of the {kind}")
    parser.add_argument("--split", default="train", help="whose trajectories")
    parser.add_argument("--step", type=not_negative, metavar="STEP", help="of this step only; None: of all")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Print the trajectories."""
    options = make_parser().parse_args(arguments)
    run = find_run(options.run, options.root)
    folder = run / "trajectories" / options.split
    known = files.steps(folder)
    if not known:
        splits = sorted(path.name for path in (run / "trajectories").glob("*") if files.steps(path))
        raise DataError(
            f"{run} has no trajectories of split {options.split!r}; it has: {', '.join(splits) or 'none at all'}"
        )
    chosen = choose(folder, known if options.step is None else [options.step], options)
    _print(chosen)
    return 0


def choose(folder: Path, steps: Sequence[int], options: argparse.Namespace) -> list[tuple[str, Found]]:
    """The trajectories to print, each with what it is: "best", "worst" or "newest"."""
    best = heapq.nlargest(options.best, _rated(folder, steps), key=_quality) if options.best else []
    worst = heapq.nsmallest(options.worst, _rated(folder, steps), key=_quality) if options.worst else []
    newest = list(_found(folder, steps[-1:]))[-options.newest :] if options.newest else []
    return (
        [("best", found) for found in best]
        + [("worst", found) for found in worst]
        + [("newest", found) for found in newest]
    )


def _quality(found: Found) -> tuple[float, int]:
    return found.reward, found.step


def _rated(folder: Path, steps: Iterable[int]) -> Iterator[Found]:
    return (found for found in _found(folder, steps) if not math.isnan(found.reward))


def _found(folder: Path, steps: Iterable[int]) -> Iterator[Found]:
    for step in steps:
        for number, group in enumerate(files.read(folder, step)):
            for index, trajectory in enumerate(group):
                yield Found(step=step, group=number, index=index, trajectory=trajectory)


def _print(chosen: Sequence[tuple[str, Found]]) -> None:
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    console = Console()
    colours = {"best": "green", "worst": "red", "newest": "blue"}
    for kind, found in chosen:
        text = Text()
        for role, words in conversation(found.trajectory):
            text.append(f"{role}\n", style="bold")
            text.append(f"{clean(words)}\n")
        for record in found.trajectory.exceptions:
            text.append(f"survived {clean(record.type)}: {clean(record.message)}\n", style="red")
        text.rstrip()
        title = f"{kind}: reward {found.reward:g}, step {found.step}, group {found.group}, attempt {found.index}"
        console.print(Panel(text, title=Text(title), title_align="left", border_style=colours[kind]))


def conversation(trajectory: Trajectory) -> Iterator[tuple[str, str]]:
    """Who said what; what the policy said is marked."""
    for history in trajectory.histories():
        for item in history.messages_and_choices:
            message = item if isinstance(item, dict) else item.message  # of a file, so a completion where it is none
            role = str(message.get("role", "?"))
            said = message.get("content")
            words = [said if isinstance(said, str) else "" if said is None else repr(said)]
            words += [f"calls {call['function']['name']}({call['function']['arguments']})" for call in _calls(message)]
            yield (f"{role} (sampled)" if isinstance(item, Completion) else role), "\n".join(filter(None, words))
    for tokens in trajectory.token_histories:
        sampled = int(tokens.mask.sum())
        yield "tokens", f"{len(tokens)} token ids, {sampled} of them sampled; the run keeps no text of them"


def clean(text: str) -> str:
    """Text that a terminal prints and does not obey."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def _calls(message: dict[str, object]) -> list[dict[str, dict[str, object]]]:
    calls = message.get("tool_calls")
    return [call for call in calls if isinstance(call.get("function"), dict)] if isinstance(calls, list) else []
