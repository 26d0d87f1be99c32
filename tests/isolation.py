"""Fixtures of every test, the core's and the plugins': one thread, and a check that no test leaves anything behind.

Without a GPU the Triton kernels run in Triton's interpreter, which has to be chosen before Triton is first imported.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator

import psutil
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    # transformers imports DeepSpeed where it is installed, which would say on standard output that it found no GPU
    os.environ["DS_ACCELERATOR"] = "cpu"

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as for what a shell starts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

from hypothesis import HealthCheck, settings  # noqa: E402

from fitrl.testing import is_rank  # noqa: E402

settings.register_profile(
    "fitrl",
    deadline=None,
    derandomize=True,
    max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("fitrl")

# libraries set these once, when they are first imported or used
_ALLOWED_ENVIRONMENT = {
    "CRC32C_SW_MODE",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_DEVICE_ORDER",
    "CUDA_MODULE_LOADING",
    "KMP_DUPLICATE_LIB_OK",
    "KMP_INIT_AT_FORK",
    "PYTEST_CURRENT_TEST",
    "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR",
    "TRITON_PTXAS_PATH",
    "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR",
}
# threads that libraries keep for the life of the process, once they are first used; Dummy: not started by Python
_ALLOWED_THREADS = ("tqdm_monitor", "InductorSubproc", "subproc_worker_timer", "pin_memory", "Dummy-")
# processes that libraries keep likewise: a compiler's, multiprocessing's, and MPI's daemon where it is installed
_KEPT, _MPI = ("compile_worker", "multiprocessing.resource_tracker"), "orted"
_GRACE_S = 5.0


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Compute on one thread: tiny tensors are slower on several."""
    torch.set_num_threads(1)


def _command(process: psutil.Process) -> str:
    """Command line of a process; nothing for one that has ended."""
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def _family(process: psutil.Process) -> list[psutil.Process]:
    """Children and theirs; none of a process that has ended."""
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _is_kept(line: str) -> bool:
    """Whether a command line is of a process that a library keeps."""
    return any(kept in line for kept in _KEPT) or line.split()[0] == _MPI


@pytest.fixture(autouse=True)
def nothing_left_behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fail a test that leaves anything: environment, threads, processes, ports, process groups, temporary files."""
    if is_rank():  # of a job whose launcher waits for it; its process group is made once
        yield
        return
    scratch = tmp_path_factory.mktemp("scratch")
    outer = tempfile.tempdir
    tempfile.tempdir = str(scratch)
    environment = dict(os.environ)
    threads = set(threading.enumerate())
    me = psutil.Process()
    started = set(me.children())  # by a fixture of several tests, which ends them
    yield
    tempfile.tempdir = outer
    changed = {
        name
        for name in environment.keys() | os.environ.keys()
        if environment.get(name) != os.environ.get(name) and name not in _ALLOWED_ENVIRONMENT
    }
    for name in changed:
        if name in environment:
            os.environ[name] = environment[name]
        else:
            del os.environ[name]
    left = [
        thread
        for thread in threading.enumerate()
        if thread not in threads and not thread.name.startswith(_ALLOWED_THREADS)
    ]
    for thread in left:
        thread.join(_GRACE_S)  # one that is about to end may do so
    running = [thread.name for thread in left if thread.is_alive()]
    children = {child: _command(child) for child in _family(me) if child not in started}
    for elder in started:
        for child in _family(elder):
            children.pop(child, None)
    ours = [
        child
        for child, line in children.items()
        if line and not any(kept in line for kept in _KEPT) and line.split()[0] != _MPI
    ]
    _, alive = psutil.wait_procs(ours, timeout=_GRACE_S)
    processes = [children[child] for child in alive]
    for child in alive:
        child.kill()
    listening = [str(link.laddr) for link in me.net_connections() if link.status == psutil.CONN_LISTEN]
    if any(line.split()[:1] == [_MPI] for line in map(_command, _family(me))):
        listening = []  # MPI listens in this process for its daemon
    connected = torch.distributed.is_initialized()
    if connected:
        torch.distributed.destroy_process_group()
    files = sorted(path.name for path in scratch.iterdir() if not path.name.startswith("torchinductor"))
    shutil.rmtree(scratch)
    assert not changed, f"the test changed environment variables: {sorted(changed)}"
    assert not running, f"the test left threads running: {running}"
    assert not processes, f"the test left processes running: {processes}"
    assert not listening, f"the test left ports open: {listening}"
    assert not connected, "the test left a process group"
    assert not files, f"the test left temporary files: {files}"
