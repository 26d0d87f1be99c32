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
from samples import make_groups

FOLDER = Path(__file__).parent / "typing"
ROOT = FOLDER.parent.parent


def readme() -> str:
    """The README's Python, as one program."""
    return "\n\n".join(re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL))


def mypy(files: list[str]) -> dict[str, set[int]]:
    """Lines with errors in each file, by mypy --strict."""
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", *files],
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


def pyright(files: list[str]) -> dict[str, set[int]]:
    """Lines with errors in each file, by pyright; it lies in its wheel, node in another, nothing is downloaded."""
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, *files],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    report = json.loads(done.stdout[done.stdout.index("{") :])
    assert report["summary"]["filesAnalyzed"] == len(files)
    found: dict[str, set[int]] = {}
    for item in report["generalDiagnostics"]:
        if item["severity"] == "error":
            found.setdefault(Path(item["file"]).name, set()).add(item["range"]["start"]["line"] + 1)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("checker", [mypy, pyright], ids=lambda checker: checker.__name__)
def test_checkers_see_the_wrong_calls_and_no_others(checker, tmp_path) -> None:
    marked = {
        number
        for number, line in enumerate((FOLDER / "calls_wrong.py").read_text().splitlines(), 1)
        if line.endswith("# error")
    }
    assert len(marked) > 50
    (tmp_path / "from_the_readme.py").write_text(readme())
    files = [*sorted(FOLDER.glob("*.py")), tmp_path / "from_the_readme.py"]
    assert checker(list(map(str, files))) == {"calls_wrong.py": marked}


def test_the_steps_of_the_readme_train(tmp_path) -> None:
    """By hand, over batches of one's own: the same step as `fit_rl`."""
    steps = re.search(r"^verbs = .*?\n\n", readme(), re.MULTILINE | re.DOTALL)[0]
    steps = re.sub(r"fitrl\.rollout\(.*\)", "given", steps)
    given, gradients = make_groups(seed=1), []
    for name in ("by hand", "by fit_rl"):
        model = fitrl.TrainableModel(name.replace(" ", "-"), "readme", "tiny", root=tmp_path)
        with fitrl.LocalTrainer(accelerator="cpu", devices=1, enable_model_summary=False) as trainer:
            if name == "by hand":
                exec(steps, {"fitrl": fitrl, "trainer": trainer, "model": model, "given": given})
            else:
                trainer.fit_rl(model, given)
            assert model.step == 1
            gradients.append(float(trainer.verbs.policy_module.last_grad_norm))
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-6)


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
