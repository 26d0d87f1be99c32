"""Objects that a configuration names: `package.module:name`, or a class with its arguments.

Names come from the user's own configuration only, like Lightning's `class_path`.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from fitrl.errors import InvalidArgumentError

Named: TypeAlias = str | dict[str, Any]


def find_object(named: Named, what: str) -> Any:
    """The object that a configuration names.

    Args:
        named: "package.module:name" (the name may have dots), or a mapping with "class_path" and "init_args", which is
            called with them.
        what: the configuration's key, for messages.

    Raises:
        InvalidArgumentError: it is not there, or cannot be made from these arguments.
    """
    if isinstance(named, str):
        return _find(named, what)
    beside = set(named) - {"class_path", "init_args"}
    if "class_path" not in named or beside:
        raise InvalidArgumentError(
            f"{what} must be 'package.module:name' or a mapping with class_path and init_args, got {named!r:.200}"
        )
    cls, options = _find(str(named["class_path"]), what), named.get("init_args") or {}
    if not callable(cls):
        raise InvalidArgumentError(f"{what}: {named['class_path']} is a {type(cls).__name__} and takes no init_args")
    try:
        inspect.signature(cls).bind(**options)
    except TypeError as error:
        raise InvalidArgumentError(f"{what}: {named['class_path']} and init_args do not fit: {error}") from error
    return cls(**options)


@contextmanager
def working_directory_importable() -> Iterator[None]:
    """Let a configuration name modules of the working directory, as under `python -m`; others of the name win."""
    here = str(Path.cwd())
    if here in sys.path or "" in sys.path:
        yield
        return
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _find(path: str, what: str) -> Any:
    module_name, colon, name = path.partition(":")
    if not colon:
        module_name, _, name = path.rpartition(".")
    if not module_name or not name:
        raise InvalidArgumentError(f"{what} must be an import path like 'package.module:name', got {path!r}")
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise InvalidArgumentError(f"{what}={path!r} cannot be imported: {error}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise InvalidArgumentError(f"{what}={path!r}: {module_name} has no {name}")
        found = getattr(found, part)
    return found
