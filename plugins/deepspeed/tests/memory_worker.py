"""What one rank's memory was while a policy was cut for stage 3, as JSON; Linux only.

torchrun ... memory_worker.py BASE_MODEL OUTPUT PRECISION     each rank writes OUTPUT.<rank>
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401 - before anything is measured
import torch

import fitrl
from fitrl_deepspeed import DeepSpeedRLStrategy, DeepSpeedTrainer


def resident(peak: bool = False) -> int:
    """Bytes of this process's memory, now or at their most since `forget_peak`."""
    status = Path("/proc/self/status").read_text()
    [kilobytes] = re.findall(rf"^{'VmHWM' if peak else 'VmRSS'}:\s+(\d+) kB$", status, re.MULTILINE)
    return int(kilobytes) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    torch.set_num_threads(1)
    base_model, output, precision = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    seen: dict[str, Any] = {}
    shard = DeepSpeedRLStrategy.shard

    def measured(self: Any, policy: Any, **options: Any) -> Any:
        seen["weights"] = sum(parameter.nbytes for parameter in policy.network.parameters())
        seen["largest"] = max(parameter.nbytes for parameter in policy.network.parameters())
        forget_peak()
        before = resident()
        cut = shard(self, policy, **options)
        seen["more"] = resident(peak=True) - before
        seen["given back"] = before - resident()
        return cut

    DeepSpeedRLStrategy.shard = measured  # type: ignore[method-assign]
    with DeepSpeedTrainer(
        zero_stage=3, accelerator="cpu", devices=2, precision=precision, enable_model_summary=False
    ) as trainer:
        trainer.open(fitrl.TrainableModel("memory", "zero", base_model, lora=None, root=output.parent))
    output.with_name(f"{output.name}.{os.environ['RANK']}").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
