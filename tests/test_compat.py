"""Each private Lightning name that is used, held to what is relied on."""

import ast
import gc
import inspect
import logging
import signal
import warnings
import weakref

import lightning
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy

from fitrl import _compat
from fitrl.data.batch import Feed
from fitrl.data.packing import pack
from fitrl.policy.model import TrainableModel
from fitrl.policy.module import PolicyModule
from fitrl.strategies.local import LocalStrategy
from samples import make_samples

NOTES = "lightning.pytorch.utilities.rank_zero"


def make_trainer(logger, **options) -> lightning.Trainer:
    return lightning.Trainer(
        strategy=LocalStrategy(),
        accelerator="cpu",
        devices=1,
        max_epochs=-1,
        logger=logger,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


@pytest.fixture
def trainer(tmp_path) -> lightning.Trainer:
    return make_trainer(CSVLogger(tmp_path))


@pytest.fixture
def module(tmp_path) -> PolicyModule:
    return PolicyModule(TrainableModel("compat", "tests", "tiny", lora=None, root=tmp_path))


def feed(num_microbatches: int = 1) -> Feed:
    [batch] = pack(make_samples(seed=1, num_trajectories=4))
    return Feed([batch] * num_microbatches)


def test_every_function_has_a_test_here() -> None:
    functions = [
        name for name, member in vars(_compat).items() if getattr(member, "__module__", "") == _compat.__name__
    ]
    public = {name for name in functions if inspect.isfunction(getattr(_compat, name)) and not name.startswith("_")}
    used = {
        node.attr
        for node in ast.walk(ast.parse(inspect.getsource(inspect.getmodule(feed))))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "_compat"
    }
    assert public <= used, public - used


# -- attach and detach ------------------------------------------------------------------------------------------------


def test_attach_sets_up_without_running(trainer, module) -> None:
    _compat.attach(trainer, module)
    assert trainer.lightning_module is module and module.trainer is trainer
    assert trainer.strategy.optimizers and trainer.strategy.lr_scheduler_configs
    assert module.trainer.global_step == 0 and trainer.current_epoch == 0
    assert module.policy.network.training
    assert not trainer.training and trainer.state.fn is None
    _compat.detach(trainer)


def test_attach_is_what_a_fit_finds_and_leaves(trainer, module) -> None:
    """The fit after it sets nothing up again, and is the fit that would have been without it."""
    trainer.strategy.keep_alive = True
    _compat.attach(trainer, module)
    optimizer, network = _compat.raw_optimizer(trainer.strategy), module.policy.network
    _compat.allow_one_more_epoch(trainer)
    trainer.fit(module, train_dataloaders=feed())
    assert _compat.raw_optimizer(trainer.strategy) is optimizer and module.policy.network is network
    assert trainer.global_step == 1 and len(optimizer.state) > 0
    stock, plain = make_trainer(False), PolicyModule(module.model)
    _compat.allow_one_more_epoch(stock)
    stock.fit(plain, train_dataloaders=feed())
    for ours, theirs in zip(network.parameters(), plain.policy.network.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    trainer.strategy.close()


def test_attach_runs_callbacks_logging_and_precision(tmp_path, module) -> None:
    """What a callback logs in the first epoch after it arrives, and the strategy's precision is in force."""

    class Logs(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args) -> None:
            self.log("mine", 3.0, batch_size=1)

    trainer = make_trainer(False, callbacks=[Logs()], precision="bf16-mixed")
    trainer.strategy.keep_alive = True
    _compat.attach(trainer, module)
    with trainer.precision_plugin.forward_context():
        assert torch.is_autocast_enabled("cpu")
    _compat.allow_one_more_epoch(trainer)
    trainer.fit(module, train_dataloaders=feed())
    assert float(trainer.callback_metrics["mine"]) == 3.0
    trainer.strategy.close()


def test_detach_forgets_the_module(trainer, tmp_path) -> None:
    def module() -> PolicyModule:
        return PolicyModule(TrainableModel("compat", "tests", "tiny", lora=None, root=tmp_path))

    first = module()
    _compat.attach(trainer, first)
    _compat.allow_one_more_epoch(trainer)
    trainer.fit(first, train_dataloaders=feed())
    _compat.detach(trainer)
    assert trainer.lightning_module is None and trainer.strategy.model is None
    assert not trainer.strategy.optimizers and not trainer.strategy.lr_scheduler_configs
    gone = weakref.ref(first.policy.network)
    del first
    gc.collect()
    assert gone() is None  # and its memory is free
    second = module()
    _compat.attach(trainer, second)
    assert trainer.lightning_module is second and trainer.strategy.optimizers


def test_raw_optimizer(trainer, module) -> None:
    _compat.attach(trainer, module)
    optimizer = _compat.raw_optimizer(trainer.strategy)
    assert isinstance(optimizer, torch.optim.AdamW) and trainer.strategy.optimizers == [optimizer]
    trained = {id(parameter) for parameter in module.parameters() if parameter.requires_grad}
    assert {id(parameter) for group in optimizer.param_groups for parameter in group["params"]} == trained


def test_schedulers_are_stepped_once(trainer, module) -> None:
    module.lr_schedule = lambda step: 1.0 / (1 + step)
    trainer.strategy.keep_alive = True
    _compat.attach(trainer, module)
    [config] = trainer.strategy.lr_scheduler_configs
    optimizer = _compat.raw_optimizer(trainer.strategy)
    optimizer.step()
    _compat.step_schedulers(trainer.strategy)
    assert config.scheduler.last_epoch == 1
    assert optimizer.param_groups[0]["lr"] == pytest.approx(module.learning_rate / 2)
    # and as Lightning steps them
    _compat.allow_one_more_epoch(trainer)
    trainer.fit(module, train_dataloaders=feed())
    assert trainer.strategy.lr_scheduler_configs == [config] and config.scheduler.last_epoch == 2
    assert optimizer.param_groups[0]["lr"] == pytest.approx(module.learning_rate / 3)
    trainer.strategy.close()


# -- steps and epochs -------------------------------------------------------------------------------------------------


def test_global_step(trainer, module) -> None:
    _compat.attach(trainer, module)
    _compat.set_global_step(trainer, 7)
    assert trainer.global_step == 7
    _compat.advance_global_step(trainer)
    assert trainer.global_step == 8
    _compat.allow_one_more_epoch(trainer)
    trainer.fit(module, train_dataloaders=feed())
    assert trainer.global_step == 9
    _compat.set_global_step(trainer, 2)
    assert trainer.global_step == 2


def test_loggers_see_the_step_that_was_set(trainer, module) -> None:
    class Logs(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args) -> None:
            self.log("mine", 3.0, batch_size=1, on_step=True, on_epoch=False)

    trainer.callbacks.append(Logs())
    _compat.attach(trainer, module)
    _compat.set_global_step(trainer, 40)
    _compat.allow_one_more_epoch(trainer)
    seen = []
    trainer.loggers[0].log_metrics = lambda metrics, step: seen.append((step, metrics.get("mine")))
    trainer.fit(module, train_dataloaders=feed(2))
    # Lightning numbers batches from the steps before them
    assert [step for step, value in seen if value is not None] == [40, 41]


def test_one_more_epoch_each_time_also_after_one_was_cut_short(trainer, module) -> None:
    assert _compat.epochs_processed(trainer) == 0
    for done in (1, 2):
        _compat.allow_one_more_epoch(trainer)
        trainer.fit(module, train_dataloaders=feed())
        assert _compat.epochs_processed(trainer) == done
    trainer.fit(module, train_dataloaders=feed())  # not allowed: nothing runs
    assert _compat.epochs_processed(trainer) == 2 == trainer.global_step

    class Stop(lightning.Callback):
        def on_train_batch_start(self, *args) -> None:
            raise ArithmeticError

    trainer.callbacks.append(Stop())
    _compat.allow_one_more_epoch(trainer)
    with pytest.raises(ArithmeticError):
        trainer.fit(module, train_dataloaders=feed())
    trainer.callbacks.pop()
    before = trainer.global_step
    for after in (1, 2):
        _compat.allow_one_more_epoch(trainer)
        trainer.fit(module, train_dataloaders=feed())
        assert trainer.global_step == before + after


def test_an_epoch_cut_short_between_batches_is_not_taken_up_again(trainer, module) -> None:
    class StopAtSecond(lightning.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if batch_idx == 1:
                raise ArithmeticError

    trainer.callbacks.append(StopAtSecond())
    _compat.allow_one_more_epoch(trainer)
    with pytest.raises(ArithmeticError):
        trainer.fit(module, train_dataloaders=feed(3))
    trainer.callbacks.pop()
    taken = trainer.global_step
    _compat.allow_one_more_epoch(trainer)
    trainer.fit(module, train_dataloaders=feed(3))
    assert taken == 1 and trainer.global_step == 4  # all three batches of the new epoch


def test_epoch_notes_are_dropped_and_others_kept(trainer, module, caplog) -> None:
    caplog.set_level(logging.INFO, logger=NOTES)
    logger = logging.getLogger(NOTES)
    filters = list(logger.filters)
    _compat.allow_one_more_epoch(trainer)
    with _compat.without_epoch_notes():
        trainer.fit(module, train_dataloaders=feed())
        logger.info("something else")
    assert "something else" in caplog.text and "max_epochs" not in caplog.text
    with pytest.raises(ArithmeticError), _compat.without_epoch_notes():
        raise ArithmeticError
    assert logger.filters == filters
    _compat.allow_one_more_epoch(trainer)
    trainer.fit(module, train_dataloaders=feed())
    assert "`Trainer.fit` stopped: `max_epochs=2` reached." in caplog.text


def test_fit_keeps_the_memory_of_the_device(trainer, module, monkeypatch) -> None:
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    _compat.allow_one_more_epoch(trainer)
    trainer.fit(module, train_dataloaders=feed())
    assert emptied  # Lightning does it
    emptied.clear()
    _compat.allow_one_more_epoch(trainer)
    with _compat.keeping_device_memory(trainer):
        trainer.fit(module, train_dataloaders=feed())
    assert not emptied
    assert "resume_end" not in vars(trainer._checkpoint_connector)


def test_fit_asks_nobody_before_each_batch_whether_to_end(trainer, module, monkeypatch) -> None:
    asked = []
    loop = trainer.fit_loop.epoch_loop
    monkeypatch.setattr(type(loop), "_broadcast_sigterm_tensor", lambda self: asked.append(1))
    monkeypatch.setattr(type(trainer), "world_size", 2)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        _compat.allow_one_more_epoch(trainer)
        trainer.fit(module, train_dataloaders=feed())
        assert asked  # Lightning does it
        asked.clear()
        _compat.allow_one_more_epoch(trainer)
        with _compat.without_sigterm_broadcasts(trainer):
            trainer.fit(module, train_dataloaders=feed())
    finally:
        torch.distributed.destroy_process_group()
    assert not asked
    assert "_broadcast_sigterm_tensor" not in vars(loop)


def test_ranks_do_not_wait_for_each_other_before_the_first_batch(trainer, module, monkeypatch) -> None:
    waited: list[str | None] = []
    first = {"pre_setup", "post_setup", "run-stage", "train_dataloader()"}
    monkeypatch.setattr(LocalStrategy, "barrier", lambda self, name=None: waited.append(name))
    _compat.allow_one_more_epoch(trainer)
    trainer.fit(module, train_dataloaders=feed())
    assert first <= set(waited)  # Lightning does it
    waited.clear()
    _compat.allow_one_more_epoch(trainer)
    with _compat.without_first_barriers(trainer):
        trainer.fit(module, train_dataloaders=feed())
        trainer.strategy.barrier("another")
    assert "another" in waited and first.isdisjoint(waited)
    assert "barrier" not in vars(trainer.strategy)


def test_the_missing_validation_loop_is_not_worth_a_warning(trainer, module) -> None:
    """pytest replaces the filters of the process, so the one that _compat adds is put back first."""
    [line] = [
        ast.unparse(node)
        for node in ast.parse(inspect.getsource(_compat)).body
        if isinstance(node, ast.Expr) and "filterwarnings" in ast.unparse(node)
    ]
    _compat.allow_one_more_epoch(trainer)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer.fit(module, train_dataloaders=feed())
        assert any("no `val_dataloader`" in str(warning.message) for warning in seen)  # Lightning still says so
        seen.clear()
        exec(line, {"warnings": warnings})
        _compat.allow_one_more_epoch(trainer)
        trainer.fit(module, train_dataloaders=feed())
        assert not any("no `val_dataloader`" in str(warning.message) for warning in seen)


def test_slurms_requeue_signal_is_taken_from_lightning(tmp_path, module, monkeypatch) -> None:
    assert _compat.take_requeue_signal(make_trainer(False)) is None  # no SLURM
    for name in ("NTASKS", "NNODES"):
        monkeypatch.setenv(f"SLURM_{name}", "1")
    for name in ("PROCID", "LOCALID", "NODEID"):
        monkeypatch.setenv(f"SLURM_{name}", "0")
    before, seen = signal.getsignal(signal.SIGUSR1), []

    class Looks(lightning.Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            seen.append(signal.getsignal(signal.SIGUSR1))

    for take in (False, True):
        trainer = make_trainer(False, callbacks=[Looks()])
        if take:
            assert _compat.take_requeue_signal(trainer) is signal.SIGUSR1
            assert _compat.take_requeue_signal(trainer) is None  # taken
        _compat.allow_one_more_epoch(trainer)
        trainer.fit(module, train_dataloaders=feed())
    assert seen[0] != before and seen[1] == before


# -- loggers ----------------------------------------------------------------------------------------------------------


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
    trainer.loggers[0].finalize("failed")  # Lightning's own again
    assert finished == ["success", "failed"]


def test_a_held_logger_that_was_never_used_writes_nothing(trainer, tmp_path) -> None:
    _compat.hold_loggers(trainer)
    trainer.loggers[0].finalize("success")
    _compat.release_loggers(trainer)
    assert not list(tmp_path.rglob("*.csv"))


@pytest.mark.parametrize("hold", [True, False])
def test_one_event_file_for_all_calls(hold, tmp_path, module) -> None:
    """What holding is for: without it Lightning starts another file with every fit."""
    trainer = make_trainer(TensorBoardLogger(tmp_path / "board"))
    if hold:
        _compat.hold_loggers(trainer)
    for _ in range(3):
        _compat.allow_one_more_epoch(trainer)
        trainer.fit(module, train_dataloaders=feed())
        trainer.loggers[0].log_metrics({"a": 1.0}, step=trainer.global_step)
    _compat.release_loggers(trainer)
    trainer.loggers[0].finalize("success")
    files = list((tmp_path / "board").rglob("events.*"))
    assert (len(files) == 1) == hold


def test_the_registry_is_lightnings() -> None:
    assert "ddp" in _compat.registry and "fitrl_local" in _compat.registry
    assert isinstance(_compat.registry.get("fitrl_local"), LocalStrategy)


def test_a_strategy_is_told_its_module_before_its_environment_is_set_up(trainer, module) -> None:
    _compat.announce(trainer, module)
    assert trainer.strategy.lightning_module is module is trainer.lightning_module


def test_all_processes_share_the_data() -> None:
    """By default `ModelParallelStrategy` gives each node one share of the data."""
    strategy = ModelParallelStrategy()
    strategy.parallel_devices, strategy.num_nodes = [torch.device("cpu")] * 3, 2
    assert strategy._data_parallel_size == "auto"
    _compat.set_data_parallel_size(strategy, 1)
    assert strategy._data_parallel_size == 6
    _compat.set_data_parallel_size(strategy, 2)
    assert strategy._data_parallel_size == 3


def test_lightning_evaluates_under_gloo_as_it_would_under_nccl(monkeypatch) -> None:
    modes = []

    class Evaluated(BoringModel):
        def validation_step(self, batch, batch_idx):
            modes.append(torch.is_inference_mode_enabled())

    monkeypatch.setattr("lightning.pytorch.loops.utilities._distributed_is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_backend", lambda: "gloo")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(accelerator="cpu", limit_val_batches=1, enable_checkpointing=False, **quiet)
    trainer.validate(Evaluated(), verbose=False)
    with _compat.evaluating_as_with_nccl():
        trainer.validate(Evaluated(), verbose=False)
    trainer.validate(Evaluated(), verbose=False)
    assert modes == [False, True, False]
