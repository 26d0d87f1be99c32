"""`fitrl completion SHELL`: a completion script for the shell, by shtab.

The script is static: the shell answers at once, where a command that is asked at every key press would import torch
each time. It knows what was installed when it was made.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from importlib.metadata import entry_points
from typing import Any

import shtab

from fitrl.cli import backends, demo, plot, show
from fitrl_command import COMMANDS, installed_commands

_FILES = {"config", "output", "root"}


def make_parser() -> argparse.ArgumentParser:
    """The options of `fitrl completion`."""
    parser = argparse.ArgumentParser(
        prog="fitrl completion",
        description="Print a completion script. For bash: "
        "fitrl completion bash > ~/.local/share/bash-completion/completions/fitrl",
    )
    parser.add_argument("shell", choices=shtab.SUPPORTED_SHELLS)
    return parser


def main(arguments: Sequence[str]) -> int:
    """Print the script."""
    options = make_parser().parse_args(arguments)
    print(shtab.complete(whole_parser(), options.shell))
    return 0


def whole_parser() -> argparse.ArgumentParser:
    """One plain parser of all sub-commands and their options."""
    from fitrl.cli.fit_rl import make_completion_parser

    parser = argparse.ArgumentParser(prog="fitrl", description="Teach language models by reinforcement.")
    parser.add_argument("--version", action="store_true", help="print the version")
    names = parser.add_subparsers(dest="command")
    ours: dict[str, Any] = {
        "fit_rl": make_completion_parser(),
        "demo": demo.make_parser(),
        "plot": plot.make_parser(),
        "show": show.make_parser(),
        "backends": backends.make_parser(),
        "completion": make_parser(),
    }
    for name in installed_commands():
        text = COMMANDS[name][1] if name in COMMANDS else "a plugin's command"
        command = names.add_parser(name, help=text, add_help=False)
        if name in ours:
            _copy(ours[name]._actions, command)
    return parser


def _copy(actions: Iterable[argparse.Action], to: argparse.ArgumentParser) -> None:
    """The names and choices of options, without what jsonargparse adds to them."""
    for action in actions:
        choices = list(action.choices) if action.choices else _choices(action)
        nargs = action.nargs if isinstance(action.nargs, str) and action.nargs in "*?+" else None
        takes_nothing = action.nargs == 0
        if takes_nothing:
            to.add_argument(*action.option_strings, dest=action.dest, action="store_true")
            continue
        names: dict[str, Any] = {"dest": action.dest} if action.option_strings else {}
        copied = to.add_argument(
            *(action.option_strings or [action.dest]), choices=choices or None, nargs=nargs, **names
        )
        key = action.dest.split(".")[-1]
        if key in _FILES or action.dest in ("run", "resume", "rollout.tasks", "model.base_model"):
            copied.complete = shtab.DIRECTORY if key in ("root", "run", "resume") else shtab.FILE  # type: ignore[attr-defined]


def _choices(action: argparse.Action) -> list[str]:
    if action.dest in ("backend", "names"):
        return sorted(entry.name for entry in entry_points(group="fitrl.trainers"))
    shown = action.metavar if isinstance(action.metavar, str) else ""  # jsonargparse writes closed types {a,b}
    return shown.strip("{}").split(",") if shown.startswith("{") else []
