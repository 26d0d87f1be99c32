"""Fixtures of the plugin's tests: those of the core's own, whose folder is on the path."""

from isolation import nothing_left_behind, one_thread

__all__ = ["nothing_left_behind", "one_thread"]
