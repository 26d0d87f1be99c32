"""The house's order: imports run down the data's flow, heavy ones stay inside, private Lightning names in one file."""

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import lightning
import pytest
from lightning.pytorch.strategies import StrategyRegistry

import fitrl
from fitrl import discovery
from fitrl.errors import InvalidArgumentError

SOURCE = Path(fitrl.__file__).parent
ORDER = "errors data objective policy rollout protocols strategies trainers testing demo cli".split()
FILES = sorted(path for path in SOURCE.rglob("*.py") if path.parent != SOURCE / "assets")


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def imports(path: Path) -> list[tuple[str, list[str], int]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.module, [alias.name for alias in node.names], node.lineno))
        elif isinstance(node, ast.Import):
            found += [(alias.name, [], node.lineno) for alias in node.names]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_never_run_up(path) -> None:
    here = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    for module, names, line in imports(path):
        modules = [f"fitrl.{name}" for name in names] if module == "fitrl" else [module]
        for used in modules:
            if not used.startswith("fitrl.") or here not in ORDER or room(used) not in ORDER:
                continue
            assert ORDER.index(room(used)) <= ORDER.index(here), f"{path}:{line} imports {used}"


def test_private_lightning_names_are_in_one_file_only() -> None:
    private = []
    for path in FILES:
        if path.name == "_compat.py":
            continue
        for module, names, line in imports(path):
            if module.startswith("lightning") and any(part.startswith("_") for part in [*module.split("."), *names]):
                private.append((path.name, line))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                owner = ast.unparse(node.value)
                if owner.rsplit(".", 1)[-1] in ("trainer", "strategy", "fit_loop", "epoch_loop"):
                    private.append((path.name, node.lineno))
    assert not private


def test_import_adds_nothing_heavy() -> None:
    code = "import sys, lightning.pytorch, torch; b = set(sys.modules); import fitrl; print(*set(sys.modules) - b)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    added = {name.split(".")[0] for name in done.stdout.split()}
    heavy = "transformers peft matplotlib openai gguf deepspeed vllm tinker triton httpx fastapi pandas".split()
    assert not added & {*heavy, "jsonargparse"}


def test_exports_and_entry_points_exist() -> None:
    assert all(hasattr(fitrl, name) for name in fitrl.__all__)
    for group in ("fitrl.strategies", "fitrl.trainers", "fitrl.samplers"):
        entries = importlib.metadata.entry_points(group=group)
        assert entries and all(entry.load() for entry in entries)


def test_discovery() -> None:
    assert discovery.trainer_class("local") is fitrl.LocalTrainer
    assert discovery.sampler_class("transformers") is fitrl.TransformersSampler
    with pytest.raises(InvalidArgumentError, match="has no 'nowhere'; installed: local"):
        discovery.trainer_class("nowhere")
    discovery.register_strategies()
    assert "fitrl_local" in StrategyRegistry


def test_strategy_by_name_is_lazy_and_takes_the_trainers_device() -> None:
    trainer = lightning.Trainer(strategy="fitrl_local", accelerator="cpu", devices=1, logger=False)
    assert type(trainer.strategy).__name__ == "LocalStrategy"
    assert trainer.strategy.root_device.type == "cpu"
