"""fitrl on the Tinker service.

trainer = fitrl_tinker.TinkerTrainer()
result = trainer.fit_rl(model, groups, learning_rate=1e-5, deploy_checkpoint=True)
"""

from fitrl_tinker.errors import ServiceError, ServiceTimeoutError
from fitrl_tinker.sampler import TinkerSampler
from fitrl_tinker.strategy import TinkerStrategy
from fitrl_tinker.trainer import TinkerTrainer, TinkerTrainResult

__all__ = [
    "ServiceError",
    "ServiceTimeoutError",
    "TinkerSampler",
    "TinkerStrategy",
    "TinkerTrainResult",
    "TinkerTrainer",
]
