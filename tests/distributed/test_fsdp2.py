"""`fitrl_fsdp2` on two gloo ranks against one process: weights in pieces, the same gradients, one checkpoint."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fitrl
from distributed.ddp_worker import ACCELERATOR, AFTER_A_STEP
from distributed.fsdp2_worker import CASES
from distributed.launch import HERE, environment, torchrun
from fitrl.errors import CheckpointError, InvalidArgumentError
from fitrl.policy.checkpoints import verify
from fitrl.strategies.fsdp2 import FSDP2Strategy
from samples import make_groups

pytestmark = pytest.mark.slow
# of gradients' norms and sums: a compiler's float32 kernels, and layers that are gathered in bfloat16
TOLERANCE = {
    "adapters, recomputed, offloaded": 1e-5,
    "float32, compiled": 1e-4,
    "float32, summed once": 1e-4,
    "float32, summed once, whole in a step": 1e-4,
    "bfloat16": 5e-2 if ACCELERATOR == "gpu" else 2e-2,
    "adapters, bfloat16": 5e-2,
}
TOLERANCE |= {f"{name}, whole in a step": TOLERANCE[name] for name in ("bfloat16", "adapters, bfloat16")}


def stays_whole(case: str, told: str) -> bool:
    """Whether a case was told to keep it whole; on GPUs so small a model does by itself."""
    return told in case or (ACCELERATOR == "gpu" and "offloaded" not in case)


def assert_same_gradients(ours: list[list[float]], expected: list[list[float]]) -> None:
    """Of all steps, the first one before Adam has made more of last bits."""
    assert len(ours) == len(expected)
    for step, (found, others) in enumerate(zip(ours, expected, strict=True)):
        rel = AFTER_A_STEP if step else 1e-8
        assert found == pytest.approx(others, rel=rel, abs=rel * others[0] if rel > 1e-8 else 1e-10)


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict[str, Any]:
    """What one process and each of two ranks saw, all from one run of each."""
    folder = tmp_path_factory.mktemp("fsdp2")
    variables = environment() | {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    alone = subprocess.run(
        [sys.executable, str(HERE / "fsdp2_worker.py"), str(folder / "one")],
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert alone.returncode == 0, alone.stderr
    ranks = torchrun("fsdp2_worker.py", str(folder / "two"), variables=variables)
    assert ranks.returncode == 0, ranks.stderr
    files = {name: json.loads((folder / name).read_text()) for name in ("one", "two.0", "two.1")}
    return files | {"folder": folder}


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_one_process(seen, case) -> None:
    one, first, second = (seen[name]["train"][case] for name in ("one", "two.0", "two.1"))
    assert first["gradients"] == second["gradients"]
    assert len(first["gradients"]) == len(one["gradients"]) == 2
    if case not in TOLERANCE:
        assert_same_gradients(first["gradients"], one["gradients"])
        return
    tolerance = TOLERANCE[case]
    for ours, expected in zip(first["gradients"], one["gradients"], strict=True):
        # of the first step all, of the second the norm where Adam has made more of last bits
        norms_only = expected is not one["gradients"][0]
        assert ours[:1] == pytest.approx(expected[:1], rel=0.2 if norms_only else tolerance)
        if not norms_only:
            assert ours == pytest.approx(expected, rel=tolerance, abs=tolerance * expected[0])


def test_the_compiler_takes_no_size_of_the_model_for_unknown(seen) -> None:
    for name in ("one", "two.0", "two.1"):
        numbers = seen[name]["train"]["float32, compiled"]["unknown numbers"]
        assert numbers  # the lengths of batches
        assert not [number for number in numbers if "modules" in number]


@pytest.mark.parametrize("case", CASES)
def test_each_rank_holds_its_pieces_only(seen, case) -> None:
    for name in ("two.0", "two.1"):
        rank = seen[name]["train"][case]
        assert rank["in pieces"]
        assert rank["own"] < 0.52 * rank["all"]
    assert seen["two.0"]["train"][case]["own"] + seen["two.1"]["train"][case]["own"] == rank["all"]


@pytest.mark.parametrize("case", [case for case in CASES if "whole in a step" in case])
def test_weights_that_stay_whole_change_no_number(seen, case) -> None:
    for name in ("two.0", "two.1"):
        ours, others = (seen[name]["train"][key] for key in (case, case.removesuffix(", whole in a step")))
        assert ours["gradients"] == others["gradients"]
        assert ours["digest"] == others["digest"]


@pytest.mark.parametrize("case", CASES)
def test_weights_are_gathered_once_for_a_step_where_they_stay_whole(seen, case) -> None:
    for name in ("two.0", "two.1"):
        rank = seen[name]["train"][case]
        assert rank["microbatches"] > 1
        if stays_whole(case, "whole in a step"):
            assert rank["gathers"] == rank["parts"]
        else:
            assert rank["gathers"] >= rank["microbatches"] * rank["parts"]


@pytest.mark.parametrize("case", CASES)
def test_every_rank_is_told_all_weights_under_their_names(seen, case) -> None:
    one, first, second = (seen[name]["train"][case] for name in ("one", "two.0", "two.1"))
    assert first["names"] == second["names"] == one["names"]
    assert first["digest"] == second["digest"]


def test_transformers_loads_what_was_saved(seen) -> None:
    assert seen["two.0"]["saved"] == seen["one"]["saved"] == seen["one"]["train"]["full"]["names"]


def test_sampling_between_calls_changes_nothing(seen) -> None:
    one, first, second = (seen[name]["sampled"] for name in ("one", "two.0", "two.1"))
    assert first["groups"] == second["groups"]
    texts = [
        [item["messages_and_choices"][-1]["completion"]["token_ids"] for item in json.loads(group)["trajectories"]]
        for group in first["groups"]
    ]
    assert texts == [
        [item["messages_and_choices"][-1]["completion"]["token_ids"] for item in json.loads(group)["trajectories"]]
        for group in one["groups"]
    ]
    assert first["by hand"] == second["by hand"] == pytest.approx(one["by hand"], rel=AFTER_A_STEP)
    assert first["digest"] == second["digest"]
    assert_same_gradients(first["gradients"], one["gradients"])


@pytest.mark.parametrize("kind", ["full", "adapters"])
def test_resumed_it_goes_on_as_one_process_would(seen, kind) -> None:
    one, first, second = (seen[name]["resumed"][kind] for name in ("one", "two.0", "two.1"))
    assert len(first["gradients"]) == 3 and first["digest"] == second["digest"]
    assert_same_gradients(first["gradients"], one["gradients"])


@pytest.mark.parametrize("kind", ["full", "adapters"])
def test_one_process_goes_on_from_what_two_saved(seen, kind) -> None:
    """The checkpoint holds whole tensors, so that any number of ranks resumes it: the next step is the same."""
    results = {}
    for name in ("one", "two.0"):
        root = Path(seen[name]["resumed"][kind]["checkpoint"]).parents[3]
        lora = None if kind == "full" else fitrl.LoraSettings(rank=4)
        model = fitrl.TrainableModel(f"resume-{kind}", "fsdp2", "tiny", lora=lora, root=root)
        with fitrl.LocalTrainer(
            accelerator="cpu", devices=1, precision="64-true", gradient_clip_val=0.5, enable_model_summary=False
        ) as trainer:
            result = trainer.fit_rl(model, make_groups(seed=4), learning_rate=1e-3)
            weights = torch.cat([tensor.flatten() for _, tensor in trainer.verbs.named_weights()])
        assert result.step == 4
        results[name] = (result.metrics["loss/grad_norm"], weights)
    assert results["two.0"][0] == pytest.approx(results["one"][0], rel=AFTER_A_STEP)
    assert float((results["two.0"][1] - results["one"][1]).abs().max()) < 100 * AFTER_A_STEP


def test_each_rank_writes_its_moments_and_nobody_all_of_them(seen) -> None:
    folder = Path(seen["two.0"]["train"]["full"]["checkpoint"])
    manifest = verify(folder)
    files = sorted((folder / "moments").iterdir())
    assert len(files) == 2 and {f"moments/{file.name}" for file in files} <= manifest.files.keys()
    parts = [load_file(file) for file in files]
    sizes = [sum(tensor.numel() for tensor in part.values()) for part in parts]
    whole = seen["two.0"]["train"]["full"]["all"]
    assert sum(sizes) == 2 * whole and max(sizes) < 0.52 * 2 * whole
    state = torch.load(folder / "trainer_state.pt", weights_only=True)["optimizer"]["state"]
    assert len(state) > 10 and all(entry.keys() == {"step"} for entry in state.values())


def test_each_rank_writes_a_share_of_the_weights(seen) -> None:
    folder = Path(seen["two.0"]["train"]["full"]["checkpoint"])
    manifest = verify(folder)
    files = sorted(folder.glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    assert {file.name for file in files} < manifest.files.keys()
    parts = [load_file(file) for file in files]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file.name for file, part in zip(files, parts, strict=True) for name in part}
    assert parts[0].keys().isdisjoint(parts[1]) and len(parts[0]) + len(parts[1]) == len(index["weight_map"])
    sizes = [sum(tensor.nbytes for tensor in part.values()) for part in parts]
    assert sum(sizes) == index["metadata"]["total_size"] and max(sizes) < 0.6 * sum(sizes)


@pytest.mark.parametrize("damage", ["cut", "changed", "missing", "more"])
def test_a_checkpoint_whose_pieces_are_not_as_written_is_refused(seen, damage, tmp_path) -> None:
    saved = Path(seen["two.0"]["resumed"]["full"]["checkpoint"])
    model = fitrl.TrainableModel("damaged", "fsdp2", "tiny", lora=None, root=tmp_path)
    folder = model.checkpoints_dir / saved.name
    shutil.copytree(saved, folder)
    file = next((folder / "moments").iterdir())
    content = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(content[:-8])
    elif damage == "changed":
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "missing":
        file.unlink()
    else:
        shutil.copy(file, file.with_name("shard-00009-model-00001-of-00001.safetensors"))
    with fitrl.LocalTrainer(accelerator="cpu", devices=1, precision="64-true", enable_model_summary=False) as trainer:
        if damage != "more":
            trainer.open(model)
            assert trainer.global_step == 0  # passed over, as any checkpoint that is not whole
        with pytest.raises(CheckpointError, match="no whole checkpoint"):
            trainer.open(model) and trainer.verbs.load(str(folder))


def test_a_save_that_fails_on_one_rank_fails_on_all_and_leaves_nothing(seen) -> None:
    assert "rank 1" in seen["two.0"]["save"]["alone 1"]
    for name in ("two.0", "two.1"):
        saved = seen[name]["save"]
        assert saved["full 0"].startswith("CheckpointError") and "rank 0" in saved["full 0"]
        assert saved["full 1"].startswith("CheckpointError") and "rank 1" in saved["full 1"]
        assert all("CheckpointError" in saved[f"alone {rank}"] for rank in (0, 1))
        assert all(saved[f"left {kind} {rank}"] == ["0001"] for kind in ("full", "alone") for rank in (0, 1))
        assert saved["goes on"] == 2 and saved["same weights"] and saved["same moments"]
        assert "moments" not in saved["weights"] and "trainer_state.pt" not in saved["weights"]


def test_a_callback_that_samples_in_the_middle_of_a_call_is_told_what_to_do(seen) -> None:
    for name in ("two.0", "two.1"):
        said = seen[name]["mid-call"]
        assert said["trainer's"].startswith("SamplerError") and "sample between calls" in said["trainer's"]
        assert said["own"].startswith("SamplerError") and "lie in pieces on several ranks" in said["own"]


def test_moments_that_cannot_be_cut_are_refused(seen) -> None:
    pytest.importorskip("bitsandbytes", reason="part of the tests' packages, but not on every machine with GPUs")
    for name in ("two.0", "two.1"):
        assert seen[name]["refused"].startswith("UnsupportedError") and "fitrl_ddp" in seen[name]["refused"]
    assert seen["one"]["refused"] == "taken"


def test_memory_decides_what_stays_whole_unless_told(monkeypatch) -> None:
    """A GPU of 80 GB: 10 GB stay whole, more do not."""
    monkeypatch.setattr(FSDP2Strategy, "root_device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * 10**9))
    assert [FSDP2Strategy()._cuts(size * 10**9, None) for size in (1, 10, 11)] == [False, False, True]
    assert FSDP2Strategy()._cuts(1, True)
    assert not FSDP2Strategy()._cuts(10**12, False)
    assert FSDP2Strategy(offload=True)._cuts(1, None)
    monkeypatch.setattr(FSDP2Strategy, "root_device", torch.device("cpu"))
    assert FSDP2Strategy()._cuts(1, None)


@pytest.mark.parametrize("name", ["reshard_after_forward", "sync_every_microbatch"])
def test_what_is_offloaded_cannot_stay_on_the_device(name) -> None:
    with pytest.raises(InvalidArgumentError, match=f"offload=True .* {name}=False .* take one"):
        FSDP2Strategy(offload=True, **{name: False})


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_summed_once_for_a_step_where_they_stay_whole(seen, case) -> None:
    for name in ("two.0", "two.1"):
        rank = seen[name]["train"][case]
        # of adapters, what is not in a layer has none
        parts = rank["parts"] - ("adapters" in case)
        if stays_whole(case, "summed once"):
            assert rank["sums"] == parts
        else:
            assert rank["sums"] >= rank["microbatches"] * parts
