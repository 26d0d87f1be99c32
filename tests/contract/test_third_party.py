"""A class without our base classes keeps the contracts that it claims."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from contract.third_party import Plain
from fitrl.testing import ExportsWeightsContract, ScoresContract, Setup, TrainsContract


class TestPlain(TrainsContract, ScoresContract, ExportsWeightsContract):
    precisions = ("32-true", "64-true")
    subject = Plain

    @contextmanager
    def open_subject(self, setup: Setup) -> Iterator[Plain]:
        dtype = {"32-true": torch.float32, "64-true": torch.float64}[setup.precision]
        yield self.subject(setup.folder, setup.learning_rate, setup.lr_schedule, setup.gradient_clip_val, dtype)


def test_it_is_short_and_nobodys_subclass() -> None:
    assert Plain.__bases__ == (object,)
    assert sum(bool(line.strip()) for line in inspect.getsource(Plain).splitlines()) <= 60
