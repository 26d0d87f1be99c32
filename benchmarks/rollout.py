"""What `VLLMSampler` costs beside the engine that it asks, and what new weights cost beside a copy of their bytes.

Before anything is timed, the sampler's token ids have to be the bare engine's, greedy and with seeds.

* tokens/s: the same prompts by `VLLMSampler.sample`, and to the engine itself (its HTTP API; `LLM.generate` in this
  process), by turns. A server is reached by its URL, and as one that we started and watch over.
* exchange: what `fit_rl` waits for after a step, from the trainer's weights to the proof that they answer. The transfer
  ends when the engine has loaded them; its limit, by folder, is to write as many bytes to a file of the same folder and
  to read them; from memory to memory, and by NCCL, to copy as many bytes from device to device. The trainer's part of
  the proof, a forward of 64 tokens, is computed while the engine loads; the rest is waited for.

It runs where vLLM is installed, or with `--python` of such an environment, then without the engine in this process. The
default model has random weights, as many as `--megabytes` says; whether it is computed on a GPU is the engine's choice.

    python benchmarks/rollout.py [--model DIR | --megabytes 100] [--only tokens full lora inside] [--runs 7]
        [--transfer folder memory nccl] [--engine-gpu 1] [--arguments="--dtype float32"] [--output benchmarks/results]
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import gc
import importlib.util
import json
import logging
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import lightning
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

import fitrl
from fitrl_vllm import InProcessEngine, VLLMSampler, VLLMServer

LORA = fitrl.LoraSettings(rank=16)
ON_GPU = torch.cuda.is_available()
ARGUMENTS = "--gpu-memory-utilization 0.5" if ON_GPU else "--enforce-eager --dtype float32 --max-model-len 512"
PRECISION = "bf16-mixed" if ON_GPU else "32-true"
TOLERANCE = 0.05 if ON_GPU else 1e-3
ENVIRONMENT = {} if ON_GPU else {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
PARTS = ("transfer_s", "load_s", "proof_s", "total_s")
WHAT = ("tokens", "full", "lora", "inside")

Ids = list[tuple[int, ...]]
Rates = dict[str, list[float]]
Ask = Callable[[Sequence[int], int, int, float, int | None], Awaitable[Ids]]
"""Prompt, completions, tokens, temperature and seed to token ids."""


def random_policy(folder: Path, megabytes: int = 100) -> Path:
    """A Qwen3 of about so many megabytes of random float32 weights, with the bundled policy's tokenizer."""
    hidden = 128
    while 32 * hidden * (9 * hidden + 1536) < megabytes * 1e6:  # 3 matrices of 3 x hidden, and the attention's
        hidden += 128
    tokenizer = fitrl.load_tokenizer("tiny")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=272,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# -- tokens a second ------------------------------------------------------------------------------------------------


def by_sampler(sampler: VLLMSampler) -> Ask:
    """Ask the sampler."""

    async def ask(prompt: Sequence[int], n: int, tokens: int, temperature: float, seed: int | None) -> Ids:
        said = await sampler.sample(prompt, n=n, max_new_tokens=tokens, temperature=temperature, seed=seed)
        return [item.token_ids for item in said]

    return ask


def by_http(client: httpx.AsyncClient, *, plain: bool = False) -> Ask:
    """Ask the server itself for the same; `plain`: for text alone, without ids and logprobs."""

    async def ask(prompt: Sequence[int], n: int, tokens: int, temperature: float, seed: int | None) -> Ids:
        body: dict[str, Any] = {
            "model": "base",
            "prompt": prompt,
            "n": n,
            "max_tokens": tokens,
            "temperature": temperature,
            "top_p": 1.0,
            "top_k": 0,
            "seed": seed,
        }
        if not plain:
            body |= {"logprobs": 0, "return_token_ids": True}
        answer = (await client.post("/v1/completions", json=body)).raise_for_status().json()
        if plain:
            return [(0,) * int(answer["usage"]["completion_tokens"])]
        return [tuple(choice["token_ids"]) for choice in answer["choices"]]

    return ask


def generate(llm: Any, prompts: Sequence[Sequence[int]], n: int, tokens: int, **how: Any) -> Ids:
    """Ask the engine of this process itself."""
    from vllm import SamplingParams

    params = SamplingParams(n=n, max_tokens=tokens, logprobs=0, flat_logprobs=True, **how)
    outputs = llm.generate([{"prompt_token_ids": list(ids)} for ids in prompts], params, use_tqdm=False)
    return [tuple(out.token_ids) for output in outputs for out in output.outputs]


async def same_ids(prompts: Sequence[Sequence[int]], tokens: int, mine: Ask, theirs: Ask) -> int:
    """How many completions were compared, one after the other.

    Raises:
        SystemExit: token ids differ.
    """
    compared = 0
    for number, prompt in enumerate(prompts):
        for temperature, seed in ((0.0, None), (1.0, number)):
            await mine(prompt, 1, tokens, temperature, seed)  # so that both find the prompt cached
            if (said := await mine(prompt, 1, tokens, temperature, seed)) != (
                answered := await theirs(prompt, 1, tokens, temperature, seed)
            ):
                raise SystemExit(f"prompt {number}, temperature {temperature}: {said} by the sampler, {answered} bare")
            compared += 1
    return compared


async def each(prompts: Sequence[Sequence[int]], samples: int, tokens: int, ask: Ask) -> int:
    """Tokens that all prompts at once are answered with."""
    said = await asyncio.gather(*(ask(prompt, samples, tokens, 1.0, None) for prompt in prompts))
    return sum(len(ids) for answer in said for ids in answer)


async def rates(ways: dict[str, Callable[[], Awaitable[int]]], runs: int) -> tuple[Rates, Rates]:
    """Tokens/s of each way, and microseconds of this process's CPU time for a token, by turns; a first run is left out.

    What was loaded is kept from the garbage collector: going over all of it takes half a second, in whichever run it
    comes.
    """
    gc.collect()
    gc.freeze()
    found: Rates = {name: [] for name in ways}
    host: Rates = {name: [] for name in ways}
    for run in range(runs + 1):
        for name in list(ways)[:: 1 if run % 2 else -1]:
            start, worked = time.perf_counter(), time.process_time()
            tokens = await ways[name]()
            if run:
                found[name].append(tokens / (time.perf_counter() - start))
                host[name].append(1e6 * (time.process_time() - worked) / tokens)
    return found, host


def compared(mine: list[float], theirs: list[float], **further: Any) -> dict[str, Any]:
    """Medians, and the median of the ratios of neighbouring runs."""
    return {
        "sampler_per_s": statistics.median(mine),
        "engine_per_s": statistics.median(theirs),
        "ratio": statistics.median(a / b for a, b in zip(mine, theirs, strict=True)),
        "ratios": [a / b for a, b in zip(mine, theirs, strict=True)],
        **further,
    }


# -- weights --------------------------------------------------------------------------------------------------------


class TimedSampler(VLLMSampler):
    """Keeps what each exchange took."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.exchanges: list[dict[str, float]] = []
        loads = ("load_weights", "load_adapter", "receive")
        for name, part in (*((name, "load_s") for name in loads), ("score", "engine_score_s")):
            setattr(self.engine, name, self._timed(getattr(self.engine, name), part))

    def _timed(self, ask: Callable[..., Awaitable[Any]], part: str) -> Callable[..., Awaitable[Any]]:
        async def timed(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            answer = await ask(*arguments, **options)
            if self.exchanges:  # else it is the sampler's own question, before any exchange
                end = time.perf_counter()
                self.exchanges[-1] |= {part: end - start, f"{part}_ends": end}
            return answer

        return timed

    def update_proven(self, weights: Iterable[tuple[str, Tensor]], version: int, score: Any) -> None:
        """Time the exchange, and its parts."""
        held: dict[str, float] = {"bytes": 0.0}  # that are handed over
        # of a number, as the engine holds it or as it is
        narrow = 2 if ON_GPU and self._weights.come_without_files else 4
        self.exchanges.append(held)

        def counted() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                held["bytes"] += narrow * tensor.numel()
                yield name, tensor

        def timed_score(token_ids: Sequence[int]) -> Tensor:
            start = time.perf_counter()
            said: Tensor = score(token_ids)
            said = said.cpu()
            held["trainer_score_s"] = time.perf_counter() - start
            return said

        start = time.perf_counter()
        super().update_proven(counted(), version, timed_score)
        held["total_s"] = time.perf_counter() - start
        held["transfer_s"] = held.pop("load_s_ends") - start
        held["proof_s"] = held["total_s"] - held["transfer_s"]


def copy_s(size: int, folder: Path, runs: int) -> float:
    """Median seconds to write so many bytes to a new file there and to read them."""
    data = torch.randint(256, (size,), dtype=torch.uint8).numpy().data
    back = memoryview(bytearray(size))
    found = []
    for run in range(runs + 1):
        file = folder / f"copy-{run}"
        start = time.perf_counter()
        with file.open("wb", buffering=0) as out:
            written = 0
            while written < size:
                written += out.write(data[written:])
        with file.open("rb", buffering=0) as given:
            read = 0
            while read < size:
                read += given.readinto(back[read:])
        if run:
            found.append(time.perf_counter() - start)
        file.unlink()
    assert back == data
    return statistics.median(found)


def device_copy_s(size: int, runs: int, engine_gpu: int) -> float:
    """Median seconds to copy so many bytes from the trainer's device to the engine's."""
    source = torch.randint(256, (size,), dtype=torch.uint8, device="cuda" if ON_GPU else "cpu")
    target = torch.empty_like(source, device=f"cuda:{engine_gpu}" if ON_GPU else "cpu")
    found = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        target.copy_(source)
        if ON_GPU:
            torch.cuda.synchronize(target.device)
            torch.cuda.synchronize(source.device)
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])


def exchanges(sampler: TimedSampler, runs: int, limit_of: Callable[[int], float]) -> dict[str, Any]:
    """Train, and see what each step's exchange took; every one is proven by the sampler."""
    with fitrl.LocalTrainer(
        devices=1, precision=PRECISION, sampler=sampler, enable_model_summary=False, accelerator="auto"
    ) as trainer:
        for step in range(runs + 1):
            draw = random.Random(step)  # whatever is said, so that there is always a step to take
            groups = fitrl.rollout(
                trainer.sampler(sampler.model),
                ["a"],
                reward=lambda task, trajectory, draw=draw: draw.random(),
                group_size=8,
                max_new_tokens=8,
                seed=step,
            )
            trainer.fit_rl(sampler.model, groups, learning_rate=1e-5, save_checkpoint=False)
            assert sampler.version == step + 1
    counted = sampler.exchanges[2:]  # the first is that of opening, the second after the first step
    size = int(counted[0]["bytes"])
    found = {name: statistics.median(held[name] for held in counted) for name in PARTS}
    limit = limit_of(size)
    return {"bytes": size, **found, "copy_s": limit, "ratio": found["transfer_s"] / limit, "exchanges": counted}


# -- the whole ------------------------------------------------------------------------------------------------------


class Benchmark:
    """The measurements, and what they need."""

    def __init__(self, options: argparse.Namespace, root: Path) -> None:
        self.options, self.root = options, root
        self.base = options.model or str(random_policy(root / "policy", options.megabytes))
        self.transfer = Path(tempfile.mkdtemp(prefix="fitrl-rollout-", dir=options.transfer_dir or root))
        tokenizer = fitrl.load_tokenizer(self.base)
        generator = torch.Generator().manual_seed(0)
        self.prompts: list[list[int]] = [
            [*tokenizer(f"{number}: ")["input_ids"], *torch.randint(32, 127, (24,), generator=generator).tolist()]
            for number in range(options.prompts)
        ]
        self.work = (self.prompts, options.samples, options.tokens)
        self.throughput: dict[str, dict[str, Any]] = {}
        self.weights: dict[str, dict[str, Any]] = {}
        self.num_compared = 0

    def model(self, name: str, lora: fitrl.LoraSettings | None) -> fitrl.TrainableModel:
        """A model of the benchmark."""
        return fitrl.TrainableModel(name, "benchmark", self.base, lora=lora, root=self.root)

    def sampler(
        self, name: str, engine: Any, lora: fitrl.LoraSettings | None = None, transfer: Any = "folder"
    ) -> TimedSampler:
        """A sampler over the engine."""
        return TimedSampler(
            self.model(name, lora),
            engine,
            tolerance=self.options.tolerance,
            transfer=transfer,
            transfer_dir=self.transfer,
        )

    def limit(self, transfer: str, size: int) -> float:
        """Seconds of a plain copy of so many bytes."""
        if transfer == "folder":
            return copy_s(size, self.transfer, self.options.runs)
        return device_copy_s(size, self.options.runs, self.options.engine_gpu)

    async def over_http(self, sampler: VLLMSampler, url: str) -> dict[str, Any]:
        """Sampler against server."""
        options = self.options
        settings = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=600.0, limits=settings, trust_env=False) as client:
            mine, bare = by_sampler(sampler), by_http(client)
            self.num_compared += await same_ids(self.prompts[:8], options.tokens, mine, bare)
            asks = {"sampler": mine, "engine": bare, "plain": by_http(client, plain=True)}
            ways = {name: functools.partial(each, *self.work, ask) for name, ask in asks.items()}
            found, _ = await rates(ways, options.runs)  # the server's host is another process
        return compared(found["sampler"], found["engine"], plain_per_s=statistics.median(found["plain"]))

    def server(self, lora: fitrl.LoraSettings | None) -> VLLMServer:
        """A server of ours."""
        return VLLMServer(
            self.base,
            lora=lora,
            python=self.options.python,
            arguments=shlex.split(self.options.arguments),
            environment=ENVIRONMENT | gpu_of(self.options.engine_gpu),
            log=self.root / "vllm.log",
        )

    def measure(self) -> Iterator[str]:
        """What was asked for, one engine after the other; what has just been measured."""
        runs, asked = self.options.runs, self.options.only
        if "tokens" in asked or "full" in asked:
            with self.server(None) as server:
                yield from self.over_servers(server)
        if "lora" in asked:
            with self.server(LORA) as server, self.sampler("adapted", server, LORA) as sampler:
                self.weights[f"LoRA, rank {LORA.rank}"] = exchanges(
                    sampler, runs, functools.partial(self.limit, "folder")
                )
            yield "lora"
        if "inside" in asked and self.options.in_process:
            self.in_this_process()
            yield "inside"

    def over_servers(self, server: VLLMServer) -> Iterator[str]:
        """Both ways to reach a server, and an exchange of all weights."""
        asked = self.options.only
        if "tokens" in asked:
            with self.sampler("by-url", server.url) as sampler:
                self.throughput["a server by its URL"] = asyncio.run(self.over_http(sampler, server.url))
            yield "tokens, by URL"
            with self.sampler("supervised", server) as sampler:
                self.throughput["a server of ours"] = asyncio.run(self.over_http(sampler, server.url))
            yield "tokens, supervised"
        for way in self.options.transfer if "full" in asked else ():
            with self.sampler(f"by-{way}", server, transfer=way) as sampler:
                limit = functools.partial(self.limit, way)
                self.weights[f"all weights, by {way}"] = exchanges(sampler, self.options.runs, limit)
            yield f"full, by {way}"

    def in_this_process(self) -> None:
        """Sampler against `LLM`."""
        os.environ.update(ENVIRONMENT)
        import vllm
        from vllm.engine.arg_utils import EngineArgs
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
        asked = ["--model", self.base, "--logprobs-mode", "processed_logprobs", *shlex.split(self.options.arguments)]
        llm = vllm.LLM.from_engine_args(EngineArgs.from_cli_args(parser.parse_args(asked)))
        prompts, samples, tokens = self.work

        async def one(prompt: Sequence[int], n: int, tokens: int, temperature: float, seed: int | None) -> Ids:
            return await asyncio.to_thread(generate, llm, [prompt], n, tokens, temperature=temperature, seed=seed)

        async def bare() -> int:
            return sum(map(len, await asyncio.to_thread(generate, llm, prompts, samples, tokens, temperature=1.0)))

        async def run(ask: Ask) -> tuple[Rates, Rates]:
            self.num_compared += await same_ids(prompts[:8], tokens, ask, one)
            return await rates({"sampler": lambda: each(*self.work, ask), "engine": bare}, self.options.runs)

        try:
            with self.sampler("inside", InProcessEngine(llm)) as sampler:
                found, host = asyncio.run(run(by_sampler(sampler)))
        finally:
            llm.llm_engine.engine_core.shutdown()
        costs = {f"{name}_host_us": statistics.median(each_run) for name, each_run in host.items()}
        self.throughput["`LLM` in this process"] = compared(found["sampler"], found["engine"], **costs)


def gpu_of(number: int) -> dict[str, str]:
    """Variables of an engine on one GPU of those that are visible."""
    if not ON_GPU:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
    return {"CUDA_VISIBLE_DEVICES": visible.split(",")[number]}


def table(benchmark: Benchmark) -> str:
    """What was found, as Markdown."""
    prompts, samples, tokens = benchmark.work
    lines = [
        f"{len(prompts)} prompts at once, {samples} completions of at most {tokens} tokens each; medians of "
        f"{benchmark.options.runs} runs.",
        "",
        "| engine | bare, text alone, tokens/s | bare, tokens/s | `VLLMSampler`, tokens/s | of bare | from, to |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in benchmark.throughput.items():
        plain = f"{row['plain_per_s']:,.0f}" if "plain_per_s" in row else "-"
        between = f"{min(row['ratios']):.2f}, {max(row['ratios']):.2f}"
        lines.append(
            f"| {name} | {plain} | {row['engine_per_s']:,.0f} | {row['sampler_per_s']:,.0f} | {row['ratio']:.2f} | "
            f"{between} |"
        )
    for name, row in benchmark.throughput.items():
        if "sampler_host_us" in row:
            lines += [
                "",
                f"{name}: a token takes {row['sampler_host_us']:.1f} us of the process's CPU time by the sampler, "
                f"{row['engine_host_us']:.1f} us bare.",
            ]
    lines += [
        "",
        "| exchange | MB | transfer, ms | of it loading, ms | then proof, ms | whole, ms | copy, ms | to copy |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in benchmark.weights.items():
        times = " | ".join(f"{1e3 * row[part]:,.1f}" for part in (*PARTS, "copy_s"))
        lines.append(f"| {name} | {row['bytes'] / 1e6:,.1f} | {times} | {row['ratio']:.2f} |")
    lines += [
        "",
        f"{benchmark.num_compared} completions, greedy and seeded, had the same token ids by the sampler and bare. "
        "Bare is the same request: ids and logprobs. Ratios are of neighbouring runs. Every exchange was proven: the "
        "engine's logprobs were the trainer's.",
    ]
    if "inside" in benchmark.options.only and not benchmark.options.in_process:
        lines.append("Not measured: `LLM` in this process, because vLLM is not installed beside this interpreter.")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and print the table; with `--output` also keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id; else a small one with random weights")
    parser.add_argument("--megabytes", type=int, default=100, help="size of the random one, in float32")
    parser.add_argument("--only", nargs="+", choices=WHAT, default=WHAT, help="what to measure; else all")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environment that has vLLM")
    parser.add_argument("--arguments", default=ARGUMENTS, help="of vLLM's server, in one string")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="of the proof, in nats")
    parser.add_argument(
        "--transfer", nargs="+", default=["folder", "memory"], help="ways of all weights: folder, memory, nccl"
    )
    parser.add_argument("--engine-gpu", type=int, default=0, help="the engine's; the trainer's is 0, by nccl another")
    parser.add_argument("--transfer-dir", help="folder for weights; else one in the temporary directory")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=8, help="completions of each prompt")
    parser.add_argument("--tokens", type=int, default=64, help="longest completion")
    parser.add_argument("--runs", type=int, default=7, help="timed runs of each way")
    parser.add_argument("--note", help="what a reader has to know of this run; goes into the results")
    parser.add_argument("--output", type=Path, help="folder for rollout.md and .json")
    options = parser.parse_args()
    options.in_process = importlib.util.find_spec("vllm") is not None
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    facts = {
        "hardware": _hardware(),
        "load": f"{os.getloadavg()[1]:.1f} other processes on average over the 5 minutes before",
        "versions": f"python {platform.python_version()}, torch {torch.__version__}, "
        f"lightning {lightning.__version__}, vllm {_vllm(options.python)}",
        "commit": _commit(),
        "command": shlex.join(["python", *sys.argv]),
    } | ({} if options.note is None else {"note": options.note})
    with tempfile.TemporaryDirectory() as folder:
        benchmark = Benchmark(options, Path(folder))
        start = time.perf_counter()
        for part in benchmark.measure():
            print(f"{part}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
            if options.output is not None:  # after each part: all of them take minutes
                keep(benchmark, facts, options.output)
    print(table(benchmark))


def keep(benchmark: Benchmark, facts: dict[str, str], folder: Path) -> None:
    """Write down what was found so far."""
    folder.mkdir(parents=True, exist_ok=True)
    about = "\n".join(f"* {name}: {fact}" for name, fact in facts.items())
    (folder / "rollout.md").write_text(f"# Rollouts by vLLM\n\n{table(benchmark)}\n{about}\n")
    report = {"throughput": benchmark.throughput, "exchanges": benchmark.weights, **facts}
    (folder / "rollout.json").write_text(json.dumps(report, indent=2) + "\n")


def _hardware() -> str:
    if ON_GPU:
        return f"{torch.cuda.get_device_name()}, {os.cpu_count()} cores"
    return f"{platform.machine()} CPU, {os.cpu_count()} cores; one thread for the engine, one for the trainer"


def _vllm(python: str) -> str:
    ask = "import vllm; print(vllm.__version__)"
    done = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True)
    return done.stdout.split()[-1]


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":  # vLLM's own processes import this file again
    main()
