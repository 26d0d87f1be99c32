"""What is refused before anything is loaded, and how the backend is found."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fitrl
from fitrl.errors import InvalidArgumentError, MissingDependencyError, UnknownArgumentError, UnsupportedError
from fitrl.testing import is_rank, run_on_ranks
from fitrl_titan import TitanStrategy, TitanTrainer
from fitrl_titan.older_torch import lend_names


@pytest.mark.parametrize("name", ["data_parallel_size", "tensor_parallel_size", "context_parallel_size"])
def test_a_size_below_one_is_refused(name) -> None:
    with pytest.raises(InvalidArgumentError, match=f"{name} must be at least 1, got 0"):
        TitanStrategy(**{name: 0})


def test_an_unknown_kind_of_checkpointing_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="True, False or 'selective', got 'full'"):
        TitanTrainer(activation_checkpointing="full")  # type: ignore[arg-type]


def test_a_script_that_torchrun_did_not_start_is_told_how() -> None:
    with pytest.raises(InvalidArgumentError, match="torchrun --nproc_per_node 2"):
        TitanTrainer(accelerator="cpu", devices=2)


@pytest.mark.parametrize("precision", ["64-true", "16-mixed", 64])
def test_other_precisions_are_refused(precision) -> None:
    with pytest.raises(UnsupportedError, match=f"precision='{precision}'"):
        TitanTrainer(accelerator="cpu", devices=1, precision=precision)


def test_it_is_found_by_name() -> None:
    assert entry_points(group="fitrl.trainers")["titan"].load() is TitanTrainer
    assert entry_points(group="fitrl.strategies")["fitrl_titan"].load() is TitanStrategy


def test_without_torchtitan_the_package_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torchtitan", None)
    with pytest.raises(MissingDependencyError, match="pip install fitrl-titan"):
        TitanStrategy()


def test_one_file_imports_torchtitan() -> None:
    """And none of the package is needed before a model is opened."""
    package = Path(sys.modules[TitanStrategy.__module__].__file__ or "").parent
    importing = [path.name for path in package.rglob("*.py") if "from torchtitan" in path.read_text()]
    assert importing == ["components.py"]
    code = "import sys, fitrl_titan; print([m for m in sys.modules if m.startswith(('torchtitan', 'monarch'))])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_torchtitan_can_be_imported_beside_an_older_torch(monkeypatch) -> None:
    import torch.distributed.fsdp as fsdp

    monkeypatch.delattr(fsdp, "DataParallelMeshDims")
    lend_names()
    assert isinstance(fsdp.DataParallelMeshDims, type)


# -- on a rank ------------------------------------------------------------------------------------------------------


class OnRank:
    """What is known only when a model is opened."""

    __test__ = is_rank()

    @pytest.mark.parametrize(
        ("options", "lora", "said"),
        [
            ({}, fitrl.LoraSettings(), "pass lora=None"),
            ({"optimizer": fitrl.AdamWSettings(moments="8bit")}, None, "moments='8bit'"),
        ],
    )
    def test_what_it_cannot_do_is_refused(self, tmp_path, options, lora, said) -> None:
        model = fitrl.TrainableModel("refused", "titan", "tiny", lora=lora, root=tmp_path)
        with (
            TitanTrainer(accelerator="cpu", devices=1, enable_model_summary=False, **options) as trainer,
            pytest.raises(UnsupportedError) as raised,
        ):
            trainer.open(model)
        assert said in str(raised.value)

    def test_sizes_that_do_not_make_the_job_are_refused(self, tmp_path) -> None:
        model = fitrl.TrainableModel("sizes", "titan", "tiny", lora=None, root=tmp_path)
        for options, said in (
            ({"tensor_parallel_size": 2}, "tensor_parallel_size=2 times context_parallel_size=1 does not make the 1"),
            ({"data_parallel_size": 2}, "times data_parallel_size=2 does not make the 1 ranks"),
        ):
            with TitanTrainer(accelerator="cpu", devices=1, enable_model_summary=False, **options) as trainer:
                with pytest.raises(InvalidArgumentError) as raised:
                    trainer.open(model)
                assert said in str(raised.value)

    def test_an_argument_of_another_backend_is_named(self, tmp_path) -> None:
        model = fitrl.TrainableModel("argument", "titan", "tiny", lora=None, root=tmp_path)
        with (
            TitanTrainer(accelerator="cpu", devices=1, enable_model_summary=False) as trainer,
            pytest.raises(UnknownArgumentError, match="titan"),
        ):
            trainer.fit_rl(model, [], train_mlp=True)  # type: ignore[call-arg]


@pytest.mark.slow
@pytest.mark.skipif(is_rank(), reason="it starts the rank")
def test_one_rank_refuses_what_it_cannot_do() -> None:
    assert "4 passed" in run_on_ranks(f"{__file__}::OnRank", ranks=1)


@pytest.mark.parametrize(
    ("version", "recomputes", "said"),
    [
        ("2.12.1+cu130", False, r"tensor_parallel_size=2 needs torch 2\.13, this is 2\.12\.1\+cu130"),
        ("2.13.0", True, "tensor_parallel_size=2 and activation_checkpointing: torch 2.13 fails"),
    ],
)
def test_cut_layers_that_the_compiler_cannot_follow_are_refused(monkeypatch, version, recomputes, said) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(TitanStrategy, "lightning_module", SimpleNamespace(activation_checkpointing=recomputes))
    policy: Any = SimpleNamespace(is_adapter=False)
    with pytest.raises(UnsupportedError, match=said):
        TitanStrategy(tensor_parallel_size=2).shard(policy, precision="32-true", moments="float32", compiles=True)


def test_what_torchtitans_plans_cannot_do_is_no_argument() -> None:
    with pytest.raises(InvalidArgumentError, match="offload=True: torchtitan's plans"):
        TitanStrategy(offload=True)
