"""Entry points of fitrl and its plugins: strategies by name, trainers and samplers on demand.

`import fitrl` reads distribution metadata once and registers a lazy factory for each strategy; nothing of a plugin is
imported before it is chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from fitrl._compat import registry
from fitrl.errors import InvalidArgumentError


def register_strategies() -> None:
    """Put every `fitrl.strategies` entry point into Lightning's registry; safe to call again."""
    for entry in entry_points(group="fitrl.strategies"):
        if entry.name not in registry:
            registry.register(entry.name, _lazy(entry), description=f"fitrl: {entry.value}")


def trainer_class(backend: str) -> type[Any]:
    """The trainer class of a backend, by its `fitrl.trainers` entry point.

    Raises:
        InvalidArgumentError: no such backend is installed.
    """
    return _load("fitrl.trainers", backend)


def sampler_class(name: str) -> type[Any]:
    """A sampler class, by its `fitrl.samplers` entry point.

    Raises:
        InvalidArgumentError: no such sampler is installed.
    """
    return _load("fitrl.samplers", name)


def _load(group: str, name: str) -> type[Any]:
    found = {entry.name: entry for entry in entry_points(group=group)}
    if name not in found:
        raise InvalidArgumentError(
            f"{group} has no {name!r}; installed: {', '.join(sorted(found)) or 'none'}. One of a plugin comes with it, "
            f"'pip install fitrl-{name}' say"
        )
    loaded: type[Any] = found[name].load()
    return loaded


def _lazy(entry: EntryPoint) -> Callable[..., Any]:
    def make(*args: Any, **kwargs: Any) -> Any:
        return entry.load()(*args, **kwargs)

    return make
