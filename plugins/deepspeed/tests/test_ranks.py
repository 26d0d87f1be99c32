"""`DeepSpeedTrainer` on two gloo ranks against one process of `LocalTrainer`: the same gradients, whatever the stage.

With FITRL_DEEPSPEED_ALL=1 every stage does everything; without it each stage, full weights and adapters, at least once.
"""

from __future__ import annotations

import functools
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
from samples import make_groups

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from ranks_worker import ACCELERATOR, BROKEN, CASES, LORA, OVERFLOWED, RESUMED, SAMPLED, teach  # noqa: E402

pytestmark = pytest.mark.slow
START = [f"{first}-{then}-{kind}" for first, then, kind in RESUMED]


def local() -> fitrl.LocalTrainer:
    return fitrl.LocalTrainer(accelerator=ACCELERATOR, devices=1, gradient_clip_val=0.5, enable_model_summary=False)


def model_of(root: Path, project: str, name: str, kind: str) -> fitrl.TrainableModel:
    return fitrl.TrainableModel(name, project, "tiny", lora=None if kind == "full" else LORA, root=root)


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict[str, Any]:
    """What each of two ranks saw, all from one job, after one process has saved what they resume."""
    folder = tmp_path_factory.mktemp("zero")
    with local() as trainer:
        for kind in ("full", "adapters"):
            for seed in (5, 6):
                trainer.fit_rl(model_of(folder, "start", kind, kind), make_groups(seed=seed), learning_rate=1e-3)
    for name in START:
        shutil.copytree(folder / "start" / name.rpartition("-")[2], folder / "resumed" / name)
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
    return {"ranks": ranks, "folder": folder, "said": job.stderr}


@functools.cache
def one_process(root: Path, adapters: bool) -> list[list[float]]:
    """Loss and norm of the calls of `teach`, in float32."""
    model = model_of(root, "alone", str(adapters), "adapters" if adapters else "full")
    with local() as trainer:
        return [[row["loss/train"], row["loss/grad_norm"]] for row in teach(trainer, model)]


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_one_process(seen, case) -> None:
    """Each call has another number of microbatches; in bfloat16 up to its rounding."""
    first, second = (rank["train"][case] for rank in seen["ranks"])
    assert first == second
    expected = one_process(seen["folder"], "adapters" in case)
    narrow = "bfloat16" in case
    for number, (ours, theirs) in enumerate(zip(first["calls"], expected, strict=True)):
        # Adam makes much of last bits
        tolerance = (0.02 if number == 0 else 0.1) if narrow else (1e-4 if number == 0 else 1e-3)
        assert ours == pytest.approx(theirs, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_deepspeed_is_initialized_once_for_all_calls(seen, case) -> None:
    assert [rank["train"][case]["initialized"] for rank in seen["ranks"]] == [1, 1]


@pytest.mark.parametrize("case", CASES)
def test_weights_come_out_whole_in_float32_and_transformers_loads_them(seen, case) -> None:
    rank = seen["ranks"][0]["train"][case]
    assert rank["dtypes"] == ["torch.float32"]
    assert rank["held"] == 0 if rank["zero"] == 3 else rank["held"] > 400_000
    folder = Path(rank["checkpoint"])
    if "adapters" in case:
        assert (folder / "adapter_model.safetensors").is_file()
        return
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert rank["shapes"] == {name: list(tensor.shape) for name, tensor in loaded.state_dict().items()}
    total = float(sum(tensor.double().sum() for tensor in loaded.state_dict().values()))
    assert total == pytest.approx(rank["sum"], rel=1e-9)


@pytest.mark.parametrize("stage", SAMPLED)
def test_each_rank_samples_from_whole_weights(seen, stage) -> None:
    """As one process does; afterwards stage 3 has its weights in pieces again."""
    first, second = (rank["sampled"][str(stage)] for rank in seen["ranks"])
    assert first == second
    from fitrl.demo import TASKS, correct

    with local() as trainer:
        model = model_of(seen["folder"], "alone", f"sampled-{stage}", "full")
        for call, (texts, lent, held) in enumerate(first):
            groups = fitrl.rollout(
                trainer.sampler(model), TASKS[:5], reward=correct, group_size=3, max_new_tokens=4, seed=call
            )
            assert texts == [[trajectory.completions()[-1].text for trajectory in group] for group in groups]
            assert lent > 400_000 and (held == 0) == (stage == 3)
            trainer.fit_rl(model, make_groups(seed=call), learning_rate=1e-4)


@pytest.mark.parametrize("name", START)
def test_checkpoints_go_from_one_process_to_several_and_back(seen, name) -> None:
    """Saved by one process, resumed by two in one stage, by two in another, by one: as if there had been one."""
    kind, folder = name.rpartition("-")[2], seen["folder"]
    alone = folder / "onward" / name
    shutil.copytree(folder / "start" / kind, alone, dirs_exist_ok=True)
    rows = []
    with local() as trainer:
        for seed in (7, 8, 9):
            metrics = trainer.fit_rl(
                model_of(folder, "onward", name, kind), make_groups(seed=seed), learning_rate=1e-3
            ).metrics
            rows.append([trainer.global_step, metrics["loss/train"], metrics["loss/grad_norm"]])
        back = trainer.fit_rl(model_of(folder, "resumed", name, kind), make_groups(seed=9), learning_rate=1e-3)
    ours = [*seen["ranks"][0]["resumed"][name], [back.step, *_told(back.metrics)]]
    for found, expected in zip(ours, rows, strict=True):
        assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("stage", BROKEN)
def test_what_breaks_costs_its_call_only(seen, stage) -> None:
    """A backward that raised changes nothing; after a gradient that is not a number the newest checkpoint goes on."""
    first, second = (rank["broken"][str(stage)] for rank in seen["ranks"])
    assert first == second and (first[1], first[3]) == ("ArithmeticError", "NonFiniteGradientError")
    with local() as trainer:
        model = model_of(seen["folder"], "alone", f"broken-{stage}", "full")
        for seed, found in enumerate(first[::2]):
            metrics = trainer.fit_rl(model, make_groups(seed=seed), learning_rate=1e-4).metrics
            assert found == pytest.approx([*_told(metrics), trainer.global_step], rel=1e-3)


@pytest.mark.parametrize("stage", OVERFLOWED)
def test_steps_that_overflow_are_counted_and_shown(seen, stage) -> None:
    """The scale of the loss falls until a step fits, and a new session takes up where it was."""
    (steps, skipped, scale), (later, skipped_later, scale_later) = seen["ranks"][0]["overflowed"][str(stage)]
    assert (steps, later) == (6, 12)
    assert skipped > 0 and scale == 2.0 ** (19 - skipped)
    assert skipped_later < skipped and scale_later <= scale
    assert "step 1 was skipped: its gradient overflowed in float16" in seen["said"]


def _told(metrics: dict[str, float]) -> list[float]:
    return [metrics["loss/train"], metrics["loss/grad_norm"]]
