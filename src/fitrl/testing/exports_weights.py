"""The contract of `ExportsWeights`: all weights, whole, on every rank, under the names that transformers knows."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch

from fitrl.data import ranks
from fitrl.protocols.verbs import ExportsWeights, Trains
from fitrl.testing.by_hand import ByHand
from fitrl.testing.opening import Contract, Setup, microbatches, step_samples
from fitrl.testing.samples import reference_network


class ExportsWeightsContract(Contract):
    """`open_subject` gives an `ExportsWeights` with full weights."""

    def test_weights_are_complete_under_hf_names(self, folder: Any) -> None:
        """Before a step they are the base model's: each name once, each tensor whole, tied ones once or twice."""
        network = reference_network()
        expected = network.state_dict()
        tied = set(network.all_tied_weights_keys)
        with self.open_subject(Setup(folder=folder)) as subject:
            assert isinstance(subject, ExportsWeights)
            handed = [(name, tensor.detach().cpu()) for name, tensor in subject.named_weights()]
        names = [name for name, _ in handed]
        assert len(set(names)) == len(names)
        assert set(names) <= set(expected) and set(expected) - set(names) <= tied
        for name, tensor in handed:
            assert type(tensor) is torch.Tensor and tensor.shape == expected[name].shape, name
            assert tensor.is_floating_point(), name
            assert torch.equal(tensor.double(), expected[name].to(tensor.dtype).double()), name

    def test_weights_carry_no_gradient_and_can_be_drained_again(self, folder: Any) -> None:
        """An export changes nothing and holds no graph."""
        with self.open_subject(Setup(folder=folder)) as subject:
            first = _digest(subject)
            assert not any(tensor.requires_grad for _, tensor in subject.named_weights())
            assert _digest(subject) == first

    def test_every_rank_is_handed_the_trained_weights(self, folder: Any) -> None:
        """After steps all ranks get the same bits, and a plain transformers model with them scores as by hand."""
        hand = ByHand()
        with self.open_subject(Setup(folder=folder)) as subject:
            trains = isinstance(subject, Trains)
            if not trains:
                pytest.skip(f"{type(self).__name__} does not train")
            before = _digest(subject)
            for seed in (1, 2):
                hand.learn(step_samples(seed), 1e-3)
                subject.forward_backward(microbatches(seed)[0])
                subject.optim_step()
            told = ranks.collect(_digest(subject))
            assert len(set(told)) == 1 and told[0] != before
            weights = {name: tensor.detach().cpu().double() for name, tensor in subject.named_weights()}
        loaded = ByHand()
        loaded.network.load_state_dict(weights, strict=False)  # one of two tied names may be missing
        with torch.no_grad():
            for sample in step_samples(3):
                assert float((loaded.logprobs(sample) - hand.logprobs(sample)).abs().max()) < 1e-3


def _digest(subject: ExportsWeights) -> str:
    sha = hashlib.sha256()
    for name, tensor in subject.named_weights():
        sha.update(name.encode() + tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return sha.hexdigest()
