"""Trainers and samplers in processes of their own, as actors of Monarch, behind fitrl's protocols.

async with TrainerActors(open_trainer, ranks=2) as trainer:  # an AsyncPolicyTrainer
    await trainer.forward_backward(batches)
    await trainer.optim_step(learning_rate=1e-5)
"""

from fitrl.errors import MissingDependencyError

try:
    import monarch.actor  # noqa: F401
except ImportError as error:
    raise MissingDependencyError("fitrl_titan.actors needs torchmonarch: pip install 'fitrl-titan[actors]'") from error

from fitrl_titan.actors.samplers import SamplerActors
from fitrl_titan.actors.trainer import TrainerActors

__all__ = ["SamplerActors", "TrainerActors"]
