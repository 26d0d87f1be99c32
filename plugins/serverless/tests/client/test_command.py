"""`fitrl fit_rl --backend serverless`: the command line's loop on a service, and the key nowhere on disk."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator

import pytest

from fitrl_command import main

CONFIG = """
backend: serverless
model: {name: adder, project: smoke, base_model: tiny}
rollout: {tasks: "fitrl.demo:TASKS", reward: "fitrl.demo:correct", tasks_per_step: 2, group_size: 2, max_new_tokens: 4}
steps: 2
progress: false
"""


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(CONFIG)
    return tmp_path


@pytest.mark.filterwarnings("ignore:the service at .* is not fitrl's")
def test_a_run_and_its_continuation(foreign, key, in_folder, monkeypatch, capsys) -> None:
    # half of the answers to each prompt are right, in whatever order they are asked for: there is something to learn
    answers: dict[str, Iterator[str]] = {}
    chat = foreign.chat

    def answer(body: dict) -> dict:
        alternating = answers.setdefault(json.dumps(body["messages"]), itertools.cycle(["1", "77"]))
        return _said(chat(body), next(alternating))

    monkeypatch.setattr(foreign, "chat", answer)
    monkeypatch.setattr("fitrl.demo.correct", lambda task, trajectory: float(trajectory.completions()[0].text == "1"))
    assert main(["fit_rl", "--config", "run.yaml", "--trainer.url", foreign.url, "--trainer.key", key]) == 0
    told = capsys.readouterr().out
    [run] = (in_folder / ".fitrl" / "smoke").iterdir()
    assert f"checkpoint    me/smoke/{run.name}:step2" in told
    for path in in_folder.rglob("*"):
        assert path.is_dir() or key.encode() not in path.read_bytes(), path
    monkeypatch.setenv("FITRL_SERVERLESS_KEY", key)
    assert main(["fit_rl", "--resume", str(run), "--steps", "3"]) == 0
    assert f"checkpoint    me/smoke/{run.name}:step3" in capsys.readouterr().out


def _said(answer: dict, text: str) -> dict:
    answer["choices"][0]["message"]["content"] = text
    return answer


def test_without_an_address(in_folder, monkeypatch, capsys) -> None:
    monkeypatch.delenv("FITRL_SERVERLESS_URL", raising=False)
    assert main(["fit_rl", "--config", "run.yaml"]) == 2
    assert "pass url=..., or set FITRL_SERVERLESS_URL" in capsys.readouterr().err


def test_an_argument_of_another_backend(in_folder, capsys) -> None:
    assert main(["fit_rl", "--config", "run.yaml", "--fit_rl.num_epochs", "2"]) == 2
    assert "num_epochs" in (told := capsys.readouterr().err) and "fit_rl of the backend 'serverless' takes" in told
