"""The configuration of `fitrl fit_rl`: a LightningCLI whose trainer is a backend's.

Enters: the command line and YAML files. Leaves: the model, the trainer, the rollouts, and the keyword arguments of
`fit_rl`, typed by the backend's own signatures.
"""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, DefaultHelpFormatter, Namespace  # type: ignore[attr-defined]
from jsonargparse.typing import PositiveInt
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from typing_extensions import override

from fitrl.cli.rollouts import Rollouts
from fitrl.discovery import trainer_class
from fitrl.policy.model import TrainableModel
from fitrl.trainers.progress import RewardProgressBar

DEFAULT_BACKEND = "local"
_DESCRIPTION = """\
Teach a model by reinforcement: sample trajectories, rate them, call fit_rl, log; again. Each run gets a folder of
its own, <root>/<project>/<name>-<time>, with its configuration, history, trajectories and checkpoints.

examples:
  fitrl fit_rl --config configs/smoke/local.yaml
  fitrl fit_rl --config configs/smoke/local.yaml --fit_rl.learning_rate 1e-4 --trainer.devices 1 --steps 20
  fitrl fit_rl --config .fitrl/demo/adder-20260101-120000/config.yaml      the same settings, a new run
  fitrl fit_rl --resume demo/adder-20260101-120000 --steps 200             the same run, further
  torchrun --nproc_per_node 2 -m fitrl fit_rl --config my.yaml             several processes

A value is a --section.key, or a line under that section in the YAML file; later ones win. --print_config prints the
whole configuration. Options of lightning.Trainer, like devices, precision, callbacks and logger, are keys of the
section trainer too: --help_all lists them, --trainer.callbacks.help CLASS shows those of a class."""
_SECRETS = {"key", "api_key"}  # of a backend's trainer
_SECTIONS = {
    "model": "model: what is trained, and where its run lies",
    "trainer": "trainer: of the backend; and every option of lightning.Trainer, see --help_all",
    "trainer.optimizer": "trainer.optimizer: AdamW's settings, but for the learning rate",
    "rollout": "rollout: tasks, reward, sampling",
    "fit_rl": "fit_rl: what each call does",
}


class _Formatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the lines of the description."""


class Parser(LightningArgumentParser):
    """A parser whose help a person can read: no lists of all known subclasses, and Lightning's options on demand."""

    hidden: Sequence[argparse.Action] | None = None  # what the help leaves out; None: nothing

    @override
    def format_help(self, formatter: argparse.HelpFormatter | None = None) -> str:
        if self.hidden is None:
            return super().format_help(formatter)
        texts = [action.help for action in self.hidden]
        for action in self.hidden:
            action.help = argparse.SUPPRESS  # while it is printed: jsonargparse saves no option that is suppressed
        try:
            text = super().format_help(formatter)
        finally:
            for action, told in zip(self.hidden, texts, strict=True):
                action.help = told
        return re.sub(r",\s+known\s+subclasses:[^)]*\)", ")", text)


def make_parser(backend: str = DEFAULT_BACKEND, *, shows_all: bool = False) -> Parser:
    """The parser of a backend.

    Args:
        backend: name of a `fitrl.trainers` entry point.
        shows_all: let the help list the options of `lightning.Trainer` and of classes too.

    Raises:
        InvalidArgumentError: no such backend is installed.
    """
    trainer = trainer_class(backend)
    parser = Parser(
        prog="fitrl fit_rl",
        usage="fitrl fit_rl [--backend NAME] [--config FILE] [--resume RUN] [--SECTION.KEY VALUE ...]",
        description=_DESCRIPTION,
        exit_on_error=False,
        formatter_class=_Formatter,
    )
    parser.add_argument(
        "-c", "--config", action=ActionConfigFile, metavar="FILE", help="a YAML file; may be given several times"
    )
    run = parser.add_argument_group("run")
    run.add_argument("--backend", default=backend, metavar="NAME", help="which trainer, see `fitrl backends`")
    run.add_argument(
        "--steps", type=PositiveInt, default=100, help="calls of fit_rl in the whole run, resumed ones included"
    )
    run.add_argument("--seed", type=int, default=0, help="of the tasks drawn and of the sampling")
    run.add_argument(
        "--save_every", type=PositiveInt, default=1, help="calls from one checkpoint to the next; the last is saved too"
    )
    run.add_argument(
        "--resume", type=str | None, default=None, metavar="RUN", help="go on with this run: a folder, or project/name"
    )
    run.add_argument("--progress", type=bool, default=True, help="show a progress bar")
    run.add_argument("--help_all", action="store_true", default=argparse.SUPPRESS, help="this, and every other option")
    parser.add_class_arguments(TrainableModel, "model")
    parser.add_class_arguments(Rollouts, "rollout")
    parser.add_method_arguments(trainer, "fit_rl", "fit_rl", skip={"model", "groups"})
    parser.add_lightning_class_args(trainer, "trainer")
    groups = parser.groups or {}
    for name in _SECTIONS.keys() & groups.keys():
        groups[name].title = _SECTIONS[name]
    if not shows_all:
        own = set(inspect.signature(trainer.__init__).parameters)
        parser.hidden = [action for action in parser._actions if _is_detail(action.dest, own)]
    return parser


def _is_detail(dest: str, own: set[str]) -> bool:
    """Whether an option is left out of the short help: Lightning's, the help of classes, whole sections."""
    key = dest.split(".")
    of_lightning = key[0] == "trainer" and len(key) > 1 and key[1] not in own
    return of_lightning or (key[-1] == "help" and len(key) > 1) or dest in _SECTIONS


def _reproducible(config: Namespace) -> Namespace:
    """The configuration as it is saved: of a new run, from whichever folder it is started."""
    saved = config.clone()
    saved.resume = None
    for secret in _SECRETS & set(saved.trainer.keys()):
        saved.trainer[secret] = None  # a resumed run takes it from the environment
    if isinstance(saved.rollout.tasks, str) and saved.rollout.tasks.endswith(".jsonl"):
        saved.rollout.tasks = str(Path(saved.rollout.tasks).expanduser().resolve())
    return saved


class FitRLCLI(LightningCLI):
    """Parses, and builds model, trainer and rollouts of a run.

    Args:
        backend: whose trainer.
        arguments: the command line after `fitrl fit_rl`.
        name_run: given the parsed configuration, says where the run lies: root, project, name.
    """

    def __init__(self, backend: str, arguments: Sequence[str], *, name_run: Any) -> None:
        self._backend_name = backend
        self._name_run = name_run
        super().__init__(
            trainer_class=trainer_class(backend),
            save_config_callback=None,
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=list(arguments),
        )

    @override
    def setup_parser(
        self, add_subcommands: bool, main_kwargs: dict[str, Any], subparser_kwargs: dict[str, Any]
    ) -> None:
        self.parser = make_parser(self._backend_name)

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)
        self.config["seed_everything"] = False  # LightningCLI's own; the seed is set when the run is known

    @override
    def before_instantiate_classes(self) -> None:
        self.config.pop("seed_everything")
        self.resolved = self.parser.dump(_reproducible(self.config), skip_unset=False)
        self.config.model.root, self.config.model.project, self.config.model.name = self._name_run(self.config)
        folder = self.config.model.root / self.config.model.project / self.config.model.name
        if self.config.trainer.get("default_root_dir") is None:  # Lightning's own files go there too
            self.config.trainer.default_root_dir = str(folder)

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Any:
        options = self.config_init.trainer
        given = options.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        if any(isinstance(callback, ProgressBar) for callback in given) or options.get("enable_progress_bar"):
            return super().instantiate_trainer(**kwargs)
        bar = [RewardProgressBar(self.config.steps)] if self.config.progress else []
        return super().instantiate_trainer(callbacks=[*given, *bar], **kwargs)

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of `fit_rl`."""
        return dict(self.config_init.fit_rl)

    @property
    def rollouts(self) -> Rollouts:
        """The rollouts."""
        rollouts: Rollouts = self.config_init.rollout
        return rollouts
