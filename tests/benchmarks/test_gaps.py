"""The report on where a rank's time went, of made-up kernels."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from gaps import Span, tell  # noqa: E402


def test_gaps_are_told_with_what_the_host_did() -> None:
    whole = Span(name="call", start=100.0, end=160.0)
    kernels = [
        Span(name="ncclDevKernel_AllReduce", start=141.0, end=150.0),
        Span(name="sm90_xmma_gemm_bf16", start=120.0, end=140.5),
        Span(name="multi_tensor_apply_kernel", start=145.0, end=158.0),
        Span(name="a_kernel", start=158.0, end=160.0),
    ]
    host = [whole, Span(name="base.join_groups", start=101.0, end=118.0), Span(name="aten::to", start=118.0, end=119.5)]
    lines = list(tell(kernels, host, whole))
    assert lines == [
        "call: 60.0 ms",
        "host: base.join_groups from 1.0 ms, 17.0 ms",
        "kernels, ms (streams overlap): NCCL 9.0, attention 0.0, matrices 20.5, optimizer 13.0, copies 0.0, other 2.0",
        "gap at 0.0 ms, 20.0 ms, between the call's start and sm90_xmma_gemm_bf16",
        "    base.join_groups 17.0; aten::to 1.5",
        "no kernel ran for 20.5 ms",
    ]
