"""Trainers and samplers as actors: real processes of Monarch, compared with a trainer in this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fitrl
from fitrl.errors import InvalidArgumentError, MissingDependencyError

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from actors_worker import BOUND, RATE, STEPS, batches  # noqa: E402
from plain_trainer import PlainTrainer  # noqa: E402

from fitrl_titan.actors import SamplerActors, TrainerActors  # noqa: E402

TRAINERS = ("of_titan", "of_local", "of_somebody")


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict[str, Any]:
    """What the worker saw."""
    folder = tmp_path_factory.mktemp("actors")
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]), "TMPDIR": str(folder)}
    job = subprocess.run(
        [sys.executable, str(HERE / "actors_worker.py"), str(folder)],
        env=variables,
        capture_output=True,
        text=True,
        timeout=600.0,
        check=False,
    )
    assert job.returncode == 0, job.stdout[-4000:] + job.stderr[-8000:]
    found: dict[str, Any] = json.loads((folder / "seen.json").read_text())
    return found


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, Any]:
    """The same steps in this process, one microbatch each."""
    found: dict[str, Any] = {}
    root = tmp_path_factory.mktemp("alone")
    with fitrl.LocalTrainer(accelerator="cpu", devices=1, enable_model_summary=False) as trainer:
        verbs = trainer.open(fitrl.TrainableModel("alone", "actors", "tiny", lora=None, root=root))
        for name in ("first", "second"):
            loss = verbs.forward_backward(batches(0 if name == "first" else 1, 1)[0]).loss
            found[name] = [loss, verbs.optim_step(learning_rate=RATE).grad_norm]
            if name == "first":
                found["logprobs"] = verbs.forward(batches(1, 1)[0]).logprobs
                weights = dict(verbs.named_weights())
                found["weights"] = [len(weights), float(sum(tensor.double().sum() for tensor in weights.values()))]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("trainer", TRAINERS)
def test_verbs_are_those_of_a_trainer_here(seen, expected, trainer) -> None:
    """Titan on two ranks, Local on one, and a trainer of somebody else, which takes steps of SGD."""
    found = seen[trainer]["verbs"]
    data_ranks = found["ranks"]
    assert found["is"] and data_ranks == (2 if trainer == "of_titan" else 1)
    assert found["world"] == data_ranks
    loss, norm, step, tokens, highest = found["first"]
    assert (step, tokens) == (1, sum(batch.loss_inputs.mask.sum() for batch in batches(0, 1)))
    assert highest > 1.0
    assert [loss, norm] == pytest.approx(expected["first"], rel=1e-4)
    assert found["accumulated"] == data_ranks
    if trainer != "of_somebody":
        assert found["second"][:2] == pytest.approx(expected["second"], rel=1e-3)
        order = [member for batch in batches(1, data_ranks) for member in batch.members]
        ours = _by_sample(found["logprobs"], batches(1, data_ranks))
        theirs = _by_sample(expected["logprobs"].tolist(), batches(1, 1))
        assert sorted(order) == sorted(theirs)
        for member, logprobs in theirs.items():
            assert ours[member] == pytest.approx(logprobs, abs=1e-3)
        assert found["weights"][0] == expected["weights"][0]
        assert found["weights"][1] == pytest.approx(expected["weights"][1], abs=0.02)  # 2e5 numbers, Adam's first step
    assert found["second"][2:] == [2, 1]
    assert found["back"] == [True, 1]


def _by_sample(logprobs: list[float], packed: list[fitrl.Batch]) -> dict[int, list[float]]:
    """Logprobs of each sample, by its place in what was packed."""
    found: dict[int, list[float]] = {}
    rest = iter(logprobs)
    for batch in packed:
        ids = batch.loss_inputs.trajectory_ids
        for place, member in enumerate(batch.members):
            found[member] = [next(rest) for _ in range(int((ids == place).sum()))]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("trainer", TRAINERS)
def test_what_every_rank_raises_is_raised_as_it_is(seen, trainer) -> None:
    kind, text, note = seen[trainer]["verbs"]["early"]
    assert kind == "NothingAccumulatedError" and text.startswith("optim_step before any forward_backward")
    assert note.startswith("raised by rank 0 of ") and "optim_step" in note


@pytest.mark.slow
def test_what_one_rank_raises_names_it_and_nothing_stays_accumulated(seen) -> None:
    kind, text = seen["of_somebody"]["one alone"][:2]
    assert (kind, text) == ("RankError", "forward_backward failed on rank 1 of 2: ArithmeticError: on purpose")
    assert seen["of_somebody"]["cleared"][0] == "NothingAccumulatedError"


@pytest.mark.slow
def test_ranks_that_wait_for_a_failed_one_are_started_again_from_the_newest_checkpoint(seen, expected) -> None:
    kind, text = seen["of_titan"]["stuck"][:2]
    assert kind == "RankError"
    assert text.startswith("forward_backward failed on rank 1 of 2: ArithmeticError: on purpose; 1 more did not come")
    assert text.endswith("all 2 were started again and stand at step 1, send what came after it again")
    assert seen["of_titan"]["step"] == 1
    assert seen["of_titan"]["again"] == pytest.approx(expected["second"], rel=1e-3)


@pytest.mark.slow
def test_a_dead_rank_is_reported_and_all_are_started_again_so_often(seen) -> None:
    found = seen["of_somebody"]
    kind, text = found["dead"][:2]
    assert kind == "RankLostError" and text.startswith("rank 1 of 2 has died: ")
    assert "exited with non-zero code 3" in text and "stand at step 1" in text
    assert found["step"] == 1
    assert found["again"] == pytest.approx(found["verbs"]["second"][:2], rel=1e-5)  # from the same checkpoint
    kind, text = found["dead again"][:2]
    assert kind == "RankLostError" and text.startswith("rank 0 of 2 has died") and "most_restarts" in text
    assert found["not running"][0] == "SessionError"


@pytest.mark.slow
def test_rollouts_go_on_while_the_trainer_takes_steps(seen) -> None:
    found = seen["of_titan"]["asynchronous"]
    assert len(found["losses"]) == STEPS
    assert all(abs(loss) < 100 for loss in found["losses"])
    assert max(found["lags"]) <= BOUND
    assert max(found["lags"]) > 0  # some were sampled before the step that they were learned after
    assert found["begun"] > STEPS
    assert found["sampler"] == [True, 2]
    assert found["version"] == 2 + STEPS
    assert found["update"][0] == "SamplerError" and "await sampler.take" in found["update"][1]


@pytest.mark.slow
def test_samplers_answer_with_the_trainers_weights(seen) -> None:
    found = seen["of_titan"]["asynchronous"]
    assert found["said"] == [True, True]
    assert found["logprobs"][0] == pytest.approx(found["logprobs"][1], abs=1e-5)


@pytest.mark.slow
def test_misuse_is_told_and_nothing_is_left(seen) -> None:
    assert seen["of_titan"]["too many"][0] == "InvalidArgumentError"
    assert seen["of_titan"]["twice"][0] == seen["of_titan"]["closed"][0] == "SessionError"
    kind, text, note = seen["of_somebody"]["cannot open"]
    assert kind == "TypeError" and "opened()" in text and note.startswith("raised by rank 0 of 1")
    assert seen["left"] == []


def test_sizes_are_checked() -> None:
    with pytest.raises(InvalidArgumentError, match="ranks must be at least 1, got 0"):
        TrainerActors(lambda: None, ranks=0)  # type: ignore[arg-type, return-value]
    with pytest.raises(InvalidArgumentError, match="most_restarts and grace_s"):
        TrainerActors(lambda: None, most_restarts=-1)  # type: ignore[arg-type, return-value]
    with pytest.raises(InvalidArgumentError, match="count must be at least 1, got 0"):
        SamplerActors(lambda: None, count=0)  # type: ignore[arg-type, return-value]


def test_without_monarch_the_extra_is_named() -> None:
    code = "import sys; sys.modules['monarch'] = None\nimport fitrl_titan\nimport fitrl_titan.actors"
    job = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert job.returncode == 1
    assert f"{MissingDependencyError.__name__}: fitrl_titan.actors needs torchmonarch" in job.stderr
    assert "pip install 'fitrl-titan[actors]'" in job.stderr


def test_the_plain_trainer_has_the_verbs_and_no_base_class(tmp_path: Path) -> None:
    assert isinstance(PlainTrainer(tmp_path), fitrl.PolicyTrainer)
    assert PlainTrainer.__mro__ == (PlainTrainer, object)
    assert torch.is_grad_enabled()
