"""Rollouts by vLLM: a sampler whose weights are proven after each transfer."""

from fitrl_vllm.errors import EngineDiedError, EngineError, EngineTimeoutError, StaleWeightsError
from fitrl_vllm.in_process import InProcessEngine
from fitrl_vllm.recorder import Recorder, Recording
from fitrl_vllm.sampler import VLLMSampler
from fitrl_vllm.server import VLLMServer

__all__ = [
    "EngineDiedError",
    "EngineError",
    "EngineTimeoutError",
    "InProcessEngine",
    "Recorder",
    "Recording",
    "StaleWeightsError",
    "VLLMSampler",
    "VLLMServer",
]
