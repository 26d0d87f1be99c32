"""How a contract gets at what it checks: it says how a subject is to be opened, and the subclass opens it.

On several ranks every rank runs the same checks in the same order, so each check is a collective: nothing in one may
depend on the rank but the share of a step's microbatches.
"""

from __future__ import annotations

import copy
import functools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fitrl.data import ranks
from fitrl.data.batch import Batch
from fitrl.data.groups import TrajectoryGroup
from fitrl.data.packing import pack
from fitrl.data.samples import Sample
from fitrl.policy.loading import LoraSettings
from fitrl.policy.model import TrainableModel
from fitrl.testing.by_hand import ByHand
from fitrl.testing.samples import make_groups, make_samples

FOLDER = "FITRL_TESTING_FOLDER"  # where the ranks of a job find each other's files


def constant(step: int) -> float:
    """A schedule that changes nothing."""
    return 1.0


def falling(step: int) -> float:
    """A schedule that tells every step from every other."""
    return 1.0 / (1 + step)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """How a subject is to be opened; with the bundled policy "tiny", full weights, and AdamW as `ByHand` has it.

    Attributes:
        folder: for its files, the same on every rank. Opened again with this folder it may find what it saved.
        learning_rate: of AdamW, before the schedule.
        lr_schedule: factor on it, by optimizer steps taken.
        gradient_clip_val: largest norm of a gradient, None: any.
        precision: in Lightning's words.
    """

    folder: Path
    learning_rate: float = 1e-3
    lr_schedule: Callable[[int], float] = constant
    gradient_clip_val: float | None = None
    precision: str = "32-true"


class Contract:
    """Subclass a contract in a pytest file, and say how the subject is opened; combine contracts as bases.

    A method opens and closes it, and not a fixture, because a check may open several, one after the other. What a
    subject cannot do is said by class attributes, nothing is guessed from its type; a check that does not apply is
    skipped with the reason.

    Example:
        >>> class TestMine(TrainsContract, ScoresContract):  # doctest: +SKIP
        ...     @contextmanager
        ...     def open_subject(self, setup):
        ...         yield Mine(setup.learning_rate, setup.lr_schedule, setup.gradient_clip_val)

    Attributes:
        tolerance: relative to numbers computed by hand in float64.
        lora: of the models; numbers computed by hand are those of full weights, whatever it says.
    """

    tolerance: float = 1e-4
    lora: LoraSettings | None = None

    def open_subject(self, setup: Setup) -> AbstractContextManager[Any]:
        """Open the subject at step 0 and close it afterwards; the objective in force is `Objective()`."""
        raise NotImplementedError(f"{type(self).__name__} has to define open_subject(setup)")

    def model(self, setup: Setup, name: str = "policy") -> TrainableModel:
        """The model to teach; the same run for the same folder and name."""
        return TrainableModel(name, "contract", "tiny", lora=self.lora, root=setup.folder)

    @pytest.fixture
    def folder(self, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
        """A folder of this check's own, the same on every rank."""
        if FOLDER not in os.environ:
            return tmp_path
        folder = Path(os.environ[FOLDER]) / re.sub(r"\W+", "-", request.node.nodeid)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def near(self, expected: float) -> Any:
        """Equal up to `tolerance`."""
        return pytest.approx(expected, rel=self.tolerance, abs=self.tolerance)


@functools.cache
def step_samples(seed: int) -> list[Sample]:
    """The samples of one optimizer step, over all ranks."""
    with torch.inference_mode(False):  # the first to ask may be a validation
        return make_samples(seed=seed, num_trajectories=8)


@functools.cache
def first_step(seed: int, *, ppo: bool = False) -> tuple[float, float]:
    """Loss and gradient's norm of the step `step_samples(seed)` under the base policy, by hand."""
    return ByHand().learn(step_samples(seed), 0.0, ppo=ppo)


def step_groups(seed: int) -> list[TrajectoryGroup]:
    """The groups of one call, to be changed at will."""
    return copy.deepcopy(_groups(seed))


@functools.cache
def _groups(seed: int) -> list[TrajectoryGroup]:
    return make_groups(seed=seed)


def microbatches(seed: int, count: int = 1) -> list[Batch]:
    """This rank's `count` microbatches of the step `step_samples(seed)`."""
    wanted = count * ranks.num_data_ranks()
    batches = pack(step_samples(seed), num_batches=wanted)
    return ranks.share_of([*batches, *(batches[0].filler() for _ in range(wanted - len(batches)))])


def total(values: Sequence[float]) -> float:
    """Sum of the numbers of all ranks."""
    return float(ranks.sum_up(torch.tensor(list(values), dtype=torch.float64)).sum())


class Steps:
    """Optimizer steps as a Lightning loop eats them; cut when iterated, because ranks know each other only then."""

    def __init__(self, seeds: Sequence[int], microbatches_per_step: int = 1) -> None:
        self._seeds = seeds
        self._count = microbatches_per_step

    def __len__(self) -> int:
        return len(self._seeds) * self._count

    def __iter__(self) -> Iterator[Batch]:
        for seed in self._seeds:
            yield from microbatches(seed, self._count)
