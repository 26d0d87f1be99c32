"""Raw totals and what is derived from them, against numpy over all tokens at once."""

import numpy
import pytest
import torch

from fitrl.objective.objective import Objective
from fitrl.objective.policy_loss import policy_loss
from fitrl.policy.metrics import CallTotals, RawTotals, derive, mismatch


def test_sums_are_added_and_maxima_are_kept() -> None:
    totals = RawTotals()
    for a, b in ((1.0, -5.0), (2.0, -3.0), (4.0, -4.0)):
        totals.update({"a": torch.tensor(a), "b_max": torch.tensor(b), "n": torch.tensor(2)})
    assert totals.compute() == {"a": 7.0, "b_max": -3.0, "n": 6.0}
    totals.reset()
    totals.update({"only_max": torch.tensor(0.5)})
    assert totals.compute() == {"only_max": 0.5}
    totals.reset()
    totals.update({"only": torch.tensor(0.25)})
    assert totals.compute() == {"only": 0.25}


def test_ranks_reduce_by_sum_and_by_maximum() -> None:
    left, right = RawTotals(), RawTotals()
    left.update({"a": torch.tensor(1.0), "b_max": torch.tensor(7.0)})
    right.update({"a": torch.tensor(2.0), "b_max": torch.tensor(3.0)})
    gathered = {name: torch.stack([getattr(left, name), getattr(right, name)]) for name in ("sums", "maxima")}
    for name, reduce in left._reductions.items():
        setattr(left, name, reduce(gathered[name]))
    assert left.compute() == {"a": 3.0, "b_max": 7.0}


def test_derived_metrics_are_those_of_all_tokens_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    p = -torch.rand(40, generator=generator, dtype=torch.float64) * 3
    q = p + 0.3 * torch.randn(40, generator=generator, dtype=torch.float64)
    o = q + 0.1 * torch.randn(40, generator=generator, dtype=torch.float64)
    a = torch.randn(40, generator=generator, dtype=torch.float64)
    mask = torch.rand(40, generator=generator) < 0.8
    ids = torch.arange(40) // 8
    objective = Objective(ppo=True, epsilon=0.1)
    totals = CallTotals()
    totals.reset(torch.device("cpu"))
    for part in (slice(0, 16), slice(16, 40)):
        result = policy_loss(
            p[part], q[part], a[part], mask[part], ids[part] - ids[part][0], objective, num_tokens=int(mask.sum())
        )
        totals.microbatches.update(result.metrics)
        totals.mismatch.update(mismatch(p[part], o[part], mask[part]))
    totals.steps.update(
        {"grad_norm": torch.tensor(2.0), "learning_rate": torch.tensor(0.1), "step_count": torch.ones(())}
    )
    found = totals.compute()
    r = (p - q).exp()[mask].numpy()
    assert found["ratio/mean"] == pytest.approx(r.mean())
    assert found["ratio/max"] == pytest.approx(r.max())
    assert found["ratio/clip_fraction_low"] == pytest.approx((r < 0.9).mean())
    assert found["ratio/clip_fraction_high"] == pytest.approx((r > 1.1).mean())
    assert found["ratio/ess"] == pytest.approx(r.sum() ** 2 / (r**2).sum() / len(r))
    assert found["mismatch/kl"] == pytest.approx(float((o - p)[mask].mean()))
    correlation = numpy.corrcoef(o[mask].exp().numpy(), p[mask].exp().numpy())[0, 1]
    assert found["mismatch/prob_corr"] == pytest.approx(correlation)
    whole = policy_loss(p, q, a, mask, ids, objective)
    assert found["loss/train"] == pytest.approx(float(whole.loss))
    assert (found["loss/grad_norm"], found["loss/learning_rate"]) == pytest.approx((2.0, 0.1))


def test_missing_inputs_give_no_metric_and_own_names_come_through() -> None:
    assert derive({}) == {}
    assert derive({"token_count": 3.0}) == {}
    assert derive({"mine": 2.5}) == {"objective/mine": 2.5}
