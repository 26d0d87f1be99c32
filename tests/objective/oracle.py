"""The objective in plain Python floats, one token at a time, written from the objective's text, not from its code.

`live` logprobs are what a finite difference moves; `fixed` ones are what every stop-gradient sees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class Oracle:
    """What the objective says of a batch.

    Attributes:
        loss, policy, kl, entropy: aggregated; `kl` without its coefficient.
        ratios: of the tokens that count, in order.
        window: (low, high).
        branches: which side of each kink every token is on, so that a difference quotient can tell a crossing.
    """

    loss: float = 0.0
    policy: float = 0.0
    kl: float = 0.0
    entropy: float = 0.0
    ratios: list[float] = field(default_factory=list)
    window: tuple[float, float] = (0.0, 0.0)
    branches: list[object] = field(default_factory=list)


def bounded(x: float) -> float:
    return min(max(x, -20.0), 20.0)


def window_of(options: dict) -> tuple[float, float]:
    low, high = options.get("epsilon"), options.get("epsilon_high")
    if options.get("ppo", False):
        low = 0.2 if low is None else low
        high = low if high is None else high
    else:
        low = 1.0 if low is None else low
        high = 4.0 if high is None else high
    return 1.0 - low, 1.0 + high


def policy_loss(
    live: list[float],
    q: list[float],
    advantages: list[float],
    mask: list[bool],
    ids: list[int],
    options: dict,
    *,
    o: list[float] | None = None,
    ref: list[float] | None = None,
    entropies: list[float] | None = None,
    num_tokens: float | None = None,
    num_sequences: float | None = None,
    kl_mean: float | None = None,
    fixed: list[float] | None = None,
) -> Oracle:
    fixed = live if fixed is None else fixed
    rows = [t for t in range(len(live)) if mask[t]]
    members: dict[int, list[int]] = {}
    for t in rows:
        members.setdefault(ids[t], []).append(t)
    num_tokens = len(rows) if num_tokens is None else num_tokens
    num_sequences = len(members) if num_sequences is None else num_sequences
    old = {t: fixed[t] if math.isnan(q[t]) else q[t] for t in rows}
    get = options.get
    low, high = window_of(options)
    out = Oracle(window=(low, high))

    def ratio(p: list[float], t: int) -> float:
        rho = math.exp(bounded(p[t] - old[t]))
        level = get("importance_sampling_level", "token")
        if level != "token":
            own = members[ids[t]]
            s = math.exp(sum(bounded(p[u] - old[u]) for u in own) / len(own))
            r = {"sequence": s, "average": (rho + s) / 2, "geometric_average": math.sqrt(rho * s)}[level]
        else:
            r = rho
        cap = get("max_negative_advantage_importance_sampling_weight")
        return min(r, cap) if cap is not None and advantages[t] < 0 else r

    def clip(r: float) -> float:
        return min(max(r, low), high)

    beta, place = get("kl_coef", 0.0), get("kl_in", "loss")
    estimator = get("kl_estimator") or {"loss": "k2", "advantage": "k1"}[place]
    if beta > 0 and place == "advantage" and kl_mean is None:
        kl_mean = sum(old[t] - ref[t] for t in rows) / max(len(rows), 1)

    policy, kl, entropy = {}, {}, {}
    for t in rows:
        a, p = advantages[t], live[t]
        r, frozen = ratio(live, t), ratio(fixed, t)
        cap = get("max_negative_advantage_importance_sampling_weight")
        out.ratios.append(r)
        out.branches += [abs(p - old[t]) > 20, r < low, r > high, a < 0 and cap is not None and r >= cap]
        if get("kimi_k2_tau"):
            a -= get("kimi_k2_tau") * bounded(fixed[t] - old[t])
        kl[t] = 0.0
        if beta > 0 and place == "advantage":
            a += beta * (kl_mean - (old[t] - ref[t]))
        elif beta > 0 and estimator == "k2":
            kl[t] = (p - ref[t]) ** 2 / 2
        elif beta > 0 and estimator == "k3":
            kl[t] = math.exp(bounded(ref[t] - p)) - bounded(ref[t] - p) - 1
            out.branches.append(abs(ref[t] - p) > 20)
        if get("ppo", False):
            delta = get("ratio_cap")
            unclipped = r if delta is None else min(r, delta)
            value = -min(unclipped * a, clip(r) * a)
            out.branches.append(delta is not None and r > delta)
            if get("dual_clip") is not None and a < 0:
                out.branches.append(value > -get("dual_clip") * a)
                value = min(value, -get("dual_clip") * a)
        else:
            value = -clip(frozen) * a * p
        if get("mask_prob_ratio", False) and not low < r < high:
            value = 0.0
        truncate = get("truncated_importance_sampling")
        if truncate is not None and math.isfinite(o[t]):
            # a NaN q is sg(p), so this weight never moves
            value *= min(math.exp(bounded(old[t] - o[t])), truncate)
        policy[t] = value
        entropy[t] = entropies[t] if entropies is not None else 0.0

    def aggregate(values: dict[int, float]) -> float:
        kind = get("loss_aggregation", "token_mean")
        if not rows:
            return 0.0
        if kind == "token_sum":
            return sum(values.values())
        if kind == "token_mean":
            return sum(values.values()) / num_tokens
        sums = [sum(values[t] for t in own) for own in members.values()]
        if kind == "seq_mean_token_mean":
            sums = [x / len(own) for x, own in zip(sums, members.values(), strict=True)]
        total = sum(sums) / num_sequences
        return total / get("norm_length") if kind == "seq_mean_token_sum_norm" else total

    out.policy, out.kl, out.entropy = aggregate(policy), aggregate(kl), aggregate(entropy)
    coefficient = get("entropy_coef", 0.0)
    out.loss = aggregate({t: policy[t] + beta * kl[t] - coefficient * entropy[t] for t in rows})
    return out


def gradient(
    p: list[float], *rest: object, step: float = 1e-5, **keywords: object
) -> tuple[list[float | None], list[float]]:
    """Central differences by every logprob, stop-gradients held still; None next to a kink. And by the entropies."""

    def moved(values: list[float], t: int, by: float) -> list[float]:
        return [x + by if u == t else x for u, x in enumerate(values)]

    here = policy_loss(p, *rest, **keywords).branches
    by_logprob: list[float | None] = []
    for t in range(len(p)):
        above, below = (policy_loss(moved(p, t, sign * step), *rest, **keywords, fixed=p) for sign in (1, -1))
        smooth = above.branches == here == below.branches
        by_logprob.append((above.loss - below.loss) / (2 * step) if smooth else None)
    by_entropy = []
    entropies = keywords.pop("entropies", None)
    if entropies is not None:
        for t in range(len(p)):
            above, below = (
                policy_loss(p, *rest, **keywords, entropies=moved(entropies, t, sign * 0.5)).loss for sign in (1, -1)
            )
            by_entropy.append(above - below)
    return by_logprob, by_entropy
