"""The first step of the `fitrl` command: which sub-command, and what becomes of its errors.

Enters: the command line. Leaves: the exit status of a sub-command, which gets the rest of the line. This file lies
beside the package, because importing the package brings torch and Lightning, and help should not wait for them.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points, version

COMMANDS = {
    "fit_rl": ("fitrl.cli.fit_rl:main", "teach a model, as a YAML file says"),
    "demo": ("fitrl.cli.demo:main", "the bundled tiny policy learns single-digit addition, in about a minute on a CPU"),
    "plot": ("fitrl.cli.plot:main", "draw the reward curve of a run, or any of its metrics"),
    "show": ("fitrl.cli.show:main", "print the best, worst and newest trajectories of a run"),
    "backends": ("fitrl.cli.backends:main", "list what is installed, and the arguments of each backend's fit_rl"),
    "completion": ("fitrl.cli.completion:main", "print a completion script for your shell"),
}
INTERRUPTED = 130  # 128 + SIGINT, as shells say it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 for what went wrong, 2 for a wrong command line."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    commands = installed_commands()
    if not given or given[0] not in commands:
        make_parser(commands).parse_args(given)  # help, version, or a complaint; all of them leave
    try:
        return int(commands[given[0]].load()(given[1:]) or 0)
    except KeyboardInterrupt:
        return fail("interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader of a pipe has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        from fitrl.errors import FitRLError

        if not isinstance(error, FitRLError):
            raise
        return fail(str(error), 1)


def fail(message: str, status: int) -> int:
    """Print one line on standard error; returns the status."""
    print(f"fitrl: {' '.join(message.split())}", file=sys.stderr)
    return status


def installed_commands() -> dict[str, EntryPoint]:
    """Our sub-commands, and those of plugins: `fitrl.commands` entry points, each a `main(arguments) -> status`.

    A plugin cannot take the place of one of ours.
    """
    plugins = {entry.name: entry for entry in entry_points(group="fitrl.commands")}
    ours = {name: EntryPoint(name, value, "fitrl.commands") for name, (value, _) in COMMANDS.items()}
    return ours | {name: plugins[name] for name in sorted(plugins) if name not in ours}


def make_parser(commands: dict[str, EntryPoint]) -> argparse.ArgumentParser:
    """The parser of what stands before the sub-command."""
    parser = argparse.ArgumentParser(
        prog="fitrl",
        description="Teach language models by reinforcement.",
        epilog="`fitrl COMMAND --help` says more.",
    )
    parser.add_argument("--version", action="version", version=f"fitrl {version('fitrl')}")
    names = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, entry in commands.items():
        names.add_parser(name, help=COMMANDS[name][1] if name in COMMANDS else _summary(entry), add_help=False)
    return parser


def _summary(entry: EntryPoint) -> str:
    """What a plugin says of itself, without importing it."""
    text = entry.dist.metadata.json.get("summary") if entry.dist is not None else None
    return str(text or f"of {entry.value}").replace("%", "%%")


if __name__ == "__main__":
    sys.exit(main())
