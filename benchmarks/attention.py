"""Attention of packed rows and shared prefixes: exact first, then how fast, kernel by kernel and as a stack of layers.

1. Hidden states and gradients of small random models (Qwen3, Gemma 2 with a window and a soft cap) in the layouts
   padded, packed and shared, in float32 and bfloat16, against the padded layout in float64.
2. Attention alone, forward and backward, with Qwen3's heads: flash attention over lengths, for shared prefixes part by
   part of the tree, cuDNN's for one history, FlexAttention, a dense mask.
3. Qwen3's decoder layers, random weights, bfloat16, compiled and checkpointed, forward and backward: 16k tokens of
   uneven histories, and one prompt with many completions. How often layers and FlexAttention are compiled for batches
   of 20 other shapes.

    python benchmarks/attention.py [--only PART ...] [--output benchmarks/results]     the whole, on a GPU
    python benchmarks/attention.py --tiny                                              whether it runs, on a CPU
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, Gemma2Config, Qwen3Config

from fitrl.data.batch import Batch
from fitrl.data.bins import Layout
from fitrl.data.histories import TokenHistory
from fitrl.data.packing import pack
from fitrl.data.samples import Sample
from fitrl.policy import attention
from fitrl.policy.layers import compile_layers, recompute_layers
from fitrl.policy.packed_row import BLOCK, PackedRow
from fitrl.policy.policy import Policy
from fitrl.policy.probing import probe

LAYOUTS: tuple[Layout, ...] = ("padded", "packed", "shared")
QWEN3 = {  # 0.6B
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_hidden_layers": 28,
    "vocab_size": 1024,  # the head is not part of this
    "max_position_embeddings": 65536,
}
TINY = QWEN3 | {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY |= {"head_dim": 16, "num_hidden_layers": 2}


def main() -> None:
    """Check, time, print a table, and write it down when asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small sizes, not compiled: whether it runs")
    parser.add_argument("--only", nargs="*", default=[], help="parts: accuracy, kernels, compilations, layers")
    parser.add_argument("--repeats", type=int, default=10, help="timed runs of each")
    parser.add_argument("--output", type=Path, help="folder for attention.md and .json")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    sizes = TINY if options.tiny else QWEN3
    scale = 64 if options.tiny else 1  # tokens are divided by this
    uneven = histories(16384 // scale, longest=2048 // scale)
    group = completions(prompt=2048 // scale, answers=16, length=256 // min(scale, 16))
    one = histories(16384 // scale, longest=16384 // scale)
    groups = {"uneven histories": uneven, "prompt and completions": group}
    parts: dict[str, Callable[[], Any]] = {
        "accuracy": lambda: [row for name in ("qwen3", "gemma2") for row in check(name, device)],
        "kernels": lambda: [
            row
            for case, samples in ({"one history": one} | groups).items()
            for row in time_kernels(case, samples, sizes, device, options.repeats)
        ],
        "compilations": lambda: count_compilations(sizes, device, scale) if not options.tiny else {},
        "layers": lambda: time_layers(groups, sizes, device, options),
    }
    report: dict[str, Any] = {
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU",
        "versions": f"python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}",
        "commit": _commit(),
        "command": "python " + " ".join(sys.argv),
    }
    for part, measure in parts.items():
        if options.only and part not in options.only:
            continue
        start = time.perf_counter()
        report[part] = measure()
        print(f"{part}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        if options.output is not None:  # after each part: the later ones take minutes
            options.output.mkdir(parents=True, exist_ok=True)
            (options.output / "attention.md").write_text(_text(report))
            (options.output / "attention.json").write_text(json.dumps(report, indent=2) + "\n")
    print(_text(report))


def _text(report: dict[str, Any]) -> str:
    tables = [f"## {name}\n\n{_table(report[name])}\n" for name in ("accuracy", "kernels", "layers") if name in report]
    told = ("compilations", "hardware", "versions", "commit", "command")
    return "\n".join(
        ["# Attention of packed rows and shared prefixes\n", *tables]
        + [f"* {key}: {report[key]}" for key in told if key in report]
        + [""]
    )


# -- batches --------------------------------------------------------------------------------------------------------


def histories(tokens: int, longest: int, seed: int = 0) -> list[Sample]:
    """Uneven histories, so many tokens in all, the later half of each trained."""
    draw = random.Random(seed)
    samples: list[Sample] = []
    while tokens > 4:
        length = tokens if longest >= tokens else draw.randint(longest // 4, longest)
        samples.append(_sample([draw.randrange(1000) for _ in range(length)], length // 2))
        tokens -= length
    return samples


def completions(prompt: int, answers: int, length: int, seed: int = 0) -> list[Sample]:
    """Answers of the same length to one prompt."""
    draw = random.Random(seed)
    stem = [draw.randrange(1000) for _ in range(prompt)]
    return [_sample([*stem, *(draw.randrange(1000) for _ in range(length))], prompt) for _ in range(answers)]


def _sample(ids: Sequence[int], untrained: int) -> Sample:
    tokens = torch.tensor(ids)
    history = TokenHistory(
        token_ids=tokens,
        mask=torch.arange(len(ids)) >= max(untrained, 1),
        logprobs=torch.zeros(len(ids)),
        temperature=torch.ones(len(ids)),
        versions=torch.zeros_like(tokens),
    )
    return Sample(histories=[history], advantage=1.0)


def batch_of(samples: Sequence[Sample], layout: Layout, device: torch.device) -> Batch:
    """All of the samples as one microbatch."""
    [batch] = pack(samples, layout=layout)
    return batch.to(device)


# -- 1. accuracy ----------------------------------------------------------------------------------------------------


def check(name: str, device: torch.device) -> list[dict[str, Any]]:
    """Relative errors of hidden states and gradients; no layout may be worse than twice the padded one."""
    if name == "qwen3":
        config: Any = Qwen3Config(**TINY | {"head_dim": 64})
    else:
        config = Gemma2Config(**TINY | {"head_dim": 64}, sliding_window=100, attn_logit_softcapping=2.0)
    network = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    policy = Policy(network=network, tokenizer=None)  # type: ignore[arg-type]
    probe(policy)
    samples = [*completions(prompt=300, answers=3, length=60), *completions(prompt=150, answers=2, length=90, seed=1)]
    exact = _step(_copy(policy, torch.float64, device), batch_of(samples, "padded", device))
    rows: list[dict[str, Any]] = []
    for dtype in (torch.float32, torch.bfloat16):
        other = _copy(policy, dtype, device)
        for layout in LAYOUTS:
            errors = [
                float((ours.double() - true).norm() / true.norm())
                for ours, true in zip(_step(other, batch_of(samples, layout, device)), exact, strict=True)
            ]
            row = {"model": name, "dtype": str(dtype).removeprefix("torch."), "layout": layout}
            rows.append(row | {"hidden error": errors[0], "gradient error": errors[1]})
            worst = [2 * rows[-1 - LAYOUTS.index(layout)][key] + 1e-6 for key in ("hidden error", "gradient error")]
            assert errors[0] <= worst[0] and errors[1] <= worst[1], rows
    return rows


def _copy(policy: Policy, dtype: torch.dtype, device: torch.device) -> Policy:
    other = copy.copy(policy)
    other.network = copy.deepcopy(policy.network).to(device, dtype)
    return other


def _step(policy: Policy, batch: Batch) -> tuple[Tensor, Tensor]:
    """Hidden states of the predictors, and the gradient of a weighted sum of them."""
    hidden = policy.hidden_of(batch.model_inputs).flatten(0, 1)[batch.loss_inputs.rows]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(hidden.shape, generator=generator, dtype=torch.float64).to(hidden.device)
    parameters = list(policy.causal_lm.base_model.parameters())
    gradients = torch.autograd.grad((hidden.double() * weight).sum(), parameters)
    return hidden.detach(), torch.cat([gradient.flatten() for gradient in gradients])


# -- 2. kernels -----------------------------------------------------------------------------------------------------


def time_kernels(
    case: str, samples: Sequence[Sample], sizes: dict[str, int], device: torch.device, repeats: int
) -> list[dict[str, Any]]:
    """Attention alone, with the arithmetic of the pairs that see each other."""
    rows: list[dict[str, Any]] = []
    kernels: dict[str, Callable[..., Tensor]] = {"dense mask": attention.dense_attention}
    if device.type == "cuda":
        kernels = {
            "flash over lengths": attention.length_attention,
            "flash by parts": attention.shared_attention,
            "cuDNN": lambda query, key, value, row, scale: attention.causal_attention(query, key, value, scale=scale),
            "flex": attention.flex_attention,
        } | kernels
    for layout in ("packed", "shared"):
        batch = batch_of(samples, layout, device)
        if batch.layout != layout:
            continue  # there is nothing to share
        row = PackedRow(batch.model_inputs, multiple_of=BLOCK)
        pairs = float((row.position_ids + 1).sum())
        heads, size = sizes["num_attention_heads"], sizes["head_dim"]
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        query, key, value = (
            torch.randn(1, number, row.length, size, device=device, dtype=dtype, requires_grad=True)
            for number in (heads, sizes["num_key_value_heads"], sizes["num_key_value_heads"])
        )
        output = torch.randn(1, row.length, heads, size, device=device, dtype=dtype)
        for name, kernel in kernels.items():
            wrong = {"flash over lengths": layout == "shared", "flash by parts": layout == "packed"}
            wrong |= {"cuDNN": len(samples) > 1, "dense mask": row.length > 20_000}
            if wrong.get(name):
                continue

            def forward(kernel: Callable[..., Tensor] = kernel) -> Tensor:
                return kernel(query, key, value, row, scale=size**-0.5)  # noqa: B023 - called at once

            def both() -> None:
                torch.autograd.grad(forward(), (query, key, value), output)  # noqa: B023 - called at once

            with torch.no_grad():
                ahead = _median_ms(forward, device, repeats)
            whole = _median_ms(both, device, repeats)
            rows.append(
                {
                    "batch": case,
                    "layout": layout,
                    "tokens": row.length,
                    "kernel": name,
                    "forward ms": ahead,
                    "both ms": whole,
                    "TFLOP/s": 3.5 * 4 * pairs * heads * size / whole / 1e9,
                }
            )
    return rows


# -- 3. layers ------------------------------------------------------------------------------------------------------


def stack(sizes: dict[str, int], device: torch.device, *, compiled: bool) -> Policy:
    """Random Qwen3 layers in bfloat16, checkpointed."""
    with torch.device(device):
        network: Any = AutoModelForCausalLM.from_config(Qwen3Config(**sizes), dtype=torch.bfloat16)
    policy = Policy(network=network.train(), tokenizer=None)  # type: ignore[arg-type]
    probe(policy)
    policy.can_pack = policy.can_share = attention.read_packed_rows(network)  # bfloat16 is too coarse to tell
    recompute_layers(policy, keep_attention=compiled)
    if compiled:
        compile_layers(policy)
    return policy


def time_layers(
    groups: dict[str, list[Sample]], sizes: dict[str, int], device: torch.device, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Forward and backward of all layers, each group in each layout, by one stack of layers, compiled once a layout."""
    policy = stack(sizes, device, compiled=not options.tiny)
    rows: list[dict[str, Any]] = []
    for case, samples in groups.items():
        trained = sum(sample.num_trainable_tokens for sample in samples)
        padded = float("nan")
        for layout in LAYOUTS:
            batch = batch_of(samples, layout, device)
            if batch.layout != layout:
                continue
            row: dict[str, Any] = {"batch": case, "layout": layout, "positions": batch.num_positions}
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            start = time.perf_counter()
            try:
                update(policy, batch)
                row["first s"] = time.perf_counter() - start
                row["ms"] = _median_ms(lambda b=batch: update(policy, b), device, options.repeats)
                padded = row["ms"] if layout == "padded" else padded
                row["trained tokens/s"] = 1e3 * trained / row["ms"]
                row["input tokens/s"] = 1e3 * sum(sample.num_input_tokens for sample in samples) / row["ms"]
                row["peak GiB"] = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
                row["of padded"] = row["ms"] / padded
            except torch.OutOfMemoryError:
                row |= dict.fromkeys(("first s", "ms", "trained tokens/s", "input tokens/s", "peak GiB"), float("nan"))
                torch.cuda.empty_cache()
            rows.append(row)
    return rows


def update(policy: Policy, batch: Batch) -> None:
    """One forward and backward; gradients are thrown away."""
    with attention.attention_kernels(batch.loss_inputs.rows.device):
        hidden = policy.hidden_of(batch.model_inputs).flatten(0, 1)[batch.loss_inputs.rows]
        hidden.float().square().sum().backward()
    policy.network.zero_grad(set_to_none=True)


def count_compilations(sizes: dict[str, int], device: torch.device, scale: int) -> dict[str, int]:
    """Graphs compiled for the first batches of each kind, and for 20 of other shapes after them."""
    policy = stack(sizes | {"num_hidden_layers": 2}, device, compiled=True)
    counts = []
    for number in range(24):
        for layout in ("packed", "shared"):
            samples = [
                *completions(prompt=(300 + 41 * number) // scale, answers=2 + number % 7, length=70, seed=number),
                *histories((500 + 333 * number) // scale, longest=700 // scale, seed=number),
            ]
            update(policy, batch_of(samples, layout, device))  # type: ignore[arg-type]
        counts.append(counters["stats"]["unique_graphs"])
    return {"by the first 4 pairs": counts[3], "by 20 more pairs": counts[-1] - counts[3]}


# -- timing and tables ----------------------------------------------------------------------------------------------


def _median_ms(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def _table(rows: Sequence[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))

    def cell(value: Any) -> str:
        if not isinstance(value, float) or value != value:
            return str(value)
        return f"{value:.3g}" if value < 1000 else str(round(value))

    lines = [" | ".join(names), " | ".join("---" for _ in names)]
    lines += [" | ".join(cell(row.get(name, "")) for name in names) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
