"""`PolicyModule` and `RolloutDataModule` under a stock `lightning.Trainer`."""

import math
import threading

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from transformers import GraniteConfig, GraniteForCausalLM

import fitrl
from fitrl.data.batch import Feed
from fitrl.data.packing import pack
from fitrl.demo import TASKS, correct
from fitrl.errors import DataError, InvalidArgumentError, NonFiniteGradientError, UnsupportedError
from fitrl.policy.module import PolicyModule
from fitrl.policy.policy import Policy
from fitrl.policy.scoring import logprobs_of
from samples import make_groups, make_samples, true_logprobs

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


@pytest.mark.parametrize("strategy", ["auto", "fitrl_local"])
def test_fit_beside_rollouts_that_are_a_step_behind(strategy, module) -> None:
    behind, threads = [], set()

    class Keep(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args) -> None:
            behind.append(pl_module._observed[-2]["off_policy/steps_max"])
            threads.update(thread.name for thread in threading.enumerate())

    data = fitrl.RolloutDataModule(
        TASKS, correct, tasks_per_step=12, group_size=4, steps_per_epoch=3, max_new_tokens=4, max_steps_off_policy=1
    )
    trainer = lightning.Trainer(strategy=strategy, max_epochs=2, callbacks=[Keep()], **STOCK)
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 6 and behind[0] == 0.0 and max(behind) == 1.0
    assert module.call_metrics["off_policy/steps_max"] <= 1.0 and "pipeline/queue_depth" in module.call_metrics
    assert module.call_metrics["ratio/max"] != pytest.approx(1.0, abs=1e-4)  # sampled with weights before
    assert "fitrl-pipeline" in threads  # and is ended, as every test is checked for


def test_of_what_is_observed_the_mean_is_told_and_the_highest_of_maxima(module) -> None:
    for behind in (0.0, 1.0, 1.0, 0.0):
        module.observe({"off_policy/steps_mean": behind, "off_policy/steps_max": behind})
    assert module.host_metrics == {"off_policy/steps_mean": 0.5, "off_policy/steps_max": 1.0}


def test_rollouts_beside_a_fit_end_with_it_when_it_fails(module) -> None:
    class Fail(lightning.Callback):
        def on_train_batch_end(self, *args) -> None:
            raise OSError("no space")

    data = fitrl.RolloutDataModule(TASKS, correct, group_size=4, max_new_tokens=4, max_steps_off_policy=1)
    with pytest.raises(OSError, match="no space"):
        lightning.Trainer(callbacks=[Fail()], max_epochs=1, **STOCK).fit(module, datamodule=data)


def test_a_fit_that_is_resumed_goes_on_with_groups_that_it_was_not_trained_on(tmp_path) -> None:
    floors = []
    for epochs in (1, 2):
        model = fitrl.TrainableModel("module", "tests", "tiny", lora=None, root=tmp_path)
        data = fitrl.RolloutDataModule(
            TASKS, correct, tasks_per_step=6, group_size=4, steps_per_epoch=3, max_new_tokens=4, max_steps_off_policy=1
        )
        trainer = lightning.Trainer(strategy="fitrl_local", max_epochs=epochs, **STOCK)
        path = tmp_path / "last.ckpt"
        trainer.fit(PolicyModule(model, learning_rate=1e-4), datamodule=data, ckpt_path=path if epochs == 2 else None)
        trainer.save_checkpoint(path)
        state = data.state_dict()
        floors.append(state["floor"] + len(state["done"]))
    assert floors == [18, 36]  # six groups a step, and none twice


def test_every_draw_flat_is_an_error_that_says_so(module) -> None:
    data = fitrl.RolloutDataModule(TASKS, lambda task, trajectory: 1.0, tasks_per_step=2, group_size=2)
    with pytest.raises(DataError, match="rewards are all equal"):
        lightning.Trainer(max_epochs=1, **STOCK).fit(module, datamodule=data)


def test_data_module_arguments() -> None:
    with pytest.raises(InvalidArgumentError, match="tasks is empty"):
        fitrl.RolloutDataModule([], correct)
    with pytest.raises(InvalidArgumentError, match="group_size"):
        fitrl.RolloutDataModule(TASKS, correct, group_size=0)
    with pytest.raises(InvalidArgumentError, match="max_steps_off_policy"):
        fitrl.RolloutDataModule(TASKS, correct, max_steps_off_policy=-1)
    with pytest.raises(InvalidArgumentError, match="max_concurrency and on_weight_change have no effect"):
        fitrl.RolloutDataModule(TASKS, correct, max_concurrency=4, on_weight_change="restart")


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


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_head_that_is_not_plain_is_bounded_too(tmp_path, tiny_tokenizer, layout, monkeypatch) -> None:
    config = GraniteConfig(
        vocab_size=262,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        logits_scaling=4.0,
    )
    folder = tmp_path / "granite"
    GraniteForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    model = fitrl.TrainableModel("module", "tests", str(folder), lora=None, root=tmp_path)
    [batch] = pack(make_samples(seed=2, num_trajectories=6), layout=layout)
    rows = []
    own_logits = Policy.own_logits
    monkeypatch.setattr(Policy, "own_logits", lambda self, hidden: rows.append(len(hidden)) or own_logits(self, hidden))
    with fitrl.LocalTrainer(accelerator="cpu", devices=1, enable_model_summary=False) as trainer:
        verbs = trainer.open(model)
        live = trainer.verbs.policy_module
        assert not live.policy.has_linear_head and live.policy.can_pack
        live.logprob_chunk_size = 7
        scores = verbs.forward(batch).logprobs
        with torch.no_grad():
            whole = logprobs_of(live.policy, batch)  # as the loss computes them
    assert len(rows) > 2 and max(rows) == 7 and sum(rows) == len(scores)
    assert torch.allclose(scores, whole, atol=1e-5)


def test_a_layout_that_the_policy_cannot_read_is_refused(tmp_path, module, monkeypatch) -> None:
    [batch] = pack(make_samples(seed=2, num_trajectories=6), layout="packed")
    with fitrl.LocalTrainer(accelerator="cpu", devices=1, enable_model_summary=False) as trainer:
        verbs = trainer.open(module.model)
        trainer.verbs.policy_module.policy.can_pack = False
        with pytest.raises(InvalidArgumentError, match="layout='padded'"):
            verbs.forward_backward(batch)
        with pytest.raises(InvalidArgumentError, match="layout='padded'"):
            verbs.forward(batch)


def test_validate_alone_reports_the_rewards_of_its_own_rollouts(module) -> None:
    rewards = iter([1.0] * 8 + [0.5] * 8)
    data = fitrl.RolloutDataModule(
        TASKS, lambda task, trajectory: next(rewards), val_tasks=TASKS[:2], group_size=4, max_new_tokens=2
    )
    trainer = lightning.Trainer(**STOCK)
    told = [trainer.validate(module, datamodule=data, verbose=False)[0]["val/reward/mean"] for _ in range(2)]
    assert told == [1.0, 0.5]


def test_the_open_policy_is_validated_by_its_trainer(module) -> None:
    data = fitrl.RolloutDataModule(
        TASKS, lambda task, trajectory: 0.75, val_tasks=TASKS[:2], group_size=2, max_new_tokens=2
    )
    with fitrl.LocalTrainer(accelerator="cpu", devices=1, enable_model_summary=False) as trainer:
        trainer.open(module.model)
        assert trainer.validate(datamodule=data, verbose=False)[0]["val/reward/mean"] == 0.75
        assert "val/reward/mean" not in trainer.fit_rl(module.model, make_groups(seed=1)).metrics


def test_early_stopping_sees_the_rewards_of_held_out_tasks(module) -> None:
    data = fitrl.RolloutDataModule(
        TASKS, correct, val_tasks=TASKS[:2], group_size=4, steps_per_epoch=1, tasks_per_step=30, max_new_tokens=4
    )
    stop = EarlyStopping("val/reward/mean", mode="max", stopping_threshold=-1.0)
    lightning.Trainer(max_epochs=3, callbacks=[stop], num_sanity_val_steps=0, **STOCK).fit(module, datamodule=data)
    assert stop.stopped_epoch == 0 and module.trainer.current_epoch == 1


def test_the_model_knows_its_step_after_a_stock_fit(module) -> None:
    feed = Feed(pack(make_samples(seed=2, num_trajectories=5), num_batches=3))
    lightning.Trainer(max_epochs=1, **STOCK).fit(module, train_dataloaders=feed)
    assert module.model.step == len(feed) > 1


@pytest.mark.parametrize("factor", [math.nan, -1.0, math.inf])
def test_a_learning_rate_that_is_none_changes_nothing(module, factor) -> None:
    before = []

    class Keep(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args) -> None:
            before.append([tensor.clone() for _, tensor in pl_module.named_weights()])

    module.lr_schedule = lambda step: factor if step else 1.0
    feed = Feed(pack(make_samples(seed=2, num_trajectories=5), num_batches=3))
    with pytest.raises(InvalidArgumentError, match="learning rate after 1 steps is .* lr_schedule must return"):
        lightning.Trainer(max_epochs=1, callbacks=[Keep()], **STOCK).fit(module, train_dataloaders=feed)
    assert len(before) == 1
    for left, (_, right) in zip(before[0], module.named_weights(), strict=True):
        assert torch.equal(left, right)


def test_a_gradient_that_is_not_finite_is_an_error_that_names_the_step(module) -> None:
    class Breaks:
        inputs = "logprobs"
        calls = 0

        def __call__(self, inputs, /):
            self.calls += 1
            return fitrl.PolicyLoss(loss=inputs.logprobs.sum() * (math.inf if self.calls == 2 else 1.0))

    groups = make_groups(seed=1)
    with fitrl.LocalTrainer(accelerator="cpu", devices=1, enable_model_summary=False) as trainer:
        trainer.fit_rl(module.model, groups)
        with pytest.raises(NonFiniteGradientError, match="gradient of step 3 was not finite.*newest checkpoint"):
            trainer.fit_rl(module.model, groups, objective=Breaks(), num_minibatches=3)
        # the broken weights are gone, whatever comes next
        trainer.open(fitrl.TrainableModel("other", "tests", "tiny", lora=None, root=module.model.root))
        assert [path.name for path in module.model.checkpoints()] == ["0001"]
        again = trainer.fit_rl(module.model, groups)
        assert again.step == 2 and math.isfinite(again.metrics["loss/train"])


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


def test_validation_loss_does_not_depend_on_how_it_is_cut(module) -> None:
    """Shares add up, and of two steps the mean is told, as of training; a filler counts for nothing."""
    trainer = lightning.Trainer(**STOCK)

    def told(*batches) -> dict[str, float]:
        return trainer.validate(module, Feed(batches), verbose=False)[0]

    first, second = (make_samples(seed=seed, num_trajectories=6) for seed in (1, 2))
    whole = told(*pack(first))
    cut = pack(first, num_batches=3)
    for other in (told(*cut), told(*cut, cut[0].filler())):
        assert other == pytest.approx(whole, rel=1e-5)
    both = told(*pack(first), *pack(second))["val/loss/train"]
    assert both == pytest.approx((whole["val/loss/train"] + told(*pack(second))["val/loss/train"]) / 2, rel=1e-5)
