"""Turns, states, resuming, deletion, Lightning's own loop and the command line."""

from __future__ import annotations

import asyncio
import copy
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

import fitrl
from fitrl import LoraSettings, PolicyModule, RolloutDataModule, TrainableModel
from fitrl.cli.fit_rl import main
from fitrl.data.packing import pack
from fitrl.data.samples import Sample
from fitrl.demo import TASKS, correct
from fitrl.discovery import trainer_class
from fitrl.errors import CheckpointError, InvalidArgumentError, RunLockedError, UnknownArgumentError
from fitrl_tinker import TinkerTrainer, TinkerTrainResult
from fitrl_tinker.datums import Datums
from samples import make_groups, make_samples


@pytest.fixture
def trainer(service) -> Any:
    with TinkerTrainer(enable_model_summary=False) as trainer:
        yield trainer


def make_model(root: Any, name: str = "policy") -> TrainableModel:
    return TrainableModel(name, "runs", "tiny", lora=LoraSettings(rank=4), root=root)


# -- several turns ---------------------------------------------------------------------------------------------------


def turns(count: int, *, mask_all: bool = False) -> Sample:
    """A trajectory of turns, each history the one before and more; each trains its own tokens."""
    [longest] = make_samples(seed=11, num_trajectories=1, longest=40)
    [whole] = longest.histories
    ends = [len(whole) * (turn + 1) // count for turn in range(count)]
    histories = []
    for start, end in zip([0, *ends], ends, strict=False):
        history = copy.deepcopy(whole)
        history.mask[: 0 if mask_all else start] = False
        history.mask[max(1, start)] = True  # every turn says something
        histories.append(
            type(history)(
                token_ids=history.token_ids[:end],
                mask=history.mask[:end],
                logprobs=torch.where(history.mask[:end], whole.logprobs[:end].nan_to_num(-1.0), torch.nan),
                temperature=history.temperature[:end],
                versions=history.versions[:end],
            )
        )
    return Sample(histories=histories, advantage=0.7)


def test_turns_that_extend_each_other_are_one_datum() -> None:
    sample = turns(3)
    [batch] = pack([sample], layout="packed")
    datums = Datums(batch)
    [datum] = datums.build({"logprobs": batch.loss_inputs.old_logprobs})
    assert datum.model_input.length == max(sequence.tokens.numel() for sequence in datums.sequences) - 1
    sent = datum.loss_fn_inputs["logprobs"].tolist()
    trained = sum(int(history.mask.sum()) for history in sample.histories)
    assert sum(value != 0.0 for value in sent) == trained == len(batch.loss_inputs.rows)  # every turn is there


def test_a_token_that_two_turns_train_counts_twice() -> None:
    [batch] = pack([turns(2, mask_all=True)], layout="packed")
    assert len(Datums(batch).build({})) == 2


def test_turns_of_different_trajectories_stay_apart() -> None:
    first, second = turns(1), turns(1)
    [batch] = pack([first, second], layout="packed")
    datums = Datums(batch)
    assert len(datums.sequences) == 2 and datums.is_one_each


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_several_turns_learn_as_locally(level, service, tmp_path) -> None:
    batches = pack(
        [turns(3), *make_samples(seed=2, num_trajectories=2, histories_per_trajectory=(2,))], layout="packed"
    )
    objective = fitrl.Objective(ppo=True, importance_sampling_level=level)
    found = []
    for make, lora in ((fitrl.LocalTrainer, None), (TinkerTrainer, LoraSettings(rank=4))):
        more: dict[str, Any] = {"enable_model_summary": False}
        if make is fitrl.LocalTrainer:
            more |= {"accelerator": "cpu", "devices": 1, "precision": "64-true"}
        with make(**more) as trainer:
            verbs = trainer.open(TrainableModel(make.__name__, "runs", "tiny", lora=lora, root=tmp_path))
            [result] = [verbs.forward_backward(batch, objective) for batch in batches]
            norm = verbs.optim_step(learning_rate=1e-3).grad_norm
            found.append((result.loss, norm))
    assert found[1] == pytest.approx(found[0], rel=2e-5)


def test_chat_turns_are_all_trained(trainer, tmp_path, service) -> None:
    async def two_turns(chat: fitrl.Chat, task: Any) -> fitrl.Trajectory:
        messages: list[Any] = [{"role": "user", "content": task["prompt"]}]
        for _ in range(2):
            messages += [await chat(messages), {"role": "user", "content": "again"}]
        return fitrl.Trajectory(messages_and_choices=messages[:-1])

    model = make_model(tmp_path)
    groups = fitrl.rollout(
        trainer.sampler(model),
        TASKS[:2],
        group_size=4,
        agent=two_turns,
        max_new_tokens=3,
        seed=1,
        reward=lambda task, trajectory: float(len(trajectory.completions()[0].text)),
    )
    metrics = trainer.fit_rl(model, groups).metrics
    said = [t for group in groups for t in group if t.reward != sum(group.rewards) / len(group)]
    tokens = sum(len(c.token_ids or ()) for t in said for c in t.completions())
    sent = [datum for _, _, data in service.sent for datum in data]
    assert sum(value != 0.0 for datum in sent for value in datum.loss_fn_inputs["advantages"].tolist()) == tokens
    assert metrics["data/num_tokens"] >= tokens


# -- states ----------------------------------------------------------------------------------------------------------


def test_states_are_listed_resumed_and_deleted(service, trainer, tmp_path) -> None:
    model = make_model(tmp_path)
    for seed, reward in ((1, 0.2), (2, 0.9), (3, 0.5), (4, 0.6)):
        result = trainer.fit_rl(model, make_groups(seed=seed), deploy_checkpoint=seed == 4)
        model.log(metrics={"val/score": reward}, step=result.step)
        assert isinstance(result, TinkerTrainResult)
        assert result.checkpoint_path == f"tinker://run1/weights/step-{seed}"
    assert trainer.open(model).save("mine", weights_only=True) == "tinker://run1/weights/mine-step-4-weights"
    kinds = [(state.step, state.kind) for state in trainer.states(model)]
    assert kinds == [(1, "training"), (2, "training"), (3, "training"), (4, "training"), (4, "sampler"), (4, "weights")]
    with pytest.raises(InvalidArgumentError, match="not logged"):
        trainer.delete_states(model, best="nothing")
    deleted = trainer.delete_states(model, best="val/score")
    assert [state.step for state in deleted] == [1, 3]
    assert [state.step for state in trainer.states(model)] == [2, 4, 4, 4]
    assert trainer.open(model).load("tinker://run1/weights/step-2") and trainer.global_step == 2
    assert trainer.open(model).load() == "tinker://run1/weights/step-4" and trainer.global_step == 4


def test_going_back_makes_the_older_state_the_newest_when_it_is_saved(service, trainer, tmp_path) -> None:
    model = make_model(tmp_path)
    for seed in (1, 2, 3):
        trainer.fit_rl(model, make_groups(seed=seed))
    trainer.open(model).load("tinker://run1/weights/step-1")
    assert trainer.fit_rl(model, make_groups(seed=9)).checkpoint_path == "tinker://run2/weights/step-2"
    trainer.close()
    with TinkerTrainer(enable_model_summary=False) as again:
        again.open(model)
        assert again.global_step == 2


def test_a_run_keeps_its_rank(service, tmp_path) -> None:
    with TinkerTrainer() as trainer:
        trainer.fit_rl(make_model(tmp_path), make_groups(seed=1))
    wider = TrainableModel("policy", "runs", "tiny", lora=LoraSettings(rank=8), root=tmp_path)
    with TinkerTrainer() as again, pytest.raises(CheckpointError, match="rank"):
        again.open(wider)


def test_every_own_argument_has_an_effect(service, trainer, tmp_path, capsys) -> None:
    model = make_model(tmp_path)
    result = trainer.fit_rl(model, make_groups(seed=1), save_checkpoint=False, verbose=True)
    assert (result.checkpoint_path, result.deployed) == (None, False) and not service.saved
    assert "tinker step 1" in capsys.readouterr().err
    for arguments in ({"train_mlp": False}, {"train_attn": False}, {"train_unembed": True}):
        other = make_model(tmp_path, "".join(arguments).replace("_", "-"))
        trainer.fit_rl(other, make_groups(seed=1), **arguments)
        assert service.created[-1] | arguments == service.created[-1]
    with pytest.raises(UnknownArgumentError, match="tinker.*deploy_checkpoint"):
        trainer.fit_rl(model, make_groups(seed=1), kl_coef=0.1)
    for name in ("strategy", "sampler", "compile"):
        with pytest.raises(InvalidArgumentError, match=name):
            TinkerTrainer(**{name: None})


def test_no_weights_are_here(service, trainer, tmp_path, monkeypatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("a model was loaded")

    model = make_model(tmp_path)
    monkeypatch.setattr("fitrl.policy.module.load_policy", refuse)
    trainer.fit_rl(model, make_groups(seed=1))
    module = trainer.lightning_module
    assert module.network is None and sum(parameter.numel() for parameter in module.parameters()) == 1


def test_overlong_trajectories_are_dropped_and_counted(service, trainer, tmp_path) -> None:
    service.context = 8
    result = trainer.fit_rl(make_model(tmp_path), make_groups(seed=1))
    assert result.dropped["overlong_trajectories"] > 0 and result.num_optimizer_steps == 1


def test_one_trainer_per_run_and_calls_in_order(service, trainer, tmp_path) -> None:
    model = make_model(tmp_path)
    trainer.open(model)
    with TinkerTrainer(enable_model_summary=False) as other, pytest.raises(RunLockedError):
        other.open(make_model(tmp_path))

    async def several() -> list[TinkerTrainResult]:
        return await asyncio.gather(*(trainer.fit_rl_async(model, make_groups(seed=seed)) for seed in (1, 2)))

    assert [result.step for result in asyncio.run(several())] == [1, 2]


# -- Lightning's own loop, and the command line ------------------------------------------------------------------------


def test_lightnings_fit_with_rollouts_and_ckpt_path(service, tmp_path) -> None:
    def fit(epochs: int, ckpt_path: Any = None) -> lightning.Trainer:
        keep = ModelCheckpoint(dirpath=tmp_path / "kept", save_last=True)
        trainer = lightning.Trainer(
            strategy="fitrl_tinker",
            accelerator="cpu",
            max_epochs=epochs,
            enable_progress_bar=False,
            enable_model_summary=False,
            gradient_clip_val=1.0,
            accumulate_grad_batches=2,
            log_every_n_steps=1,
            callbacks=[keep, LearningRateMonitor("step")],
            logger=CSVLogger(tmp_path),
        )
        module = PolicyModule(make_model(tmp_path), learning_rate=1e-3, lr_schedule=lambda step: 1 / (1 + step))
        data = RolloutDataModule(
            TASKS[:4],
            reward=correct_length,
            tasks_per_step=2,
            group_size=3,
            steps_per_epoch=2,
            max_new_tokens=3,
            val_tasks=TASKS[:1],
        )
        torch.manual_seed(1)
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        return trainer

    first = fit(1)
    assert first.global_step == 2 and first.callback_metrics["loss/train"].isfinite()
    assert "val/loss/train" in first.callback_metrics
    saved = torch.load(tmp_path / "kept" / "last.ckpt", weights_only=True)
    assert saved["remote_state"] == "tinker://run1/weights/step-2" and saved["state_dict"] == {}
    again = fit(2, tmp_path / "kept" / "last.ckpt")
    assert again.global_step == 4
    assert [step.learning_rate for step in service.steps] == pytest.approx([1e-3 / (1 + n) for n in range(4)])
    assert "load" in service.log


def correct_length(task: Any, trajectory: fitrl.Trajectory) -> float:
    """A reward that seldom leaves a group flat."""
    return correct(task, trajectory) + sum(trajectory.completions()[-1].token_ids or ()) / 1000


def test_the_command_line_learns_and_resumes(service, tmp_path, capsys) -> None:
    model = {"project": "cli", "root": str(tmp_path), "base_model": "tiny"}
    rollout = {"tasks": "fitrl.demo.TASKS", "reward": "fitrl.demo.correct", "tasks_per_step": "4"}
    rollout |= {"group_size": "4", "max_new_tokens": "2"}
    common = ["--backend", "tinker", "--progress", "false", "--fit_rl.deploy_checkpoint", "true"]
    for section, values in (("model", model), ("rollout", rollout)):
        common += [part for name, value in values.items() for part in (f"--{section}.{name}", value)]
    assert main([*common, "--model.name", "adder", "--steps", "2"]) == 0
    [run] = (tmp_path / "cli").iterdir()
    assert trainer_class("tinker") is TinkerTrainer and (run / "tinker.json").is_file()
    created = len(service.created)
    assert main(["--resume", str(run), "--steps", "3"]) == 0
    assert len(service.created) == created and "load" in service.log
    assert "reward" in capsys.readouterr().out


def test_the_example_of_the_readme_runs(service, tmp_path, monkeypatch, capsys) -> None:
    text = (Path(__file__).parent.parent / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    assert len(code.strip().splitlines()) <= 25
    for written, here in (("Qwen/Qwen3-8B", "tiny"), ("range(50)", "range(2)"), ("=256", "=2"), ("[:16]", "[:2]")):
        assert written in code
        code = code.replace(written, here)
    monkeypatch.chdir(tmp_path)
    # seldom right, so that groups would be flat
    code = code.replace('float(str(task["sum"]) in', 'float(len(str(task["sum"])) > 0) * sum(map(ord,').replace(
        ".text)", ".text))"
    )
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert "tinker://run" in capsys.readouterr().out
