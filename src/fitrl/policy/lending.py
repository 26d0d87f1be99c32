"""Copies of a policy for samplers: with weights of its own, or filled with whole ones for as long as it is lent.

Enters: a policy, to be lent before its layers are cut over ranks. Leaves: a copy of its modules that computes as one
device does.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fitrl.policy.layers import plain_layers
from fitrl.policy.loading import trained_state
from fitrl.policy.policy import Policy
from fitrl.policy.sharding import whole


def own_copy(policy: Policy) -> Policy:
    """A policy with trained weights of its own, not compiled; those that adapters leave as they are it shares.

    Args:
        policy: whole, not in pieces; nothing trains it meanwhile.
    """
    shared: dict[int, Any] = {}
    if policy.is_adapter:
        trained = {id(tensor) for tensor in trained_state(policy, keep_parameters=True).values()}
        shared = {id(p): p for p in policy.network.parameters() if id(p) not in trained}
    network = copy.deepcopy(policy.network, shared)
    for parameter in network.parameters():
        if id(parameter) not in shared:
            parameter.requires_grad_(False)
    copied = dataclasses.replace(policy, network=network, root=None)
    plain_layers(copied)
    return copied


class LentPolicy:
    """A copy of a policy's modules, empty until `fill`; made before the policy's own are cut.

    Args:
        policy: as it was loaded.
    """

    def __init__(self, policy: Policy) -> None:
        # weights go into the copy as empty ones, which makes it nearly free
        empty: dict[int, Any] = {id(p): _empty(p) for p in policy.network.parameters()}
        network = copy.deepcopy(policy.network, empty)
        self.policy = dataclasses.replace(policy, network=network, root=None)
        self.is_filled = False

    @torch.no_grad()
    def fill(self, network: nn.Module, device: torch.device) -> None:
        """Put all weights of a network that was cut together; a collective.

        Args:
            network: the policy's own.
            device: where the copy computes.
        """
        gathered: dict[int, Tensor] = {}
        weights: dict[str, Tensor] = {}
        for name, parameter in network.named_parameters(remove_duplicate=False):
            if id(parameter) not in gathered:
                gathered[id(parameter)] = whole(parameter.detach()).to(device)
            weights[name] = gathered[id(parameter)]
        self.take(weights, device)

    def take(self, weights: Mapping[str, Tensor], device: torch.device) -> None:
        """Put all weights, whole and on the device, under the names of the policy's own network."""
        self._take(weights)
        self.policy.network.to(device)  # buffers
        self.is_filled = True

    def drain(self) -> None:
        """Give the memory back."""
        if self.is_filled:
            self._take({name: _empty(p) for name, p in self.policy.network.named_parameters(remove_duplicate=False)})
        self.is_filled = False

    def _take(self, weights: Mapping[str, Tensor]) -> None:
        self.policy.network.load_state_dict(weights, strict=False, assign=True)


def _empty(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
