"""The house's order: imports run down the data's flow, heavy ones stay inside, private Lightning names in one file."""

import ast
import importlib
import importlib.metadata
import inspect
import json
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import lightning
import pytest
from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry

import fitrl
import fitrl_command
from fitrl import discovery
from fitrl.errors import InvalidArgumentError
from fitrl.strategies.local import LocalStrategy

SOURCE = Path(fitrl.__file__).parent
ORDER = "errors data objective policy rollout protocols strategies trainers testing demo cli".split()
FOUNDATION = ("_compat", "discovery")  # entry points and Lightning's private names: used by all, using errors only
FILES = sorted(path for path in SOURCE.rglob("*.py") if path.parent != SOURCE / "assets")
# heavy, or of one backend: inside a plugin or a function, never on the way of `import fitrl`
HEAVY = """accelerate bitsandbytes datasets deepspeed fastapi gguf httpx jsonargparse kernels matplotlib openai pandas
    peft pyarrow requests scipy shtab sklearn tensorboard tinker torchtitan transformers triton vllm wandb""".split()


def room(module: str) -> str:
    return module.split(".")[1]


def imports(path: Path) -> list[tuple[str, list[str], int]]:
    """Every import of a file, inside functions and `if TYPE_CHECKING` too: module, names, line."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            found.append((node.module or "", [alias.name for alias in node.names], node.lineno))
        elif isinstance(node, ast.Import):
            found += [(alias.name, [], node.lineno) for alias in node.names]
    return found


# -- the order --------------------------------------------------------------------------------------------------------


def ups(path: Path) -> list[str]:
    """Imports of a file that run up the order."""
    here = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if here in ("__init__", "__main__"):  # what is on top
        return []
    assert here in (*ORDER, *FOUNDATION), f"{path} has no place in the order"
    height = ORDER.index("errors" if here in FOUNDATION else here)
    found = []
    for module, names, line in imports(path):
        for used in [f"fitrl.{name}" for name in names] if module == "fitrl" and names else [module]:
            if not (used + ".").startswith("fitrl."):
                continue
            top = used == "fitrl" or room(used) not in (*ORDER, *FOUNDATION)
            if top or (room(used) in ORDER and ORDER.index(room(used)) > height):
                found.append(f"{path}:{line} imports {used}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_never_run_up(path) -> None:
    assert not ups(path)


@pytest.mark.parametrize(
    "line",
    [
        "from fitrl.policy.policy import Policy",
        "import fitrl.policy.loading",
        "from fitrl import policy",
        "from fitrl import Objective",
        "import fitrl",
        "def f():\n    from fitrl.cli import main",
        "if TYPE_CHECKING:\n    from fitrl.trainers.local import LocalTrainer",
    ],
)
def test_the_check_itself_sees_an_import_that_runs_up(line, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SOURCE", tmp_path)
    (tmp_path / "objective").mkdir()
    (tmp_path / "objective" / "x.py").write_text(f"from fitrl.data.groups import Trajectory\n{line}\n")
    assert len(ups(tmp_path / "objective" / "x.py")) == 1


def test_the_core_imports_what_it_declares_and_no_plugin() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    requirements = project["dependencies"] + extras["gguf"] + extras["parquet"] + extras["bitsandbytes"]
    requirements += extras["reasoning-gym"]
    declared = {re.match(r"[\w-]+", requirement)[0].replace("-", "_") for requirement in requirements}
    declared |= {"fitrl", "fitrl_command", "yaml"}  # the last is imported by another name than its distribution's
    declared.add("triton")  # torch brings it along where there is a GPU
    contracts = declared | {"pytest"}  # which say so where it is missing
    for path in FILES:
        for module, _, line in imports(path):
            top = module.split(".")[0]
            allowed = contracts if path.parent == SOURCE / "testing" else declared
            assert top in allowed or top in sys.stdlib_module_names, f"{path}:{line} imports {top}, undeclared"


# -- private Lightning names ------------------------------------------------------------------------------------------


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_private_lightning_names_are_in_one_file_only() -> None:
    private = []
    owners = ("trainer", "strategy", "fit_loop", "epoch_loop", "logger", "module", "lightning_module")
    for path in FILES:
        if path.name == "_compat.py":
            continue
        for module, names, line in imports(path):
            if module.startswith("lightning") and any(map(is_private, [*module.split("."), *names])):
                private.append(f"{path}:{line}")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and is_private(node.attr):
                owner = ast.unparse(node.value).rsplit(".", 1)[-1]
                if owner in owners or owner in ("super()", "connector"):
                    private.append(f"{path}:{node.lineno} {ast.unparse(node)}")
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr"):
                name = node.args[1]
                if isinstance(name, ast.Constant) and is_private(str(name.value)):
                    private.append(f"{path}:{node.lineno} {ast.unparse(node)}")
    assert not private


def our_classes() -> list[type]:
    modules = [
        importlib.import_module(info.name)
        for info in pkgutil.walk_packages(fitrl.__path__, "fitrl.")
        if not info.name.endswith(("__main__", "make_tiny"))
    ]
    return [
        member
        for module in modules
        for member in vars(module).values()
        if getattr(member, "__module__", "") == module.__name__ and inspect.isclass(member)
    ]


SUBCLASSES = [c for c in our_classes() if any(base.__module__.startswith("lightning.") for base in c.__mro__)]


@pytest.mark.parametrize("cls", SUBCLASSES, ids=lambda cls: cls.__name__)
def test_no_private_name_of_a_subclass_is_lightnings(cls) -> None:
    """Neither used on purpose, which belongs into _compat.py, nor taken by accident."""
    ours = set(re.findall(r"\bself\.(_[a-z]\w*)", inspect.getsource(cls))) | set(filter(is_private, vars(cls)))
    theirs = set()
    for base in cls.__mro__:
        if base.__module__.startswith("lightning."):
            source = inspect.getsource(base)
            theirs |= set(re.findall(r"\b(?:self|cls)\.(_[a-z]\w*)", source)) | set(
                re.findall(r"def (_[a-z]\w*)", source)
            )
    assert theirs or cls.__name__ == "Rows"  # Lightning's Logger has none
    assert not ours & theirs


def test_subclasses_of_lightning_were_found() -> None:
    assert {"LocalTrainer", "RLTrainer", "PolicyModule", "LocalStrategy"} <= {cls.__name__ for cls in SUBCLASSES}


# -- what `import fitrl` brings ---------------------------------------------------------------------------------------


def test_import_adds_nothing_heavy() -> None:
    code = (
        "import json, sys, lightning.pytorch, torch\n"
        "before = set(sys.modules)\n"
        "import fitrl\n"
        "from lightning.pytorch.strategies import StrategyRegistry\n"
        "print(json.dumps([sorted(set(sys.modules) - before), 'fitrl_local' in StrategyRegistry]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules, registered = json.loads(done.stdout)
    added = {name.split(".")[0] for name in modules}
    assert "fitrl" in added and registered
    assert not added & set(HEAVY)
    assert not {"pytest", "fitrl.demo", "fitrl.cli", "fitrl.testing"} & set(modules)
    assert done.stderr == ""


def test_the_contracts_say_that_they_need_pytest() -> None:
    code = "import sys; sys.modules['pytest'] = None; import fitrl; import fitrl.testing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].endswith(
        "MissingDependencyError: fitrl.testing holds pytest classes: pip install pytest"
    )


def test_exports_exist_and_are_sorted() -> None:
    assert all(hasattr(fitrl, name) for name in fitrl.__all__)
    assert len(set(fitrl.__all__)) == len(fitrl.__all__)
    assert fitrl.__all__ == sorted(fitrl.__all__)
    assert fitrl.__version__ == importlib.metadata.version("fitrl")


# -- entry points -----------------------------------------------------------------------------------------------------


def test_entry_points_resolve() -> None:
    found = {
        (group, entry.name): entry.load()
        for group in ("fitrl.strategies", "fitrl.trainers", "fitrl.samplers", "fitrl.commands")
        for entry in importlib.metadata.entry_points(group=group)
    }
    assert found["fitrl.strategies", "fitrl_local"] is LocalStrategy
    assert found["fitrl.trainers", "local"] is fitrl.LocalTrainer
    assert found["fitrl.samplers", "transformers"] is fitrl.TransformersSampler
    [command] = importlib.metadata.entry_points(group="console_scripts", name="fitrl")
    assert command.load() is fitrl_command.main


def test_discovery() -> None:
    assert discovery.trainer_class("local") is fitrl.LocalTrainer
    assert discovery.sampler_class("transformers") is fitrl.TransformersSampler
    with pytest.raises(InvalidArgumentError, match="fitrl.trainers has no 'nowhere'; installed: .*local"):
        discovery.trainer_class("nowhere")
    with pytest.raises(InvalidArgumentError, match="fitrl.samplers has no 'local'; installed: .*transformers"):
        discovery.sampler_class("local")


def test_strategies_register_twice_safely() -> None:
    before = dict(StrategyRegistry)
    discovery.register_strategies()
    discovery.register_strategies()
    assert dict(StrategyRegistry) == before and "fitrl_local" in before


def test_a_strategy_is_imported_when_it_is_chosen(monkeypatch) -> None:
    absent = importlib.metadata.EntryPoint("fitrl_absent", "fitrl_no_such_plugin:Strategy", "fitrl.strategies")
    monkeypatch.setattr(discovery, "entry_points", lambda group: [absent])
    try:
        discovery.register_strategies()
        assert "fitrl_absent" in StrategyRegistry
        with pytest.raises(ModuleNotFoundError, match="fitrl_no_such_plugin"):
            lightning.Trainer(strategy="fitrl_absent", accelerator="cpu", devices=1, logger=False)
    finally:
        StrategyRegistry.remove("fitrl_absent")


def test_strategy_by_name_takes_the_trainers_device() -> None:
    trainer = lightning.Trainer(strategy="fitrl_local", accelerator="cpu", devices=1, logger=False)
    assert type(trainer.strategy) is LocalStrategy and isinstance(trainer.strategy, SingleDeviceStrategy)
    assert trainer.strategy.root_device.type == "cpu" and trainer.world_size == 1
    another = lightning.Trainer(strategy="fitrl_local", accelerator="cpu", devices=1, logger=False)
    assert another.strategy is not trainer.strategy
    assert not trainer.strategy.keep_alive  # under a stock trainer it is a stock strategy
