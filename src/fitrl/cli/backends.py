"""`fitrl backends`: what is installed, whether it imports, and what its `fit_rl` takes."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from fitrl.errors import InvalidArgumentError


@dataclass(frozen=True, slots=True, kw_only=True)
class Argument:
    """One argument of a `fit_rl`, as a person reads it."""

    name: str
    type: str
    default: str
    text: str


def make_parser() -> argparse.ArgumentParser:
    """The options of `fitrl backends`."""
    parser = argparse.ArgumentParser(
        prog="fitrl backends",
        description="List the backends that are installed: name, trainer class, distribution, whether it imports; and "
        "the arguments of each fit_rl with their defaults.",
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help="only these backends")
    parser.add_argument("--brief", action="store_true", help="without the arguments")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Print the list."""
    options = make_parser().parse_args(arguments)
    found = {entry.name: entry for entry in entry_points(group="fitrl.trainers")}
    unknown = [name for name in options.names if name not in found]
    if unknown:
        raise InvalidArgumentError(f"no backend {', '.join(unknown)}; installed: {', '.join(sorted(found))}")
    for name in options.names or sorted(found):
        _print(found[name], brief=options.brief)
    if not options.names:
        for group in ("strategies", "samplers", "commands"):
            entries = sorted(entry_points(group=f"fitrl.{group}"), key=lambda entry: entry.name)
            if entries:
                print(f"{group:<12}" + ", ".join(f"{entry.name} ({_distribution(entry)})" for entry in entries))
    return 0


def fit_rl_arguments(trainer: type[Any]) -> list[Argument]:
    """The keyword arguments of a trainer's `fit_rl`, with what its docstring says of each."""
    from docstring_parser import parse

    texts = {
        entry.arg_name: " ".join((entry.description or "").split())
        for entry in parse(trainer.fit_rl.__doc__ or "").params
    }
    found = []
    for name, parameter in inspect.signature(trainer.fit_rl).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            kind = parameter.annotation if isinstance(parameter.annotation, str) else str(parameter.annotation)
            default = "required" if parameter.default is parameter.empty else repr(parameter.default)
            found.append(Argument(name=name, type=kind, default=default, text=texts.get(name, "")))
    return found


def _print(entry: EntryPoint, *, brief: bool) -> None:
    try:
        trainer = entry.load()
    except Exception as error:  # a plugin may fail in any way, and the others are still to be listed
        print(
            f"{entry.name}: {entry.value} ({_distribution(entry)}) does not import: {type(error).__name__}: {error}\n"
        )
        return
    print(f"{entry.name}: {trainer.__module__}.{trainer.__qualname__} ({_distribution(entry)}), imports")
    if not brief:
        _print_arguments(fit_rl_arguments(trainer))
    print()


def _print_arguments(arguments: Sequence[Argument]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("fit_rl argument", "default", "type", "effect", box=None, pad_edge=False, header_style="bold")
    for argument in arguments:
        table.add_row(*(Text(cell) for cell in (argument.name, argument.default, argument.type, argument.text)))
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # a file or a pipe has no width of its own
    console.print(table)


def _distribution(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else "unknown distribution"
