"""One policy update on one GPU: tokens a second, memory, and where the time goes.

Random weights of Qwen3's real shapes, made-up token ids, no download. A timed update is a whole call of `fit_rl`:
groups to samples, packing, transfer, forward, backward, clipping, AdamW, metrics; only the checkpoint is left out.

1. Two histories of 16k and of 64k tokens, one a microbatch, all weights and LoRA; uneven histories in one row; one long
   prompt with many completions, its prefix shared or not.
2. With `--trl`: TRL's `GRPOTrainer` on the same trajectories in the same process (`trl_peer.py` says how).
3. Whether the step waits for the device, and how often layers are compiled for 20 batches of other shapes.

    python benchmarks/update.py [--only NAME ...] [--trl] [--output benchmarks/results]     the whole, on a GPU
    python benchmarks/update.py --tiny                                                      whether it runs, on a CPU
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import math
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import lightning
import torch
import transformers
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, Qwen3Config

import fitrl
from fitrl.data import layouts
from fitrl.data.completion import Completion
from fitrl.policy import loading, module
from fitrl.policy.attention import read_no_packed_rows, read_packed_rows
from fitrl.policy.policy import Policy
from parts import Memory, times

SHAPES: dict[str, dict[str, Any]] = {
    "0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_hidden_layers": 28},
    "4B": {"hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32, "num_hidden_layers": 36},
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_hidden_layers": 30}
    | {"num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49_152},  # SmolLM2's
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
    | {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 1024},
}
COMMON = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936, "max_position_embeddings": 131_072}
LONG = {"16k": 16384, "64k": 65536}
PEAK_FLOPS = 989e12  # bfloat16, dense, of one H100 SXM by its data sheet


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    shape: str
    groups: str
    lora: bool = False
    checkpointing: bool = False
    layout: Literal["auto", "padded", "packed", "shared"] = "auto"
    moments: str = "float32"
    trl: tuple[tuple[int, bool], ...] = ()  # trajectories a microbatch, checkpointed
    repeats: int = 5


CASES = (
    Case("0.6B full, uneven, 16k in all", "0.6B", "uneven"),
    Case("0.6B full, histories of 16k", "0.6B", "16k"),
    Case("0.6B full, 16 answers to each of 8 short prompts", "0.6B", "short prompts", trl=((16, False), (32, True))),
    Case("0.6B full, 16 answers of 256 to a prompt of 2k", "0.6B", "long prompt", trl=((8, False), (16, True))),
    Case("0.6B full, the same, prefix not shared", "0.6B", "long prompt", layout="packed"),
    Case("0.6B LoRA r16, histories of 16k", "0.6B", "16k", lora=True),
    Case("0.6B full, 8-bit moments, uneven, 16k in all", "0.6B", "uneven", moments="8bit"),
    Case("4B LoRA r16, histories of 16k, checkpointed", "4B", "16k", lora=True, checkpointing=True, repeats=3),
    Case("0.6B full, histories of 64k, checkpointed", "0.6B", "64k", checkpointing=True, repeats=2),
    Case("0.6B full, histories of 16k, checkpointed", "0.6B", "16k", checkpointing=True),
    *(
        Case(f"135M full, 8 short answers to each of 32 prompts, {layout}", "135M", "small", layout=layout, repeats=10)
        for layout in ("auto", "padded", "packed", "shared")
    ),
)


def main() -> None:
    """Time each case, print a table, write it down when asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small model, not compiled: whether it runs")
    parser.add_argument("--only", nargs="*", default=[], help="parts of the names of the cases to run")
    parser.add_argument("--trl", action="store_true", help="also TRL's update, where a case has it")
    parser.add_argument("--output", type=Path, help="folder for update.md and .json")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = [case for case in CASES if not options.only or any(part in case.name for part in options.only)]
    report: dict[str, Any] = {
        "rows": [],
        "behaviour": {},
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU",
        "versions": f"python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, lightning {lightning.__version__}, fitrl {fitrl.__version__}",
        "commit": _commit(),
        "command": "python " + " ".join(sys.argv),
    }
    report["behaviour"] = behaviour(options, device)
    for case in chosen:
        try:
            report["rows"] += run(case, options, device)
        except (torch.OutOfMemoryError, fitrl.errors.OutOfMemoryError) as error:
            report["rows"].append({"case": case.name, "error": str(error)[:200]})
        print(report["rows"][-1], file=sys.stderr, flush=True)
        _write(report, options.output)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(_text(report))


def _write(report: dict[str, Any], output: Path | None) -> None:
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / "update.md").write_text(_text(report))
        (output / "update.json").write_text(json.dumps(report, indent=1) + "\n")


# -- what is trained ------------------------------------------------------------------------------------------------


def histories(kind: str, tiny: bool, seed: int) -> list[list[tuple[list[int], list[int]]]]:
    """Prompts and answers as token ids, by group."""
    draw = random.Random(f"{kind}/{seed}")
    cut = 64 if tiny else 1

    def ids(count: int) -> list[int]:
        return [draw.randrange(1000) for _ in range(max(2, count))]

    def answers(prompt: int, lengths: Sequence[int]) -> list[tuple[list[int], list[int]]]:
        stem = ids(prompt // cut)
        return [(stem, ids(length // cut)) for length in lengths]

    if kind in LONG:  # two, because one alone has nothing to be compared with
        return [[(ids(16), ids(LONG[kind] // cut - 16)) for _ in range(2)]]
    if kind == "uneven":
        groups, left = [], 16384
        while left > 0:
            length = left if left < 512 else draw.randint(256, min(2048, left))
            groups += answers(length // 4, [length - length // 4])
            left -= length
        return [groups]
    if kind == "short prompts":
        return [answers(draw.randint(64, 256), [draw.randint(64, 1024) for _ in range(16)]) for _ in range(8)]
    if kind == "small":  # all prompts begin with the same system message
        system = ids(25)
        return [
            [(system + prompt, ids(draw.randint(8, 40))) for _ in range(8)] for prompt in [ids(12) for _ in range(32)]
        ]
    return [answers(2048, [256] * 16)]


def groups_of(found: list[list[tuple[list[int], list[int]]]]) -> list[fitrl.TrajectoryGroup]:
    """Groups of trajectories whose rewards differ."""
    groups = []
    for pairs in found:
        group = []
        for number, (prompt, answer) in enumerate(pairs):
            said = Completion(
                message={"role": "assistant", "content": ""},
                token_ids=tuple(answer),
                logprobs=(-math.log(151_936),) * len(answer),
                temperature=1.0,
                prompt_ids=tuple(prompt),
            )
            question = {"role": "user", "content": "?"}
            group.append(fitrl.Trajectory(messages_and_choices=[question, said], reward=float(number % 2 == 0)))
        groups.append(fitrl.TrajectoryGroup(group))
    return groups


@contextlib.contextmanager
def random_weights(shape: str, device: torch.device, *, layout: str = "auto") -> Iterator[None]:
    """Let trainers load a model of this shape with random weights, made on the device, and lay its batches out so."""
    kept = module.load_policy

    def load(base_model: str, lora: fitrl.LoraSettings | None = None, **_: Any) -> Policy:
        sizes = COMMON | SHAPES[shape]
        with torch.device(device):
            network: Any = AutoModelForCausalLM.from_config(Qwen3Config(**sizes, tie_word_embeddings=True))
        if lora is not None:
            network = loading._with_adapters(network, lora)
        policy = Policy(network=network, tokenizer=loading.load_tokenizer("tiny"), has_linear_head=True)
        policy.can_pack = layout != "padded" and read_packed_rows(policy.causal_lm)
        policy.can_share = policy.can_pack and layout != "packed"
        return policy

    module.load_policy = load
    always = {} if layout == "auto" else dict.fromkeys(layouts.LAUNCHES, 0.0)  # whatever the launches take
    try:
        with mock.patch.dict(layouts.LAUNCHES, always):
            yield
    finally:
        module.load_policy = kept


@contextlib.contextmanager
def trainer_of(case: Case, options: argparse.Namespace, device: torch.device) -> Iterator[Any]:
    """A trainer of the case, and a function that makes an update."""
    shape = "tiny" if options.tiny else case.shape
    with (
        random_weights(shape, device, layout=case.layout),
        tempfile.TemporaryDirectory() as root,
        fitrl.LocalTrainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1,
            precision="bf16-mixed",
            gradient_clip_val=1.0,
            compile=not options.tiny,
            activation_checkpointing=case.checkpointing,
            optimizer=fitrl.AdamWSettings(moments=case.moments),  # type: ignore[arg-type]
            enable_model_summary=False,
        ) as trainer,
    ):
        lora = fitrl.LoraSettings(rank=16, alpha=32) if case.lora else None
        model = fitrl.TrainableModel("update", "benchmarks", "random", lora=lora, root=root)

        def update(seed: int = 0) -> fitrl.LocalTrainResult:
            groups = groups_of(histories(case.groups, options.tiny, seed))
            _synchronize(device)
            start = time.perf_counter()
            most = LONG.get(case.groups)  # a history in each microbatch
            result = trainer.fit_rl(
                model, groups, learning_rate=1e-6, save_checkpoint=False, max_tokens_per_microbatch=most
            )
            _synchronize(device)
            update.seconds = time.perf_counter() - start  # type: ignore[attr-defined]
            return result

        yield trainer, update


# -- 1. timing ------------------------------------------------------------------------------------------------------


def run(case: Case, options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Rows of a case: ours, and TRL's where it has one."""
    with trainer_of(case, options, device) as (trainer, update):
        result = update()
        first = update.seconds
        seconds, peak = [], 0.0
        for repeat in range(1 if options.tiny else case.repeats + 1):
            result = update(repeat)
            peak = max(peak, result.metrics.get("memory/peak_gib", 0.0))
            if repeat or options.tiny:
                seconds.append(update.seconds)
        taken = statistics.median(seconds)
        found = histories(case.groups, options.tiny, 0)
        tokens = sum(len(prompt) + len(answer) for group in found for prompt, answer in group)
        trained = sum(len(answer) for group in found for _, answer in group)
        row: dict[str, Any] = {
            "case": case.name,
            "by": "fitrl",
            "ms": 1e3 * taken,
            "tokens/s": tokens / taken,
            "response tokens/s": trained / taken,
            "peak GiB": peak,
            "MFU": _flops(case, found) / taken / PEAK_FLOPS if device.type == "cuda" else float("nan"),
            "first s": first,
        }
        sizes, rank = COMMON | SHAPES["tiny" if options.tiny else case.shape], 16 if case.lora else None
        row["parts"] = times(update, sizes, rank)
        row["parts"]["idle"] = max(0.0, 1e3 * update.seconds - row["parts"]["all kernels"])
        states = trainer.optimizers[0].state.values()
        moments = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
        network = trainer.verbs.policy_module.policy.network
        row["memory"] = Memory(network, sizes).report(update, moments)
    rows = [row]
    if options.trl and case.trl:
        del trainer, update
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        rows += run_trl(case, found, options, device, taken)
    return rows


def run_trl(case: Case, found: Any, options: argparse.Namespace, device: torch.device, ours: float) -> list[Any]:
    """TRL's update over the same trajectories, by microbatches of several sizes."""
    from trl_peer import TRLUpdate

    flat = [pair for group in found for pair in group]
    trained = sum(len(answer) for _, answer in flat)
    rows = []
    for size, checkpointing in case.trl:
        row: dict[str, Any] = {
            "case": case.name,
            "by": f"TRL, {size} a microbatch" + (", checkpointed" if checkpointing else ""),
        }
        update: Any = None
        try:
            shape = "tiny" if options.tiny else case.shape
            with random_weights(shape, device, layout="padded"), tempfile.TemporaryDirectory() as root:
                policy = module.load_policy("random")
                read_no_packed_rows(policy.causal_lm)
                update = TRLUpdate(
                    policy.network,
                    policy.tokenizer,
                    learning_rate=1e-6,
                    batch_size=size,
                    gradient_checkpointing=checkpointing,
                    output_dir=root,
                )
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                seconds = []
                for _ in range(3):
                    _synchronize(device)
                    start = time.perf_counter()
                    update(
                        [prompt for prompt, _ in flat],
                        [answer for _, answer in flat],
                        [[-math.log(151_936)] * len(answer) for _, answer in flat],
                        [1.0 if number % 2 == 0 else -1.0 for number in range(len(flat))],
                    )
                    _synchronize(device)
                    seconds.append(time.perf_counter() - start)
                taken = min(seconds[1:])
                row |= {"ms": 1e3 * taken, "response tokens/s": trained / taken, "of fitrl": taken / ours}
                if device.type == "cuda":
                    row["peak GiB"] = torch.cuda.max_memory_allocated(device) / 2**30
        except torch.OutOfMemoryError as error:
            row["error"] = str(error)[:80]
        del update
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    return rows


def _flops(case: Case, found: Any) -> float:
    """Arithmetic that the update needs (Chowdhery et al. 2022): nothing twice, attention over what is in sight.

    A frozen weight takes two products instead of three.
    """
    sizes = COMMON | SHAPES[case.shape]
    hidden, inner, layers = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_hidden_layers"]
    width, keys = (sizes[name] * sizes["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    weights = layers * hidden * (2 * width + 2 * keys + 3 * inner)
    tokens = positions = rows = 0
    for group in found:
        prompt = len(group[0][0])
        rows += sum(len(answer) for _, answer in group)
        own = [len(answer) for _, answer in group]
        shares = case.layout in ("auto", "shared")
        shared = prompt if shares else prompt * len(group)
        tokens += shared + sum(own)
        positions += prompt**2 / 2 * (1 if shares else len(group)) + sum(n * prompt + n * n / 2 for n in own)
    each = 4 if case.lora else 6
    return each * (tokens * weights + rows * hidden * sizes["vocab_size"]) + 12 * layers * width * positions


# -- 3. behaviour ---------------------------------------------------------------------------------------------------


def behaviour(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Graphs compiled for the first batches and for 20 of other shapes; whether a step waits for the device."""
    if device.type != "cuda" or (options.only and "behaviour" not in options.only):
        return {}
    case = Case("behaviour", "tiny", "uneven", layout="shared")
    told: dict[str, Any] = {}
    counters.clear()
    with trainer_of(case, argparse.Namespace(tiny=False), device) as (trainer, update):
        del update
        model = fitrl.TrainableModel("other", "benchmarks", "random", lora=None, root=tempfile.mkdtemp())
        graphs = []
        for number in range(24):
            found = _batch_of_another_shape(number)
            trainer.fit_rl(model, groups_of(found), save_checkpoint=False)
            graphs.append(counters["stats"]["unique_graphs"])
        told["graphs by the first 4 batches"] = graphs[3]
        told["graphs by 20 more batches"] = graphs[-1] - graphs[3]
        told["waits in a step"] = waits(trainer, model, groups_of(found))
    return told


def _batch_of_another_shape(number: int) -> list[list[tuple[list[int], list[int]]]]:
    """Groups by two turns: histories of their own, and answers that share their prompt."""
    draw = random.Random(number)

    def ids(count: int) -> list[int]:
        return [draw.randrange(1000) for _ in range(count)]

    groups = []
    for _ in range(1 + number % 3):
        prompt = ids(20 + 9 * number)
        groups.append([(prompt if number % 2 else ids(len(prompt)), ids(10 + 7 * n)) for n in range(2 + number % 5)])
    return groups


def waits(trainer: Any, model: fitrl.TrainableModel, groups: Any) -> int:
    """How often the program waits for the device between the first microbatch and the last optimizer step."""
    import warnings

    class Watch(lightning.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            torch.cuda.set_sync_debug_mode("warn")

        def on_train_batch_end(self, *args: Any) -> None:
            torch.cuda.set_sync_debug_mode("default")

    watch = Watch()
    trainer.callbacks.append(watch)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer.fit_rl(model, groups, save_checkpoint=False)
    trainer.callbacks.remove(watch)
    found = [str(warning.message) for warning in seen if "called a synchronizing" in str(warning.message)]
    for message in found[:3]:
        print("waits:", message[:300], file=sys.stderr)
    return len(found)


# -- tables ---------------------------------------------------------------------------------------------------------


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _text(report: dict[str, Any]) -> str:
    names = ["case", "by", "ms", "tokens/s", "response tokens/s", "of fitrl", "peak GiB", "MFU", "first s", "error"]
    names = [name for name in names if any(name in row for row in report["rows"])]
    lines = ["# One policy update on one GPU", "", " | ".join(names), " | ".join("---" for _ in names)]
    lines += [" | ".join(_cell(row.get(name, "")) for name in names) for row in report["rows"]]
    lines[2:] = [f"| {line} |" for line in lines[2:]]
    about = {
        "parts": "Device time of one update in ms, under the profiler; a product's part is told by its shapes:",
        "memory": "GiB: what is always there, what the largest microbatch keeps for the backward, and what its head "
        "needs beside that:",
    }
    for part, sentence in about.items():
        timed = [row for row in report["rows"] if part in row]
        if timed:
            kinds = list({kind: None for row in timed for kind in row[part]})
            lines += ["", sentence, ""]
            table = ["case | " + " | ".join(kinds), " | ".join("---" for _ in ["case", *kinds])]
            table += [
                f"{row['case']} | " + " | ".join(_cell(row[part].get(kind, "")) for kind in kinds) for row in timed
            ]
            lines += [f"| {line} |" for line in table]
    lines += ["", *(f"* {key}: {value}" for key, value in report["behaviour"].items())]
    lines += [f"* {key}: {report[key]}" for key in ("hardware", "versions", "commit")]
    return "\n".join([*lines, f"* command: `{report['command']}`", ""])


def _cell(value: Any) -> str:
    if not isinstance(value, float) or value != value:
        return str(value)
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
