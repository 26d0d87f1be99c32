"""`LocalTrainer.fit_rl` from end to end on the bundled policy."""

import random
import signal
import threading

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from transformers import AutoModelForCausalLM, AutoTokenizer

import fitrl
from fitrl.data.batch import Feed
from fitrl.errors import CheckpointError, DataError, InvalidArgumentError, SessionError
from fitrl.protocols.verbs import PolicyTrainer, SupportsFitRL
from samples import make_groups

CPU = {"accelerator": "cpu", "devices": 1, "enable_model_summary": False}


@pytest.fixture
def model(tmp_path) -> fitrl.TrainableModel:
    return fitrl.TrainableModel("adder", "tests", "tiny", lora=None, root=tmp_path)


@pytest.fixture
def trainer():
    with fitrl.LocalTrainer(**CPU) as trainer:
        yield trainer


def weights_of(trainer) -> torch.Tensor:
    return torch.cat([tensor.flatten() for _, tensor in trainer.verbs.named_weights()]).clone()


def test_one_call(trainer, model) -> None:
    groups = make_groups(seed=1)
    result = trainer.fit_rl(model, groups, learning_rate=1e-3)
    assert isinstance(trainer, lightning.Trainer) and isinstance(trainer, SupportsFitRL)
    assert (result.step, result.num_optimizer_steps, trainer.global_step, model.step) == (1, 1, 1, 1)
    assert result.dropped == {}
    assert result.checkpoint_path == model.checkpoints_dir / "0001"
    expected = """
        loss/train loss/policy loss/grad_norm loss/learning_rate ratio/mean ratio/max ratio/clip_fraction_low
        ratio/clip_fraction_high ratio/ess mismatch/kl mismatch/prob_corr reward/mean reward/std_within_group
        advantage/abs_mean data/num_groups_submitted data/num_groups_trainable data/num_trajectories data/num_tokens
        data/num_dropped_overlong data/padding_fraction data/shared_prefix_tokens_saved objective/exact time/tokenize_s
        time/train_s time/checkpoint_s throughput/tokens_per_s""".split()
    assert set(expected) <= set(result.metrics)
    assert all(isinstance(value, float) for value in result.metrics.values())
    assert result.metrics["data/num_tokens"] == sum(int(t.token_histories[0].mask.sum()) for g in groups for t in g)
    with pytest.raises(AttributeError):
        result.step = 5


def test_checkpoint_loads_in_transformers_as_it_is(trainer, model) -> None:
    path = trainer.fit_rl(model, make_groups(seed=1), learning_rate=1e-3).checkpoint_path
    ids = torch.tensor([list(b"3+4=")])
    plain = AutoModelForCausalLM.from_pretrained(path)(ids).logits
    with torch.no_grad():
        ours = trainer.verbs.policy_module.policy.causal_lm(ids).logits
    assert torch.allclose(plain, ours, atol=1e-6)
    assert AutoTokenizer.from_pretrained(path).encode("7") == [ord("7")]


def test_adapters_load_in_peft_as_they_are(trainer, tmp_path) -> None:
    from peft import PeftModel

    model = fitrl.TrainableModel("lora", "tests", "tiny", lora=fitrl.LoraSettings(rank=4), root=tmp_path)
    path = trainer.fit_rl(model, make_groups(seed=1), learning_rate=1e-2).checkpoint_path
    base = trainer.verbs.policy_module.policy.causal_lm.config.name_or_path
    ids = torch.tensor([list(b"3+4=")])
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path)(ids).logits
        ours = trainer.verbs.policy_module.policy.network(ids).logits
        untouched = AutoModelForCausalLM.from_pretrained(base)(ids).logits
    assert torch.allclose(adapted, ours, atol=1e-5)
    assert not torch.allclose(untouched, ours, atol=1e-3)


def by_hand(model, calls, rates) -> torch.Tensor:
    """The same updates by plain torch: one AdamW that lives through all calls."""
    network = AutoModelForCausalLM.from_pretrained(
        fitrl.policy.loading.resolve_base_model("tiny")[0], dtype=torch.float32
    ).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    for groups, rate in zip(calls, rates, strict=True):
        optimizer.zero_grad()
        count = sum(int(t.token_histories[0].mask.sum()) for group in groups for t in group)
        for group in groups:
            rewards = torch.tensor(group.rewards, dtype=torch.float64)
            advantages = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-6)
            for trajectory, advantage in zip(group, advantages, strict=True):
                [history] = trajectory.token_histories
                logits = network(history.token_ids[None]).logits[0, :-1]
                p = logits.log_softmax(-1).gather(1, history.token_ids[1:, None]).squeeze(1)[history.mask[1:]]
                q = history.logprobs[history.mask]
                ratio = (p - q).exp().clamp(0.0, 5.0).detach()
                (-(ratio * float(advantage) * p).sum() / count).backward()
        for parameters in optimizer.param_groups:
            parameters["lr"] = rate
        optimizer.step()
    return torch.cat([tensor.flatten() for tensor in network.state_dict().values()])


def test_three_calls_equal_a_loop_written_by_hand(model) -> None:
    """Adam's moments, the schedule and the step count live on from call to call."""
    calls = [make_groups(seed=seed) for seed in (1, 2, 3)]
    with fitrl.LocalTrainer(**CPU, lr_schedule=lambda step: 1.0 / (1 + step)) as trainer:
        results = [trainer.fit_rl(model, groups, learning_rate=1e-4) for groups in calls]
        ours = weights_of(trainer)
        assert [result.step for result in results] == [1, 2, 3]
        rates = [result.metrics["loss/learning_rate"] for result in results]
        assert rates == pytest.approx([1e-4, 0.5e-4, 1e-4 / 3])
        state = trainer.strategy.optimizers[0].state_dict()["state"]
        assert all(float(entry["step"]) == 3 for entry in state.values())
    hand = by_hand(model, calls, rates)
    # Adam turns the sign of a gradient that is almost 0 into a whole step; nearly all weights must agree closely
    gap = (ours - hand).abs()
    assert float(gap.max()) <= 2 * sum(rates)
    assert float((gap > 1e-6).float().mean()) < 2e-3


def test_global_random_state_is_left_alone(trainer, model) -> None:
    trainer.open(model)
    torch.manual_seed(7)
    random.seed(7)
    before = torch.get_rng_state(), random.getstate()
    trainer.fit_rl(model, make_groups(seed=1), num_minibatches=2)
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()


def test_nothing_to_train_is_an_outcome(trainer, model) -> None:
    groups = make_groups(seed=1, num_groups=2)
    for trajectory in groups[0]:
        trajectory.reward = 1.0
    alone = fitrl.TrajectoryGroup(groups[1].trajectories[:1])
    before = weights_of_opened(trainer, model)
    result = trainer.fit_rl(model, [groups[0], alone, fitrl.TrajectoryGroup([])])
    assert (result.step, result.num_optimizer_steps, result.checkpoint_path) == (0, 0, None)
    assert result.dropped == {"flat_groups": 2, "empty_groups": 1}
    assert result.metrics["reward/mean"] == pytest.approx((4 * 1.0 + alone.rewards[0]) / 5)
    assert not model.checkpoints()
    assert torch.equal(before, weights_of(trainer))


def weights_of_opened(trainer, model) -> torch.Tensor:
    trainer.open(model)
    return weights_of(trainer)


def test_flat_groups_teach_with_an_entropy_bonus(trainer, model) -> None:
    groups = make_groups(seed=1)
    for group in groups:
        for trajectory in group:
            trajectory.reward = 1.0
    assert trainer.fit_rl(model, groups, entropy_coef=0.1).num_optimizer_steps == 1


def test_fewer_groups_than_minibatches(trainer, model) -> None:
    result = trainer.fit_rl(model, make_groups(seed=1, num_groups=3), num_minibatches=8, num_epochs=2)
    assert result.num_optimizer_steps == 6


def test_uneven_minibatches_take_one_step_each(trainer, model) -> None:
    groups = make_groups(seed=1, num_groups=5, longest=40)
    result = trainer.fit_rl(model, groups, num_minibatches=2, max_tokens_per_microbatch=64)
    assert result.num_optimizer_steps == 2
    assert trainer.accumulate_grad_batches == 1


BAD_GROUPS = {
    "no groups": (lambda groups: [], "groups is empty"),
    "not a group": (lambda groups: groups[0].trajectories, r"groups\[0\] is a Trajectory"),
    "reward NaN": (lambda groups: _set(groups, "reward", float("nan")), "group 1: reward nan of trajectory 2"),
    "logprob NaN": (lambda groups: _fill(groups, "logprobs", float("nan")), "group 1, trajectory 2: .*NaN"),
    "logprob positive": (lambda groups: _fill(groups, "logprobs", 0.5), "group 1, trajectory 2: 0.5 is no logprob"),
    "temperature": (lambda groups: _fill(groups, "temperature", 0.0), "group 1, trajectory 2: temperature 0.0"),
    "nothing sampled": (
        lambda groups: [*groups, fitrl.TrajectoryGroup([fitrl.Trajectory(messages_and_choices=[{"role": "user"}])])],
        "group 3, trajectory 0: a trajectory holds nothing that the policy said",
    ),
    "other support": (lambda groups: _support(groups), "top_p < 1 or top_k"),
}


def _set(groups, name, value):
    setattr(groups[1].trajectories[2], name, value)
    return groups


def _fill(groups, name, value):
    getattr(groups[1].trajectories[2].token_histories[0], name).fill_(value)
    return groups


def _support(groups):
    groups[1].trajectories[2].token_histories[0].full_support = False
    return groups


@pytest.mark.parametrize("case", BAD_GROUPS)
def test_bad_groups_raise_and_lose_nothing(case, trainer, model) -> None:
    spoil, message = BAD_GROUPS[case]
    trainer.fit_rl(model, make_groups(seed=1))
    before = weights_of(trainer)
    with pytest.raises(DataError, match=message):
        trainer.fit_rl(model, spoil(make_groups(seed=2)))
    assert torch.equal(before, weights_of(trainer))
    assert trainer.fit_rl(model, make_groups(seed=2)).step == 2


def test_other_support_needs_recomputed_logprobs(trainer, model) -> None:
    assert trainer.fit_rl(model, _support(make_groups(seed=2)), precalculate_logprobs=True).num_optimizer_steps == 1


def test_pending_groups_are_refused(trainer, model) -> None:
    async def attempt() -> fitrl.Trajectory:
        return fitrl.Trajectory()

    waiting = attempt()
    with pytest.raises(DataError, match="await fitrl.gather"):
        trainer.fit_rl(model, [fitrl.TrajectoryGroup([waiting])])
    waiting.close()


def test_an_exception_in_a_step_leaves_the_trainer_usable(trainer, model) -> None:
    class Breaks:
        inputs = "logprobs"

        def __call__(self, inputs, /):
            raise ArithmeticError("on purpose")

    trainer.fit_rl(model, make_groups(seed=1), learning_rate=1e-3)
    before = weights_of(trainer)
    with pytest.raises(ArithmeticError, match="on purpose"):
        trainer.fit_rl(model, make_groups(seed=2), objective=Breaks())
    assert torch.equal(before, weights_of(trainer))
    assert trainer.verbs.get_status().accumulated_microbatches == 0
    result = trainer.fit_rl(model, make_groups(seed=2), learning_rate=1e-3)
    assert (result.step, result.num_optimizer_steps) == (2, 1)
    assert result.metrics["loss/learning_rate"] == pytest.approx(1e-3)


def test_precalculated_logprobs_make_the_first_ratio_one(trainer, model) -> None:
    result = trainer.fit_rl(model, make_groups(seed=1), precalculate_logprobs=True, save_checkpoint=False)
    assert result.metrics["ratio/max"] == pytest.approx(1.0, abs=1e-5)
    # the sampler's logprobs were made 0.2 off, and the mismatch still says so
    assert abs(result.metrics["mismatch/kl"]) > 1e-3


def test_sampler_and_trainer_agree(trainer, model) -> None:
    """The measured mismatch is rounding: the sampler's logprobs are the trainer's."""
    groups = fitrl.rollout(
        trainer.sampler(model),
        [f"{a}+{b}=" for a in range(4) for b in range(2)],
        reward=lambda task, trajectory: float(len(trajectory.completions()[0].text)) + random.random(),
        group_size=4,
        max_new_tokens=6,
        temperature=0.8,
        seed=1,
    )
    result = trainer.fit_rl(model, groups)
    assert abs(result.metrics["mismatch/kl"]) < 1e-5
    assert result.metrics["ratio/max"] == pytest.approx(1.0, abs=1e-4)
    assert trainer.sampler(model).version == 1


# -- sessions ----------------------------------------------------------------------------------------------------


def test_a_new_trainer_resumes_the_newest_checkpoint(model, tmp_path) -> None:
    calls = [make_groups(seed=seed) for seed in (1, 2, 3)]
    arguments = {"learning_rate": 1e-3, "scale_learning_rate_by_reward_std_dev": True}
    with fitrl.LocalTrainer(**CPU) as trainer:
        for groups in calls:
            trainer.fit_rl(model, groups, **arguments)
        whole = weights_of(trainer)
    other = fitrl.TrainableModel("other", "tests", "tiny", lora=None, root=tmp_path)
    with fitrl.LocalTrainer(**CPU) as trainer:
        for groups in calls[:2]:
            trainer.fit_rl(other, groups, **arguments)
    again = fitrl.TrainableModel("other", "tests", "tiny", lora=None, root=tmp_path)
    assert again.step == 2
    with fitrl.LocalTrainer(**CPU) as trainer:
        assert trainer.fit_rl(again, calls[2], **arguments).step == 3
        assert torch.equal(whole, weights_of(trainer))


def test_another_model_saves_and_releases_the_first(trainer, model, tmp_path) -> None:
    other = fitrl.TrainableModel("other", "tests", "tiny", lora=fitrl.LoraSettings(rank=2), root=tmp_path)
    trainer.fit_rl(model, make_groups(seed=1), learning_rate=1e-3, save_checkpoint=False)
    first = weights_of(trainer)
    sampler = trainer.sampler(model)
    assert trainer.fit_rl(other, make_groups(seed=1), save_checkpoint=False).step == 1
    assert [path.name for path in model.checkpoints()] == ["0001"]  # saved on the way out
    assert trainer.fit_rl(other, make_groups(seed=2), save_checkpoint=False).step == 2
    trainer.open(model)
    assert trainer.global_step == 1 and torch.equal(first, weights_of(trainer))
    with pytest.raises(Exception, match="ask trainer.sampler"):
        fitrl.rollout(sampler, ["1+1="], reward=lambda *_: 0.0, group_size=1)


def test_lora_and_full_checkpoints_are_not_mixed_up(trainer, model, tmp_path) -> None:
    trainer.fit_rl(model, make_groups(seed=1))
    trainer.close()
    mixed = fitrl.TrainableModel("adder", "tests", "tiny", lora=fitrl.LoraSettings(), root=tmp_path)
    with pytest.raises(CheckpointError, match="holds full weights"):
        trainer.fit_rl(mixed, make_groups(seed=1))
    assert trainer.fit_rl(model, make_groups(seed=1)).step == 2


def test_close_and_use_again(model) -> None:
    trainer = fitrl.LocalTrainer(**CPU)
    trainer.fit_rl(model, make_groups(seed=1))
    trainer.close()
    trainer.close()
    assert trainer.fit_rl(model, make_groups(seed=2)).step == 2
    trainer.close()


def test_reentrance_is_refused(trainer, model) -> None:
    class Nested:
        inputs = "logprobs"

        def __call__(self, inputs, /):
            trainer.fit_rl(model, make_groups(seed=1))

    with pytest.raises(SessionError, match="in a fit_rl call already"):
        trainer.fit_rl(model, make_groups(seed=1), objective=Nested())


def test_fit_rl_works_off_the_main_thread(trainer, model) -> None:
    steps = []
    thread = threading.Thread(target=lambda: steps.append(trainer.fit_rl(model, make_groups(seed=1)).step))
    thread.start()
    thread.join()
    assert steps == [1]


# -- Lightning -----------------------------------------------------------------------------------------------------


def test_callbacks_loggers_and_limits(model, tmp_path) -> None:
    seen = []

    class Recorder(lightning.Callback):
        def on_train_start(self, trainer, module) -> None:
            seen.append("start")

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
            seen.append("batch")

    checkpoint = ModelCheckpoint(dirpath=tmp_path / "lightning", monitor="reward/mean", mode="max", save_top_k=1)
    board, table = TensorBoardLogger(tmp_path / "tb"), CSVLogger(tmp_path / "csv")
    with fitrl.LocalTrainer(
        **CPU,
        callbacks=[Recorder(), LearningRateMonitor("step"), checkpoint, EarlyStopping("reward/mean", patience=99)],
        logger=[board, table],
    ) as trainer:
        for seed in (1, 2, 3):
            trainer.fit_rl(model, make_groups(seed=seed), learning_rate=1e-3)
            rewards = [r for group in make_groups(seed=seed) for r in group.rewards]
            assert float(trainer.callback_metrics["reward/mean"]) == pytest.approx(sum(rewards) / len(rewards))
        assert seen.count("start") == 3 and seen.count("batch") == 3
        assert len(list((tmp_path / "tb").rglob("events*"))) == 1  # not one for each call
        rows = next((tmp_path / "csv").rglob("metrics.csv")).read_text()
        assert "reward/mean" in rows and "lr-AdamW" in rows
    assert float(checkpoint.best_model_score) == pytest.approx(
        float(torch.tensor([r for g in make_groups(seed=1) for r in g.rewards]).mean()), abs=1e-5
    )


def test_clip_value_is_honoured(model, tmp_path) -> None:
    gradients = []

    class Norm(lightning.Callback):
        def on_before_zero_grad(self, trainer, module, optimizer) -> None:
            norms = [p.grad.norm() for p in module.parameters() if p.grad is not None]
            if norms:
                gradients.append(float(torch.stack(norms).norm()))

    with fitrl.LocalTrainer(**CPU, gradient_clip_val=0.01, callbacks=[Norm()]) as trainer:
        first = trainer.fit_rl(model, make_groups(seed=1), num_minibatches=2)
    assert first.metrics["loss/grad_norm"] > 0.1
    assert gradients and gradients[0] == pytest.approx(0.01, rel=1e-3)


def test_validate_between_calls_changes_nothing(trainer, model) -> None:
    trainer.fit_rl(model, make_groups(seed=1), learning_rate=1e-3)
    before = weights_of(trainer)
    held_out = _batches(trainer, make_groups(seed=9))
    [metrics] = trainer.validate(dataloaders=Feed(held_out), verbose=False)
    assert metrics["val/ratio/mean"] > 0
    assert torch.equal(before, weights_of(trainer))
    result = trainer.fit_rl(model, make_groups(seed=2), learning_rate=1e-3)
    state = trainer.strategy.optimizers[0].state_dict()["state"]
    assert result.step == 2 and all(float(entry["step"]) == 2 for entry in state.values())


def _batches(trainer, groups):
    from fitrl.data.packing import pack
    from fitrl.data.samples import build_samples

    samples = build_samples(groups, trainer.verbs.policy_module.policy.tokenizer)
    return pack([sample for group in samples.groups for sample in group])


def test_limits_that_a_call_cannot_honour_are_errors(model) -> None:
    for options in ({"accumulate_grad_batches": 2}, {"limit_train_batches": 0.5}, {"overfit_batches": 1}):
        with fitrl.LocalTrainer(**CPU, **options) as trainer, pytest.raises(InvalidArgumentError):
            trainer.fit_rl(model, make_groups(seed=1))
    with fitrl.LocalTrainer(**CPU, max_steps=3) as trainer:
        trainer.fit_rl(model, make_groups(seed=1), num_minibatches=2)
        with pytest.raises(InvalidArgumentError, match="max_steps=3 is exhausted"):
            trainer.fit_rl(model, make_groups(seed=1), num_minibatches=2)
        assert trainer.fit_rl(model, make_groups(seed=1)).step == 3
    with fitrl.LocalTrainer(**CPU, max_epochs=1) as trainer:
        assert trainer.fit_rl(model, make_groups(seed=1)).step == 4
        with pytest.raises(InvalidArgumentError, match="max_epochs=1"):
            trainer.fit_rl(model, make_groups(seed=1))


def test_open_gives_the_verbs(trainer, model) -> None:
    verbs = trainer.open(model)
    assert isinstance(verbs, PolicyTrainer)
    assert trainer.open(model) is verbs
    verbs.forward_backward(_batches(trainer, make_groups(seed=1))[0])
    with pytest.raises(SessionError, match="are waiting"):
        trainer.fit_rl(model, make_groups(seed=1))
    verbs.clear_gradients()
    assert trainer.fit_rl(model, make_groups(seed=1)).step == 1


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_logprobs_stay_float32_under_every_precision(precision, model) -> None:
    """A rollout logprob rounded to bfloat16 would move the mean ratio by far more than this."""
    groups = make_groups(seed=1)
    with fitrl.LocalTrainer(**CPU) as trainer:
        exact = trainer.fit_rl(model, groups, learning_rate=0.0, save_checkpoint=False).metrics["mismatch/kl"]
    seen = []

    class Keep(lightning.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
            seen.append(batch.loss_inputs.rollout_logprobs)

    with fitrl.LocalTrainer(**CPU, precision=precision, callbacks=[Keep()]) as trainer:
        low = trainer.fit_rl(model, groups, learning_rate=0.0, save_checkpoint=False)
    told = torch.cat([t.token_histories[0].logprobs[t.token_histories[0].mask] for g in groups for t in g])
    assert seen[0].dtype == torch.float32
    assert torch.equal(seen[0].sort().values, told.sort().values)
    assert low.metrics["mismatch/kl"] == pytest.approx(exact, abs=0.05)


def test_ctrl_c_raises_here_and_gives_the_handler_back(model) -> None:
    """Lightning answers it by ignoring further ones and leaving the process."""

    class Interrupt(lightning.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
            if trainer.global_step == 1:
                raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    with fitrl.LocalTrainer(**CPU, callbacks=[Interrupt()]) as trainer:
        trainer.fit_rl(model, make_groups(seed=1), learning_rate=1e-3)
        with pytest.raises(KeyboardInterrupt):
            trainer.fit_rl(model, make_groups(seed=2))
        assert signal.getsignal(signal.SIGINT) is handler
        assert not trainer.verbs.is_live
    with fitrl.LocalTrainer(**CPU) as trainer:
        assert trainer.fit_rl(model, make_groups(seed=2)).step == 2


def test_a_fit_of_another_module_takes_the_sessions_place(trainer, model, tmp_path) -> None:
    trainer.fit_rl(model, make_groups(seed=1), learning_rate=1e-3)
    saved = weights_of(trainer)
    other = fitrl.PolicyModule(fitrl.TrainableModel("other", "tests", "tiny", lora=None, root=tmp_path))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(other, train_dataloaders=Feed(_batches_of(model)))
    assert trainer.lightning_module is other
    trainer.open(model)
    assert trainer.global_step == 1 and torch.equal(saved, weights_of(trainer))
    assert trainer.fit_rl(model, make_groups(seed=2)).step == 2


def _batches_of(model):
    from fitrl.data.packing import pack
    from samples import make_samples

    return pack(make_samples(seed=5, num_trajectories=3))
