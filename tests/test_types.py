"""Wrong calls are errors of mypy and pyright, on the line where they are made; right ones are not."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "typing"
ROOT = FOLDER.parent.parent


def mypy(file: Path) -> set[int]:
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", str(file)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = [re.match(r"(.+?):(\d+): error:", line) for line in done.stdout.splitlines()]
    return {int(match[2]) for match in found if match and Path(match[1]).name == file.name}


def pyright(file: Path) -> set[int]:
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, str(file)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    report = json.loads(done.stdout[done.stdout.index("{") :])
    return {item["range"]["start"]["line"] + 1 for item in report["generalDiagnostics"] if item["severity"] == "error"}


@pytest.mark.slow
@pytest.mark.parametrize("checker", [mypy, pyright])
@pytest.mark.parametrize("name", ["calls_right.py", "calls_wrong.py"])
def test_checkers_see_the_wrong_calls_and_no_others(checker, name) -> None:
    file = FOLDER / name
    marked = {number for number, line in enumerate(file.read_text().splitlines(), 1) if line.endswith("# error")}
    assert (name == "calls_wrong.py") == bool(marked)
    assert checker(file) == marked
