"""The gradient of an optimizer step does not depend on how its trajectories are cut into microbatches."""

import lightning
import pytest
import torch

from fitrl.data.batch import Batch, Feed
from fitrl.data.packing import pack
from fitrl.data.samples import Sample
from fitrl.objective.objective import Objective
from fitrl.policy.model import TrainableModel
from fitrl.policy.module import PolicyModule
from fitrl.strategies.local import LocalStrategy
from samples import make_samples

AGGREGATIONS = ("token_mean", "token_sum", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm")


class _Capture(lightning.Callback):
    """Keep the gradient that the optimizer would step with."""

    def __init__(self) -> None:
        self.gradients: list[torch.Tensor] = []

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        grads = [p.grad.detach().clone().flatten() for group in optimizer.param_groups for p in group["params"]]
        self.gradients.append(torch.cat(grads).double())


def gradient_of(batches: list[Batch], objective: Objective, precision: str, tmp_path) -> torch.Tensor:
    capture = _Capture()
    trainer = lightning.Trainer(
        strategy=LocalStrategy(),
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        precision=precision,
        accumulate_grad_batches=len(batches),
        callbacks=[capture],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = TrainableModel("reduction", "tests", "tiny", lora=None, root=tmp_path)
    trainer.fit(PolicyModule(model, objective=objective), train_dataloaders=Feed(batches))
    [gradient] = capture.gradients
    return gradient


def microbatches(samples: list[Sample], count: int, layout: str) -> list[Batch]:
    """`count` microbatches of the given layout, with the denominators of all samples."""
    return pack(samples, num_batches=count, layout=layout)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", 1e-6), ("64-true", 1e-10)])
def test_gradient_is_the_same_however_the_step_is_cut(aggregation, precision, tolerance, tmp_path) -> None:
    objective = Objective(
        ppo=True,
        epsilon=0.4,
        importance_sampling_level="geometric_average",
        loss_aggregation=aggregation,
        norm_length=7.0 if aggregation.endswith("norm") else None,
        kl_coef=0.1,
        entropy_coef=0.01,
    )
    samples = make_samples(seed=3, num_trajectories=10, histories_per_trajectory=(1, 2), with_reference=True)
    # token sums are some hundred times larger than means; compare relative to the gradient's own size
    whole = gradient_of(microbatches(samples, 1, "padded"), objective, precision, tmp_path)
    scale = float(whole.abs().max())
    assert scale > 0
    for count in (1, 2, 5):
        for layout in ("padded", "packed"):
            cut = gradient_of(microbatches(samples, count, layout), objective, precision, tmp_path)
            assert float((cut - whole).abs().max()) <= tolerance * max(scale, 1.0), (count, layout)


def test_fillers_change_nothing(tmp_path) -> None:
    samples = make_samples(seed=4, num_trajectories=4)
    objective = Objective(importance_sampling_level="sequence")
    alone = microbatches(samples, 2, "packed")
    filled = [*alone, alone[0].filler(), alone[1].filler()]
    plain = gradient_of(alone, objective, "64-true", tmp_path)
    assert torch.equal(plain, gradient_of(filled, objective, "64-true", tmp_path))


def test_zero_advantage_trajectories_count_but_need_not_be_computed(tmp_path) -> None:
    samples = make_samples(seed=5, num_trajectories=6)
    samples[1].advantage = samples[4].advantage = 0.0
    objective = Objective()
    kept = pack(samples, num_batches=1)
    compact = pack(samples, num_batches=1, skip_zero_advantage=True)
    assert compact[0].num_input_tokens < kept[0].num_input_tokens
    assert float(compact[0].loss_inputs.num_tokens) == float(kept[0].loss_inputs.num_tokens)
    left = gradient_of(kept, objective, "64-true", tmp_path)
    right = gradient_of(compact, objective, "64-true", tmp_path)
    assert float((left - right).abs().max()) <= 1e-10
