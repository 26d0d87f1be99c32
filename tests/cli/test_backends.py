"""`fitrl backends`: what is installed."""

import importlib.metadata
import inspect
import re

import fitrl
from fitrl.cli import backends
from fitrl_command import main


def test_the_local_backend_and_all_its_arguments(capsys) -> None:
    assert main(["backends"]) == 0
    told = capsys.readouterr().out
    version = importlib.metadata.version("fitrl")
    assert f"local: fitrl.trainers.local.LocalTrainer (fitrl {version}), imports" in told
    lines = told[told.index("local: fitrl.") :].split("\n\n")[0].splitlines()
    for name, parameter in inspect.signature(fitrl.LocalTrainer.fit_rl).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            [line] = [line for line in lines if line.split()[:1] == [name]]
            assert repr(parameter.default) in line
    assert "learning_rate" in told and "of AdamW, before `lr_schedule`" in told
    assert re.search(rf"^strategies  .*\bfitrl_local \(fitrl {version}\)", told, re.MULTILINE)
    assert re.search(rf"^samplers    .*\btransformers \(fitrl {version}\)", told, re.MULTILINE)


def test_chosen_and_brief(capsys) -> None:
    assert main(["backends", "local", "--brief"]) == 0
    assert capsys.readouterr().out.strip().endswith("imports")
    assert main(["backends", "nowhere"]) == 1
    installed = sorted(entry.name for entry in importlib.metadata.entry_points(group="fitrl.trainers"))
    assert capsys.readouterr().err == f"fitrl: no backend nowhere; installed: {', '.join(installed)}\n"


def test_one_that_does_not_import_is_listed_with_the_reason(capsys, monkeypatch) -> None:
    broken = importlib.metadata.EntryPoint("broken", "fitrl_no_such_plugin:Trainer", "fitrl.trainers")
    local = importlib.metadata.EntryPoint("local", "fitrl.trainers.local:LocalTrainer", "fitrl.trainers")
    monkeypatch.setattr(backends, "entry_points", lambda group: [local, broken] if "trainers" in group else [])
    assert main(["backends", "--brief"]) == 0
    told = capsys.readouterr().out
    assert "broken: fitrl_no_such_plugin:Trainer (unknown distribution) does not import: ModuleNotFoundError" in told
    assert "local: " in told
