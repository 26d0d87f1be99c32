"""`fitrl completion`: what bash answers to the tabulator."""

import shutil
import subprocess

import pytest

from fitrl_command import COMMANDS, main

ASK = """
source "$1"
shift
COMP_WORDS=(fitrl "$@")
COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 ))
asked=$(complete -p fitrl)
function=${asked#*-F }
${function%% *} fitrl "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """The script, as the README says to make it."""
    path = tmp_path_factory.mktemp("completion") / "fitrl"
    import contextlib

    with path.open("w") as file, contextlib.redirect_stdout(file):
        assert main(["completion", "bash"]) == 0
    return path


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["fi"], {"fit_rl"}),
        (["show", "--ne"], {"--newest"}),
        (["fit_rl", "--fit_rl.kl"], {"--fit_rl.kl_coef", "--fit_rl.kl_in", "--fit_rl.kl_estimator"}),
        (["fit_rl", "--fit_rl.kl_in", ""], {"loss", "advantage"}),
        (["fit_rl", "--fit_rl.ppo", ""], {"true", "false"}),
        (["fit_rl", "--trainer.prec"], {"--trainer.precision"}),
        (["fit_rl", "--backend", "lo"], {"local"}),
    ],
)
def test_bash_completes(script, typed, expected) -> None:
    done = subprocess.run(
        ["bash", "--norc", "-c", ASK, "bash", str(script), *typed], capture_output=True, text=True, check=True
    )
    assert set(done.stdout.split()) == expected, done.stderr


def test_bash_completes_commands_and_files(script, tmp_path) -> None:
    (tmp_path / "mine.yaml").write_text("")

    def ask(*typed: str) -> set[str]:
        command = ["bash", "--norc", "-c", ASK, "bash", str(script), *typed]
        return set(subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout.split())

    assert set(COMMANDS) <= ask("")
    assert ask("fit_rl", "--config", "mi") == {"mine.yaml"}


def test_other_shells(capsys) -> None:
    assert main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out.startswith("#compdef fitrl")
