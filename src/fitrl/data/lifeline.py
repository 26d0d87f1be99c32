"""The ranks' lifeline: every rank learns within a moment that another one has died, and which.

A collective does not tell: with gloo it raises a connection error that names no rank, with NCCL it waits for its
time-out, and a rank that is busy elsewhere notices nothing. Here each rank holds a connection to rank 0, which the
operating system closes when a process ends, however it ends. Rank 0 passes on who is gone. A rank that ends as it
should says so first.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

from fitrl.errors import RankError

GRACE_S = 3.0
"""How long a rank that is left may go on, with a checkpoint it writes say; twice, then it is ended."""

_CONNECT_S = 60.0
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_KILLED = "was killed, or its machine is gone"


class Lifeline:
    """A connection to rank 0, and on rank 0 one to each other rank, watched by a thread until the process ends.

    When a rank dies, the others write its name to standard error. A rank that has not ended by itself after `GRACE_S`
    is sent SIGTERM where a handler in Python waits for it, and after another `GRACE_S` it ends with exit status 1:
    nothing that it waits for can come any more. Once rank 0 has ended as it should, no news is passed on.

    Args:
        rank: this process's number.
        exchange: a collective that returns everyone's text, by rank.
        host: where rank 0 can be reached.

    Attributes:
        lost: who is gone, and how, as a sentence; None while everyone is there.
        is_overdue: whether the first `GRACE_S` is over.

    Raises:
        RankError: not all ranks could connect.
    """

    def __init__(self, rank: int, exchange: Callable[[str], list[str]], host: str) -> None:
        self.lost: str | None = None
        self.is_overdue = False
        self._heard = threading.Event()
        self._rank = rank
        server = _listen(host) if rank == 0 else None
        me = {"process": os.getpid(), "host": socket.gethostname()}
        if server is not None:
            me |= {"port": server.getsockname()[1], "key": secrets.token_hex(16)}  # a stranger may find the port
        self._who = [json.loads(text) for text in exchange(json.dumps(me))]
        key = self._who[0]["key"]
        try:
            if server is not None:
                with server:
                    self._lines = _accept(server, key, len(self._who) - 1)
            else:
                line = socket.create_connection((host, self._who[0]["port"]), timeout=_CONNECT_S)
                line.sendall(f"{key} {rank}\n".encode())
                self._lines = {0: line}
        except OSError as error:
            raise RankError(f"rank {rank} cannot connect with rank 0 at {host}: {error}") from error
        for line in self._lines.values():
            _keep_alive(line)
        os.register_at_fork(after_in_child=self._close)  # a child that holds a copy would keep the connection up
        atexit.register(self._say_goodbye)
        threading.Thread(target=self._watch, name="fitrl-lifeline", daemon=True).start()

    def lost_within(self, seconds: float) -> str | None:
        """Who is gone; waits so long for the news."""
        self._heard.wait(seconds)
        return self.lost

    def _watch(self) -> None:
        loss = self._first_loss()
        if loss is None:
            return
        rank, how = loss
        if self._rank == 0:
            self._tell(rank, how)
        who = self._who[rank]
        self.lost = f"rank {rank} (process {who['process']} on {who['host']}) {how}"
        note = f"fitrl: {self.lost}; rank {self._rank} cannot go on without it\n"
        os.write(2, note.encode())  # print may be under way on the main thread
        self._heard.set()  # from here on the main thread may end the process
        time.sleep(GRACE_S)
        self.is_overdue = True
        if callable(signal.getsignal(signal.SIGTERM)):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)  # wakes it from a sleep, too
        time.sleep(GRACE_S)
        os.write(2, f"fitrl: rank {self._rank} waits for something that cannot come, and is ended\n".encode())
        os._exit(1)

    def _first_loss(self) -> tuple[int, str] | None:
        """Wait for the first rank that dies: which, and how; None when all have said goodbye."""
        heard = dict.fromkeys(self._lines, b"")
        with selectors.DefaultSelector() as waiting:
            for rank, line in self._lines.items():
                waiting.register(line, selectors.EVENT_READ, rank)
            while waiting.get_map():
                for ready, _ in waiting.select():
                    rank = ready.data
                    try:
                        data = self._lines[rank].recv(4096)
                    except OSError:
                        data = b""
                    if not data:
                        return rank, _KILLED
                    *said, heard[rank] = (heard[rank] + data).split(b"\n")
                    for message in map(json.loads, said):
                        if message["how"]:
                            return message["rank"], message["how"]
                        waiting.unregister(ready.fileobj)
        return None

    def _say_goodbye(self) -> None:
        """Tell the others that this process ends; that is a loss only where an exception ended the script."""
        error = getattr(sys, "last_value", None)
        failed = isinstance(error, Exception)  # Ctrl-C is told to all
        if self.lost is None:
            self._tell(self._rank, f"ended with {type(error).__name__}: {error}" if failed else "")

    def _tell(self, rank: int, how: str) -> None:
        message = json.dumps({"rank": rank, "how": how}).encode() + b"\n"
        for number, line in self._lines.items():
            if number != rank:
                with contextlib.suppress(OSError):  # it may have ended itself
                    line.sendall(message)

    def _close(self) -> None:
        for line in self._lines.values():
            line.close()


def _listen(host: str) -> socket.socket:
    """A port of this machine, for one moment; on the loopback if the job is, else over IPv6 too where there is any."""
    if host in _LOOPBACK:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, 0), family=family, backlog=1024)
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", 0), backlog=1024)


def _accept(server: socket.socket, key: str, expected: int) -> dict[int, socket.socket]:
    """The other ranks' connections, by rank; strangers are turned away."""
    lines: dict[int, socket.socket] = {}
    deadline = time.monotonic() + _CONNECT_S
    while len(lines) < expected:
        server.settimeout(max(0.1, deadline - time.monotonic()))
        line, _ = server.accept()
        line.settimeout(5.0)
        try:
            # byte by byte: what comes behind the line, a goodbye say, is read elsewhere
            said, _, rank = line.makefile("rb", buffering=0).readline(200).decode().strip().partition(" ")
        except (OSError, UnicodeError):
            said = rank = ""
        if secrets.compare_digest(said.encode(), key.encode()):
            lines[int(rank)] = line
        else:
            line.close()
    return lines


def _keep_alive(line: socket.socket) -> None:
    """Notice within some ten seconds that the other machine is gone, which closes nothing."""
    line.settimeout(None)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 4), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):  # Linux; elsewhere the system's own times hold
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
