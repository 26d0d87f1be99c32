"""The base of remote strategies: Lightning drives, a service computes, nothing is computed here."""

import lightning
import pytest
import torch
from in_memory import InMemoryService, InMemoryStrategy
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from fitrl import _compat
from fitrl.data.batch import Feed
from fitrl.data.packing import pack
from fitrl.errors import CheckpointError, NothingAccumulatedError, SessionError
from fitrl.objective.objective import Objective
from fitrl.policy.model import TrainableModel
from fitrl.policy.module import PolicyModule
from fitrl.protocols.verbs import ExportsWeights, Scores, Trains
from fitrl.strategies.local import LocalStrategy
from samples import make_samples

OBJECTIVE = Objective(ppo=True, epsilon=0.4, importance_sampling_level="sequence")


def make_trainer(strategy, **options) -> lightning.Trainer:
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 0.5,
    }
    return lightning.Trainer(strategy=strategy, **(defaults | options))


def make_module(tmp_path) -> PolicyModule:
    model = TrainableModel("remote", "tests", "tiny", lora=None, root=tmp_path)
    return PolicyModule(model, objective=OBJECTIVE, learning_rate=1e-4, lr_schedule=lambda step: 1 / (1 + step))


def steps(count: int) -> Feed:
    batches = []
    for seed in range(count):
        batches += pack(make_samples(seed=seed, num_trajectories=6), num_batches=2)
    return Feed(batches)


def flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def test_fit_on_a_service_equals_fit_here(tmp_path) -> None:
    service = InMemoryService()
    here = make_module(tmp_path)
    make_trainer(LocalStrategy(), precision="64-true").fit(here, train_dataloaders=steps(3))
    there = make_module(tmp_path)
    trainer = make_trainer(InMemoryStrategy(service))
    trainer.fit(there, train_dataloaders=steps(3))
    assert there.network is None  # no local copy of the model
    assert trainer.global_step == 3
    assert [count for count, _ in service.requests] == [2, 2, 2]
    assert [step.learning_rate for _, step in service.requests] == pytest.approx([1e-4, 0.5e-4, 1e-4 / 3])
    assert all(step.grad_clip_norm == 0.5 for _, step in service.requests)
    local = flat(here.policy.network.state_dict().values())
    remote = flat(service.network.state_dict().values())
    assert float((local - remote).abs().max()) < 1e-9
    for key in ("loss/train", "loss/grad_norm", "ratio/mean", "ratio/max"):
        assert there.call_metrics[key] == pytest.approx(here.call_metrics[key], rel=1e-6)


def test_checkpoint_holds_the_services_uri_and_resumes(tmp_path) -> None:
    whole, cut = InMemoryService(), InMemoryService()
    make_trainer(InMemoryStrategy(whole), max_epochs=2).fit(make_module(tmp_path), train_dataloaders=steps(2))
    keep = ModelCheckpoint(dirpath=tmp_path / "ckpt", save_last=True)
    first = make_trainer(InMemoryStrategy(cut), callbacks=[keep], enable_checkpointing=True)
    first.fit(make_module(tmp_path), train_dataloaders=steps(2))
    saved = torch.load(keep.last_model_path, weights_only=True)
    assert saved["remote_state"] == "memory://step-2" and saved["state_dict"] == {}
    cut.network = InMemoryService().network  # the service forgot what it did not save
    cut.optimizer = torch.optim.AdamW(cut.network.parameters(), lr=0.0)
    again = make_trainer(InMemoryStrategy(cut), max_epochs=2)
    again.fit(make_module(tmp_path), train_dataloaders=steps(2), ckpt_path=keep.last_model_path)
    assert again.global_step == 4
    assert torch.equal(flat(whole.network.parameters()), flat(cut.network.parameters()))
    assert [step.learning_rate for _, step in cut.requests] == [step.learning_rate for _, step in whole.requests]


def test_learning_rate_monitor_and_loggers(tmp_path) -> None:
    table = CSVLogger(tmp_path)
    trainer = make_trainer(
        InMemoryStrategy(InMemoryService()),
        callbacks=[LearningRateMonitor("step")],
        logger=table,
        log_every_n_steps=1,
    )
    trainer.fit(make_module(tmp_path), train_dataloaders=steps(2))
    rows = next(tmp_path.rglob("metrics.csv")).read_text()
    assert "lr-AdamW" in rows and "0.0001" in rows and "5e-05" in rows


@pytest.fixture
def opened(tmp_path):
    service = InMemoryService()
    trainer = make_trainer(InMemoryStrategy(service), accumulate_grad_batches=1)
    module = make_module(tmp_path)
    trainer.strategy.keep_alive = True
    _compat.attach(trainer, module)
    yield trainer.strategy, service
    trainer.strategy.close()


def test_verbs_wait_until_the_step(opened) -> None:
    strategy, service = opened
    assert isinstance(strategy, Trains)
    assert not isinstance(strategy, Scores) and not isinstance(strategy, ExportsWeights)
    with pytest.raises(NothingAccumulatedError):
        strategy.optim_step()
    batches = pack(make_samples(seed=1, num_trajectories=6), num_batches=3)
    results = [strategy.forward_backward(batch) for batch in batches]
    assert not service.requests and strategy.get_status().accumulated_microbatches == 3
    with pytest.raises(SessionError, match="not known before optim_step"):
        _ = results[0].loss
    with pytest.raises(SessionError, match="not known before optim_step"):
        _ = results[0].metrics
    step = strategy.optim_step(learning_rate=3e-4)
    assert (step.step, step.learning_rate, step.accumulated_microbatches) == (1, 3e-4, 3)
    assert sum(result.loss for result in results) != 0.0 and results[2].metrics["token_count"] > 0
    assert service.requests[0][1].learning_rate == 3e-4
    strategy.forward_backward(batches[0])
    strategy.clear_gradients()
    with pytest.raises(NothingAccumulatedError):
        strategy.optim_step()


def test_a_failed_step_counts_for_nothing(opened) -> None:
    strategy, service = opened
    [batch] = pack(make_samples(seed=1, num_trajectories=3))
    service.fail_next = True
    strategy.forward_backward(batch)
    with pytest.raises(ConnectionError):
        strategy.optim_step()
    assert strategy.get_status().step == 0 and strategy.get_status().accumulated_microbatches == 0
    strategy.forward_backward(batch)
    assert strategy.optim_step().step == 1


def test_save_and_load_by_uri(opened) -> None:
    strategy, service = opened
    with pytest.raises(CheckpointError, match="no saved state"):
        strategy.load()
    with pytest.raises(CheckpointError, match="takes a name"):
        strategy.save(path="/tmp/x")
    [batch] = pack(make_samples(seed=1, num_trajectories=3))
    strategy.forward_backward(batch)
    strategy.optim_step()
    uri = strategy.save("mine")
    assert uri == "memory://mine"
    after = flat(service.network.parameters())
    strategy.forward_backward(batch)
    strategy.optim_step()
    assert strategy.load() == uri
    assert strategy.get_status().step == 1
    assert strategy.get_status().learning_rate == pytest.approx(1e-4 / 2)  # the schedule went back with it
    assert torch.equal(after, flat(service.network.parameters()))
