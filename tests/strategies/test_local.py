"""The sticky single-device strategy and its verbs."""

import lightning
import pytest
import torch
from lightning.pytorch.strategies import StrategyRegistry

import fitrl
from fitrl.data.batch import Feed
from fitrl.data.packing import pack
from fitrl.errors import CheckpointError, InvalidArgumentError, NothingAccumulatedError, SessionError
from fitrl.objective.objective import Objective
from fitrl.policy.module import PolicyModule
from fitrl.protocols.verbs import ExportsWeights, Scores, Trains
from fitrl.strategies.local import LocalStrategy
from samples import make_samples, true_logprobs

CPU = {"accelerator": "cpu", "devices": 1, "enable_model_summary": False}
STOCK = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@pytest.fixture
def model(tmp_path) -> fitrl.TrainableModel:
    return fitrl.TrainableModel("verbs", "tests", "tiny", lora=None, root=tmp_path)


@pytest.fixture
def trainer(model):
    with fitrl.LocalTrainer(**CPU, lr_schedule=lambda step: 1.0 / (1 + step)) as trainer:
        trainer.open(model)
        trainer.verbs.set_learning_rate(1e-3)
        yield trainer


def microbatches(seed: int, count: int):
    return pack(make_samples(seed=seed, num_trajectories=6), num_batches=count)


def weights(strategy) -> torch.Tensor:
    return torch.cat([tensor.flatten() for _, tensor in strategy.named_weights()]).clone()


def test_registered_by_name() -> None:
    assert "fitrl_local" in StrategyRegistry
    assert isinstance(lightning.Trainer(strategy="fitrl_local", **STOCK).strategy, LocalStrategy)


def test_capabilities(trainer) -> None:
    assert isinstance(trainer.strategy, Trains | Scores) and isinstance(trainer.strategy, ExportsWeights)


def test_accumulate_step_clear(trainer) -> None:
    verbs = trainer.verbs
    with pytest.raises(NothingAccumulatedError):
        verbs.optim_step()
    start = weights(verbs)
    losses = [verbs.forward_backward(batch).loss for batch in microbatches(1, 3)]
    assert torch.equal(start, weights(verbs))  # never steps
    assert verbs.get_status().accumulated_microbatches == 3
    first = verbs.optim_step()
    assert (first.step, first.accumulated_microbatches, first.learning_rate) == (1, 3, 1e-3)
    assert trainer.global_step == 1 and not torch.equal(start, weights(verbs))
    assert sum(losses) != 0.0 and first.grad_norm > 0
    with pytest.raises(NothingAccumulatedError):
        verbs.optim_step()
    verbs.forward_backward(microbatches(1, 1)[0])
    verbs.clear_gradients()
    with pytest.raises(NothingAccumulatedError):
        verbs.optim_step()


def test_schedule_and_explicit_learning_rate(trainer) -> None:
    rates = []
    for rate in (None, 7e-4, None):
        trainer.verbs.forward_backward(microbatches(1, 1)[0])
        rates.append(trainer.verbs.optim_step(learning_rate=rate).learning_rate)
    assert rates == pytest.approx([1e-3, 7e-4, 1e-3 / 3])


def test_verbs_and_fit_take_the_same_step(trainer, tmp_path) -> None:
    """One code path: the same microbatches by hand and by Lightning's loop give equal weights."""
    batches = microbatches(2, 3)
    for batch in batches:
        trainer.verbs.forward_backward(batch)
    trainer.verbs.optim_step()
    stock = lightning.Trainer(strategy="fitrl_local", max_epochs=1, accumulate_grad_batches=3, **STOCK)
    other = fitrl.TrainableModel("stock", "tests", "tiny", lora=None, root=tmp_path)
    module = PolicyModule(other, learning_rate=1e-3)
    stock.fit(module, train_dataloaders=Feed(batches))
    fitted = torch.cat([tensor.flatten() for _, tensor in module.named_weights()])
    assert torch.equal(weights(trainer.verbs), fitted)


def test_clip_value_is_honoured_by_the_verb(model) -> None:
    with fitrl.LocalTrainer(**CPU, gradient_clip_val=1e-3) as trainer:
        verbs = trainer.open(model)
        parameters = trainer.strategy.optimizers[0].param_groups[0]["params"]
        seen = []

        def norm(*_) -> None:
            seen.append(float(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])))

        trainer.strategy.optimizers[0].zero_grad = lambda set_to_none=True: norm()  # called right after the step
        verbs.forward_backward(microbatches(1, 1)[0])
        result = verbs.optim_step()
    assert result.grad_norm > 0.1  # before clipping
    assert seen[0] == pytest.approx(1e-3, rel=1e-3)


def test_another_objective_for_one_microbatch(trainer) -> None:
    [batch] = microbatches(3, 1)
    plain = trainer.verbs.forward_backward(batch)
    ppo = trainer.verbs.forward_backward(batch, Objective(ppo=True))
    again = trainer.verbs.forward_backward(batch)
    assert ppo.loss != plain.loss and again.loss == plain.loss


def test_an_exception_in_forward_backward_leaves_it_usable(trainer) -> None:
    class Breaks:
        inputs = "logprobs"

        def __call__(self, inputs, /):
            raise ArithmeticError("on purpose")

    [batch] = microbatches(3, 1)
    with pytest.raises(ArithmeticError):
        trainer.verbs.forward_backward(batch, Breaks())
    assert trainer.verbs.get_status().accumulated_microbatches == 0
    trainer.verbs.forward_backward(batch)
    assert trainer.verbs.optim_step().step == 1


def test_forward_gives_the_true_logprobs(trainer) -> None:
    samples = make_samples(seed=6, num_trajectories=5)
    for layout in ("padded", "packed"):
        [batch] = pack(samples, layout=layout)
        scored = trainer.verbs.forward(batch).logprobs
        truth = torch.cat([true_logprobs(h.token_ids)[h.mask] for s in samples for h in s.histories])
        assert scored.dtype == torch.float32
        assert float((scored - truth).abs().max()) < 1e-4


def test_forward_gives_float32_from_a_policy_in_float64(model) -> None:
    with fitrl.LocalTrainer(**CPU, precision="64-true") as trainer:
        assert trainer.open(model).forward(microbatches(1, 1)[0]).logprobs.dtype == torch.float32


def test_save_and_load_are_exact(trainer, model) -> None:
    verbs = trainer.verbs
    for seed in (1, 2):
        verbs.forward_backward(microbatches(seed, 1)[0])
        verbs.optim_step()
    folder = verbs.save()
    assert folder == str(model.checkpoints_dir / "0002")
    torch.manual_seed(3)
    verbs.save("named")
    drawn = torch.rand(3)
    kept = weights(verbs)
    verbs.forward_backward(microbatches(3, 1)[0])
    after = verbs.optim_step()
    continued = weights(verbs)
    assert verbs.load(str(model.checkpoints_dir / "named")) == str(model.checkpoints_dir / "named")
    assert torch.equal(kept, weights(verbs)) and trainer.global_step == 2
    assert torch.equal(drawn, torch.rand(3))
    verbs.forward_backward(microbatches(3, 1)[0])
    assert verbs.optim_step() == after
    assert torch.equal(continued, weights(verbs))


def test_weights_only_starts_a_fresh_optimizer_at_the_saved_step(trainer, tmp_path) -> None:
    verbs = trainer.verbs
    verbs.forward_backward(microbatches(1, 1)[0])
    verbs.optim_step()
    kept = weights(verbs)
    folder = verbs.save(path=str(tmp_path / "export"), weights_only=True)
    assert not (tmp_path / "export" / "trainer_state.pt").exists()
    verbs.forward_backward(microbatches(2, 1)[0])
    verbs.optim_step()
    verbs.load(folder)
    assert torch.equal(kept, weights(verbs)) and trainer.global_step == 1
    assert not trainer.strategy.optimizers[0].state_dict()["state"]
    verbs.forward_backward(microbatches(2, 1)[0])
    # the rate that was set stays, and the schedule stands where step 1 left it
    assert verbs.optim_step().learning_rate == pytest.approx(0.5e-3)


def test_bad_saves_and_loads(trainer, tmp_path) -> None:
    with pytest.raises(CheckpointError, match="holds no whole checkpoint"):
        trainer.verbs.load()
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        trainer.verbs.load(str(tmp_path))
    for wrong in ("../up", "a/b", "", ".hidden"):
        with pytest.raises(InvalidArgumentError, match="plain folder name"):
            trainer.verbs.save(wrong)
    with pytest.raises(InvalidArgumentError, match="not both"):
        trainer.verbs.save("a", "b")


def test_verbs_without_a_model(tmp_path) -> None:
    with fitrl.LocalTrainer(**CPU) as trainer, pytest.raises(SessionError, match="no model is open"):
        trainer.verbs.forward(microbatches(1, 1)[0])


def test_config_and_status(trainer) -> None:
    config = trainer.verbs.get_config()
    assert (config.backend, config.base_model, config.lora_rank) == ("LocalStrategy", "tiny", None)
    assert (config.precision, config.world_size, config.gradient_clip_val) == ("32-true", 1, None)
    status = trainer.verbs.get_status()
    assert (status.step, status.accumulated_microbatches, status.learning_rate) == (0, 0, 1e-3)


def test_named_weights_have_the_names_of_a_saved_checkpoint(trainer, tmp_path) -> None:
    from safetensors.torch import load_file

    saved = load_file(f"{trainer.verbs.save()}/model.safetensors")
    handed = dict(trainer.verbs.named_weights())
    assert set(saved) <= set(handed)
    assert set(handed) - set(saved) <= {"lm_head.weight"}  # tied, so saved once
    assert all(torch.equal(saved[name], handed[name]) for name in saved)
    lora = fitrl.TrainableModel("lora", "tests", "tiny", lora=fitrl.LoraSettings(rank=2), root=tmp_path)
    trainer.open(lora)
    adapters = load_file(f"{trainer.verbs.save()}/adapter_model.safetensors")
    assert set(adapters) == {name for name, _ in trainer.verbs.named_weights()}


def test_setup_happens_once_per_model(model, monkeypatch) -> None:
    calls = []
    for name in ("setup_optimizers", "model_to_device"):
        original = getattr(LocalStrategy, name)
        monkeypatch.setattr(
            LocalStrategy,
            name,
            lambda self, *args, _name=name, _original=original: (calls.append(_name), _original(self, *args))[1],
        )
    from samples import make_groups

    with fitrl.LocalTrainer(**CPU) as trainer:
        for seed in (1, 2, 3):
            trainer.fit_rl(model, make_groups(seed=seed), save_checkpoint=False)
    assert calls == ["model_to_device", "setup_optimizers"]


def test_a_stock_trainer_sees_an_ordinary_strategy(tmp_path) -> None:
    """Without keep_alive the strategy tears down after fit, like any other."""
    strategy = LocalStrategy()
    trainer = lightning.Trainer(strategy=strategy, max_epochs=1, **STOCK)
    model = fitrl.TrainableModel("stock", "tests", "tiny", lora=None, root=tmp_path)
    trainer.fit(PolicyModule(model), train_dataloaders=Feed(microbatches(1, 2)))
    assert trainer.global_step == 2 and not strategy.is_live
