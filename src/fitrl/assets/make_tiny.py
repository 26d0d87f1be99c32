"""Make the bundled tiny policy: a Qwen3 model of 0.4 M parameters that half knows single-digit addition.

The policy is small enough to ship with the package and to fine-tune on one CPU core in seconds, and it is
loadable by plain `transformers`. Its vocabulary is the 256 bytes (token id = byte value) and six special
tokens. It is pre-trained on the 100 chats `a+b=` -> `sum` with half of the labels wrong, until the full
correct answer has a mean probability of `TARGET_ACCURACY` when sampled at temperature 1. That leaves a
policy that mostly gives well-formed answers and that reinforcement learning can improve.

Run it as `python -m fitrl.assets.make_tiny [--out DIR]`. On one machine the output is reproducible byte for
byte; another processor or version of PyTorch may round differently.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers import logging as transformers_logging

DEFAULT_OUT = Path(__file__).parent / "tiny"

ROLE_TOKENS = ["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
END_TOKEN = "<|end|>"
PAD_TOKEN = "<|pad|>"
MAX_LENGTH = 512

CHAT_TEMPLATE = """\
{%- if tools %}
    {{- '<|system|>Tools: ' ~ (tools | tojson) ~ '<|end|>' }}
{%- endif %}
{%- for message in messages %}
    {%- set role = message['role'] %}
    {%- if role not in ['system', 'user', 'assistant', 'tool'] %}
        {{- raise_exception('Unknown role: ' ~ role) }}
    {%- endif %}
    {{- '<|' ~ role ~ '|>' }}
    {%- if role == 'assistant' %}
        {%- generation %}
            {{- message['content'] or '' }}
            {%- if message['tool_calls'] %}
                {{- message['tool_calls'] | tojson }}
            {%- endif %}
            {{- '<|end|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- (message['content'] or '') ~ '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""

PROBLEMS = list(itertools.product(range(10), repeat=2))
NUM_ANSWERS = 19
WRONG_LABEL_RATE = 0.5
TARGET_ACCURACY = 0.40

SEED = 0
LEARNING_RATE = 5e-4
WEIGHT_DECAY = 0.01
WARMUP_STEPS = 100
EVAL_EVERY = 5
MAX_STEPS = 5000
IGNORE_INDEX = -100


@dataclass(frozen=True)
class ChatTable:
    """Every problem with every possible answer, as right-padded token ids and labels.

    Attributes:
        input_ids: Token ids, shaped `[problem, answer, position]`.
        labels: `input_ids` where the assistant answers and `IGNORE_INDEX` elsewhere, in the same shape.
        correct: The index of the correct answer of each problem, shaped `[problem]`.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    correct: torch.Tensor


def byte_vocabulary() -> dict[str, int]:
    """Map the character by which byte-level BPE stands for a byte to the value of that byte."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the byte-level tokenizer with its special tokens and chat template."""
    backend = Tokenizer(models.BPE(vocab=byte_vocabulary(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([*ROLE_TOKENS, END_TOKEN, PAD_TOKEN])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        eos_token=END_TOKEN,
        pad_token=PAD_TOKEN,
        extra_special_tokens=ROLE_TOKENS,
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Build the untrained model, drawing its weights from the global random state."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attention_dropout=0.0,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=torch.float32,
    )
    model = Qwen3ForCausalLM(config)
    # The default top_k of 50 would make a plain `generate` sample from a truncated distribution.
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def build_chats(tokenizer: PreTrainedTokenizerFast) -> ChatTable:
    """Tokenize every problem with every possible answer through the chat template."""
    chats = [
        [{"role": "user", "content": f"{a}+{b}="}, {"role": "assistant", "content": str(answer)}]
        for a, b in PROBLEMS
        for answer in range(NUM_ANSWERS)
    ]
    encoded: Any = tokenizer.apply_chat_template(
        chats, return_assistant_tokens_mask=True, return_dict=True, return_tensors="pt", padding=True
    )
    input_ids: torch.Tensor = encoded["input_ids"]
    answered: torch.Tensor = encoded["assistant_masks"].bool()
    shape = (len(PROBLEMS), NUM_ANSWERS, -1)
    return ChatTable(
        input_ids=input_ids.view(shape),
        labels=input_ids.masked_fill(~answered, IGNORE_INDEX).view(shape),
        correct=torch.tensor([a + b for a, b in PROBLEMS]),
    )


def token_log_probs(model: Qwen3ForCausalLM, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of every label, zero where it is ignored, for `[chat, position]` inputs."""
    # Attention is causal and the padding is on the right, so no label attends to it.
    logits = model(input_ids=input_ids).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), labels[:, 1:], ignore_index=IGNORE_INDEX, reduction="none"
    )
    return -losses


@torch.no_grad()
def answer_probabilities(model: Qwen3ForCausalLM, chats: ChatTable) -> torch.Tensor:
    """Return the exact probability of each answer with its end token, shaped `[problem, answer]`."""
    log_probs = token_log_probs(model, chats.input_ids.flatten(0, 1), chats.labels.flatten(0, 1))
    return log_probs.sum(-1).exp().view(len(PROBLEMS), NUM_ANSWERS)


@torch.no_grad()
def sampled_accuracy(model: Qwen3ForCausalLM, chats: ChatTable) -> float:
    """Return the mean probability of the full correct answer when sampling at temperature 1."""
    rows = torch.arange(len(PROBLEMS))
    labels = chats.labels[rows, chats.correct]
    log_probs = token_log_probs(model, chats.input_ids[rows, chats.correct], labels)
    return log_probs.sum(-1).exp().mean().item()


def noisy_answers(correct: torch.Tensor) -> torch.Tensor:
    """Replace answers, at `WRONG_LABEL_RATE`, by a uniformly random other one."""
    offset = torch.randint(1, NUM_ANSWERS, correct.shape)
    wrong = torch.rand(correct.shape) < WRONG_LABEL_RATE
    return torch.where(wrong, (correct + offset) % NUM_ANSWERS, correct)


def train(model: Qwen3ForCausalLM, chats: ChatTable) -> tuple[int, float]:
    """Train on all problems with fresh noisy labels each step until the target accuracy is reached.

    Args:
        model: The model, updated in place.
        chats: The tokenized chats.

    Returns:
        The number of steps taken and the sampled accuracy reached.

    Raises:
        RuntimeError: If `MAX_STEPS` steps do not reach the target.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS))
    rows = torch.arange(len(PROBLEMS))
    accuracy = 0.0
    for step in range(1, MAX_STEPS + 1):
        answers = noisy_answers(chats.correct)
        labels = chats.labels[rows, answers]
        log_probs = token_log_probs(model, chats.input_ids[rows, answers], labels)
        loss = -log_probs.sum() / (labels != IGNORE_INDEX).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warmup.step()
        if step % EVAL_EVERY == 0:
            accuracy = sampled_accuracy(model, chats)
            if accuracy >= TARGET_ACCURACY:
                return step, accuracy
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.4f}, sampled accuracy {accuracy:.4f}", flush=True)
    raise RuntimeError(f"sampled accuracy {accuracy:.4f} after {MAX_STEPS} steps, not {TARGET_ACCURACY}")


def make(out: Path) -> None:
    """Train the policy and write it, with its tokenizer, to `out`."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(SEED)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    tokenizer = build_tokenizer()
    chats = build_chats(tokenizer)
    model = build_model(tokenizer)
    steps, accuracy = train(model, chats)
    well_formed = answer_probabilities(model, chats).sum(-1).mean().item()
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # safetensors writes it readable by its owner only
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"steps: {steps}")
    print(f"sampled accuracy: {accuracy:.4f}")
    print(f"probability of an answer in 0..{NUM_ANSWERS - 1}: {well_formed:.4f}")
    print(f"parameters: {model.num_parameters()}")
    print(f"bytes: {size} in {out}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Make the bundled tiny policy.")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="directory to write (%(default)s)")
    make(parser.parse_args(argv).out)


if __name__ == "__main__":
    main()
