"""What the kernel benchmark writes, without a GPU."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def kernel():
    spec = importlib.util.spec_from_file_location("kernel_benchmark", BENCHMARKS / "kernel.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_the_page_is_made_of_the_numbers(kernel) -> None:
    results = json.loads((BENCHMARKS / "results" / "kernel.json").read_text())
    rows = results.pop("rows")
    assert kernel.report(results, rows) == (BENCHMARKS / "results" / "kernel.md").read_text()
    assert {row["shape"] for row in rows} >= set(kernel.SHAPES)
    assert {row["variant"] for row in rows} >= set(kernel.VARIANTS)
    assert {row["mode"] for row in rows} >= set(kernel.MODES)


def test_measured_targets_are_met(kernel) -> None:
    rows = json.loads((BENCHMARKS / "results" / "kernel.json").read_text())["rows"]
    checked = 0
    for row in rows:
        target = kernel.TARGETS.get((row["shape"], row["variant"]))
        if target is not None and row["mode"] != "half masked":
            assert row["of_products"] <= target, row
            checked += 1
        if row["variant"] == "fitrl, exact":
            assert row["logprob_error"] <= 1e-3 and row["d_hidden_error"] <= 5e-3, row
            assert row["d_weight_error"] is None or row["d_weight_error"] <= 5e-3, row
    assert checked == 2 * len(kernel.TARGETS)


def test_relative_error(kernel) -> None:
    truth = torch.full((9000, 2), 2.0, dtype=torch.float64)
    assert kernel.relative_error(truth, truth) == 0
    assert kernel.relative_error(truth * 1.5, truth) == pytest.approx(0.5)


def test_a_peer_that_is_not_there_says_so(kernel, monkeypatch) -> None:
    for package in ("trl", "cut_cross_entropy", "liger_kernel", "verl"):
        monkeypatch.setitem(sys.modules, package, None)
    for name in ("TRL", "Apple CCE", "Liger SM90", "Liger fused GRPO", "verl"):
        with pytest.raises(ImportError):
            kernel.VARIANTS[name]()
