"""torchtitan's models and parallel plans as a backend of fitrl; `fitrl_titan.actors`: trainers as actors of Monarch."""

from fitrl_titan.older_torch import lend_names
from fitrl_titan.strategy import TitanStrategy
from fitrl_titan.trainer import TitanTrainer

__all__ = ["TitanStrategy", "TitanTrainer"]

lend_names()
