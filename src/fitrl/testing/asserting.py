"""What the contracts need before anything else of them is imported: pytest, which also explains their assertions."""

from __future__ import annotations

from fitrl.errors import MissingDependencyError

try:
    import pytest
except ImportError as error:
    raise MissingDependencyError("fitrl.testing holds pytest classes: pip install pytest") from error

MODULES = ("exports_weights", "lightning_fit_rl", "lightning_stock", "scores", "supports_fit_rl", "trains")
pytest.register_assert_rewrite(*(f"fitrl.testing.{name}" for name in MODULES))
