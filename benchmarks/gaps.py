"""Where one rank's time goes: what its device did, when it waited, and what the host did meanwhile.

Enters: a call, of `fit_rl` say. Leaves: a report: kernels by kind, phases of the call on the host, and each gap between
kernels that is longer than a millisecond, with the host's operations in it. Profiling makes the host slower by itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from fitrl.trainers import base

KINDS = {
    "NCCL": r"nccl",
    "attention": r"flash|fmha|attention|attn|varlen",
    "matrices": r"gemm|cutlass|nvjet|xmma|cublas|wgmma|splitk",
    "optimizer": r"adam|multi_tensor|foreach|lpnorm",
    "copies": r"memcpy|memset",
    "other": r"",
}
"""Kinds of kernels, by what their names hold; the first that fits."""
LEAST_MS = 1.0
# of a call, in their order; each is named in the report
PHASES = (
    (base, "join_groups"),
    (base.RLTrainer, "_read"),
    (base.RLTrainer, "_plan"),
    (base.RLTrainer, "_run_epoch"),
    (base.RLTrainer, "_publish"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Something that took its time; milliseconds since the profile began."""

    name: str
    start: float
    end: float

    def within(self, start: float, end: float) -> float:
        """How much of it lies between two moments."""
        return max(0.0, min(self.end, end) - max(self.start, start))


def report(call: Callable[[], Any]) -> str:
    """Run a call under torch's profiler, and say where its time went."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with _named_phases(), profile(activities=activities) as seen, record_function("call"):
        call()
    kernels, host, device = [], [], DeviceType.CUDA
    for event in seen.events() or ():
        span = Span(name=event.name, start=event.time_range.start / 1e3, end=event.time_range.end / 1e3)
        if event.device_type != device:
            host.append(span)
        elif not getattr(event, "is_user_annotation", False):
            kernels.append(span)
    [whole] = [span for span in host if span.name == "call"]
    return "\n".join(tell(kernels, host, whole))


def tell(kernels: list[Span], host: list[Span], whole: Span) -> Iterator[str]:
    """The report's lines, of one device's kernels and the host's operations during a call."""
    yield f"call: {whole.end - whole.start:.1f} ms"
    for owner, name in PHASES:
        for span in sorted((span for span in host if span.name == _label(owner, name)), key=lambda span: span.start):
            yield f"host: {span.name} from {span.start - whole.start:.1f} ms, {span.end - span.start:.1f} ms"
    if not kernels:
        yield "no kernels: a CPU computed"
        return
    kinds = dict.fromkeys(KINDS, 0.0)
    for kernel in kernels:
        kind = next(kind for kind, pattern in KINDS.items() if re.search(pattern, kernel.name, re.IGNORECASE))
        kinds[kind] += kernel.end - kernel.start
    yield "kernels, ms (streams overlap): " + ", ".join(f"{kind} {taken:.1f}" for kind, taken in kinds.items())
    kernels = sorted(kernels, key=lambda kernel: kernel.start)
    ended, last, waited = whole.start, "the call's start", 0.0
    for kernel in [*kernels, Span(name="the call's end", start=whole.end, end=whole.end)]:
        gap = kernel.start - ended
        waited += max(0.0, gap)
        if gap >= LEAST_MS:
            yield f"gap at {ended - whole.start:.1f} ms, {gap:.1f} ms, between {last:.60} and {kernel.name:.60}"
            inside = sorted(host, key=lambda span: -span.within(ended, kernel.start))
            inside = [span for span in inside if span is not whole and span.within(ended, kernel.start) > gap / 20]
            yield "    " + "; ".join(f"{span.name:.50} {span.within(ended, kernel.start):.1f}" for span in inside[:8])
        if kernel.end > ended:
            ended, last = kernel.end, kernel.name
    yield f"no kernel ran for {waited:.1f} ms"


@contextmanager
def _named_phases() -> Iterator[None]:
    with ExitStack() as stack:
        for owner, name in PHASES:
            stack.enter_context(mock.patch.object(owner, name, _named(getattr(owner, name), _label(owner, name))))
        yield


def _named(function: Callable[..., Any], label: str) -> Callable[..., Any]:
    def named(*args: Any, **kwargs: Any) -> Any:
        with record_function(label):
            return function(*args, **kwargs)

    return named


def _label(owner: Any, name: str) -> str:
    return f"{owner.__name__.rpartition('.')[2]}.{name}"
