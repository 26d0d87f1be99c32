"""The worker: one process, or the ranks of a `torchrun` job, that trains the jobs of the queue one after another.

    python -m fitrl_serverless.server.worker SETTINGS

It reads its standard input, which only ends: when the server is gone, however it went, the worker goes too. Training
runs beside the main thread, so that a signal ends the process at once; the next worker clears up behind it.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from typing import NoReturn

from filelock import FileLock

import fitrl
from fitrl.errors import FitRLError
from fitrl.policy.checkpoints import newest, read_manifest
from fitrl_serverless.server.database import Database
from fitrl_serverless.server.job import Outcome
from fitrl_serverless.server.orders import POLL_S, Orders
from fitrl_serverless.server.queue import Queue
from fitrl_serverless.server.registry import Registry
from fitrl_serverless.server.settings import Settings
from fitrl_serverless.server.training import Training, reason, where

WORKER = "FITRL_SERVE_WORKER"
FAILED = 3
_PREDECESSOR_S = 120.0
_log = logging.getLogger("fitrl_serverless.server.worker")


def main() -> NoReturn:
    """Work until told to stop, then end the process."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s worker: %(message)s")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    threading.Thread(target=_end_with_server, name="fitrl-serve-watch", daemon=True).start()
    status: list[int] = []
    thread = threading.Thread(target=lambda: status.append(_work(Settings.load(sys.argv[1]))), name="fitrl-serve-work")
    thread.start()
    thread.join()
    logging.shutdown()
    os._exit(status[0] if status else FAILED)  # nothing is left to do, and the libraries take seconds to do it


def _end_with_server() -> None:
    while os.read(0, 4096):
        pass
    os._exit(FAILED)


def _work(settings: Settings) -> int:
    first = os.environ.get("RANK", "0") == "0"
    lock = FileLock(settings.state / "worker.lock", thread_local=False)
    if first:
        lock.acquire(timeout=_PREDECESSOR_S)  # of a worker that is about to end
    database = Database(settings.database)
    try:
        queue = Queue(database)
        registry = Registry(database, settings)
        orders = Orders(database, os.environ[WORKER], is_first=first)
        if first:
            recover(queue, registry, settings)
        strategy = settings.strategy or ("fitrl_local" if settings.ranks == 1 else "fitrl_ddp")
        options = {"devices": settings.ranks, "enable_model_summary": False} | dict(settings.trainer)
        with fitrl.LocalTrainer(strategy=strategy, **options) as trainer:
            training = Training(trainer, database, registry, queue, orders)
            if first:
                _lead(training, database, queue, orders, settings)
            else:
                _follow(training, queue, orders)
    except Exception as error:
        _log.error("ends: %s %s", type(error).__name__, where(error))
        return FAILED
    finally:
        database.close()
        lock.release()
    return 0


def _lead(training: Training, database: Database, queue: Queue, orders: Orders, settings: Settings) -> None:
    """Rank 0: take jobs until told to stop."""
    worker = os.environ[WORKER]
    with database.transaction() as connection:
        connection.execute("UPDATE workers SET state = 'ready' WHERE id = ? AND state = 'starting'", (worker,))
    _log.info("ready")
    while True:
        row = database.row("SELECT state FROM workers WHERE id = ?", worker)
        if row is None or row["state"] == "stopping":
            orders.give("stop")
            return
        job = queue.claim(training.open_model, settings.patience_s) if queue.has_work() else None
        if job is None:
            time.sleep(POLL_S)
            continue
        try:
            groups = training.read(job)
        except FitRLError as error:
            queue.fail(job, reason(error))
            continue
        orders.give("train", job.id)
        start = time.perf_counter()
        training.train(job, groups)
        _log.info("%s of %s took %.2f s", job.id, job.model_id, time.perf_counter() - start)


def _follow(training: Training, queue: Queue, orders: Orders) -> None:
    """The other ranks: do as rank 0 says."""
    while (order := orders.take()).what != "stop":
        assert order.job_id is not None
        job = queue.job(order.job_id)
        assert job is not None
        training.train(job, [])


def recover(queue: Queue, registry: Registry, settings: Settings) -> None:
    """Bring what a dead worker left running to its end, or back into the queue; see `queue`."""
    for job in queue.running():
        folder = newest(settings.state / "models" / job.model_id / "checkpoints")
        on_disk = 0 if folder is None else read_manifest(folder).step
        if job.start_step is not None and on_disk > job.start_step:
            _log.info("%s had been trained and saved when its worker ended", job.id)
            known = job.outcome or Outcome(step=on_disk, num_optimizer_steps=1, dropped={}, metrics={})
            queue.succeed(job, known)
        elif job.cancel_requested:
            queue.end_cancelled(job)
        elif job.verdict is not None:
            _log.warning("%s ran for too long and is failed", job.id)
            queue.fail(job, job.verdict)
        elif job.attempts >= settings.limits.attempts:
            _log.warning("%s took its worker down %d times and is failed", job.id, job.attempts)
            queue.fail(job, f"the worker ended {job.attempts} times while it trained this job: too large, perhaps")
        else:
            _log.info("%s waits again: its worker ended before anything of it was saved", job.id)
            queue.requeue(job)


if __name__ == "__main__":
    main()
