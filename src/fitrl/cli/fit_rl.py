"""`fitrl fit_rl`: teach a model as a configuration says.

Enters: the command line. Leaves: a run folder, with the configuration beside what was learned.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException

from fitrl.cli.backends import fit_rl_arguments
from fitrl.cli.config import DEFAULT_BACKEND, FitRLCLI, make_parser
from fitrl.cli.imports import working_directory_importable
from fitrl.cli.loop import learn
from fitrl.cli.naming import name_run
from fitrl.discovery import trainer_class
from fitrl.errors import FitRLError, GroupError
from fitrl.strategies.verbs import PolicyVerbs
from fitrl_command import INTERRUPTED, fail

WRONG = 2


def main(arguments: Sequence[str]) -> int:
    """Run it; returns the exit status."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="lightning")
    backend = DEFAULT_BACKEND
    with working_directory_importable():
        try:
            given = with_config_of_resumed(list(arguments))
            backend = choose_backend(given)
            if "--help_all" in given:
                make_parser(backend, shows_all=True).print_help()
                return 0
            cli = FitRLCLI(backend, given, name_run=name_run)
        except argparse.ArgumentError as error:
            return _refuse(explain(str(error), backend))
        except (FitRLError, MisconfigurationException, ValueError, TypeError, ImportError, OSError) as error:
            # what a trainer, callback or logger says of the options that it was given
            return _refuse(str(error) or type(error).__name__)
        try:
            learn(cli)
        except GroupError as error:
            return fail(f"{error} ({where(error.exceptions[-1])})", 1)
        except KeyboardInterrupt:
            keeps_here = isinstance(cli.trainer.strategy, PolicyVerbs)  # else a service keeps the checkpoints
            if not cli.model.checkpoints() and (keeps_here or not cli.model.step):
                return fail("interrupted before anything was learned", INTERRUPTED)
            return fail(f"interrupted; go on with: fitrl fit_rl --resume {cli.model.run_dir}", INTERRUPTED)
    return 0


def _refuse(message: str) -> int:
    """Complain about the command line, once for all ranks: they have the same."""
    return fail(message, WRONG) if os.environ.get("RANK", "0") == "0" else WRONG


def with_config_of_resumed(arguments: list[str]) -> list[str]:
    """The command line with the configuration of the run that it resumes, where it gives no other."""
    first, _ = _first_look(arguments)
    if first.resume is None or first.config:
        return arguments
    path = _find_resumed(first) / "config.yaml"
    return ["--config", str(path), *arguments] if path.is_file() else arguments


def choose_backend(arguments: Sequence[str]) -> str:
    """The backend: of the command line, else of the last file that names one."""
    first, _ = _first_look(arguments)
    if first.backend is not None:
        return str(first.backend)
    for path in reversed(first.config):
        try:
            content = yaml.safe_load(Path(path).expanduser().read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            continue  # parsing it in earnest says what is wrong with it
        if isinstance(content, dict) and content.get("backend") is not None:
            return str(content["backend"])
    return DEFAULT_BACKEND


def explain(message: str, backend: str) -> str:
    """A complaint of the parser, and what could have been meant."""
    names = [argument.name for argument in fit_rl_arguments(trainer_class(backend))]
    mentioned = re.findall(r"\bfit_rl\.(\w+)|'fit_rl' does not accept option '(\w+)'", message)
    wrong = [name for pair in mentioned for name in pair if name and name not in names]
    known = f"; fit_rl of the backend {backend!r} takes: {', '.join(names)}" if wrong else ""
    return f"{message.strip().rstrip('.')}{known}"


def where(error: BaseException) -> str:
    """File and line that raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "nowhere in Python"


def _find_resumed(first: argparse.Namespace) -> Path:
    from fitrl.cli.runs import find_run

    return find_run(first.resume, Path(first.root or ".fitrl"))


def _first_look(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--backend")
    parser.add_argument("-c", "--config", action="append", default=[])
    parser.add_argument("--resume")
    parser.add_argument("--model.root", dest="root")
    return parser.parse_known_args(arguments)


def make_completion_parser() -> Any:
    """The parser whose options a shell completes."""
    return make_parser(shows_all=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
