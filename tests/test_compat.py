"""Each private Lightning name that is used, held to what is relied on."""

import logging

import lightning
import pytest
from lightning.pytorch.loggers import CSVLogger

from fitrl import _compat
from fitrl.data.batch import Feed
from fitrl.data.packing import pack
from fitrl.policy.model import TrainableModel
from fitrl.policy.module import PolicyModule
from fitrl.strategies.local import LocalStrategy
from samples import make_samples


@pytest.fixture
def trainer(tmp_path) -> lightning.Trainer:
    return lightning.Trainer(
        strategy=LocalStrategy(),
        accelerator="cpu",
        devices=1,
        max_epochs=-1,
        logger=CSVLogger(tmp_path),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@pytest.fixture
def module(tmp_path) -> PolicyModule:
    return PolicyModule(TrainableModel("compat", "tests", "tiny", lora=None, root=tmp_path))


def feed() -> Feed:
    return Feed(pack(make_samples(seed=1, num_trajectories=4)))


def test_attach_sets_up_without_running_and_detach_forgets(trainer, module) -> None:
    _compat.attach(trainer, module)
    assert trainer.strategy.optimizers and module.trainer.global_step == 0
    assert module.policy.network is not None
    assert _compat.raw_optimizer(trainer.strategy) is trainer.strategy.optimizers[0]
    _compat.detach(trainer)
    assert trainer.lightning_module is None and not trainer.strategy.optimizers


def test_global_step(trainer, module) -> None:
    _compat.attach(trainer, module)
    _compat.set_global_step(trainer, 7)
    assert trainer.global_step == 7
    _compat.advance_global_step(trainer)
    assert trainer.global_step == 8
    _compat.allow_one_more_epoch(trainer)
    trainer.fit(module, train_dataloaders=feed())
    assert trainer.global_step == 9


def test_one_more_epoch_each_time_also_after_one_was_cut_short(trainer, module) -> None:
    for done in (1, 2):
        _compat.allow_one_more_epoch(trainer)
        trainer.fit(module, train_dataloaders=feed())
        assert _compat.epochs_processed(trainer) == done

    class Stop(lightning.Callback):
        def on_train_batch_start(self, *args) -> None:
            raise ArithmeticError

    trainer.callbacks.append(Stop())
    _compat.allow_one_more_epoch(trainer)
    with pytest.raises(ArithmeticError):
        trainer.fit(module, train_dataloaders=feed())
    trainer.callbacks.pop()
    before = trainer.global_step
    _compat.allow_one_more_epoch(trainer)
    trainer.fit(module, train_dataloaders=feed())
    assert trainer.global_step == before + 1


def test_epoch_notes_are_dropped_and_others_kept(trainer, module, caplog) -> None:
    caplog.set_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero")
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    _compat.allow_one_more_epoch(trainer)
    with _compat.without_epoch_notes():
        trainer.fit(module, train_dataloaders=feed())
        logger.info("something else")
    assert "something else" in caplog.text and "max_epochs" not in caplog.text
    _compat.allow_one_more_epoch(trainer)
    trainer.fit(module, train_dataloaders=feed())
    assert "`Trainer.fit` stopped: `max_epochs=2` reached." in caplog.text


def test_loggers_are_held_open_and_released_once(trainer, monkeypatch) -> None:
    finished = []
    monkeypatch.setattr(CSVLogger, "finalize", lambda self, status: finished.append(status))
    _compat.hold_loggers(trainer)
    _compat.hold_loggers(trainer)
    trainer.loggers[0].log_metrics({"a": 1.0}, step=1)
    trainer.loggers[0].finalize("success")
    assert not finished
    with open(trainer.loggers[0].experiment.metrics_file_path) as file:
        assert file.readline().startswith("a,")  # written, though nothing was closed
    _compat.release_loggers(trainer)
    _compat.release_loggers(trainer)
    assert finished == ["success"]


def test_schedulers_are_stepped(trainer, module) -> None:
    _compat.attach(trainer, module)
    [config] = trainer.strategy.lr_scheduler_configs
    before = config.scheduler.last_epoch
    trainer.strategy.optimizers[0].step()
    _compat.step_schedulers(trainer.strategy)
    assert config.scheduler.last_epoch == before + 1
