"""What `DeepSpeedTrainer` takes and refuses at construction, and what the plugin is to the rest of fitrl."""

from __future__ import annotations

import builtins
from typing import Any

import lightning
import pytest
from deepspeed.runtime.config import DeepSpeedConfig

import fitrl
from fitrl.discovery import trainer_class
from fitrl.errors import InvalidArgumentError, MissingDependencyError, UnknownArgumentError
from fitrl_deepspeed import DeepSpeedRLStrategy, DeepSpeedTrainer
from fitrl_deepspeed.settings import check_precision, deepspeed_config, loss_scaling


def config(zero_stage: int = 2, **options: Any) -> dict[str, Any]:
    chosen: dict[str, Any] = {"offload_optimizer": False, "offload_params": False, "settings": {}}
    return deepspeed_config(zero_stage, **(chosen | options))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_reads_what_is_built(stage) -> None:
    built = config(stage, offload_optimizer=True, settings={"zero_optimization": {"reduce_bucket_size": 1000}})
    read = DeepSpeedConfig(built | {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1})
    assert int(read.zero_config.stage) == stage
    assert read.zero_config.reduce_bucket_size == 1000
    assert read.zero_config.offload_optimizer.device == "cpu"
    assert read.managed_gradient_accumulation is False


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"zero_stage": 4}, "zero_stage must be 1"),
        ({"zero_stage": True}, "zero_stage must be 1"),
        ({"offload_params": True}, "offload_params=True needs zero_stage=3"),
        ({"offload_optimizer": "cpu"}, "offload_optimizer must be True or False, got 'cpu'"),
        ({"settings": {"zero_optimisation": {}}}, "did you mean 'zero_optimization'"),
        ({"settings": {"zero_optimization": {"reduce_bucket": 1}}}, "did you mean 'reduce_bucket_size'"),
        ({"settings": {"zero_optimization": {"stage": 3}}}, "pass zero_stage"),
        ({"settings": {"zero_optimization": {"offload_param": {"device": "nvme"}}}}, "pass offload_params=True"),
        ({"settings": {"zero_optimization": 3}}, "must be a mapping"),
        ({"settings": [1]}, "settings must be a mapping"),
        ({"settings": {"gradient_accumulation_steps": 4}}, "fit_rl accumulates"),
        ({"settings": {"gradient_clipping": 1.0}}, "pass gradient_clip_val"),
        ({"settings": {"optimizer": {"type": "Adam"}}}, "pass optimizer=AdamWSettings"),
        ({"settings": {"bf16": {"enabled": True}}}, "pass precision='bf16-mixed'"),
        ({"settings": {"fp16": {"enabled": True}}}, "pass precision='16-mixed'"),
        ({"settings": {"fp16": {"loss_scales": 1}}}, "did you mean 'loss_scale'"),
        ({"settings": {"zero_optimization": {"stage3_max_live_parameters": 1}}}, "has no effect with zero_stage=2"),
        ({"settings": {"zero_optimization": {"reduce_bucket_size": "much"}}}, "DeepSpeed refuses its settings"),
        ({"settings": {"zero_optimization": {"reduce_bucket_size": -1}}}, "DeepSpeed refuses its settings"),
        ({"settings": {"communication_data_type": "fp7"}}, "DeepSpeed refuses its settings"),
    ],
)
def test_what_is_wrong_or_could_have_no_effect_is_refused(arguments, said) -> None:
    with pytest.raises(InvalidArgumentError, match=said):
        DeepSpeedTrainer(accelerator="cpu", devices=2, **arguments)
    with pytest.raises(ValueError, match=said):  # the strategy by itself, too
        DeepSpeedRLStrategy(**arguments)


def test_loss_scaling_goes_with_float16_only() -> None:
    settings = {"fp16": {"initial_scale_power": 8}}
    assert loss_scaling(settings, "16-mixed") == {"initial_scale_power": 8}
    with pytest.raises(InvalidArgumentError, match="has no effect with precision='bf16-mixed'"):
        loss_scaling(settings, "bf16-mixed")


@pytest.mark.parametrize(("precision", "said"), [("bf16-true", "'bf16-mixed'"), ("64-true", "LocalTrainer")])
def test_each_precision_has_one_name(precision, said) -> None:
    with pytest.raises(InvalidArgumentError, match=said):
        check_precision(precision)
    with pytest.raises(InvalidArgumentError, match=said):
        DeepSpeedTrainer(accelerator="cpu", devices=2, precision=precision)


def test_moments_that_cannot_be_cut_and_other_clipping_are_refused() -> None:
    with pytest.raises(fitrl.FitRLError, match="moments='8bit'"):
        DeepSpeedTrainer(accelerator="cpu", devices=2, optimizer=fitrl.AdamWSettings(moments="8bit"))
    with pytest.raises(InvalidArgumentError, match="gradient_clip_algorithm='value'"):
        DeepSpeedTrainer(accelerator="cpu", devices=2, gradient_clip_val=1.0, gradient_clip_algorithm="value")
    with pytest.raises(fitrl.FitRLError, match="compile=True"):
        DeepSpeedTrainer(accelerator="cpu", devices=2, zero_stage=3, compile=True)


def test_it_asks_for_torchrun() -> None:
    with pytest.raises(InvalidArgumentError, match="torchrun --nproc_per_node 2"):
        DeepSpeedTrainer(accelerator="cpu", devices=2)


def test_a_missing_deepspeed_is_named_with_what_brings_it(monkeypatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "deepspeed":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match="pip install fitrl-deepspeed"):
        DeepSpeedRLStrategy()


def test_it_is_found_by_name() -> None:
    assert trainer_class("deepspeed") is DeepSpeedTrainer
    trainer = lightning.Trainer(strategy="fitrl_deepspeed", accelerator="cpu", devices=2, logger=False)
    assert isinstance(trainer.strategy, DeepSpeedRLStrategy) and trainer.strategy.zero_stage == 2


def test_an_argument_of_another_backend_names_this_one(monkeypatch) -> None:
    monkeypatch.setattr("fitrl.trainers.session.check_processes", lambda trainer: None)
    trainer = DeepSpeedTrainer(accelerator="cpu", devices=1)
    model = fitrl.TrainableModel("a", "b", "tiny")
    with pytest.raises(UnknownArgumentError, match="the backend 'deepspeed' takes: learning_rate"):
        trainer.fit_rl(model, [], deploy_checkpoint=True)  # type: ignore[call-arg]
