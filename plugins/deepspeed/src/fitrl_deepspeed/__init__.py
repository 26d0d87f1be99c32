"""DeepSpeed's ZeRO as a backend of fitrl: optimizer, gradients and weights in pieces over the ranks."""

from fitrl_deepspeed.strategy import DeepSpeedRLStrategy
from fitrl_deepspeed.trainer import DeepSpeedTrainer

__all__ = ["DeepSpeedRLStrategy", "DeepSpeedTrainer"]
