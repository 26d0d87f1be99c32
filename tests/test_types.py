"""Wrong calls are errors of mypy and pyright, on the line where they are made; right ones are not."""

import inspect
import json
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import fitrl
from fitrl.errors import UnknownArgumentError
from fitrl.strategies.local import LocalStrategy

FOLDER = Path(__file__).parent / "typing"
ROOT = FOLDER.parent.parent


def mypy() -> dict[str, set[int]]:
    """Lines with errors in each file, by mypy --strict."""
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", *map(str, sorted(FOLDER.glob("*.py")))],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found: dict[str, set[int]] = {}
    for match in re.finditer(r"^(.+?):(\d+): error:", done.stdout, re.MULTILINE):
        found.setdefault(Path(match[1]).name, set()).add(int(match[2]))
    return found


def pyright() -> dict[str, set[int]]:
    """Lines with errors in each file, by pyright; it lies in its wheel, node in another, nothing is downloaded."""
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, str(FOLDER)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    report = json.loads(done.stdout[done.stdout.index("{") :])
    assert report["summary"]["filesAnalyzed"] == len(list(FOLDER.glob("*.py")))
    found: dict[str, set[int]] = {}
    for item in report["generalDiagnostics"]:
        if item["severity"] == "error":
            found.setdefault(Path(item["file"]).name, set()).add(item["range"]["start"]["line"] + 1)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("checker", [mypy, pyright], ids=lambda checker: checker.__name__)
def test_checkers_see_the_wrong_calls_and_no_others(checker) -> None:
    marked = {
        number
        for number, line in enumerate((FOLDER / "calls_wrong.py").read_text().splitlines(), 1)
        if line.endswith("# error")
    }
    assert len(marked) > 50
    assert checker() == {"calls_wrong.py": marked}


# -- the same at run time ---------------------------------------------------------------------------------------------


def test_protocols_are_checkable_at_run_time() -> None:
    trainer = fitrl.LocalTrainer(accelerator="cpu", devices=1)
    strategy = LocalStrategy()
    assert isinstance(trainer, fitrl.SupportsFitRL) and not isinstance(trainer, fitrl.PolicyTrainer)
    for protocol in (fitrl.PolicyTrainer, fitrl.Trains, fitrl.Scores, fitrl.ExportsWeights):
        assert isinstance(strategy, protocol) and not isinstance(object(), protocol)
    assert not isinstance(strategy, fitrl.SupportsFitRL)


def test_the_wrapper_hides_neither_signature_nor_documentation() -> None:
    signature = inspect.signature(fitrl.LocalTrainer.fit_rl)
    assert signature.parameters["learning_rate"].kind is inspect.Parameter.KEYWORD_ONLY
    assert "kl_estimator" in signature.parameters and not any(
        parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in signature.parameters.values()
    )
    assert typing.get_type_hints(fitrl.LocalTrainer.fit_rl)["return"] is fitrl.LocalTrainResult
    assert "ratio window" in (fitrl.LocalTrainer.fit_rl.__doc__ or "")
    common = inspect.signature(fitrl.SupportsFitRL.fit_rl).parameters
    assert set(common) <= set(signature.parameters)


def test_a_subclass_with_its_own_fit_rl_names_itself() -> None:
    class Mine(fitrl.LocalTrainer):
        backend = "mine"

        def fit_rl(self, model, groups, *, own_argument=1):
            return own_argument

    trainer = Mine(accelerator="cpu", devices=1)
    model = fitrl.TrainableModel("a", "b", "tiny")
    assert trainer.fit_rl(model, [], own_argument=4) == 4
    with pytest.raises(UnknownArgumentError, match="Mine.fit_rl.. takes no 'ppo'.*'mine' takes: own_argument$"):
        trainer.fit_rl(model, [], ppo=True)
    with pytest.raises(TypeError):
        trainer.fit_rl(model, [], 4)
