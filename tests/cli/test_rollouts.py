"""The `rollout` section: what `fitrl.rollout` and `RolloutPipeline` take; its tasks depend on seed and call only."""

import inspect

import fitrl
from fitrl.cli.rollouts import Rollouts

BESIDE = {
    "max_steps_off_policy",
    "on_weight_change",
    "max_resamples_of_flat_groups",
    "max_retries",
    "attempt_timeout_s",
}


def test_the_section_is_what_rollout_takes() -> None:
    ours, theirs = (inspect.signature(f).parameters for f in (Rollouts, fitrl.rollout))
    same = set(theirs) - {"sampler", "tasks", "reward", "agent", "stop", "seed", "progress"}
    assert set(ours) - {"tasks", "reward", "agent", "stop", "tasks_per_step"} - BESIDE == same
    for name in same:
        assert (ours[name].default, ours[name].annotation) == (theirs[name].default, theirs[name].annotation)
    pipelines = inspect.signature(fitrl.RolloutPipeline).parameters
    for name in BESIDE - {"max_steps_off_policy"}:
        assert (ours[name].default, ours[name].annotation) == (pipelines[name].default, pipelines[name].annotation)


def test_every_setting_reaches_rollout(monkeypatch) -> None:
    seen = {}
    monkeypatch.setattr("fitrl.cli.rollouts.rollout", lambda sampler, tasks, **options: seen.update(options))
    given = {"group_size": 3, "max_new_tokens": 5, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "stop": ["x"]}
    given |= {"max_concurrency": 2, "max_exceptions": 0.5}
    Rollouts(tasks="fitrl.demo:TASKS", reward="fitrl.demo:correct", **given).groups(None, seed=0, call=1)
    assert {name: seen[name] for name in given} == given
    assert seen["reward"].__name__ == "correct" and seen["agent"] is None


def test_every_setting_reaches_the_pipeline(monkeypatch) -> None:
    seen = {}
    given = {"group_size": 3, "max_new_tokens": 5, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "stop": ["x"]}
    given |= {"max_concurrency": 2, "max_steps_off_policy": 4, "on_weight_change": "restart", "max_retries": 1}
    given |= {"max_resamples_of_flat_groups": 3, "attempt_timeout_s": 5.0}
    rollouts = Rollouts(tasks="fitrl.demo:TASKS", reward="fitrl.demo:correct", tasks_per_step=6, **given)
    monkeypatch.setattr("fitrl.cli.rollouts.RolloutPipeline", lambda sampler, tasks, **options: seen.update(options))
    rollouts.pipeline(None, model=None, seed=8)
    assert {name: seen[name] for name in given} == given
    assert seen["reward"].__name__ == "correct" and seen["groups_per_step"] == 6 and seen["seed"] == 8


def test_tasks_of_a_call() -> None:
    rollouts = Rollouts(tasks="fitrl.demo:TASKS", reward="fitrl.demo:correct", tasks_per_step=30)
    drawn, seed = rollouts.draw(0, 5)
    assert (drawn, seed) == rollouts.draw(0, 5)
    for other in (rollouts.draw(0, 6), rollouts.draw(1, 5)):
        assert other[0] != drawn and other[1] != seed
    assert len({task["prompt"] for task in drawn}) == 30
    everything, _ = Rollouts(tasks="fitrl.demo:TASKS", reward="fitrl.demo:correct").draw(0, 1)
    assert len(everything) == 100
