"""What the plugin's tests share."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

CPU = {"accelerator": "cpu", "devices": 1, "enable_model_summary": False}


def by_transformers(folder, prompt, said, temperature=1.0) -> list[float]:
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        logits = network(torch.tensor([[*prompt, *said]])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(said)[:, None]).squeeze(1).tolist()
