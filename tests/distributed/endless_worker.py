"""A rank that trains until it is told to stop; rank 0 says each step.

torchrun ... endless_worker.py ROOT
"""

from __future__ import annotations

import os
import sys

import torch

import fitrl
from samples import make_groups


def main() -> None:
    torch.set_num_threads(1)
    model = fitrl.TrainableModel("endless", "ddp", "tiny", lora=None, root=sys.argv[1])
    accelerator = os.environ.get("FITRL_TEST_ACCELERATOR", "cpu")
    options = {"accelerator": accelerator, "devices": 2, "strategy": "fitrl_ddp", "enable_model_summary": False}
    with fitrl.LocalTrainer(**options) as trainer:
        while True:
            step = trainer.fit_rl(
                model, make_groups(seed=1), learning_rate=1e-3, num_minibatches=2, save_checkpoint=False
            ).step
            if os.environ["RANK"] == "0":
                print(f"step {step}", flush=True)


if __name__ == "__main__":
    main()
