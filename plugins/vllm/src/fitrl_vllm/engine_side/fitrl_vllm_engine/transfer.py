"""The engine's side of a transfer without files: a backend of vLLM's weight-transfer API.

`/init_weight_transfer_engine`, `/start_weight_update`, `/update_weights` and `/finish_weight_update` reach it. vLLM's
own backends unpickle what a request holds; this one reads JSON.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from .channels import MemoryChannel, NcclChannel
from .in_place import can_load_in_place
from .nccl import Communicator
from .packed_heads import pack_again
from .pieces import Assembly

BACKEND = "fitrl"


@dataclass
class Init(WeightTransferInitInfo):
    """How the weights will come: the path of a socket, or what NCCL's processes have in common and their number."""

    socket: str | None = None
    unique_id: str | None = None
    num_processes: int = 0


@dataclass
class Update(WeightTransferUpdateInfo):
    """All weights, in buckets that the channel tells of."""


class Transfer(WeightTransferEngine[Init, Update]):
    """Take all weights from a trainer."""

    init_info_cls = Init
    update_info_cls = Update
    supports_draft_weight_update = False
    _channel: MemoryChannel | NcclChannel | None = None
    _communicator: Communicator | None = None
    _in_place: bool = False

    def init_transfer_engine(self, init_info: Init) -> None:
        """Join the trainer."""
        self.shutdown()
        if init_info.socket is not None:
            self._channel = MemoryChannel(init_info.socket, self.device)
            return
        assert init_info.unique_id is not None
        if self.parallel_config.data_parallel_size > 1:
            raise RuntimeError("transfer='nccl' reaches one replica of the engine, this one has several")
        rank = 1 + self.parallel_config.rank  # the trainer is 0
        self._communicator = Communicator(init_info.unique_id, init_info.num_processes, rank)
        self._channel = NcclChannel(self._communicator, self.device)

    def start_weight_update(self) -> None:
        """Take weights as checkpoints have them: in place where the model holds them so, else layer by layer."""
        self._in_place = can_load_in_place(self.model, self.device)
        if not self._in_place:
            initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: Update) -> None:
        """Load what comes over the channel; what broke off leaves no count of what had come, and can be made again."""
        try:
            with torch.no_grad():
                self.model.load_weights(self._received())
        except BaseException:
            with contextlib.suppress(Exception):  # of layers that are half there
                self._finish()
            raise

    def _received(self) -> Iterator[tuple[str, Tensor]]:
        assert self._channel is not None, "init_weight_transfer_engine comes first"
        assembly = Assembly(self.device)
        for table, buffer in self._channel:
            yield from assembly.take(table, buffer)
        assembly.finish()

    def finish_weight_update(self) -> None:
        """Put the new weights in place."""
        self._finish()
        pack_again(self.model)

    def _finish(self) -> None:
        if not self._in_place:
            finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Leave the trainer."""
        if self._communicator is not None:
            self._communicator.abort()
        self._channel = self._communicator = None

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
        """The trainer has its own side, `fitrl_vllm.transfer`."""
        raise NotImplementedError


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, Transfer)
