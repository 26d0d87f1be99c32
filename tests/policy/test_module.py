"""`PolicyModule` and `RolloutDataModule` under a stock `lightning.Trainer`."""

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import fitrl
from fitrl.data.batch import Feed
from fitrl.data.packing import pack
from fitrl.demo import TASKS, correct
from fitrl.errors import DataError, InvalidArgumentError, UnsupportedError
from fitrl.policy.module import PolicyModule
from samples import make_samples, true_logprobs

STOCK = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@pytest.fixture
def module(tmp_path) -> PolicyModule:
    model = fitrl.TrainableModel("module", "tests", "tiny", lora=None, root=tmp_path)
    return PolicyModule(model, learning_rate=1e-3)


@pytest.mark.parametrize("strategy", ["auto", "fitrl_local"])
def test_fit_with_rollouts_learns(strategy, module) -> None:
    rewards = []

    class Keep(lightning.Callback):
        def on_train_epoch_end(self, trainer, pl_module) -> None:
            rewards.append(pl_module.host_metrics["reward/mean"])

    torch.manual_seed(1)
    data = fitrl.RolloutDataModule(
        TASKS, correct, val_tasks=TASKS[:10], tasks_per_step=40, group_size=4, steps_per_epoch=8, max_new_tokens=4
    )
    trainer = lightning.Trainer(
        strategy=strategy,
        max_epochs=4,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        callbacks=[Keep()],
        num_sanity_val_steps=0,
        **STOCK,
    )
    module.learning_rate = 3e-4
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 32
    assert rewards[-1] > rewards[0] + 0.05
    assert module.call_metrics["ratio/mean"] == pytest.approx(1.0, abs=1e-4)  # sampled with the newest weights
    assert "val/reward/mean" in trainer.callback_metrics


def test_every_draw_flat_is_an_error_that_says_so(module) -> None:
    data = fitrl.RolloutDataModule(TASKS, lambda task, trajectory: 1.0, tasks_per_step=2, group_size=2)
    with pytest.raises(DataError, match="rewards are all equal"):
        lightning.Trainer(max_epochs=1, **STOCK).fit(module, datamodule=data)


def test_data_module_arguments() -> None:
    with pytest.raises(InvalidArgumentError, match="tasks is empty"):
        fitrl.RolloutDataModule([], correct)
    with pytest.raises(InvalidArgumentError, match="group_size"):
        fitrl.RolloutDataModule(TASKS, correct, group_size=0)


def test_kl_and_truncated_importance_sampling_need_fit_rl(tmp_path) -> None:
    model = fitrl.TrainableModel("module", "tests", "tiny", lora=None, root=tmp_path)
    module = PolicyModule(model, objective=fitrl.Objective(kl_coef=0.1))
    data = fitrl.RolloutDataModule(TASKS, correct)
    with pytest.raises(InvalidArgumentError, match="use fit_rl"):
        lightning.Trainer(max_epochs=1, **STOCK).fit(module, datamodule=data)
    module.objective = fitrl.Objective(truncated_importance_sampling=2.0)  # without old logprobs it does nothing
    with pytest.raises(InvalidArgumentError, match="truncated_importance_sampling has no effect; use fit_rl"):
        lightning.Trainer(max_epochs=1, **STOCK).fit(module, datamodule=data)


def test_ckpt_path_resumes_under_a_stock_trainer(tmp_path) -> None:
    def make() -> PolicyModule:
        return PolicyModule(fitrl.TrainableModel("module", "tests", "tiny", lora=None, root=tmp_path))

    batches = Feed([batch for seed in (1, 2) for batch in pack(make_samples(seed=seed, num_trajectories=5))])
    whole = make()
    lightning.Trainer(max_epochs=2, **STOCK).fit(whole, train_dataloaders=batches)
    keep = ModelCheckpoint(dirpath=tmp_path / "ckpt", save_last=True)
    options = STOCK | {"enable_checkpointing": True}
    lightning.Trainer(max_epochs=1, callbacks=[keep], **options).fit(make(), train_dataloaders=batches)
    resumed = make()
    trainer = lightning.Trainer(max_epochs=2, **STOCK)
    trainer.fit(resumed, train_dataloaders=batches, ckpt_path=keep.last_model_path)
    assert trainer.global_step == 4
    for (name, left), (_, right) in zip(whole.named_weights(), resumed.named_weights(), strict=True):
        assert torch.equal(left, right), name


def test_policy_is_loaded_by_a_trainer(module) -> None:
    with pytest.raises(UnsupportedError, match="not loaded yet"):
        _ = module.policy


def test_score_bounds_rows_and_agrees_with_transformers(module, tmp_path) -> None:
    samples = make_samples(seed=2, num_trajectories=6)
    with fitrl.LocalTrainer(accelerator="cpu", devices=1, enable_model_summary=False) as trainer:
        verbs = trainer.open(module.model)
        [batch] = pack(samples)
        live = trainer.verbs.policy_module
        scores = []
        for size in (1, 7, 4096):
            live.logprob_chunk_size = size
            scores.append(verbs.forward(batch).logprobs)
    truth = torch.cat([true_logprobs(h.token_ids)[h.mask] for s in samples for h in s.histories])
    for score in scores:
        assert float((score - truth).abs().max()) < 1e-4


def test_custom_objective_inputs_are_checked(module) -> None:
    class Wrong:
        inputs = "attention"

        def __call__(self, inputs, /):
            raise AssertionError

    module.objective = Wrong()
    feed = Feed(pack(make_samples(seed=2, num_trajectories=2)))
    with pytest.raises(InvalidArgumentError, match="'logprobs', 'logits' or 'hidden'"):
        lightning.Trainer(max_epochs=1, **STOCK).fit(module, train_dataloaders=feed)


def test_settings_are_checked() -> None:
    with pytest.raises(InvalidArgumentError):
        fitrl.AdamWSettings(betas=(0.9, 1.0))
    with pytest.raises(InvalidArgumentError):
        fitrl.LoraSettings(rank=0)
