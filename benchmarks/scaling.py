"""One device against several: `fitrl_ddp` and `fitrl_fsdp2` on Qwen3's shapes, the same groups.

Random weights, made-up token ids (`update.py`). A timed update is a whole call of `fit_rl` but for the checkpoint. Each
run is a job of its own, one process or `torchrun`; the gradient's norm of the first call is compared with one device's.

With `--zero` the stages of ZeRO (`plugins/deepspeed`) beside `fitrl_fsdp2`, on the same devices: memory of the fullest
one, host memory of the first process, time. Nothing is compiled there, because stage 3 cannot be; `--ranks 1` is the
case of offloading on a single device.

With `--profile` the first process of each job runs one more call under torch's profiler, and says where its time went
(`gaps.py`). A job that takes longer than `--limit` seconds is ended, and told as an error.

With `--titan` torchtitan's plans (`plugins/titan`) beside one device and `fitrl_fsdp2`, compiled, tensor parallel from
torch 2.13 on; `--ranks 1` compares torchtitan's modules with transformers' on a single device. A microbatch has 16,384
positions; with context parallel each of the ranks that share one has so many.

    python benchmarks/scaling.py [--ranks 2] [--output benchmarks/results]             on a machine with so many GPUs
    python benchmarks/scaling.py --tensor-parallel 2 ...                               fitrl_fsdp2 by groups of two
    python benchmarks/scaling.py --zero [--ranks 2] [--output benchmarks/results]      the stages of ZeRO
    python benchmarks/scaling.py --titan [--ranks 1] [--output benchmarks/results]     torchtitan's plans
    python benchmarks/scaling.py --profile --only "0.6B full" ...                      where the time goes
    python benchmarks/scaling.py --tiny [--zero] [--titan]                             whether it runs, on CPUs
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import platform
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning
import psutil
import torch
import transformers

import fitrl
from fitrl.data import ranks
from fitrl.strategies.fsdp2 import FSDP2Strategy
from gaps import report
from update import Case, _commit, _synchronize, groups_of, random_weights

RUNS = (
    ("0.6B full", Case("0.6B full", "0.6B", "uneven"), ("fitrl_local", "fitrl_ddp", "fitrl_fsdp2")),
    (
        "4B LoRA r16, recomputed",
        Case("4B LoRA", "4B", "uneven", lora=True, checkpointing=True),
        ("fitrl_local", "fitrl_ddp", "fitrl_fsdp2"),
    ),
    ("4B full, recomputed", Case("4B full", "4B", "uneven", checkpointing=True), ("fitrl_fsdp2",)),
)
ZERO = (
    *("fitrl_fsdp2", "zero 1", "zero 2", "zero 3", "zero 2, optimizer offloaded"),
    "zero 3, optimizer and weights offloaded",
)
ZERO_RUNS = (
    ("0.6B full", Case("0.6B full", "0.6B", "uneven"), ZERO),
    ("4B LoRA r16, recomputed", Case("4B LoRA", "4B", "uneven", lora=True, checkpointing=True), ZERO),
    ("4B full, recomputed", Case("4B full", "4B", "uneven", checkpointing=True), ZERO),
)
TITAN = ("fitrl_local", "fitrl_fsdp2", "titan", "titan, tensor 2", "titan, context 2")
TITAN_RUNS = (
    ("0.6B full", Case("0.6B full", "0.6B", "uneven"), TITAN),
    (
        "0.6B full, recomputed",
        Case("0.6B full", "0.6B", "uneven", checkpointing=True),
        (*TITAN[:3], "titan, selective"),
    ),
)


def main() -> None:
    """Run every job, print a table, write it down when asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small model on CPUs, not compiled: whether it runs")
    parser.add_argument("--zero", action="store_true", help="the stages of ZeRO beside FSDP2")
    parser.add_argument("--titan", action="store_true", help="torchtitan's plans beside one device and FSDP2")
    parser.add_argument("--ranks", type=int, default=2, help="devices of the larger jobs")
    parser.add_argument(
        "--tensor-parallel", type=int, default=1, help="ranks that fitrl_fsdp2 has compute together; not compiled then"
    )
    parser.add_argument("--repeats", type=int, default=4, help="timed updates")
    parser.add_argument("--only", nargs="*", default=[], help="parts of the names of the runs to make")
    parser.add_argument("--profile", action="store_true", help="one more call of each job, under torch's profiler")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds after which a job is ended")
    parser.add_argument("--strategies", nargs="*", default=[], help="names of the strategies to run; none: all")
    parser.add_argument("--output", type=Path, help="folder for scaling.md and .json, or zero.md and .json")
    parser.add_argument("--job", nargs=2, metavar=("RUN", "STRATEGY"), help="used for the jobs: one of them")
    options = parser.parse_args()
    if options.job:
        job(int(options.job[0]), options.job[1], options)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to end"))
    rows: list[dict[str, Any]] = []
    text = ""
    for number, (name, _, strategies) in enumerate(runs(options)):
        if options.only and not any(part in name for part in options.only):
            continue
        for strategy in strategies:
            if options.strategies and strategy not in options.strategies:
                continue
            if options.titan and options.ranks % 2 and strategy.endswith(" 2"):
                continue  # needs two ranks
            row = {"run": name, "strategy": strategy, "devices": 1 if strategy == "fitrl_local" else options.ranks}
            if strategy == "fitrl_fsdp2" and options.tensor_parallel > 1:
                row["tensor parallel"] = options.tensor_parallel
            row |= start(number, strategy, options)
            if (profile := row.pop("profile", None)) is not None:
                print(f"\n{name}, {strategy}\n{profile}\n", flush=True)
            one = next((other for other in rows if other["run"] == name and other["devices"] == 1), None)
            if one is not None and "ms" in row and "ms" in one:
                row["of one"] = one["ms"] / row["ms"]
                row["norm error"] = abs(row["norm"] / one["norm"] - 1)
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
            text = write(rows, options)
    print(text)


def write(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """Say what was found so far; in a file too when asked to."""
    told = {
        "hardware": f"{options.ranks} x {torch.cuda.get_device_name()}"
        if torch.cuda.is_available()
        else f"{platform.machine()} CPU",
        "versions": f"python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, lightning {lightning.__version__}, fitrl {fitrl.__version__}",
        "commit": _commit(),
        "command": "python " + " ".join(sys.argv),
    }
    text = table(rows) + "".join(f"* {key}: {value}\n" for key, value in told.items())
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        file, title = ("zero", "ZeRO by stage") if options.zero else ("scaling", "One device against several")
        file, title = ("titan", "torchtitan's plans") if options.titan else (file, title)
        (options.output / f"{file}.md").write_text(f"# {title}\n\n{text}")
        (options.output / f"{file}.json").write_text(json.dumps({"rows": rows} | told, indent=1) + "\n")
    return text


def runs(options: argparse.Namespace) -> Any:
    """What is run, with which strategies."""
    return ZERO_RUNS if options.zero else TITAN_RUNS if options.titan else RUNS


def start(number: int, strategy: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one job and read what its first rank wrote."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "told"
        launcher = [sys.executable]
        if strategy != "fitrl_local":
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(options.ranks)]
        flags = ["--job", str(number), strategy, "--repeats", str(options.repeats), "--output", str(path)]
        flags += ["--tiny"] if options.tiny else []
        flags += ["--tensor-parallel", str(options.tensor_parallel)]
        flags += ["--zero"] if options.zero else []
        flags += ["--titan"] if options.titan else []
        flags += ["--profile"] if options.profile else []
        status, said = finish([*launcher, __file__, *flags], options.limit)
        if status is None:
            return {"error": f"had not ended after {options.limit:g} s"}
        if status:
            errors = [line for line in said.splitlines() if "Error: " in line]  # torchrun has the last word
            return {"error": (errors or said.strip().splitlines() or ["no word"])[0].strip()[:200]}
        told: dict[str, Any] = json.loads(path.read_text())
        return told


def finish(command: list[str], limit: float) -> tuple[int | None, str]:
    """Exit status and errors of a command; None as status where it had to be ended, with all that it started."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            said = process.communicate(timeout=limit)[1]
        except BaseException as error:  # also where this program is told to end
            ranks_of_it = psutil.Process(process.pid).children(recursive=True)
            for one in (process, *ranks_of_it):  # torchrun first, which would wait for them
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.send_signal(signal.SIGKILL)
            psutil.wait_procs(ranks_of_it)
            if isinstance(error, subprocess.TimeoutExpired):
                return None, process.communicate()[1]
            raise
        return process.returncode, said


def job(number: int, strategy: str, options: argparse.Namespace) -> None:
    """One job, on every rank: update, time, let rank 0 write."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    gpu = torch.cuda.is_available() and not options.tiny
    case = runs(options)[number][1]
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    draw = random.Random(0)
    cut = 64 if options.tiny else 1
    together = options.tensor_parallel if strategy == "fitrl_fsdp2" else 1
    found = [
        [
            (stem, [draw.randrange(1000) for _ in range(draw.randint(256, 2048) // cut + 2)])
            for stem in [[draw.randrange(1000) for _ in range(256 // cut)]]
            for _ in range(8)
        ]
        for _ in range(8)
    ]
    tokens = sum(len(prompt) + len(answer) for group in found for prompt, answer in group)
    # every rank makes the same weights
    torch.manual_seed(0)
    with (
        random_weights("tiny" if options.tiny else case.shape, device),
        tempfile.TemporaryDirectory() as root,
        trainer_of(
            strategy,
            together,
            accelerator="gpu" if gpu else "cpu",
            devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            precision="bf16-mixed" if gpu else "32-true",
            gradient_clip_val=1.0,
            compile=gpu and together == 1 and not options.zero,
            activation_checkpointing=case.checkpointing,
            enable_model_summary=False,
        ) as trainer,
    ):
        lora = fitrl.LoraSettings(rank=16, alpha=32) if case.lora else None
        # rank 0's folder; the others never write
        model = fitrl.TrainableModel("scaling", "benchmarks", "random", lora=lora, root=root)

        def update() -> tuple[float, Any]:
            groups = groups_of(found)  # as rollouts leave them
            _synchronize(device)
            start = time.perf_counter()
            result = trainer.fit_rl(
                model,
                groups,
                learning_rate=1e-6,
                save_checkpoint=False,
                max_tokens_per_microbatch=16384 // cut * (2 if strategy.endswith("context 2") else 1),
            )
            _synchronize(device)
            return time.perf_counter() - start, result

        _, first = update()
        update()
        taken = statistics.median(update()[0] for _ in range(options.repeats))
        told = {"ms": 1e3 * taken, "tokens/s": tokens / taken, "norm": first.metrics["loss/grad_norm"]}
        if gpu:
            told["peak GiB"] = ranks.highest(torch.cuda.max_memory_allocated(device)) / 2**30
        if options.zero:
            told["host GiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        if options.profile:
            told |= {"profile": report(update)} if trainer.is_global_zero else {"": update()}
        if trainer.is_global_zero:
            options.output.write_text(json.dumps(told))


def trainer_of(strategy: str, together: int, **options: Any) -> fitrl.LocalTrainer:
    """A trainer with a strategy by name, so many ranks computing together, with torchtitan, or with a stage of ZeRO."""
    if together > 1:
        return fitrl.LocalTrainer(strategy=FSDP2Strategy(tensor_parallel_size=together), **options)
    if strategy.startswith("titan"):
        from fitrl_titan import TitanTrainer

        how = strategy.removeprefix("titan").removeprefix(", ")
        sizes = {"tensor 2": {"tensor_parallel_size": 2}, "context 2": {"context_parallel_size": 2}}.get(how, {})
        options["compile"] = options["compile"] and (how != "tensor 2" or torch.__version__ >= (2, 13))
        if how == "selective":
            options["activation_checkpointing"] = "selective"
        return TitanTrainer(**sizes, **options)
    if not strategy.startswith("zero "):
        return fitrl.LocalTrainer(strategy=strategy, **options)
    from fitrl_deepspeed import DeepSpeedTrainer

    return DeepSpeedTrainer(
        zero_stage=int(strategy.split(",")[0].removeprefix("zero ")),  # type: ignore[arg-type]
        offload_optimizer="offloaded" in strategy,
        offload_params="weights" in strategy,
        **options,
    )


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as markdown."""
    names = list(dict.fromkeys(name for row in rows for name in row))

    def cell(value: Any) -> str:
        if not isinstance(value, float):
            return str(value)
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"

    lines = [" | ".join(names), " | ".join("---" for _ in names)]
    lines += [" | ".join(cell(row.get(name, "")) for name in names) for row in rows]
    return "".join(f"| {line} |\n" for line in lines) + "\n"


if __name__ == "__main__":
    main()
