"""One policy update of TRL's GRPOTrainer on given token ids, for timing against another library.

What runs is TRL's own code: the trainer's constructor, padding, shuffle, ``training_step`` (its ``compute_loss`` under
its autocast, then ``accelerator.backward``), gradient clipping and optimizer. Only the generation is replaced, by the
trajectories the caller gives, and the surrounding ``Trainer.train`` loop, by ``TRLUpdate.__call__``.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset
from pyarrow import table
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import pad, shuffle_sequence_dict

Batch = dict[str, torch.Tensor]


class GivenTrajectories(GRPOTrainer):  # type: ignore[misc, unused-ignore]
    """GRPOTrainer whose training step takes a finished microbatch, where TRL would generate or look one up."""

    def _prepare_inputs(self, generation_batch: Batch) -> Batch:
        return generation_batch

    def _send_telemetry(self) -> None:
        """Do not call home."""


def no_reward(completions: list[Any], **_: Any) -> list[float | None]:
    """Stand in for the reward function TRL requires; advantages are given, so it is never called."""
    return [0.0] * len(completions)


class TRLUpdate:
    """One update of TRL's GRPOTrainer on given token ids."""

    def __init__(
        self,
        network: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        learning_rate: float,
        batch_size: int,
        gradient_checkpointing: bool,
        output_dir: str,
    ) -> None:
        """Build the trainer and its optimizer around ``network``, whose weights are float32 and change in place.

        The network is moved to the GPU where there is one; there the trainer uses bf16 mixed precision, TRL's default,
        and float32 elsewhere. ``batch_size`` is the number of trajectories of one microbatch. As every GRPOTrainer
        does, this seeds the global random generators (``seed=42``).
        """
        if any(parameter.dtype != torch.float32 for parameter in network.parameters() if parameter.requires_grad):
            raise ValueError("mixed precision wants float32 weights: load the network with dtype=torch.float32")
        self.batch_size = batch_size
        gpu = torch.cuda.is_available()
        arguments = GRPOConfig(
            output_dir=output_dir,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=2,  # set anew for each update, by the number of its microbatches
            num_generations=2,  # must divide the generation batch; groups play no part once advantages are given
            gradient_checkpointing=gradient_checkpointing,
            bf16=gpu,
            use_cpu=not gpu,
            loss_type="dapo",
            beta=0.0,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        self.trainer: Any = GivenTrajectories(
            model=network,
            reward_funcs=no_reward,
            args=arguments,
            train_dataset=Dataset(table({"prompt": ["", ""]}), fingerprint="never read"),
            processing_class=tokenizer,
        )
        # What Trainer.train does before its first step.
        if gradient_checkpointing:
            network.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments.gradient_checkpointing_kwargs)
        self.trainer.create_optimizer()
        self.model, self.trainer.optimizer = self.trainer.accelerator.prepare(network, self.trainer.optimizer)
        self.trainer.create_scheduler(num_training_steps=1)
        self.trainer.model_wrapped = self.model
        self.model.zero_grad()

    def __call__(
        self,
        prompts: list[list[int]],
        completions: list[list[int]],
        logprobs: list[list[float]],
        advantages: list[float],
    ) -> float:
        """Take one optimizer step over all trajectories and return the loss."""
        loss = self.backward(prompts, completions, logprobs, advantages)
        self.step()
        return float(loss)

    def backward(
        self,
        prompts: list[list[int]],
        completions: list[list[int]],
        logprobs: list[list[float]],
        advantages: list[float],
    ) -> torch.Tensor:
        """Add the gradient of all trajectories, microbatch by microbatch, and return the loss."""
        microbatches = list(self.microbatches(self.batch(prompts, completions, logprobs, advantages)))
        # All of a generation batch goes into one optimizer step, as in TRL's default configuration.
        self.trainer.current_gradient_accumulation_steps = len(microbatches)
        self.trainer.args.gradient_accumulation_steps = len(microbatches)
        self.trainer.args.steps_per_generation = len(microbatches)
        loss = torch.zeros((), device=self.trainer.accelerator.device)
        for microbatch in microbatches:
            loss += self.trainer.training_step(self.model, microbatch, None)
        return loss

    def step(self) -> None:
        """Clip the gradient, step the optimizer and the (constant) schedule, and clear, as Trainer's loop does."""
        trainer = self.trainer
        trainer.accelerator.clip_grad_norm_(self.model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        self.model.zero_grad()
        trainer.state.global_step += 1
        trainer._metrics["train"].clear()  # Trainer.log does so every few steps

    def batch(
        self,
        prompts: list[list[int]],
        completions: list[list[int]],
        logprobs: list[list[float]],
        advantages: list[float],
    ) -> Batch:
        """Return what ``_generate_and_score_completions`` returns: one batch, padded to the longest of them all."""
        token = self.trainer._tokenizer.pad_token_id
        mask = self.padded([[1] * len(ids) for ids in completions], 0, "right")
        return {
            "prompt_ids": self.padded(prompts, token, "left"),
            "prompt_mask": self.padded([[1] * len(ids) for ids in prompts], 0, "left"),
            "completion_ids": self.padded(completions, token, "right"),
            "completion_mask": mask,
            "advantages": torch.tensor(advantages, device=self.trainer.accelerator.device),
            "num_items_in_batch": self.trainer.accelerator.gather(mask.sum()).sum(),
            "old_per_token_logps": self.padded(logprobs, 0.0, "right"),
        }

    def padded(self, rows: Sequence[Sequence[float]], value: float, side: str) -> torch.Tensor:
        """Pad the rows to one tensor on the trainer's device, by TRL's own function."""
        tensors = [torch.tensor(row) for row in rows]
        multiple = self.trainer.pad_to_multiple_of
        tensor = pad(tensors, padding_value=value, padding_side=side, pad_to_multiple_of=multiple)
        return tensor.to(device=self.trainer.accelerator.device)

    def microbatches(self, batch: Batch) -> Iterator[Batch]:
        """Shuffle and split the batch as TRL does; the last microbatch may be smaller, which TRL does not allow."""
        batch = shuffle_sequence_dict(batch)
        for start in range(0, len(batch["advantages"]), self.batch_size):
            stop = start + self.batch_size
            yield {key: value[start:stop] if value.ndim else value for key, value in batch.items()}
