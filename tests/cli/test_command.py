"""The first step of the command: which sub-command, help that does not wait for torch, errors in one line."""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fitrl
import fitrl_command
from fitrl_command import main

COMMAND = str(Path(sys.executable).parent / "fitrl")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [([], "required: COMMAND"), (["nothing"], "invalid choice: 'nothing'"), (["--x"], "required: COMMAND")],
)
def test_no_such_command(arguments, complaint, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    told = capsys.readouterr()
    assert stop.value.code == 2 and told.out == ""
    assert told.err.startswith("usage: fitrl") and complaint in told.err


def test_help_names_every_command_and_says_what_it_does(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for name, (_, text) in fitrl_command.COMMANDS.items():
        assert f"{name} {text}" in told
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"fitrl {fitrl.__version__}\n"


def test_help_imports_neither_torch_nor_the_package() -> None:
    code = (
        "import sys, fitrl_command\n"
        "try: fitrl_command.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'lightning', 'fitrl', 'jsonargparse', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", fitrl_command.COMMANDS)
def test_every_command_is_there_and_has_help(name, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    told = capsys.readouterr().out
    assert stop.value.code == 0 and told.startswith(f"usage: fitrl {name}")


def plugin(monkeypatch, function, name="serve", module="fitrl_plugin_of_a_test") -> None:
    """Install a `fitrl.commands` entry point, as a plugin's metadata would."""
    sys_module = type(sys)(module)
    sys_module.main = function
    monkeypatch.setitem(sys.modules, module, sys_module)
    entry = importlib.metadata.EntryPoint(name, f"{module}:main", "fitrl.commands")
    monkeypatch.setattr(fitrl_command, "entry_points", lambda group: [entry] if group == "fitrl.commands" else [])


def test_a_plugin_brings_a_command(monkeypatch, capsys) -> None:
    seen = []
    plugin(monkeypatch, lambda arguments: seen.append(arguments) or 3)
    assert main(["serve", "--port", "1", "--help"]) == 3
    assert seen == [["--port", "1", "--help"]]  # everything behind its name is the plugin's
    with pytest.raises(SystemExit):
        main(["--help"])
    assert re.search(r"serve +of fitrl_plugin_of_a_test:main", capsys.readouterr().out)


def test_an_installed_plugin_is_found_by_its_metadata(tmp_path) -> None:
    """What an installer leaves: a module, and metadata with a summary and the entry point."""
    (tmp_path / "fitrl_serve_of_a_test.py").write_text("def main(arguments):\n    print('served', arguments)\n")
    metadata = tmp_path / "fitrl_serve_of_a_test-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: fitrl-serve-of-a-test\nVersion: 1.0\nSummary: Serve 100% of it\n"
    )
    (metadata / "entry_points.txt").write_text("[fitrl.commands]\nserve_of_a_test = fitrl_serve_of_a_test:main\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}

    def run(*arguments: str) -> str:
        command = [COMMAND, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout

    assert re.search(r"serve_of_a_test\s+Serve 100% of it", run("--help"))
    assert run("serve_of_a_test", "--port", "1") == "served ['--port', '1']\n"


def test_a_plugin_that_returns_nothing_has_succeeded(monkeypatch) -> None:
    plugin(monkeypatch, lambda arguments: None)
    assert main(["serve"]) == 0


def test_a_plugin_cannot_take_the_place_of_ours(monkeypatch) -> None:
    plugin(monkeypatch, lambda arguments: 3, name="demo")
    assert fitrl_command.installed_commands()["demo"].value == "fitrl.cli.demo:main"


def test_errors_of_fitrl_are_one_line_and_status_1(monkeypatch, capsys) -> None:
    def fails(arguments):
        raise fitrl.FitRLError("something is not so;\n  do this")

    plugin(monkeypatch, fails)
    assert main(["serve"]) == 1
    told = capsys.readouterr()
    assert told.err == "fitrl: something is not so; do this\n" and told.out == ""


def test_other_errors_are_not_hidden(monkeypatch) -> None:
    plugin(monkeypatch, lambda arguments: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        main(["serve"])


def test_interrupted(monkeypatch, capsys) -> None:
    def stops(arguments):
        raise KeyboardInterrupt

    plugin(monkeypatch, stops)
    assert main(["serve"]) == 130
    assert capsys.readouterr().err == "fitrl: interrupted\n"


def test_the_installed_command_ends_with_the_status() -> None:
    done = subprocess.run([COMMAND, "nothing"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("usage: fitrl") and done.stdout == ""
    closed = subprocess.run(f"{COMMAND} backends | true", shell=True, capture_output=True, text=True, check=False)
    assert closed.stderr == ""
