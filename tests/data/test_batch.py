"""A batch on its way to the device: fillers weigh nothing, dtypes stay, Lightning leaves it alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision

from fitrl.data.batch import Batch, Feed, LossTargets, ModelInputs
from fitrl.data.host import by_one_thread
from fitrl.data.packing import pack
from fitrl.objective.objective import Objective
from fitrl.objective.policy_loss import policy_loss
from fitrl.policy.policy import Policy
from helpers import facts, sample, token_history


@pytest.fixture(params=["padded", "packed", "shared"])
def batch(request: pytest.FixtureRequest) -> Batch:
    """Two trajectories, one of them with two histories, one of these with a first token that another has."""
    samples = [
        sample(token_history([5, 6, 7, 8], [0, 1, 0, 1]), advantage=0.3, reference=True),
        sample(token_history([9, 10], [0, 1]), token_history([5, 12, 13], [0, 0, 1]), advantage=-2.0, reference=True),
    ]
    [built] = pack(samples, layout=request.param, kl_mean=0.1, measures_mismatch=True)
    return built


def _columns(part: ModelInputs | LossTargets) -> dict[str, torch.Tensor]:
    named = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
    return {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}


def _facts(batch: Batch) -> Any:
    other = (batch.measures_mismatch, batch.members, batch.num_tokens_saved)
    return facts(batch.model_inputs), facts(batch.loss_inputs), other


def test_to_copies_everything_and_keeps_dtypes(batch: Batch) -> None:
    moved = batch.to("meta")

    for old, new in ((batch.model_inputs, moved.model_inputs), (batch.loss_inputs, moved.loss_inputs)):
        assert _columns(old).keys() == _columns(new).keys()
        for name, column in _columns(new).items():
            assert column.device.type == "meta"
            assert (column.dtype, column.shape) == (_columns(old)[name].dtype, _columns(old)[name].shape)
    assert (moved.measures_mismatch, moved.members) == (True, batch.members)
    assert moved.layout == batch.layout
    assert _facts(batch.to("cpu")) == _facts(batch)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_half_precision_leaves_logprobs_untouched(batch: Batch, precision: Any) -> None:
    """Lightning rounds what it finds in dicts, lists and dataclasses; a rounded logprob makes the ratio noise."""
    before = _facts(batch)
    plugin = HalfPrecision(precision)
    assert plugin.convert_input({"x": torch.ones(1)})["x"].dtype != torch.float32  # it does round

    converted = plugin.convert_input(batch)

    assert _facts(converted) == before
    assert converted.loss_inputs.old_logprobs.dtype == torch.float32


def test_mixed_precision_leaves_logprobs_untouched(batch: Batch) -> None:
    assert _facts(MixedPrecision("bf16-mixed", "cpu").convert_input(batch)) == _facts(batch)


def test_sizes(batch: Batch) -> None:
    saved = 1 if batch.layout == "shared" else 0
    assert batch.num_tokens_saved == saved
    assert batch.num_input_tokens == 3 + 1 + 2 - saved
    assert batch.num_positions == (9 if batch.layout == "padded" else 6 - saved)
    assert batch.model_inputs.longest == 3


# -- filler ---------------------------------------------------------------------------------------------------------


def test_a_filler_is_one_position_without_weight(batch: Batch) -> None:
    filler = batch.filler()

    assert (filler.num_positions, filler.num_tokens_saved, filler.layout) == (1, 0, "padded")
    assert filler.loss_inputs.rows.tolist() == [0]
    assert filler.loss_inputs.mask.tolist() == [False]
    assert filler.loss_inputs.trajectory_ids.tolist() == [0]
    assert filler.members == ()
    assert filler.measures_mismatch  # ranks reduce the same metrics, whoever got a filler
    for name, column in _columns(batch.loss_inputs).items():
        own = _columns(filler.loss_inputs)[name]
        assert own.dtype == column.dtype
        assert own.shape == (column.shape if column.dim() == 0 else (1,))
    assert filler.loss_inputs.num_tokens == batch.loss_inputs.num_tokens
    assert filler.loss_inputs.num_sequences == batch.loss_inputs.num_sequences
    assert filler.loss_inputs.kl_mean == batch.loss_inputs.kl_mean


@pytest.mark.parametrize(
    "objective",
    [
        Objective(),
        Objective(ppo=True, importance_sampling_level="sequence"),
        Objective(loss_aggregation="seq_mean_token_mean"),
        Objective(kl_coef=0.1),
    ],
)
def test_a_filler_reaches_the_weights_with_a_gradient_of_zero(
    batch: Batch, objective: Objective, fresh_policy: Policy
) -> None:
    """Every parameter takes part, so that no rank waits for another, and none of them moves."""
    filler = batch.filler()
    inputs, loss = filler.model_inputs, filler.loss_inputs
    logits = fresh_policy.causal_lm(input_ids=inputs.input_ids, position_ids=inputs.position_ids).logits
    logprobs = logits.flatten(0, 1)[loss.rows].log_softmax(-1).gather(1, loss.targets[:, None]).squeeze(1)

    result = policy_loss(
        logprobs,
        loss.old_logprobs,
        loss.advantages,
        loss.mask,
        loss.trajectory_ids,
        objective,
        rollout_logprobs=loss.rollout_logprobs,
        reference_logprobs=loss.reference_logprobs,
        num_tokens=loss.num_tokens,
        num_sequences=loss.num_sequences,
        kl_mean=loss.kl_mean,
    )
    result.loss.backward()

    assert result.loss.item() == 0.0
    gradients = [parameter.grad for parameter in fresh_policy.network.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_a_filler_of_a_token_without_logprob_weighs_nothing_either() -> None:
    [batch] = pack([sample(token_history([1, 2], [0, 1], logprobs=[0.0, float("nan")]))])
    loss = batch.filler().loss_inputs
    logprobs = torch.tensor([-0.5], requires_grad=True)

    result = policy_loss(
        logprobs, loss.old_logprobs, loss.advantages, loss.mask, loss.trajectory_ids, Objective(), num_tokens=1.0
    )
    result.loss.backward()

    assert result.loss.item() == 0.0
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [0.0]


# -- feed -----------------------------------------------------------------------------------------------------------


def test_a_feed_is_sized_and_can_be_read_twice(batch: Batch) -> None:
    feed = Feed([batch, batch.filler()])

    assert len(feed) == 2
    assert list(feed) == list(feed)
    assert next(iter(feed)) is batch


def test_a_batch_is_pinned_when_its_turn_comes(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[Batch] = []
    monkeypatch.setattr(Batch, "pin_memory", lambda self: pinned.append(self) or self.filler())
    feed = iter(Feed([batch, batch], device=torch.device("cuda")))

    assert next(feed) is not batch
    assert pinned == [batch]
    assert len(list(feed)) == 1
    assert pinned == [batch, batch]


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("device, expected", [("cuda", 1), ("cpu", 2)])
def test_batches_for_a_gpu_are_made_by_one_thread(batch, device, expected, two_threads, monkeypatch) -> None:
    monkeypatch.setattr(Batch, "pin_memory", lambda self: self)
    seen: list[int] = []

    def make() -> Batch:
        seen.append(torch.get_num_threads())
        return batch

    for _ in Feed([make, make], device=torch.device(device)):
        seen.append(torch.get_num_threads())  # what else computes has all threads
    assert seen == [expected, 2] * 2


def test_threads_come_back_after_an_error(two_threads) -> None:
    with pytest.raises(ArithmeticError), by_one_thread(torch.device("cuda")):
        raise ArithmeticError
    assert torch.get_num_threads() == 2
