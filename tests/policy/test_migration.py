"""Older calls do what the new ones do, say how to write them, and refuse what has no counterpart."""

import asyncio
import warnings
from pathlib import Path

import pytest
import torch

import fitrl
from fitrl.errors import InvalidArgumentError, SessionError
from fitrl.policy.migration import _INSTEAD, _SAME, translate
from samples import make_groups

CPU = {"accelerator": "cpu", "devices": 1, "enable_model_summary": False}
OLD = {
    "ppo": True,
    "epsilon": 0.3,
    "epsilon_high": None,
    "precalculate_logprobs": True,
    "packed_sequence_length": 100,
    "kl_penalty_coef": 0.1,
}
NEW = {
    "learning_rate": 1e-3,
    "ppo": True,
    "epsilon": 0.3,
    "precalculate_logprobs": True,
    "max_tokens_per_microbatch": 100,
    "kl_coef": 0.1,
    "kl_in": "advantage",
    "reference": "base",
}


def weights_of(trainer) -> torch.Tensor:
    return torch.cat([tensor.flatten() for _, tensor in trainer.verbs.named_weights()]).clone()


def test_older_calls_train_like_new_ones_and_spell_them_out(tmp_path) -> None:
    old = fitrl.TrainableModel("old", "tests", "tiny", lora=None, root=tmp_path)
    new = fitrl.TrainableModel("new", "tests", "tiny", lora=None, root=tmp_path)
    groups = make_groups(seed=1)

    async def older(trainer):
        await old.register(trainer)
        return await old.train(groups, config=fitrl.TrainConfig(learning_rate=1e-3), _config=OLD)

    with fitrl.LocalTrainer(**CPU) as trainer:
        with pytest.warns(DeprecationWarning) as told:
            result = asyncio.run(older(trainer))
        ours = weights_of(trainer)
    texts = [str(warning.message) for warning in told if issubclass(warning.category, DeprecationWarning)]
    texts = [text for text in texts if "deprecated" in text and "model." in text]
    assert "pass the model to LocalTrainer.fit_rl" in texts[0]
    spelled = "trainer.fit_rl(model, groups, learning_rate=0.001, epsilon=0.3, ppo=True, precalculate_logprobs=True, "
    assert spelled in texts[1] and "model.log(groups, metrics=result.metrics, step=result.step)" in texts[1]
    assert all(warning.filename == __file__ for warning in told if "model." in str(warning.message))
    with fitrl.LocalTrainer(**CPU) as trainer:
        expected = trainer.fit_rl(new, groups, **NEW)
        assert torch.equal(weights_of(trainer), ours)
    assert result.step == expected.step == 1
    [entry] = old.history()
    assert entry["step"] == 1 and entry["metrics"]["loss/train"] == expected.metrics["loss/train"]


def test_translation() -> None:
    assert translate(fitrl.TrainConfig(learning_rate=1e-3), OLD) == NEW
    assert translate(fitrl.TrainConfig()) == {"learning_rate": 5e-6}
    assert translate(fitrl.TrainConfig(beta=0.2)) == {
        "learning_rate": 5e-6,
        "kl_coef": 0.2,
        "kl_estimator": "k3",
        "reference": "base",
    }
    assert translate(fitrl.TrainConfig(kl_penalty_coef=0.2), {"kl_ref_adapter_path": "a"})["reference"] == "a"


@pytest.mark.parametrize(
    ("config", "options", "said"),
    [
        (fitrl.TrainConfig(), {"normalize_by_length": False}, "normalize_by_length.*loss_aggregation"),
        (fitrl.TrainConfig(), {"moe_routing_replay_strict": True}, "moe_routing_replay_strict.*no counterpart"),
        (fitrl.TrainConfig(), {"kl_ref_adapter_path": "a"}, "no effect"),
        (fitrl.TrainConfig(beta=0.1, kl_penalty_coef=0.1), {}, "one KL"),
        (fitrl.TrainConfig(), {"epsilonn": 1}, "epsilonn"),
        (
            fitrl.TrainConfig(grad_accumulation_sequences=2),
            {},
            "grad_accumulation_sequences.*max_tokens_per_microbatch",
        ),
        (fitrl.TrainConfig(optimizer_save_interval=5), {}, "optimizer_save_interval.*save_checkpoint"),
    ],
)
def test_what_has_no_counterpart_is_refused(config, options, said) -> None:
    with pytest.raises(InvalidArgumentError, match=said):
        translate(config, options)


def test_a_model_without_a_trainer(tmp_path) -> None:
    model = fitrl.TrainableModel("old", "tests", "tiny", lora=None, root=tmp_path)
    with pytest.raises(SessionError, match="no trainer is registered"):
        asyncio.run(model.train([]))
    with warnings.catch_warnings(), pytest.raises(InvalidArgumentError, match="got object"):
        warnings.simplefilter("error")
        asyncio.run(model.register(object()))


def test_the_page_maps_every_argument() -> None:
    page = (Path(__file__).parents[2] / "MIGRATION.md").read_text()
    assert all(f"`{name}`" in page or f'["{name}"]' in page for name in _SAME)
    assert all(f".{name}`" in page or f'["{name}"]' in page for name in _INSTEAD)
