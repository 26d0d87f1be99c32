"""Random trajectories near the bundled policy, as the contracts use them."""

from fitrl.testing.samples import make_groups, make_samples, random_history, reference_network, true_logprobs

__all__ = ["make_groups", "make_samples", "random_history", "reference_network", "true_logprobs"]
