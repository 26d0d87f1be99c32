"""What training through `fitrl serve` costs beside training here, how many jobs it does, and what it survives.

Server, worker and client run on this machine, over loopback, on the tiny policy.

* overhead: the same groups to a `ServerlessTrainer` and to a `LocalTrainer`, by turns; both keep a checkpoint.
* jobs: one client, and several at once with a model each, of whose steps none may be missing or doubled.
* faults: client, server and worker are killed with SIGKILL by turns at random moments; the run has to end with the
  weights of an undisturbed `LocalTrainer`, bit for bit.

    python benchmarks/serverless.py [--calls 20] [--clients 8] [--kills 12] [--output benchmarks/results]
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import hashlib
import json
import logging
import os
import platform
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import httpx
import lightning
import psutil
import torch

import fitrl
from fitrl.demo import TASKS, correct
from fitrl.testing.opening import step_groups
from fitrl_serverless import ServerlessTrainer, wire

RATE = 3e-4
FAULT_STEPS = 60


class Server:
    """`fitrl serve` in a process of its own, on a port that it keeps."""

    def __init__(self, state: Path) -> None:
        self.state = state
        with socket.socket() as reserved:
            reserved.bind(("127.0.0.1", 0))
            self.port = reserved.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        made = [sys.executable, "-m", "fitrl", "serve", "key", "add", "benchmark", "--state", str(state)]
        key = subprocess.run(made, capture_output=True, text=True, check=True).stdout.strip()
        os.environ |= {"FITRL_SERVERLESS_URL": self.url, "FITRL_SERVERLESS_KEY": key}
        self.start()

    def start(self) -> None:
        """Start it and wait until it answers."""
        command = [sys.executable, "-m", "fitrl", "serve", "--state", str(self.state), "--port", str(self.port)]
        with (self.state.parent / "serve.log").open("a") as log:
            self.process = subprocess.Popen(
                [*command, "--accelerator", "cpu"], stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )
        while True:
            with suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            if self.process.poll() is not None:
                raise SystemExit((self.state.parent / "serve.log").read_text())
            time.sleep(0.05)

    def worker(self) -> psutil.Process | None:
        """The process that trains; None while there is none."""
        with suppress(psutil.Error):
            return next(iter(psutil.Process(self.process.pid).children(recursive=True)), None)
        return None

    def kill(self) -> None:
        """End the server as `kill -9` does."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """End it gracefully."""
        self.process.terminate()
        self.process.wait()


def sampled(prompts: int, samples: int, root: Path) -> list[fitrl.TrajectoryGroup]:
    """Groups of the demo's tasks."""
    with local() as trainer:
        model = fitrl.TrainableModel("groups", "benchmark", "tiny", lora=None, root=root)
        tasks = random.Random(0).sample(TASKS, prompts)
        options = {"reward": correct, "group_size": samples, "max_new_tokens": 4, "seed": 1}
        return fitrl.rollout(trainer.sampler(model), tasks, **options)


def local() -> fitrl.LocalTrainer:
    """A trainer of this process."""
    return fitrl.LocalTrainer(accelerator="cpu", devices=1, enable_model_summary=False)


def overhead(calls: int, root: Path) -> dict[str, float]:
    """The same calls here and there, by turns."""
    groups = sampled(32, 8, root)
    here_model = fitrl.TrainableModel("here", "benchmark", "tiny", lora=None, root=root)
    there_model = fitrl.TrainableModel("there", "benchmark", "tiny", lora=None, root=root)
    here_s: list[float] = []
    there_s: list[float] = []
    with local() as here, ServerlessTrainer() as there:
        for call in range(calls + 3):
            start = time.perf_counter()
            mine = here.fit_rl(here_model, groups, learning_rate=RATE)
            middle = time.perf_counter()
            theirs = there.fit_rl(there_model, groups, learning_rate=RATE)
            end = time.perf_counter()
            assert mine.metrics["loss/train"] == theirs.metrics["loss/train"] and mine.step == theirs.step
            if call >= 3:
                here_s.append(middle - start)
                there_s.append(end - middle)
    plain = b"".join(group.model_dump_json().encode() for group in wire.groups_to_wire(groups))
    return {
        "local_ms": 1e3 * statistics.median(here_s),
        "remote_ms": 1e3 * statistics.median(there_s),
        "overhead_ms": 1e3 * statistics.median(b - a for a, b in zip(here_s, there_s, strict=True)),
        "trajectories": sum(map(len, groups)),
        "plain_kib": len(plain) / 1024,
        "sent_kib": len(gzip.compress(plain, compresslevel=3)) / 1024,
    }


def jobs(clients: int, each: int, root: Path) -> dict[str, float]:
    """Small jobs: of one client, then of several at once with a model each."""

    async def client(name: str) -> int:
        model = fitrl.TrainableModel(name, "benchmark", "tiny", lora=None, root=root)
        with ServerlessTrainer() as trainer:
            for number in range(each):
                await trainer.fit_rl_async(model, step_groups(number), learning_rate=RATE)
            return model.step

    async def run(names: list[str]) -> list[int]:
        return list(await asyncio.gather(*map(client, names)))

    rates = []
    for names in (["alone"], [f"client-{number}" for number in range(clients)]):
        start = time.perf_counter()
        steps = asyncio.run(run(names))
        assert steps == [each] * len(names), f"jobs were lost or doubled: {steps}"
        rates.append(len(names) * each / (time.perf_counter() - start))
    return {"alone_per_s": rates[0], "together_per_s": rates[1], "clients": clients, "each": each}


def learn(root: Path) -> None:
    """The client that is killed: a user's loop, whose groups depend on the step alone."""
    torch.set_num_threads(1)
    model = fitrl.TrainableModel("disturbed", "benchmark", "tiny", lora=None, root=root)
    with ServerlessTrainer() as trainer:
        trainer.open(model)
        while model.step < FAULT_STEPS:
            trainer.fit_rl(model, step_groups(model.step), learning_rate=RATE)


def faults(kills: int, root: Path, server: Server) -> dict[str, float]:
    """Kill client, server and worker by turns until the run is done."""
    draw = random.Random(1)
    killed = dict.fromkeys(("client", "server", "worker"), 0)

    def start_client() -> subprocess.Popen[bytes]:
        command = [sys.executable, __file__, "--client", str(root)]
        with (root / "client.log").open("a") as log:
            return subprocess.Popen(command, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})

    start = time.perf_counter()
    client = start_client()
    run_dir = root / "benchmark" / "disturbed"
    while client.poll() is None:
        # a moment in the middle of a job: kills while everything is starting would show little
        while client.poll() is None and not (run_dir / "job.json").exists():
            time.sleep(0.002)
        time.sleep(draw.uniform(0.0, 1.0))
        victim = list(killed)[sum(killed.values()) % 3]
        if client.poll() is not None or sum(killed.values()) >= kills:
            client.wait()
            break
        if victim == "client":
            client.send_signal(signal.SIGKILL)
            client.wait()
            client = start_client()
        elif victim == "server":
            server.kill()
            server.start()
        elif (worker := server.worker()) is not None:
            worker.kill()
        else:
            continue
        killed[victim] += 1
    assert client.returncode == 0, (root / "client.log").read_text()
    seconds = time.perf_counter() - start
    with ServerlessTrainer() as trainer:
        model = fitrl.TrainableModel("disturbed", "benchmark", "tiny", lora=None, root=root)
        steps = [found.step for found in trainer.checkpoints(model)]
        theirs = _digest(trainer.download_checkpoint(model))
    with local() as trainer:
        model = fitrl.TrainableModel("undisturbed", "benchmark", "tiny", lora=None, root=root)
        for step in range(FAULT_STEPS):
            result = trainer.fit_rl(model, step_groups(step), learning_rate=RATE)
        assert result.checkpoint_path is not None
        mine = _digest(result.checkpoint_path)
    assert steps == list(range(FAULT_STEPS + 1)), f"steps were lost or doubled: {steps}"
    assert mine == theirs, "the disturbed run has other weights"
    return {"steps": FAULT_STEPS, "seconds": seconds, **{f"{who}_kills": count for who, count in killed.items()}}


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def main() -> None:
    """Measure and print three tables; with `--output` also keep them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=20, help="timed calls of each trainer")
    parser.add_argument("--clients", type=int, default=8, help="clients at once")
    parser.add_argument("--jobs", type=int, default=10, help="jobs of each client")
    parser.add_argument("--kills", type=int, default=12, help="processes killed")
    parser.add_argument("--output", type=Path, help="folder for serverless.md and .json")
    parser.add_argument("--client", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if options.client is not None:
        learn(options.client)
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        server = Server(root / "state")
        try:
            cost = overhead(options.calls, root)
            throughput = jobs(options.clients, options.jobs, root)
            survived = faults(options.kills, root, server)
        finally:
            server.stop()
    facts = {
        "hardware": f"{platform.machine()} CPU, {os.cpu_count()} cores, one thread for each process",
        "load": f"{os.getloadavg()[2]:.1f} processes on average over the last 15 minutes, these included",
        "versions": f"python {platform.python_version()}, torch {torch.__version__}, "
        f"lightning {lightning.__version__}, httpx {httpx.__version__}",
        "commit": _commit(),
        "command": "python " + " ".join(sys.argv),
    }
    table = (
        "| one call, {trajectories} trajectories, a checkpoint kept | median ms |\n|---|---|\n"
        "| `LocalTrainer.fit_rl` | {local_ms:.0f} |\n| `ServerlessTrainer.fit_rl` | {remote_ms:.0f} |\n"
        "| difference, pair by pair | {overhead_ms:.0f} |\n\n"
        "A job's body has {plain_kib:.0f} KiB, of which {sent_kib:.0f} KiB are sent, gzipped.\n\n"
        "| small jobs, {each} of each client | jobs/s |\n|---|---|\n"
        "| one client, its trainer opened included | {alone_per_s:.2f} |\n"
        "| {clients} clients at once, a model each | {together_per_s:.2f} |\n\n"
        "| killed with SIGKILL during {steps} steps ({seconds:.0f} s) | times |\n|---|---|\n"
        "| client | {client_kills} |\n| server | {server_kills} |\n| worker | {worker_kills} |\n\n"
        "No step was lost or trained twice, and the weights are those of an undisturbed `LocalTrainer`, bit for bit.\n"
    ).format(**cost, **throughput, **survived)
    print(table)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        about = "\n".join(f"* {name}: {fact}" for name, fact in facts.items())
        (options.output / "serverless.md").write_text(f"# Training through `fitrl serve`\n\n{table}\n{about}\n")
        report = {"overhead": cost, "jobs": throughput, "faults": survived, **facts}
        (options.output / "serverless.json").write_text(json.dumps(report, indent=2) + "\n")


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
