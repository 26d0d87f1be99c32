"""Ranks that die, fail, hang and end: what the others hear of it. Each rank is a fork of this process."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

import pytest

from fitrl.data import lifeline
from fitrl.data.lifeline import Lifeline
from fitrl.errors import RankError

HOST = "127.0.0.1"


class Job:
    """Ranks as forked children, each with a pipe for its standard error."""

    def __init__(self, *work: Callable[[Lifeline], None], stranger: bool = False) -> None:
        context = multiprocessing.get_context("fork")
        told = [context.SimpleQueue() for _ in work]  # written at once: a rank may end in the next moment
        self.processes: list[int] = []
        self.pipes: list[int] = []
        for rank, do in enumerate(work):
            reading, writing = os.pipe()
            child = os.fork()
            if not child:
                os.dup2(writing, 2)
                os.close(writing)
                self._be(rank, do, told, stranger)
            os.close(writing)
            self.processes.append(child)
            self.pipes.append(reading)
        for queue in told:
            queue.close()

    def _be(self, rank: int, do: Callable[[Lifeline], None], told: list, stranger: bool) -> None:
        lifeline.GRACE_S = 0.3

        def exchange(text: str) -> list[str]:
            for queue in told:
                queue.put((rank, text))
            texts = [text for _, text in sorted(told[rank].get() for _ in told)]
            if stranger and rank == 1:  # it finds the port before anyone else does
                with socket.create_connection((HOST, json.loads(texts[0])["port"])) as line:
                    line.sendall(b"let me in 1\n")
                    assert line.recv(1) == b""
            return texts

        code = 0
        try:
            line = Lifeline(rank, exchange, HOST)
            do(line)
        except BaseException as error:
            os.write(2, f"raised {type(error).__name__}: {error}\n".encode())
            sys.last_value = error  # as Python's own end of a script leaves it
            code = 3
        else:
            if hasattr(sys, "last_value"):
                del sys.last_value
        if "line" in locals():
            line._say_goodbye()  # at exit; the pytest around this must not run on
        os._exit(code)

    def ends(self) -> list[tuple[int, str]]:
        """Exit status (a signal's number is negative) and standard error of each rank."""
        seen = []
        for child, pipe in zip(self.processes, self.pipes, strict=True):
            with os.fdopen(pipe) as file:
                said = file.read()
            seen.append((os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said))
        return seen


def dies(line: Lifeline) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hears(line: Lifeline) -> None:
    assert line.lost_within(10.0) is not None
    os.write(2, f"heard {line.lost}\n".encode())


def sleeps(line: Lifeline) -> None:
    time.sleep(30.0)


def waits_for_others(line: Lifeline) -> None:
    assert line.lost_within(1.0) is None, line.lost


def returns(line: Lifeline) -> None:
    pass


@pytest.mark.parametrize("dead", [0, 1, 2])
def test_all_hear_who_was_killed(dead) -> None:
    work = [hears, hears, hears]
    work[dead] = dies
    job = Job(*work)
    for rank, (status, said) in enumerate(job.ends()):
        if rank == dead:
            assert status == -signal.SIGKILL and not said
        else:
            who = f"rank {dead} (process {job.processes[dead]} on {socket.gethostname()}) was killed, or its machine"
            assert status == 0 and f"heard {who}" in said
            assert f"fitrl: {who} is gone; rank {rank} cannot go on without it\n" in said


def test_an_exception_is_named() -> None:
    def fails(line: Lifeline) -> None:
        raise ValueError("no reward")

    (status, said), (failed, _) = Job(hears, fails).ends()
    assert (status, failed) == (0, 3) and "rank 1 (process" in said and "ended with ValueError: no reward" in said


@pytest.mark.parametrize("first", [0, 1])
def test_a_rank_that_ends_is_no_loss(first) -> None:
    work = [waits_for_others, waits_for_others]
    work[first] = returns
    assert Job(*work).ends() == [(0, ""), (0, "")]


def test_a_rank_that_does_not_end_is_ended() -> None:
    start = time.monotonic()
    (status, said), _ = Job(sleeps, dies).ends()
    assert status == 1 and "rank 0 waits for something that cannot come" in said
    assert time.monotonic() - start < 10.0


def test_a_handler_of_sigterm_wakes_the_main_thread_first() -> None:
    def is_woken(line: Lifeline) -> None:
        def handle(*args: object) -> None:
            raise RankError(f"overdue: {line.is_overdue}")

        signal.signal(signal.SIGTERM, handle)
        time.sleep(30.0)

    (status, said), _ = Job(is_woken, dies).ends()
    assert status == 3 and "raised RankError: overdue: True" in said


def test_a_forked_child_does_not_hide_a_death() -> None:
    """As a data loader's worker would, whose copy of the connection outlives its parent."""

    def forks(line: Lifeline) -> None:
        if not os.fork():
            os.close(2)
            time.sleep(3.0)
            os._exit(0)
        dies(line)

    start = time.monotonic()
    (status, said), _ = Job(hears, forks).ends()
    assert status == 0 and "heard rank 1" in said and time.monotonic() - start < 2.5


def test_a_stranger_is_turned_away() -> None:
    assert Job(waits_for_others, waits_for_others, stranger=True).ends() == [(0, ""), (0, "")]


def test_who_cannot_connect_says_so() -> None:
    with socket.create_server((HOST, 0)) as server:
        port = server.getsockname()[1]
    answers = [json.dumps({"process": 1, "host": "h", "port": port, "key": "k"}), "{}"]
    threads = set(threading.enumerate())
    with pytest.raises(RankError, match=f"rank 1 cannot connect with rank 0 at {HOST}"):
        Lifeline(1, lambda text: answers, HOST)
    assert set(threading.enumerate()) == threads
