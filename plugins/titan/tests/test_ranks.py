"""`TitanTrainer` on two gloo ranks against one process of `LocalTrainer`: the same gradients, every way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import fitrl
from distributed.launch import environment, standalone

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from ranks_worker import ACCELERATOR, CASES, RESUMED, Squared, _numbers, model_of, padded_norm, teach  # noqa: E402

pytestmark = pytest.mark.slow


def local() -> fitrl.LocalTrainer:
    return fitrl.LocalTrainer(accelerator=ACCELERATOR, devices=1, gradient_clip_val=0.5, enable_model_summary=False)


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict[str, Any]:
    """What each of two ranks saw, all from one job, after one process has saved what they resume."""
    folder = tmp_path_factory.mktemp("titan")
    with local() as trainer:
        model = model_of(folder, "start", "full")
        for seed in (5, 6):
            _numbers(trainer, model, seed)
    for name in RESUMED:
        shutil.copytree(folder / "start" / "full", folder / "resumed" / name)
    variables = environment() | {"TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    variables["PYTHONPATH"] = os.pathsep.join([str(HERE), variables["PYTHONPATH"]])
    job = subprocess.run(
        [*standalone(2), str(HERE / "ranks_worker.py"), str(folder)],
        env=variables,
        capture_output=True,
        text=True,
        timeout=900.0,
        check=False,
    )
    assert job.returncode == 0, job.stdout[-4000:] + job.stderr[-8000:]
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    return {"ranks": ranks, "folder": folder}


@pytest.fixture(scope="module")
def alone(seen) -> dict[str, Any]:
    """The same calls in one process."""
    with local() as trainer:
        taught = teach(trainer, model_of(seen["folder"], "alone", "taught"))
        model = model_of(seen["folder"], "start", "full")  # goes on where the ranks have resumed
        resumed = _numbers(trainer, model, 7)
        logits = _numbers(trainer, model, 8, objective=Squared(), save_checkpoint=False)
        padded = padded_norm(trainer, model)
    return {"taught": taught, "resumed": resumed, "logits": logits, "padded": padded}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_one_process(seen, alone, case) -> None:
    """Each call has another number of microbatches and another term of the loss; in bfloat16 up to its rounding."""
    first, second = (rank["train"][case] for rank in seen["ranks"])
    assert first["calls"] == second["calls"]
    tolerance = 0.08 if "bfloat16" in case else 1e-3
    for found, expected in zip(first["calls"], alone["taught"], strict=True):
        assert found == pytest.approx(expected, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("case", [case for case in CASES if "compiled" in case])
def test_batches_of_other_lengths_share_the_graphs(seen, case) -> None:
    """But for what compilers take for special: rows of another number, and a single token of a row on a rank."""
    assert max(rank["train"][case]["later graphs"] for rank in seen["ranks"]) <= 2


@pytest.mark.parametrize("case", CASES)
def test_weights_are_gathered_and_gradients_summed_once_for_a_step_where_they_stay_whole(seen, case) -> None:
    parts = 1 + fitrl_tiny().config.num_hidden_layers
    for rank in seen["ranks"]:
        # with tensor parallel no other rank holds pieces of this one's part
        counts = [rank["train"][case][what] for what in ("gathers", "sums") if what == "sums" or "tensor" not in case]
        if "whole" in case or ACCELERATOR == "gpu":  # there so small a model does by itself
            assert set(counts) == {parts}
        else:
            assert min(counts) >= 2 * parts


@pytest.mark.parametrize("case", CASES)
def test_each_rank_holds_half_of_the_weights(seen, case) -> None:
    first, second = (rank["train"][case]["held"] for rank in seen["ranks"])
    whole = sum(tensor.numel() for tensor in fitrl_tiny().parameters())
    assert first == pytest.approx(whole / 2, rel=0.02)
    assert first + second == pytest.approx(whole, rel=0.02)  # norms are whole on each rank with tensor parallel


@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_what_was_saved(seen, case) -> None:
    """As float32, tied as the base model is, and changed by what was learned."""
    saved = AutoModelForCausalLM.from_pretrained(seen["ranks"][0]["train"][case]["checkpoint"])
    base = fitrl_tiny()
    assert saved.state_dict().keys() == base.state_dict().keys()
    assert {tensor.dtype for tensor in saved.state_dict().values()} == {torch.float32}
    assert saved.lm_head.weight is saved.model.embed_tokens.weight
    moved = [(mine - theirs).abs().max() for mine, theirs in zip(saved.parameters(), base.parameters(), strict=True)]
    assert all(1e-4 < step < 5e-3 for step in moved)  # four steps of AdamW at a rate of 1e-3


@pytest.mark.parametrize("way", RESUMED)
def test_what_one_process_saved_is_resumed_moments_and_all(seen, alone, way) -> None:
    first, second = (rank["resumed"][way] for rank in seen["ranks"])
    assert first == second == pytest.approx(alone["resumed"], rel=1e-3)


@pytest.mark.parametrize("way", RESUMED)
def test_what_the_ranks_saved_one_process_resumes(seen, alone, way) -> None:
    with local() as trainer:
        model = model_of(seen["folder"], "resumed", way)
        trainer.open(model)
        assert trainer.global_step == 3
        assert _numbers(trainer, model, 8, objective=Squared()) == pytest.approx(alone["logits"], rel=1e-3)


@pytest.mark.parametrize("way", RESUMED)
def test_an_objective_over_logits_has_the_gradient_of_one_process(seen, alone, way) -> None:
    first, second = (rank["logits"][way] for rank in seen["ranks"])
    assert first == second == pytest.approx(alone["logits"], rel=1e-3)


@pytest.mark.parametrize("way", RESUMED)
def test_padded_batches_have_the_gradient_of_one_process(seen, alone, way) -> None:
    first, second = (rank["padded"][way] for rank in seen["ranks"])
    assert first == second == pytest.approx(alone["padded"], rel=1e-3)


@pytest.mark.parametrize("way", RESUMED)
def test_the_embedded_sampler_has_the_newest_weights(seen, way) -> None:
    """Both ranks sample the same, which is what the trainer would have said."""
    first, second = (rank["sampled"][way] for rank in seen["ranks"])
    for mine, theirs in zip(first, second, strict=True):
        assert mine == theirs
    assert first[0][0] != first[1][0]
    for number, (_, step, mismatch) in enumerate(first):
        assert step == number + 1
        assert abs(mismatch) < 1e-4


def fitrl_tiny() -> Any:
    from fitrl.policy.loading import load_policy

    return load_policy("tiny").causal_lm
