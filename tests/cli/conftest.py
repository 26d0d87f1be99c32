"""What the tests of the command line share."""

import logging
import warnings

import pytest


@pytest.fixture(autouse=True)
def quiet_again():
    """A command quietens Lightning for its process, which here is the tests' own."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
