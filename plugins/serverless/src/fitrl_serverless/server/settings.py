"""What `fitrl serve` is told at its start: where its state lies, what it may train, and how much of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fitrl.errors import InvalidArgumentError

MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much one request or one owner may ask for; beyond it the answer is 413, 422 or 429.

    Attributes:
        body_bytes: of a request, after decompression too.
        body_s: seconds that a body may take to arrive.
        header_s: seconds that the head of a request may take to arrive.
        groups: in one job or one log call.
        trajectories: in one job or one log call.
        jobs: of one owner, waiting or running.
        models: of one owner.
        chats: chat requests that are answered at once, of all owners.
        completions: of one chat request.
        completion_tokens: of one completion.
        attempts: times that a job may take its worker down before it is failed.
        job_s: seconds that a job may run before its worker is killed.
        connections: open at once.
    """

    body_bytes: int = 256 * MIB
    body_s: float = 120.0
    header_s: float = 10.0
    groups: int = 4096
    trajectories: int = 65_536
    jobs: int = 64
    models: int = 1024
    chats: int = 64
    completions: int = 128
    completion_tokens: int = 16_384
    attempts: int = 3
    job_s: float = 4 * 3600.0
    connections: int = 512

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise InvalidArgumentError(f"the limit {name} must be above 0, got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that server and worker agree on.

    Attributes:
        state: folder of the database and of all runs.
        base_models: what a request may name as `base_model`, and what is loaded for it: a hub id, a folder, "tiny".
        ranks: processes of the worker; more than one are started by `torchrun`.
        strategy: of the worker's `LocalTrainer`; None: "fitrl_local" with one rank, "fitrl_ddp" with several.
        trainer: further arguments of `LocalTrainer`: precision, accelerator, gradient_clip_val, ...
        samplers: trained models that are kept loaded for chats.
        sampler_device: where they are: "cpu", "cuda", "cuda:1".
        patience_s: how long the oldest job waits while those of the open model go first, which saves loading models.
        limits: see `Limits`.
    """

    state: Path
    base_models: Mapping[str, str] = field(default_factory=lambda: {"tiny": "tiny"})
    ranks: int = 1
    strategy: str | None = None
    trainer: Mapping[str, Any] = field(default_factory=dict)
    samplers: int = 4
    sampler_device: str = "cpu"
    patience_s: float = 30.0
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not self.base_models:
            raise InvalidArgumentError("base_models is empty: a server that may load nothing can train nothing")
        for name, value in (("ranks", self.ranks), ("samplers", self.samplers)):
            if value < 1:
                raise InvalidArgumentError(f"{name} must be at least 1, got {value}")

    @property
    def database(self) -> Path:
        """The database's file."""
        return self.state / "serve.sqlite"

    def dump(self) -> str:
        """As text, for the worker's command line."""
        return json.dumps(asdict(self) | {"state": str(self.state)})

    @classmethod
    def load(cls, text: str) -> Settings:
        """Inverse of `dump`."""
        data = json.loads(text)
        return cls(**data | {"state": Path(data["state"]), "limits": Limits(**data["limits"])})
