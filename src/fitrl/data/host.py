"""What the host computes for a GPU: many small things, which more threads make slower."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def by_one_thread(device: torch.device) -> Iterator[None]:
    """For a GPU's sake compute on the CPU by this thread alone.

    torch shares a tensor of 32768 numbers out over every core, which takes longer than the numbers do: on a host of 64
    cores, busy with other things, 10 ms for each operation and 0.4 s for a call whose kernels took one second. Where
    the CPU is what trains, its threads are left as they are.
    """
    before = torch.get_num_threads()
    if device.type == "cpu" or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
