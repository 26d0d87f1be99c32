"""The fused policy loss against its peers and against the matrix products it cannot do without, on one GPU.

    python benchmarks/kernel.py [--shapes 8192x2048x151936 ...] [--variants default exact TRL ...]

Every variant is checked against float64 before it is timed. Peers are used where they are installed: trl, liger-kernel
(its SM90 kernel also needs nvidia-cutlass-dsl and apache-tvm-ffi), cut-cross-entropy, verl. Writes kernel.json and
kernel.md to the output folder.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import json
import platform
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fitrl
from fitrl.objective.logprobs import linear_logprobs, logits_logprobs
from fitrl.objective.policy_loss import policy_loss

SHAPES = ("8192x2048x151936", "16384x4096x128256", "4096x1024x151936")
MODES = ("full", "frozen", "half masked")
PPO = fitrl.Objective(ppo=True)
# ours / the products alone, at most; frozen heads have two products
TARGETS = {
    ("8192x2048x151936", "fitrl"): 1.20,
    ("16384x4096x128256", "fitrl"): 1.12,
    ("4096x1024x151936", "fitrl"): 1.42,
    ("8192x2048x151936", "fitrl, exact"): 1.35,
    ("16384x4096x128256", "fitrl, exact"): 1.20,
    ("4096x1024x151936", "fitrl, exact"): 1.65,
}


@dataclass(slots=True, kw_only=True, eq=False)
class Case:
    """Inputs of one shape and mode; logits have a standard deviation of 1, half of a batch is masked in runs of 256."""

    hidden: Tensor  # [T, H] bf16, leaf
    weight: Tensor  # [V, H] bf16, leaf or frozen
    targets: Tensor  # [T]
    old_logprobs: Tensor  # [T] float32, near the new ones: about 4 % of the tokens are clipped
    advantages: Tensor  # [T]
    mask: Tensor  # [T] bool
    mask_on_host: Tensor  # the same, as packing makes it
    trajectory_ids: Tensor  # [T], 8 trajectories
    logprobs: Tensor  # [T] float64, the truth
    d_hidden: Tensor  # [T, H] float64, the truth
    d_weight: Tensor | None  # [V, H] float64, the truth


def make_case(tokens: int, width: int, vocabulary: int, mode: str, *, seed: int = 0) -> Case:
    """Random inputs, and loss and gradients in float64 by explicit logits, 1024 rows at a time."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=dtype)

    hidden = normal(tokens, width, dtype=torch.bfloat16)
    weight = normal(vocabulary, width, dtype=torch.bfloat16) * width**-0.5
    targets = torch.randint(vocabulary, (tokens,), generator=generator, device="cuda")
    position = torch.arange(tokens, device="cuda")
    mask = position % 512 >= 256 if mode == "half masked" else torch.ones(tokens, dtype=torch.bool, device="cuda")
    advantages, ids = normal(tokens), position // max(1, tokens // 8)
    h, w = hidden.double(), weight.double()

    def log_softmax(start: int) -> Tensor:
        return (h[start : start + 1024] @ w.t()).log_softmax(dim=1)

    starts = range(0, tokens, 1024)
    truth = torch.cat([log_softmax(s).gather(1, targets[s : s + 1024, None]).squeeze(1) for s in starts])
    truth.requires_grad_()
    old = (truth.detach() + 0.1 * normal(tokens)).float()
    loss = policy_loss(truth, old.double(), advantages.double(), mask, ids, PPO).loss
    (slope,) = torch.autograd.grad(loss, truth)
    d_hidden, d_weight = torch.empty_like(h), torch.zeros_like(w) if mode != "frozen" else None
    for s in starts:
        d_logits = log_softmax(s).exp_().mul_(-slope[s : s + 1024, None])
        d_logits.scatter_add_(1, targets[s : s + 1024, None], slope[s : s + 1024, None])
        torch.mm(d_logits, w, out=d_hidden[s : s + 1024])
        if d_weight is not None:
            d_weight.addmm_(d_logits.t(), h[s : s + 1024])
        del d_logits
    return Case(
        hidden=hidden.requires_grad_(),
        weight=weight.requires_grad_(mode != "frozen"),
        targets=targets,
        old_logprobs=old,
        advantages=advantages,
        mask=mask,
        mask_on_host=mask.cpu(),
        trajectory_ids=ids,
        logprobs=truth.detach(),
        d_hidden=d_hidden,
        d_weight=d_weight,
    )


# -- variants: each returns the loss, and the logprobs where the implementation tells them ----------------------------

Variant = Callable[[Case], tuple[Tensor, Tensor | None]]


def ours(**options: Any) -> Variant:
    """`fused_linear_policy_loss`, as packing calls it: the mask is known on the host."""

    def run(case: Case) -> tuple[Tensor, Tensor | None]:
        result = fitrl.fused_linear_policy_loss(
            case.hidden,
            case.weight,
            case.targets,
            case.old_logprobs,
            case.advantages,
            case.mask_on_host,
            case.trajectory_ids,
            options.get("objective", PPO),
            exact_logits=options.get("exact", False),
        )
        return result.loss, result.logprobs

    return run


def ppo_loss(case: Case, logprobs: Tensor) -> Tensor:
    """The same loss for peers that return logprobs of all rows, in as few operations as possible."""
    ratio = (logprobs - case.old_logprobs).exp()
    token = -torch.minimum(ratio * case.advantages, ratio.clamp(0.8, 1.2) * case.advantages)
    return torch.where(case.mask, token, 0.0).sum() / case.mask.sum()


def selected(case: Case) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """Hidden states and targets of masked-in rows, and the way back, for peers that skip the others themselves."""
    if bool(case.mask_on_host.all()):
        return case.hidden, case.targets, lambda values: values
    index = case.mask_on_host.nonzero().squeeze(1).cuda(non_blocking=True)
    return (
        case.hidden.index_select(0, index),
        case.targets.index_select(0, index),
        lambda values: case.old_logprobs.index_copy(0, index, values.to(case.old_logprobs.dtype)),
    )


def eager(case: Case) -> tuple[Tensor, Tensor]:
    """All logits, float32 log-softmax."""
    logprobs = (case.hidden @ case.weight.t()).float().log_softmax(dim=1)
    logprobs = logprobs.gather(1, case.targets[:, None]).squeeze(1)
    return ppo_loss(case, logprobs), logprobs


def compiled() -> Variant:
    """The same under torch.compile."""

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Any:
        logprobs = (hidden @ weight.t()).float().log_softmax(dim=1).gather(1, targets[:, None]).squeeze(1)
        ratio = (logprobs - old).exp()
        token = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        return torch.where(mask, token, 0.0).sum() / mask.sum(), logprobs

    function = torch.compile(loss, dynamic=False)
    return lambda case: function(case.hidden, case.weight, case.targets, case.old_logprobs, case.advantages, case.mask)


def trl() -> Variant:
    """TRL's chunked logprobs, with the chunk size of its trainer."""
    function = importlib.import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction
    importlib.import_module("trl.trainer.utils")  # its backward imports it

    def run(case: Case) -> tuple[Tensor, Tensor]:
        hidden, targets, back = selected(case)
        logprobs = back(function.apply(hidden, case.weight, None, targets, 1.0, 32768, None, 1.0, ())[0])
        return ppo_loss(case, logprobs), logprobs

    return run


def cce() -> Variant:
    """Apple's cut cross-entropy; ignored targets skip their rows."""
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy

    def run(case: Case) -> tuple[Tensor, Tensor]:
        targets = torch.where(case.mask, case.targets, -100)
        logprobs = -function(case.hidden, case.weight, targets, reduction="none").float()
        return ppo_loss(case, logprobs), logprobs

    return run


def liger_sm90() -> Variant:
    """Liger's CuTe kernel for Hopper."""
    module = importlib.import_module("liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90")

    def run(case: Case) -> tuple[Tensor, Tensor]:
        targets = torch.where(case.mask, case.targets, -100)
        logprobs = -module.LigerFusedScaledCrossEntropySM90Function.apply(case.hidden, case.weight, targets).float()
        return ppo_loss(case, logprobs), logprobs

    return run


def liger_grpo() -> Variant:
    """Liger's fused linear GRPO loss: 8 sequences, one at a time."""
    module = importlib.import_module("liger_kernel.chunked_loss.grpo_loss")
    loss = module.LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="bnpo", temperature=1.0)

    def run(case: Case) -> tuple[Tensor, None]:
        rows = (8, -1)
        result = loss(
            case.hidden.view(8, -1, case.hidden.shape[1]),
            case.weight,
            case.targets.view(rows),
            case.mask.view(rows).float(),
            case.advantages.view(rows)[:, 0].contiguous(),
            old_per_token_logps=case.old_logprobs.view(rows),
        )
        return result[0], None

    return run


def verl() -> Variant:
    """The Triton linear cross-entropy of verl, imported beside its __init__, which wants a whole cluster's stack."""
    if "verl" not in sys.modules:
        spec = importlib.util.find_spec("verl")
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError("No module named 'verl'")
        for name in ("verl", "verl.utils", "verl.utils.kernel"):
            package = types.ModuleType(name)
            package.__path__ = [str(Path(spec.submodule_search_locations[0], *name.split(".")[1:]))]
            sys.modules[name] = package
    function = importlib.import_module("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy

    def run(case: Case) -> tuple[Tensor, Tensor]:
        logprobs, _ = function(case.hidden, case.weight, case.targets, 1.0, "none", None)
        return ppo_loss(case, logprobs), logprobs

    return run


VARIANTS: dict[str, Callable[[], Variant]] = {
    "fitrl": lambda: ours(),
    "fitrl, exact": lambda: ours(exact=True),
    "fitrl, sequence-level ratios": lambda: ours(
        objective=fitrl.Objective(ppo=True, importance_sampling_level="sequence")
    ),
    "eager, full logits": lambda: eager,
    "torch.compile, full logits": compiled,
    "TRL": trl,
    "Apple CCE": cce,
    "Liger SM90": liger_sm90,
    "Liger fused GRPO": liger_grpo,
    "verl": verl,
}
# another loss than the reference's, so that its gradient has nothing to be compared with
OTHER_LOSS = ("fitrl, sequence-level ratios", "Liger fused GRPO")


# -- measuring --------------------------------------------------------------------------------------------------------


class Clock:
    """Medians by CUDA events, with a cold L2 before each run.

    The device is given some milliseconds of other work first, as it has in training, where the layers' work is queued
    before: what is timed is the device, not how fast Python fills the queue. That is in `host_ms`.
    """

    def __init__(self) -> None:
        self.flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")

    def __call__(
        self, run: Callable[[], Any], *, repeats: int, before: Callable[[], Any] = lambda: None, budget_ms: float = 3000
    ) -> dict[str, float]:
        """Median, fastest and slowest milliseconds; stops early when the budget is spent, after 3 runs at least."""
        times: list[float] = []
        host: list[float] = []
        for i in range(repeats + 2):
            before()
            for _ in range(48):
                self.flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            begun = time.perf_counter()
            run()
            queued = time.perf_counter() - begun
            end.record()
            end.synchronize()
            if i >= 2:
                times.append(start.elapsed_time(end))
                host.append(1e3 * queued)
                if len(times) >= 3 and sum(times) > budget_ms:
                    break
        return {
            "ms": statistics.median(times),
            "fastest_ms": min(times),
            "slowest_ms": max(times),
            "host_ms": statistics.median(host),
            "runs": len(times),
        }


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Norm of the difference by norm of the truth, 4096 rows at a time."""
    off = torch.zeros((), dtype=torch.float64, device=truth.device)
    for rows in range(0, len(truth), 4096):
        off += (found[rows : rows + 4096].double() - truth[rows : rows + 4096]).square().sum()
    return float(off.sqrt() / truth.norm())


def products(case: Case, clock: Clock, repeats: int) -> dict[str, float]:
    """The products of the full batch that every loss has to do: logits, d hidden, and d weight unless it is frozen."""
    hidden, weight = case.hidden.detach(), case.weight.detach()
    logits = hidden.new_empty((len(hidden), len(weight)))
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> None:
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits, weight, out=d_hidden)
        if case.weight.requires_grad:
            torch.mm(logits.t(), hidden, out=d_weight)

    return clock(run, repeats=repeats)


def measure(case: Case, variant: Variant, name: str, clock: Clock, repeats: int) -> dict[str, Any]:
    """Check one variant, then its memory, then its time."""

    def run() -> Tensor | None:
        case.hidden.grad = case.weight.grad = None
        loss, logprobs = variant(case)
        loss.backward()
        return logprobs

    run()
    torch.cuda.synchronize()
    case.hidden.grad = case.weight.grad = None
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    logprobs = run()
    gradients = sum(g.numel() * g.element_size() for g in (case.hidden.grad, case.weight.grad) if g is not None)
    row: dict[str, Any] = {
        "extra_gib": (torch.cuda.max_memory_allocated() - before - gradients) / 2**30,
        "logprob_error": None,
        "logprob_error_rms": None,
        "d_hidden_error": None,
        "d_weight_error": None,
    }
    if logprobs is not None:
        off = (logprobs.detach().double() - case.logprobs)[case.mask]
        row["logprob_error"], row["logprob_error_rms"] = float(off.abs().max()), float(off.square().mean().sqrt())
    if name not in OTHER_LOSS:
        row["d_hidden_error"] = relative_error(case.hidden.grad, case.d_hidden)
        if case.d_weight is not None:
            row["d_weight_error"] = relative_error(case.weight.grad, case.d_weight)
    del logprobs
    row |= clock(run, repeats=repeats, budget_ms=3000 if name.startswith("fitrl") else 1000)
    case.hidden.grad = case.weight.grad = None
    return row


def measure_shape(shape: str, args: argparse.Namespace, clock: Clock) -> Iterator[list[dict[str, Any]]]:
    """All variants of a shape, mode by mode."""
    variants: dict[str, Variant | str] = {}
    for name in args.variants:
        try:
            variants[name] = VARIANTS[name]()
        except (ImportError, AttributeError, OSError) as error:
            print(name, error, flush=True)
            variants[name] = "not installed"
    for mode in args.modes:
        rows: list[dict[str, Any]] = []
        case = make_case(*map(int, shape.split("x")), mode)
        limit = products(case, clock, args.repeats)
        for name, variant in variants.items():
            row: dict[str, Any] = {"shape": shape, "mode": mode, "variant": name}
            if isinstance(variant, str):
                row["note"] = variant
            else:
                try:
                    row |= measure(case, variant, name, clock, args.repeats)
                except Exception as error:  # a peer that fails is a row of the table, not the end of it
                    if name.startswith("fitrl"):
                        raise
                    row["note"] = f"failed: {str(error).strip().splitlines()[-1][:160] if str(error) else error!r}"
                case.hidden.grad = case.weight.grad = None
                gc.collect()
                torch.cuda.empty_cache()
            rows.append(row)
            print(shape, mode, name, row.get("ms", row.get("note")), flush=True)
        again = products(case, clock, args.repeats)
        limit_ms = (limit["ms"] + again["ms"]) / 2
        rows.append(
            {"shape": shape, "mode": mode, "variant": "products alone", **limit, "ms": limit_ms, "again": again["ms"]}
        )
        for row in rows:
            if "ms" in row:
                row["of_products"] = row["ms"] / limit_ms
        print(shape, mode, "products", limit["ms"], again["ms"], flush=True)
        if mode == "full" and args.scores:
            rows += measure_scores(shape, case, clock, args.repeats)
        del case
        gc.collect()
        torch.cuda.empty_cache()
        yield rows
    torch._dynamo.reset()


def measure_scores(shape: str, case: Case, clock: Clock, repeats: int) -> list[dict[str, Any]]:
    """Logprobs without grad, 1024 rows at a time, against one product of the same size."""
    rows = []
    for exact in (False, True):

        @torch.no_grad()
        def run(exact: bool = exact) -> Tensor:
            return linear_logprobs(case.hidden, case.weight, case.targets, rows_per_tile=1024, exact_logits=exact)[0]

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        off = (run().double() - case.logprobs).abs()
        row = {
            "shape": shape,
            "mode": "no grad",
            "variant": f"linear_logprobs{', exact' if exact else ''}",
            "extra_gib": (torch.cuda.max_memory_allocated() - before) / 2**30,
            "logprob_error": float(off.max()),
            **clock(run, repeats=repeats),
        }
        logits = torch.empty(len(case.hidden), len(case.weight), dtype=torch.bfloat16, device="cuda")
        one = clock(
            lambda logits=logits: torch.mm(case.hidden.detach(), case.weight.detach().t(), out=logits), repeats=repeats
        )
        row["of_products"] = row["ms"] / one["ms"]
        rows.append(row)
        del logits
    return rows


def measure_logits_given(clock: Clock, repeats: int) -> list[dict[str, Any]]:
    """Loss and gradient from logits [4, 1024, 151936] bf16, against reading them twice and writing them once."""
    torch.manual_seed(0)
    source = torch.randn(4, 1024, 151936, device="cuda", dtype=torch.bfloat16) * 2.0
    leaf = torch.empty_like(source)
    floor = 1.5 * clock(lambda: leaf.copy_(source), repeats=repeats)["ms"]
    leaf.requires_grad_()
    flat = source.view(4096, -1)
    targets = torch.randint(151936, (4096,), device="cuda")
    truth = torch.cat(
        [flat[s : s + 512].double().log_softmax(1).gather(1, targets[s : s + 512, None]) for s in range(0, 4096, 512)]
    ).squeeze(1)
    old = (truth + 0.1 * torch.randn_like(truth)).float()
    advantages = torch.randn(4, device="cuda").repeat_interleave(1024)
    mask, ids = torch.ones(4096, dtype=torch.bool, device="cuda"), torch.arange(4096, device="cuda") // 1024
    wide = truth.requires_grad_()
    (slope,) = torch.autograd.grad(policy_loss(wide, old.double(), advantages.double(), mask, ids, PPO).loss, wide)

    def restore() -> None:
        leaf.grad = None
        with torch.no_grad():
            leaf.copy_(source)

    def fitrl_loss() -> None:
        logprobs, _ = logits_logprobs(leaf.view(4096, -1), targets, in_place=True)
        policy_loss(logprobs, old, advantages, mask, ids, PPO).loss.backward()

    def plain(logits: Tensor) -> Tensor:
        logprobs = logits.view(4096, -1).float().log_softmax(1).gather(1, targets[:, None]).squeeze(1)
        ratio = (logprobs - old).exp()
        return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()

    variants: dict[str, Callable[[], Any] | str] = {
        "fitrl logits_logprobs, in place": fitrl_loss,
        "eager": lambda: plain(leaf).backward(),
    }
    function = torch.compile(plain, dynamic=False)
    variants["torch.compile"] = lambda: function(leaf).backward()
    try:
        liger = importlib.import_module("liger_kernel.transformers.grpo_loss").triton_grpo_loss

        def liger_loss() -> None:
            padded = leaf  # its last position has no target: 1023 tokens of each row
            liger(
                padded,
                old.view(4, 1024)[:, 1:].contiguous(),
                None,
                targets.view(4, 1024)[:, 1:].contiguous(),
                advantages.view(4, 1024)[:, 0].contiguous(),
                None,
                1.0,
                0.0,
                0.2,
                0.2,
                True,
                loss_type="bnpo",
                reduce=True,
            )[0].backward()

        variants["Liger Triton GRPO, in place"] = liger_loss
    except ImportError as error:
        print(error, flush=True)
        variants["Liger Triton GRPO, in place"] = "not installed"
    rows: list[dict[str, Any]] = [
        {"shape": "4x1024x151936 logits", "mode": "given", "variant": "read + read + write at copy speed", "ms": floor}
    ]
    for name, run in variants.items():
        row: dict[str, Any] = {"shape": "4x1024x151936 logits", "mode": "given", "variant": name}
        if isinstance(run, str):
            rows.append(row | {"note": run})
            continue
        try:
            restore()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            row["extra_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
            if "Liger" not in name and leaf.grad is not None:
                grad = leaf.grad.view(4096, -1)[:256].double()
                want = flat[:256].double().softmax(1) * -slope[:256, None]
                want.scatter_add_(1, targets[:256, None], slope[:256, None])
                row["d_hidden_error"] = float((grad - want).norm() / want.norm())
                del grad, want
            row |= clock(run, repeats=repeats, before=restore)
            row["of_products"] = row["ms"] / floor
        except Exception as error:
            if name.startswith("fitrl"):
                raise
            row["note"] = f"failed: {str(error).strip().splitlines()[-1][:160] if str(error) else error!r}"
        rows.append(row)
        print(name, row.get("ms", row.get("note")), flush=True)
    return rows


# -- results ----------------------------------------------------------------------------------------------------------


def installed(package: str) -> str:
    """Version of a package, or a dash."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "-"


def cell(row: dict[str, Any], key: str, form: str) -> str:
    """One cell of a table."""
    return "" if row.get(key) is None else format(row[key], form)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown tables, one a shape and mode."""
    lines: list[str] = []
    for shape, mode in dict.fromkeys((row["shape"], row["mode"]) for row in rows):
        lines += [
            f"\n## {shape}, {mode}\n",
            "| variant | ms | of the limit | target | extra GiB "
            "| logprobs: max error | rms | d hidden | d weight | host ms |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            if (row["shape"], row["mode"]) != (shape, mode):
                continue
            target = TARGETS.get((shape, row["variant"])) if mode != "half masked" else None
            cells = [
                row["variant"],
                cell(row, "ms", ".2f") or row.get("note", ""),
                cell(row, "of_products", ".3f"),
                "" if target is None else f"<= {target:.2f}",
                cell(row, "extra_gib", ".2f"),
                *(
                    cell(row, key, ".1e")
                    for key in ("logprob_error", "logprob_error_rms", "d_hidden_error", "d_weight_error")
                ),
                cell(row, "host_ms", ".1f"),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def report(facts: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The markdown page."""
    about = "\n".join(
        f"* {key}: {', '.join(f'{k} {v}' for k, v in value.items()) if isinstance(value, dict) else value}"
        for key, value in facts.items()
    )
    return (
        "# The fused policy loss on one GPU\n\n"
        "Forward and backward of the PPO-clip token-mean loss from `hidden [T, H]` and `lm_head [V, H]` in bf16;\n"
        "shapes are T x H x V. `of the limit` divides by the matrix products that any loss has to do, on the full\n"
        "batch, measured before and after the variants of the same table: logits, d hidden and d weight (frozen: two;\n"
        "no grad: one). Medians by CUDA events, L2 flushed, the device given other work first so that Python does not\n"
        "hold it up; `host ms` is how long Python took to queue a step. Errors are against float64, those of\n"
        "gradients relative. Extra memory is the peak above inputs and gradients; where rows are cut into tiles it\n"
        "holds the float32 accumulator of d weight.\n"
        f"{table(rows)}\n\n{about}\n\nWhat was predicted, what came, and what missed: kernel_notes.md.\n"
    )


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), help="T x H x V, joined by x")
    parser.add_argument("--modes", nargs="*", default=list(MODES), choices=MODES)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--no-logits", dest="logits", action="store_false", help="skip the logits-given loss")
    parser.add_argument("--no-scores", dest="scores", action="store_false", help="skip logprobs without grad")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--commit", default="unknown")
    args = parser.parse_args()
    clock = Clock()
    rows: list[dict[str, Any]] = []
    args.output.mkdir(parents=True, exist_ok=True)
    facts = {
        "hardware": torch.cuda.get_device_name(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: installed(name) for name in ("triton", "trl", "liger-kernel", "cut-cross-entropy", "verl")},
            "fitrl": fitrl.__version__,
        },
        "commit": args.commit,
        "command": f"python benchmarks/kernel.py --repeats {args.repeats}",
    }

    def write() -> None:
        (args.output / "kernel.json").write_text(json.dumps(facts | {"rows": rows}, indent=1))
        (args.output / "kernel.md").write_text(report(facts, rows))

    if args.logits:  # first: a peer that is imported later changes settings of torch.compile
        rows += measure_logits_given(clock, args.repeats)
    for shape in args.shapes:
        for part in measure_shape(shape, args, clock):
            rows += part
            write()
    print(table(rows))


if __name__ == "__main__":
    main()
