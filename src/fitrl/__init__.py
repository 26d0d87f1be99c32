"""fitrl: reinforcement learning of language models from inside Lightning.

trainer = fitrl.LocalTrainer(devices=1)
result = trainer.fit_rl(model, groups, learning_rate=5e-6)
"""

from fitrl.data.batch import Batch, Feed
from fitrl.data.completion import Completion, Message, Tool
from fitrl.data.gather import gather
from fitrl.data.groups import ExceptionRecord, Trajectory, TrajectoryGroup
from fitrl.data.histories import History, TokenHistory
from fitrl.data.packing import pack
from fitrl.data.samples import build_samples
from fitrl.discovery import register_strategies
from fitrl.errors import FitRLError
from fitrl.objective.fused_linear import fused_linear_policy_loss
from fitrl.objective.objective import CustomObjective, LossInputs, Objective, PolicyLoss
from fitrl.objective.policy_loss import policy_loss
from fitrl.policy.loading import LoraSettings, load_tokenizer
from fitrl.policy.migration import TrainConfig
from fitrl.policy.model import TrainableModel
from fitrl.policy.module import PolicyModule
from fitrl.policy.optimizers import AdamWSettings
from fitrl.protocols.results import LocalTrainResult, TrainResult
from fitrl.protocols.verbs import AsyncPolicyTrainer, ExportsWeights, PolicyTrainer, Scores, SupportsFitRL, Trains
from fitrl.rollout.datamodule import RolloutDataModule
from fitrl.rollout.environment import Environment, EnvironmentAgent
from fitrl.rollout.pipeline import RolloutPipeline
from fitrl.rollout.reasoning_gym import ReasoningGym
from fitrl.rollout.rollout import Chat, prompt_ids, rollout, rollout_async
from fitrl.rollout.sampler import ChatSampler, Sampler
from fitrl.rollout.transformers import TransformersSampler
from fitrl.trainers.backend import BackendTrainer
from fitrl.trainers.base import RLTrainer
from fitrl.trainers.local import LocalTrainer
from fitrl.trainers.progress import RewardProgressBar

__version__ = "0.1.0"

__all__ = [
    "AdamWSettings",
    "AsyncPolicyTrainer",
    "BackendTrainer",
    "Batch",
    "Chat",
    "ChatSampler",
    "Completion",
    "CustomObjective",
    "Environment",
    "EnvironmentAgent",
    "ExceptionRecord",
    "ExportsWeights",
    "Feed",
    "FitRLError",
    "History",
    "LocalTrainResult",
    "LocalTrainer",
    "LoraSettings",
    "LossInputs",
    "Message",
    "Objective",
    "PolicyLoss",
    "PolicyModule",
    "PolicyTrainer",
    "RLTrainer",
    "ReasoningGym",
    "RewardProgressBar",
    "RolloutDataModule",
    "RolloutPipeline",
    "Sampler",
    "Scores",
    "SupportsFitRL",
    "TokenHistory",
    "Tool",
    "TrainConfig",
    "TrainResult",
    "TrainableModel",
    "Trains",
    "Trajectory",
    "TrajectoryGroup",
    "TransformersSampler",
    "build_samples",
    "fused_linear_policy_loss",
    "gather",
    "load_tokenizer",
    "pack",
    "policy_loss",
    "prompt_ids",
    "rollout",
    "rollout_async",
]

register_strategies()
