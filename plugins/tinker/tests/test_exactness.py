"""The service computes the objective: the same groups give the loss and the gradient that a local trainer computes."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import tinker
import torch

from fitrl import LocalTrainer, LoraSettings, Objective, TrainableModel
from fitrl.data.packing import pack
from fitrl.errors import DataError, InvalidArgumentError, UnsupportedError
from fitrl_tinker import TinkerTrainer
from fitrl_tinker.datums import Datums
from fitrl_tinker.losses import own_loss
from samples import make_groups, make_samples

LORA = LoraSettings(rank=4)
CPU = {"accelerator": "cpu", "devices": 1, "enable_model_summary": False}
# every argument that both trainers take, with values that change something
VALUES: dict[str, tuple[Any, ...]] = {
    "ppo": (False, True),
    "epsilon": (None, 0.05, 0.3),
    "epsilon_high": (None, 0.1),
    "advantage_balance": (0.0, 0.5, -0.5),
    "scale_rewards": (True, False),
    "importance_sampling_level": ("token", "sequence", "average", "geometric_average"),
    "loss_aggregation": ("token_mean", "token_sum", "seq_mean_token_mean", "seq_mean_token_sum"),
    "num_minibatches": (1, 2),
    "num_epochs": (1, 2),
    "seed": (0, 3),
}
ONE_STEP: dict[str, Any] = {"learning_rate": 1e-5, "save_checkpoint": False}
METRICS = ("loss/train", "loss/policy", "loss/grad_norm", "ratio/mean", "ratio/max", "ratio/ess", "mismatch/kl")


def pairwise(values: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Calls in which every two values of two arguments meet; greedily, always the call that covers most new pairs."""
    names = list(values)
    pairs = {
        frozenset([(a, i), (b, j)])
        for a, b in itertools.combinations(names, 2)
        for i in range(len(values[a]))
        for j in range(len(values[b]))
    }
    calls = []
    while pairs:
        chosen: dict[str, int] = dict(min(map(sorted, pairs)))  # not in a set's order: each process has its own
        for name in names:
            if name not in chosen:
                chosen[name] = max(
                    range(len(values[name])),
                    key=lambda i, name=name: sum(frozenset([(name, i), item]) in pairs for item in chosen.items()),
                )
        pairs -= {frozenset(pair) for pair in itertools.combinations(chosen.items(), 2)}
        calls.append({name: values[name][chosen[name]] for name in names})
    return calls


CALLS = pairwise(VALUES)


@pytest.fixture(scope="module")
def locally(tmp_path_factory) -> Any:
    """Metrics of two calls by a local trainer in float64, full weights as in the stand-in."""

    def learn(arguments: dict[str, Any]) -> list[dict[str, float]]:
        model = TrainableModel("here", "exact", "tiny", lora=None, root=tmp_path_factory.mktemp("local"))
        with LocalTrainer(precision="64-true", **CPU) as trainer:
            return [trainer.fit_rl(model, make_groups(seed=seed), **ONE_STEP, **arguments).metrics for seed in (1, 2)]

    return learn


def remotely(service: Any, root: Any, arguments: dict[str, Any]) -> list[dict[str, float]]:
    model = TrainableModel("there", "exact", "tiny", lora=LORA, root=root)
    with TinkerTrainer(enable_model_summary=False) as trainer:
        return [trainer.fit_rl(model, make_groups(seed=seed), **ONE_STEP, **arguments).metrics for seed in (1, 2)]


@pytest.mark.parametrize("arguments", CALLS, ids=lambda arguments: "-".join(map(str, arguments.values())))
def test_the_same_groups_give_the_same_loss_and_gradient(arguments, service, locally, tmp_path) -> None:
    here, there = locally(arguments), remotely(service, tmp_path, arguments)
    for one, other in zip(here, there, strict=True):  # the second call sees the weights that the first one left
        assert other["objective/exact"] == 1.0
        for key in METRICS:
            assert other[key] == pytest.approx(one[key], rel=2e-5, abs=2e-6), key


def test_every_pair_of_values_meets() -> None:
    for a, b in itertools.combinations(VALUES, 2):
        seen = {(call[a], call[b]) for call in CALLS}
        assert seen == set(itertools.product(VALUES[a], VALUES[b]))


# -- which loss it is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "cispo"),
        ({"ppo": True}, "ppo"),
        ({"ppo": True, "importance_sampling_level": "sequence"}, "gspo"),
        ({"importance_sampling_level": "sequence"}, None),
        ({"ppo": True, "importance_sampling_level": "average"}, None),
        ({"kimi_k2_tau": 0.1}, None),
        ({"ppo": True, "dual_clip": 3.0}, None),
        ({"mask_prob_ratio": True}, None),
        ({"max_negative_advantage_importance_sampling_weight": 2.0}, None),
    ],
)
def test_what_is_a_loss_of_the_services_takes_one_pass(options, name) -> None:
    [batch] = pack(make_samples(seed=1, num_trajectories=5), layout="packed")
    loss = own_loss(batch, Objective(**options), Datums(batch))
    assert (None if loss is None else loss.name) == name
    if loss is not None:
        low, high = Objective(**options).ratio_window
        assert loss.config == {"clip_low_threshold": low, "clip_high_threshold": high}  # never the service's defaults


def test_gspo_needs_every_trajectory_to_be_one_datum() -> None:
    samples = make_samples(seed=1, num_trajectories=4, histories_per_trajectory=(1, 2))
    [batch] = pack(samples, layout="packed")
    assert own_loss(batch, Objective(ppo=True, importance_sampling_level="sequence"), Datums(batch)) is None


@pytest.mark.parametrize(
    "options",
    [
        {"kimi_k2_tau": 0.3},
        {"ppo": True, "dual_clip": 1.5},
        {"ppo": True, "ratio_cap": 3.0},
        {"mask_prob_ratio": True, "epsilon": 0.1, "epsilon_high": 0.1},
        {"max_negative_advantage_importance_sampling_weight": 0.9},
        {"kl_coef": 0.2},
        {"kl_coef": 0.2, "kl_estimator": "k3"},
        {"kl_coef": 0.2, "kl_in": "advantage"},
    ],
    ids=str,
)
def test_objectives_of_the_verbs_are_exact_too(options, service, tmp_path) -> None:
    """What fit_rl does not take, but depends on logprobs alone."""
    objective = Objective(**options)
    batches = pack(
        make_samples(seed=4, num_trajectories=6, with_reference=True), layout="packed", num_batches=2, kl_mean=0.05
    )
    found = []
    for make, lora in ((LocalTrainer, None), (TinkerTrainer, LORA)):
        more = CPU | {"precision": "64-true"} if make is LocalTrainer else {"enable_model_summary": False}
        model = TrainableModel(make.__name__, "exact", "tiny", lora=lora, root=tmp_path)
        with make(**more) as trainer:
            verbs = trainer.open(model)
            results = [verbs.forward_backward(batch, objective) for batch in batches]
            step = verbs.optim_step(learning_rate=1e-3)
            found.append([*(result.loss for result in results), step.grad_norm])
    assert found[1] == pytest.approx(found[0], rel=2e-5, abs=2e-6)


def test_what_logprobs_do_not_tell_is_refused(service, tmp_path) -> None:
    [batch] = pack(make_samples(seed=1, num_trajectories=3), layout="packed")
    with TinkerTrainer(enable_model_summary=False) as trainer:
        verbs = trainer.open(TrainableModel("entropy", "exact", "tiny", lora=LORA, root=tmp_path))
        verbs.forward_backward(batch, Objective(entropy_coef=0.1))
        with pytest.raises(UnsupportedError, match="entropies.*LocalTrainer"):
            verbs.optim_step()
        assert (verbs.get_status().step, service.steps) == (0, [])
        verbs.forward_backward(batch)
        assert verbs.optim_step().step == 1


def test_a_server_that_does_not_sum_is_told_apart(service, tmp_path) -> None:
    service.averages = True
    with pytest.warns(UserWarning, match="objective/exact is 0"):
        metrics = remotely(service, tmp_path, {})
    assert [call["objective/exact"] for call in metrics] == [0.0, 0.0]


def test_a_norm_that_the_service_does_not_tell_is_left_out(service, tmp_path) -> None:
    service.tells_norm = False
    [metrics, _] = remotely(service, tmp_path, {})
    assert "loss/grad_norm" not in metrics and "loss/train" in metrics
    [batch] = pack(make_samples(seed=1, num_trajectories=3), layout="packed")
    with TinkerTrainer(enable_model_summary=False) as trainer:
        verbs = trainer.open(TrainableModel("norm", "exact", "tiny", lora=LORA, root=tmp_path))
        verbs.forward_backward(batch)
        assert math.isnan(verbs.optim_step().grad_norm)


# -- what is sent ----------------------------------------------------------------------------------------------------


def test_adam_clipping_and_bounds_are_always_sent(service, tmp_path) -> None:
    model = TrainableModel("sent", "exact", "tiny", lora=LoraSettings(rank=16, seed=5), root=tmp_path)
    with TinkerTrainer(
        enable_model_summary=False, gradient_clip_val=0.5, lr_schedule=lambda step: 1 / (1 + step), lora_seed=9
    ) as trainer:
        for seed in (1, 2):
            trainer.fit_rl(model, make_groups(seed=seed), learning_rate=1e-3, epsilon=0.4, train_unembed=True)
    assert service.created == [
        {"base_model": "tiny", "rank": 16, "seed": 9, "train_mlp": True, "train_attn": True, "train_unembed": True}
    ]
    assert [step.learning_rate for step in service.steps] == pytest.approx([1e-3, 5e-4])
    step = service.steps[0]
    assert (step.beta1, step.beta2, step.eps, step.weight_decay, step.grad_clip_norm) == (0.9, 0.999, 1e-8, 0.0, 0.5)
    assert {(name, tuple(config.items())) for name, config, _ in service.sent} == {
        ("cispo", (("clip_low_threshold", 0.6), ("clip_high_threshold", 5.0)))
    }


def test_a_datum_is_shifted_and_zero_where_nothing_is_trained(service, tmp_path) -> None:
    [sample] = make_samples(seed=3, num_trajectories=1)
    [batch] = pack([sample], layout="packed")
    [datum] = Datums(batch).build({"advantages": batch.loss_inputs.advantages})
    [history] = sample.histories
    assert datum.model_input.to_ints() == history.token_ids[:-1].tolist()
    assert datum.loss_fn_inputs["target_tokens"].tolist() == history.token_ids[1:].tolist()
    expected = torch.where(history.mask[1:], sample.advantage, 0.0)
    assert datum.loss_fn_inputs["advantages"].tolist() == pytest.approx(expected.tolist())
    assert set(datum.loss_fn_inputs) == {"target_tokens", "advantages"}
    assert isinstance(datum, tinker.Datum)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_datums_and_their_logprobs_go_back_where_they_came_from(layout) -> None:
    samples = make_samples(seed=5, num_trajectories=5, histories_per_trajectory=(1, 3, 2))
    [batch] = pack(samples, layout=layout)
    datums = Datums(batch)
    marks = torch.arange(1.0, len(batch.loss_inputs.rows) + 1)
    outputs = [{"logprobs": datum.loss_fn_inputs["advantages"]} for datum in datums.build({"advantages": marks})]
    assert torch.equal(datums.gather(outputs), marks)
    tokens = {tuple(history.token_ids.tolist()) for sample in samples for history in sample.histories}
    sent = {
        (*datum.model_input.to_ints(), datum.loss_fn_inputs["target_tokens"].tolist()[-1]) for datum in datums.build({})
    }
    assert sent == tokens


def test_shared_prefixes_are_refused_and_fillers_send_nothing() -> None:
    samples = make_samples(seed=5, num_trajectories=2)
    samples[1].histories[0].token_ids[:2] = samples[0].histories[0].token_ids[:2]
    [shared] = pack(samples, layout="shared")
    with pytest.raises(UnsupportedError, match="layout='packed'"):
        Datums(shared)
    [batch] = pack(samples, layout="packed")
    assert Datums(batch.filler()).build({}) == []


def test_another_temperature_cannot_be_learned_from(service, tmp_path) -> None:
    groups = make_groups(seed=1)
    for group in groups:
        for trajectory in group:
            for history in trajectory.token_histories:
                history.temperature.fill_(0.7)
    model = TrainableModel("warm", "exact", "tiny", lora=LORA, root=tmp_path)
    with TinkerTrainer(enable_model_summary=False) as trainer, pytest.raises(DataError, match="temperature"):
        trainer.fit_rl(model, groups)
    [batch] = pack(make_samples(seed=1, num_trajectories=2), layout="packed")
    batch.loss_inputs.temperature[0] = 0.7
    with pytest.raises(DataError, match="temperature 0.7"):
        Datums(batch)


def test_aggregations_and_models_that_do_not_map_say_so(service, tmp_path) -> None:
    def make(**options: Any) -> TrainableModel:
        return TrainableModel("refused", "exact", "tiny", root=tmp_path, **options)

    with TinkerTrainer(enable_model_summary=False) as trainer:
        with pytest.raises(UnsupportedError, match="norm_length"):
            trainer.fit_rl(make(), make_groups(seed=1), loss_aggregation="seq_mean_token_sum_norm")
        with pytest.raises(UnsupportedError, match="LoRA"):
            trainer.fit_rl(make(lora=None), make_groups(seed=1))
        for settings in (LoraSettings(alpha=8), LoraSettings(target_modules=("q_proj",))):
            with pytest.raises(InvalidArgumentError, match="no effect"):
                trainer.fit_rl(make(lora=settings), make_groups(seed=1))
        with pytest.raises(InvalidArgumentError, match="has to be True"):
            trainer.fit_rl(make(), make_groups(seed=1), train_mlp=False, train_attn=False)
        trainer.fit_rl(make(), make_groups(seed=1))
        with pytest.raises(InvalidArgumentError, match="train_unembed=True"):
            trainer.fit_rl(make(), make_groups(seed=1), train_unembed=True)
    with (
        TinkerTrainer(enable_model_summary=False) as again,
        pytest.raises(InvalidArgumentError, match="train_attn=False"),
    ):
        again.fit_rl(make(), make_groups(seed=1), train_attn=False)
    for options in ({"precision": "bf16-mixed"}, {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}):
        with TinkerTrainer(enable_model_summary=False, **options) as odd, pytest.raises(InvalidArgumentError):
            odd.open(make())
