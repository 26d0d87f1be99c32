"""The API key is checked at construction and is nowhere to be read: logs, errors, checkpoints, reprs, run folders."""

from __future__ import annotations

import logging
import traceback
from typing import Any

import pytest
import tinker
from lightning.pytorch.callbacks import ModelCheckpoint
from stand_in import KEY, status_error

import fitrl_tinker
from fitrl import LoraSettings, TrainableModel
from fitrl.cli.config import FitRLCLI
from fitrl.errors import InvalidArgumentError
from fitrl_tinker import ServiceError, TinkerStrategy, TinkerTrainer
from fitrl_tinker.credentials import find_access
from samples import make_groups


@pytest.fixture
def no_key(monkeypatch) -> None:
    monkeypatch.delenv("TINKER_API_KEY", raising=False)
    monkeypatch.delenv("TINKER_BASE_URL", raising=False)


def test_no_key_is_an_error_at_construction(no_key) -> None:
    for kind in (TinkerTrainer, TinkerStrategy):
        with pytest.raises(InvalidArgumentError, match="TINKER_API_KEY"):
            kind()


@pytest.mark.parametrize("wrong", ["sk-12345", "", " tml-x", "tml-x\n"])
def test_what_is_no_key_is_refused_and_not_repeated(wrong, no_key, monkeypatch) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        TinkerTrainer(api_key=wrong)
    assert not wrong.strip() or wrong.strip() not in str(caught.value)
    monkeypatch.setenv("TINKER_API_KEY", wrong)
    with pytest.raises(InvalidArgumentError):
        TinkerTrainer()


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "http://localhost:8000", "http://[::1]:8000"])
def test_a_server_on_this_machine_may_go_without(url, no_key) -> None:
    assert find_access(url, None).api_key == "tml-local"
    assert find_access(url, KEY).api_key == KEY


@pytest.mark.parametrize(
    "url",
    ["http://tinker.example.com", "ftp://x", "example.com", "https://user:pass@example.com", "http://127.0.0.1.x.com"],
)
def test_an_address_that_would_give_the_key_away_is_refused(url, no_key) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        find_access(url, KEY)
    assert KEY not in str(caught.value) and "pass@" not in str(caught.value)
    with pytest.raises(InvalidArgumentError):
        find_access("https://tinker.example.com", None)


def test_the_environment_says_where_and_with_which_key(no_key, monkeypatch) -> None:
    monkeypatch.setenv("TINKER_BASE_URL", "https://tinker.example.com")
    monkeypatch.setenv("TINKER_API_KEY", KEY)
    access = find_access(None, None)
    assert (access.base_url, access.api_key) == ("https://tinker.example.com", KEY)
    assert find_access("http://127.0.0.1:1", "tml-other").api_key == "tml-other"


def test_the_key_is_nowhere_to_be_read(service, tmp_path, capfd, caplog) -> None:
    """A whole life of a run, faults included, with a server that repeats the key in what it says."""
    caplog.set_level(logging.DEBUG)
    model = TrainableModel("secret", "keys", "tiny", lora=LoraSettings(rank=4), root=tmp_path)
    texts: list[str] = []
    keep = ModelCheckpoint(dirpath=tmp_path / "kept", save_last=True, every_n_train_steps=1)
    with TinkerTrainer(api_key=KEY, callbacks=[keep], default_root_dir=tmp_path, timeout=30) as trainer:
        trainer.fit_rl(model, make_groups(seed=1), learning_rate=1e-3, deploy_checkpoint=True, verbose=True)
        strategy, sampler = trainer.tinker_strategy, trainer.sampler(model)
        for thing in (trainer, strategy, strategy.service, strategy.service.access, sampler, strategy.get_config()):
            texts += [repr(thing), str(thing)]
        faults: list[Any] = [
            status_error(tinker.AuthenticationError, 401, f"the key {KEY} was refused"),
            RuntimeError(f"X-API-Key: {KEY}"),
            "lost",
        ]
        logging.getLogger("tinker").warning("paused: account of %s", KEY)
        for fault in faults:
            service.fail_next("optim_step", fault)
            with pytest.raises(ServiceError) as caught:
                trainer.fit_rl(model, make_groups(seed=2))
            texts += [str(caught.value), repr(caught.value), "".join(traceback.format_exception(caught.value))]
    assert service.keys == {KEY}  # it did reach the SDK
    assert any("tml-***" in text for text in texts)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"tinker.json", "last.ckpt", "holder.json"} <= {path.name for path in files}
    for path in files:
        assert KEY.encode() not in path.read_bytes(), path
    printed = capfd.readouterr()
    said = [record.getMessage() for record in caplog.records if record.name != "tinker"]  # that one said it itself
    for text in [*texts, *said, printed.out, printed.err]:
        assert KEY not in text


def test_the_command_line_does_not_save_it(service, tmp_path) -> None:
    arguments = ["--backend", "tinker", "--trainer.api_key", KEY, "--model.base_model", "tiny"]
    arguments += ["--model.name", "cli", "--model.project", "keys"]
    arguments += ["--rollout.tasks", "fitrl.demo.TASKS", "--rollout.reward", "fitrl.demo.correct"]
    cli = FitRLCLI("tinker", arguments, name_run=lambda config: (tmp_path, "keys", "cli"))
    assert isinstance(cli.trainer, TinkerTrainer) and cli.trainer.tinker_strategy.service.access.api_key == KEY
    assert "api_key" in cli.resolved and KEY not in cli.resolved


def test_the_sdk_is_imported_only_when_it_is_needed() -> None:
    import subprocess
    import sys

    code = (
        "import sys, fitrl, fitrl_tinker; fitrl_tinker.TinkerStrategy(api_key='tml-x'); print('tinker' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "False" and fitrl_tinker.__all__
