"""The contract of `Scores`: exact logprobs, in float32 whatever the policy computes in, and nothing else happens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch

from fitrl.data import ranks
from fitrl.data.bins import Layout
from fitrl.data.packing import pack
from fitrl.data.samples import Sample
from fitrl.protocols.results import TokenLogprobs
from fitrl.protocols.verbs import Scores, Trains
from fitrl.testing.by_hand import ByHand
from fitrl.testing.opening import Contract, Setup, microbatches, step_samples
from fitrl.testing.samples import make_samples

# how far logprobs may be from those in float64: rounding of what the precision computes in
ROUNDING = {"64-true": 1e-5, "32-true": 1e-4, "bf16-mixed": 0.3, "bf16-true": 0.3}


class ScoresContract(Contract):
    """`open_subject` gives a `Scores`.

    Attributes:
        precisions: those that the subject can be opened with.
        temperatures: those at which it knows logprobs; the last one is mixed with the first.
    """

    precisions: ClassVar[Sequence[str]] = tuple(ROUNDING)
    temperatures: ClassVar[Sequence[float]] = (1.0, 0.7)

    @pytest.mark.parametrize("layout", ["padded", "packed"])
    def test_logprobs_are_the_true_ones(self, folder: Any, layout: Layout) -> None:
        """Of the batch's targets in order, at their temperature, whichever way the batch is laid out."""
        samples = make_samples(seed=7, num_trajectories=5)
        for sample in samples[:2]:
            sample.histories[0].temperature.fill_(self.temperatures[-1])
        with self.open_subject(Setup(folder=folder)) as subject:
            assert isinstance(subject, Scores)
            scored = subject.forward(*pack(samples, layout=layout))
            assert isinstance(scored, TokenLogprobs)
            assert float((scored.logprobs.double() - _truth(samples)).abs().max()) < ROUNDING["32-true"]

    @pytest.mark.parametrize("precision", ROUNDING)
    def test_logprobs_are_float32_in_every_precision(self, folder: Any, precision: str) -> None:
        """A logprob rounded to 16 bits makes its ratio noise."""
        if precision not in self.precisions:
            pytest.skip(f"{type(self).__name__} says that it does not compute in {precision}")
        samples = step_samples(1)
        with self.open_subject(Setup(folder=folder, precision=precision)) as subject:
            logprobs = subject.forward(*pack(samples)).logprobs
            assert logprobs.dtype == torch.float32 and logprobs.device.type == "cpu" and logprobs.dim() == 1
            assert float((logprobs.double() - _truth(samples)).abs().max()) < ROUNDING[precision]
            for narrow in (torch.bfloat16, torch.float16):
                assert float((logprobs != logprobs.to(narrow).float()).float().mean()) > 0.5

    def test_a_score_leaves_nothing_behind(self, folder: Any) -> None:
        """No gradient, the same numbers the second time, each rank its own batch, the caller's batch as it was."""
        with self.open_subject(Setup(folder=folder)) as subject:
            batch = microbatches(1)[0]
            kept = batch.loss_inputs.old_logprobs.clone()
            first, second = subject.forward(batch).logprobs, subject.forward(batch).logprobs
            assert not first.requires_grad and torch.equal(first, second)
            assert first.shape == batch.loss_inputs.targets.shape
            assert torch.equal(batch.loss_inputs.old_logprobs, kept)

    def test_scores_follow_the_steps_and_do_not_disturb_them(self, folder: Any) -> None:
        """Between a microbatch and its step a score changes no gradient; after the step it sees the new weights."""
        hand = ByHand()
        norm = hand.learn(step_samples(1), 1e-3)[1]
        with self.open_subject(Setup(folder=folder)) as subject:
            trains = isinstance(subject, Trains)
            if not trains:
                pytest.skip(f"{type(self).__name__} does not train")
            other = pack(step_samples(2))[0]
            subject.forward_backward(microbatches(1)[0])
            subject.forward(other)
            step = subject.optim_step()
            assert (step.accumulated_microbatches, step.grad_norm) == (1, self.near(norm))
            with torch.no_grad():
                truth = torch.cat([hand.logprobs(sample) for sample in step_samples(2)])
            assert float((subject.forward(other).logprobs.double() - truth).abs().max()) < 1e-3

    def test_every_rank_scores_alike(self, folder: Any) -> None:
        """The same batch on every rank gives the same numbers."""
        with self.open_subject(Setup(folder=folder)) as subject:
            logprobs = subject.forward(*pack(step_samples(1))).logprobs.double()
            mean = ranks.sum_up(logprobs.clone()) / ranks.num_data_ranks()
            assert float((mean - logprobs).abs().max()) < 1e-6


@torch.no_grad()
def _truth(samples: Sequence[Sample]) -> torch.Tensor:
    hand = ByHand()
    return torch.cat([hand.logprobs(sample) for sample in samples])
