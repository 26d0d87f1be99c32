"""Folders of weights, read back by safetensors itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import fitrl
from fitrl.errors import UnsupportedError
from fitrl_vllm.weights import write_adapter, write_model

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
SHAPES = st.lists(st.integers(0, 5), max_size=3)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kinds=st.lists(st.tuples(DTYPES, SHAPES), min_size=1, max_size=12), bucket_bytes=st.integers(1, 300))
def test_files_hold_what_was_written(kinds, bucket_bytes, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("written") / "weights"
    given_ = {f"layer.{n}": torch.randn(shape, dtype=torch.float64).to(dtype) for n, (dtype, shape) in enumerate(kinds)}
    write_model(folder, iter(given_.items()), bucket_bytes=bucket_bytes)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in given_.values())
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        held = load_file(file)
        assert {name for name, where in index["weight_map"].items() if where == file.name} == set(held)
        sizes = [tensor.nbytes for tensor in held.values() if tensor.nbytes]
        assert len(sizes) <= 1 or sum(sizes) <= bucket_bytes
        found |= held
    assert set(found) == set(given_)
    for name, tensor in given_.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_a_tensor_is_read_before_the_next_is_asked_for(tmp_path) -> None:
    """What a trainer gathers from its ranks it gives up again."""
    buffer = torch.empty(3)

    def gathered():
        for number in range(4):
            yield f"w{number}", buffer.fill_(number)

    write_model(tmp_path / "w", gathered())
    [file] = (tmp_path / "w").glob("*.safetensors")
    assert {name: tensor.tolist() for name, tensor in load_file(file).items()} == {
        f"w{number}": [float(number)] * 3 for number in range(4)
    }


def test_views_and_many_names(tmp_path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    many = {f"{'long' * 40}.{number}": base.T for number in range(2000)}
    write_model(tmp_path / "w", many.items())
    files = sorted((tmp_path / "w").glob("*.safetensors"))
    assert len(files) > 1  # their table is full before they are
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert set(found) == set(many) and all(torch.equal(tensor, base.T) for tensor in found.values())


def test_weights_that_are_no_weights_are_refused(tmp_path) -> None:
    with pytest.raises(UnsupportedError, match=r"w has dtype torch.int64"):
        write_model(tmp_path / "w", [("w", torch.zeros(2, dtype=torch.int64))])


def test_an_adapter_is_as_peft_loads_it(untied, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    weights = {name.format("A"): torch.randn(4, 64), name.format("B"): torch.randn(64, 4)}
    write_adapter(tmp_path / "a", weights.items(), fitrl.LoraSettings(rank=4, alpha=8))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(untied), tmp_path / "a")
    layer = loaded.base_model.model.model.layers[0].self_attn.q_proj
    assert torch.equal(layer.lora_A["default"].weight, weights[name.format("A")])
    assert torch.equal(layer.lora_B["default"].weight, weights[name.format("B")])
    assert layer.scaling["default"] == 2.0
