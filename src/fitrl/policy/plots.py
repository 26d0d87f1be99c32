"""Pictures: the packed tensors of a step, the reward curve and metrics of a run. PNG files, by matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fitrl.data.batch import Batch
from fitrl.errors import DataError

_MOST_DRAWN = 8  # the time that a constrained layout takes explodes with more


def plot_batches(batches: Sequence[Batch], path: Path) -> Path:
    """Draw segments, advantages, and rollout and old probabilities of the first microbatches of one step."""
    from matplotlib.figure import Figure

    total = len(batches)
    batches = batches[:_MOST_DRAWN]
    figure = Figure(figsize=(12, 1 + 2.2 * len(batches) * 4 / 2), layout="constrained")
    figure.suptitle(f"microbatches of one optimizer step, {len(batches)} of {total}")
    axes = figure.subplots(len(batches) * 2, 2, squeeze=False)
    for index, batch in enumerate(batches):
        inputs, targets = batch.model_inputs, batch.loss_inputs
        segments = inputs.segment_ids.float().masked_fill(inputs.segment_ids < 0, torch.nan)
        panels: list[tuple[str, Tensor]] = [
            ("segment (blank: padding)", segments),
            ("advantage", _on_positions(targets.advantages, batch)),
            ("rollout probability", _on_positions(targets.rollout_logprobs.exp(), batch)),
            ("old probability", _on_positions(targets.old_logprobs.exp(), batch)),
        ]
        for place, (title, values) in enumerate(panels):
            axis = axes[index * 2 + place // 2][place % 2]
            image = axis.imshow(values.cpu().numpy(), aspect="auto", interpolation="nearest")
            axis.set_title(f"microbatch {index} ({batch.layout}): {title}", fontsize=9)
            axis.set_xlabel("position", fontsize=8)
            axis.set_ylabel("row", fontsize=8)
            figure.colorbar(image, ax=axis)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def plot_rewards(rewards: Sequence[float], path: Path, *, title: str, baseline: float | None = None) -> Path:
    """Draw the mean reward of each step, and its mean over ten.

    Args:
        rewards: one per step.
        path: of the PNG.
        title: of the picture.
        baseline: a reward to compare with, drawn as a dashed line.

    Raises:
        DataError: there are no rewards.
    """
    from matplotlib.figure import Figure

    if not rewards:
        raise DataError("there is no reward to plot yet")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    _curve(axis, range(1, len(rewards) + 1), rewards)
    if baseline is not None:
        axis.axhline(baseline, color="#888888", linestyle="--", linewidth=1, label="before training")
    axis.set_xlabel("step")
    axis.set_ylabel("mean reward")
    axis.set_title(title)
    axis.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def plot_metrics(series: Mapping[str, Mapping[int, float]], path: Path, *, title: str) -> Path:
    """Draw metrics by step, one below the other, each with its mean over ten.

    Args:
        series: for each metric its value by step.
        path: of the PNG.
        title: of the picture.

    Raises:
        DataError: a metric without values.
    """
    from matplotlib.figure import Figure

    for key, values in series.items():
        if not values:
            raise DataError(f"there is no {key} to plot yet")
    figure = Figure(figsize=(8, 1.2 + 3.3 * len(series)), layout="constrained")
    figure.suptitle(title)
    for (key, values), axis in zip(series.items(), figure.subplots(len(series), squeeze=False)[:, 0], strict=True):
        _curve(axis, sorted(values), [values[step] for step in sorted(values)])
        axis.set_xlabel("step")
        axis.set_ylabel(key)
        axis.legend(loc="best")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def _curve(axis: Any, steps: Sequence[int], values: Sequence[float]) -> None:
    axis.plot(steps, values, color="#9db8d6", linewidth=1, label="step")
    smooth = [sum(values[max(0, i - 9) : i + 1]) / len(values[max(0, i - 9) : i + 1]) for i in range(len(values))]
    axis.plot(steps, smooth, color="#1f4e8c", linewidth=2, label="mean of the last ten")
    axis.grid(alpha=0.3)


def _on_positions(values: Tensor, batch: Batch) -> Tensor:
    """Row values [R] on the [B, L] positions that they belong to, the mean of several; NaN elsewhere."""
    flat = torch.full((batch.num_positions,), torch.nan)
    flat.scatter_reduce_(0, batch.loss_inputs.rows, values.float(), "mean", include_self=False)
    return flat.view(batch.model_inputs.input_ids.shape)
