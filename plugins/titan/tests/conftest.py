"""Fixtures of the plugin's tests: those of the core's own, whose folder is on the path."""

from importlib.util import find_spec

from isolation import nothing_left_behind, one_thread

__all__ = ["nothing_left_behind", "one_thread"]

# it has an environment of its own: `make test-titan`
collect_ignore_glob = [] if find_spec("torchtitan") is not None else ["test_*.py"]
