"""Ctrl-C, SIGTERM and cancellation: the step is finished, saved where it must be, and the handlers come back."""

from __future__ import annotations

import asyncio
import os
import signal
import threading

import lightning
import pytest

import fitrl
from fitrl.data import ranks
from fitrl.errors import SessionError, UnknownArgumentError
from samples import make_groups

CPU = {"accelerator": "cpu", "devices": 1, "enable_model_summary": False}


@pytest.fixture
def model(tmp_path) -> fitrl.TrainableModel:
    return fitrl.TrainableModel("adder", "tests", "tiny", lora=None, root=tmp_path)


class At(lightning.Callback):
    """Does something in the middle of the optimizer step that starts from step `step`."""

    def __init__(self, step: int, act) -> None:
        self.step, self.act = step, act

    def on_after_backward(self, trainer, module) -> None:
        if trainer.global_step == self.step:
            self.act()


def handlers() -> list:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)], ids=["SIGINT", "SIGTERM"]
)
def test_a_signal_finishes_the_step_saves_and_says_where_to_resume(number, raised, model, capfd) -> None:
    before = handlers()
    with fitrl.LocalTrainer(**CPU, callbacks=[At(1, lambda: os.kill(os.getpid(), number))]) as trainer:
        with pytest.raises(raised) as caught:
            trainer.fit_rl(model, make_groups(seed=1), num_minibatches=3, save_checkpoint=False, learning_rate=1e-3)
        assert handlers()[0] is before[0]
        assert trainer.global_step == model.step == 2  # the step under way, no further one
        if raised is SystemExit:
            assert caught.value.code == 128 + signal.SIGTERM
    assert handlers() == before
    assert [path.name for path in model.checkpoints()] == ["0002"]
    said = capfd.readouterr().err
    assert f"{number.name}: stopping after the optimizer step" in said
    assert f"stopped at step 2, saved {model.checkpoints_dir / '0002'}" in said
    with fitrl.LocalTrainer(**CPU) as trainer:
        assert trainer.fit_rl(model, make_groups(seed=2)).step == 3


def test_slurms_signal_before_the_time_is_up_stops_and_saves(model, monkeypatch, capfd) -> None:
    for name, value in {"NTASKS": "1", "NNODES": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    before = signal.getsignal(signal.SIGUSR1)
    with fitrl.LocalTrainer(**CPU, callbacks=[At(1, lambda: os.kill(os.getpid(), signal.SIGUSR1))]) as trainer:
        with pytest.raises(SystemExit) as caught:
            trainer.fit_rl(model, make_groups(seed=1), num_minibatches=3, save_checkpoint=False, learning_rate=1e-3)
        assert caught.value.code == 128 + signal.SIGUSR1
    assert signal.getsignal(signal.SIGUSR1) == before
    assert [path.name for path in model.checkpoints()] == ["0002"]  # and none of Lightning's, see _compat
    assert "SIGUSR1: stopping after the optimizer step" in capfd.readouterr().err


def test_a_signal_before_the_first_step_drops_the_call(model, monkeypatch) -> None:
    with fitrl.LocalTrainer(**CPU) as trainer:
        trainer.fit_rl(model, make_groups(seed=1), learning_rate=1e-3)
        collect = trainer._collect

        def interrupted(*arguments):
            os.kill(os.getpid(), signal.SIGINT)
            return collect(*arguments)

        monkeypatch.setattr(trainer, "_collect", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trainer.fit_rl(model, make_groups(seed=2), learning_rate=1e-3)
        monkeypatch.undo()
        assert trainer.global_step == 1
        assert len(trainer.verbs.policy_module.reward_history) == 1
        assert trainer.fit_rl(model, make_groups(seed=2)).step == 2  # the session lives on


def test_a_second_signal_stops_at_once(model) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    before = handlers()
    with fitrl.LocalTrainer(**CPU, callbacks=[At(1, twice)]) as trainer:
        trainer.fit_rl(model, make_groups(seed=1), learning_rate=1e-3)
        with pytest.raises(KeyboardInterrupt):
            trainer.fit_rl(model, make_groups(seed=2), num_minibatches=2)
        assert handlers() == before  # the session is gone, too
        assert not trainer.verbs.is_live
    with fitrl.LocalTrainer(**CPU) as trainer:
        trainer.open(model)
        assert trainer.global_step == 1


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)], ids=["SIGINT", "SIGTERM"]
)
def test_a_signal_between_calls_saves_what_was_not(number, raised, model, capfd) -> None:
    before = handlers()
    with pytest.raises(raised), fitrl.LocalTrainer(**CPU) as trainer:
        trainer.fit_rl(model, make_groups(seed=1), learning_rate=1e-3, save_checkpoint=False)
        os.kill(os.getpid(), number)  # in a rollout, say
    assert handlers() == before
    assert [path.name for path in model.checkpoints()] == ["0001"]
    assert "stopped at step 1" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)], ids=["SIGINT", "SIGTERM"]
)
def test_a_signal_while_a_checkpoint_is_written_is_heard_by_that_call(number, raised, model, monkeypatch) -> None:
    with fitrl.LocalTrainer(**CPU) as trainer:
        save = trainer.verbs.save

        def interrupted(*arguments, **options):
            os.kill(os.getpid(), number)
            return save(*arguments, **options)

        monkeypatch.setattr(trainer.verbs, "save", interrupted)
        with pytest.raises(raised):
            trainer.fit_rl(model, make_groups(seed=1), learning_rate=1e-3)
        monkeypatch.undo()
        assert [path.name for path in model.checkpoints()] == ["0001"]
        assert trainer.fit_rl(model, make_groups(seed=2)).step == 2


def test_a_signal_never_hits_a_later_call(model) -> None:
    def fail() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        raise ValueError("in the middle")

    failing = At(0, fail)
    with fitrl.LocalTrainer(**CPU, callbacks=[failing]) as trainer:
        with pytest.raises(KeyboardInterrupt) as caught:
            trainer.fit_rl(model, make_groups(seed=1))
        assert isinstance(caught.value.__cause__, ValueError)
        failing.step = -1
        assert trainer.fit_rl(model, make_groups(seed=1)).step == 1


def test_handlers_of_the_users_own_are_left_alone_between_calls(model) -> None:
    got = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    try:
        with fitrl.LocalTrainer(**CPU) as trainer:
            trainer.fit_rl(model, make_groups(seed=1), learning_rate=1e-3)
            os.kill(os.getpid(), signal.SIGTERM)
            assert got == [signal.SIGTERM]
            assert trainer.fit_rl(model, make_groups(seed=2)).step == 2
    finally:
        signal.signal(signal.SIGTERM, before)


# -- fit_rl_async -----------------------------------------------------------------------------------------------------


def test_the_event_loop_stays_free(model) -> None:
    """A step that waits for the event loop would wait for ever, if it held it."""
    beat = threading.Event()

    async def main(trainer) -> fitrl.LocalTrainResult:
        loop = asyncio.get_running_loop()
        waits = At(0, lambda: (loop.call_soon_threadsafe(beat.set), beat.wait(60)))
        trainer.callbacks.append(waits)
        return await trainer.fit_rl_async(model, make_groups(seed=1), learning_rate=1e-3)

    with fitrl.LocalTrainer(**CPU) as trainer:
        result = asyncio.run(main(trainer))
    assert beat.is_set()
    assert isinstance(result, fitrl.LocalTrainResult) and result.step == 1 and result.checkpoint_path.is_dir()


def test_concurrent_calls_queue_in_their_order(model) -> None:
    async def main(trainer) -> list[fitrl.LocalTrainResult]:
        calls = [trainer.fit_rl_async(model, make_groups(seed=seed), learning_rate=1e-3) for seed in (1, 2, 3)]
        return await asyncio.gather(*calls)

    with fitrl.LocalTrainer(**CPU) as trainer:
        results = asyncio.run(main(trainer))
        ours = {name: tensor.clone() for name, tensor in trainer.verbs.named_weights()}
    assert [result.step for result in results] == [1, 2, 3]
    other = fitrl.TrainableModel("plain", "tests", "tiny", lora=None, root=model.root)
    with fitrl.LocalTrainer(**CPU) as trainer:
        for seed in (1, 2, 3):
            trainer.fit_rl(other, make_groups(seed=seed), learning_rate=1e-3)
        assert all((ours[name] == tensor).all() for name, tensor in trainer.verbs.named_weights())


def test_cancelling_stops_between_steps(model) -> None:
    async def main(trainer) -> None:
        started = asyncio.Event()
        loop = asyncio.get_running_loop()
        go = threading.Event()
        trainer.callbacks.append(At(1, lambda: (loop.call_soon_threadsafe(started.set), go.wait(60))))
        running = asyncio.create_task(trainer.fit_rl_async(model, make_groups(seed=1), num_minibatches=3))
        waiting = asyncio.create_task(trainer.fit_rl_async(model, make_groups(seed=2)))
        await started.wait()
        running.cancel()
        waiting.cancel()
        await asyncio.sleep(0)
        assert not running.done()  # the step under way is finished first
        go.set()
        for task in (running, waiting):
            with pytest.raises(asyncio.CancelledError):
                await task

    with fitrl.LocalTrainer(**CPU) as trainer:
        asyncio.run(main(trainer))
        assert trainer.global_step == model.step == 2
        assert [path.name for path in model.checkpoints()] == ["0002"]
        trainer.callbacks.pop()
        assert trainer.fit_rl(model, make_groups(seed=3)).step == 3
        assert asyncio.run(trainer.fit_rl_async(model, make_groups(seed=4))).step == 4


def test_errors_come_out_as_from_fit_rl(model) -> None:
    with fitrl.LocalTrainer(**CPU) as trainer:
        with pytest.raises(UnknownArgumentError, match="LocalTrainer.fit_rl"):
            asyncio.run(trainer.fit_rl_async(model, make_groups(seed=1), deploy_checkpoint=True))
        with pytest.raises(fitrl.FitRLError, match="empty"):
            asyncio.run(trainer.fit_rl_async(model, []))


def test_no_other_model_is_opened_under_a_running_call(model, tmp_path) -> None:
    other = fitrl.TrainableModel("other", "tests", "tiny", lora=None, root=tmp_path)

    async def main(trainer) -> int:
        started, go = asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()
        trainer.callbacks.append(At(0, lambda: (loop.call_soon_threadsafe(started.set), go.wait(60))))
        running = asyncio.create_task(trainer.fit_rl_async(model, make_groups(seed=1)))
        await started.wait()
        with pytest.raises(SessionError, match="under way"):
            trainer.open(other)
        assert trainer.sampler(model).version == 0  # the open one may be asked for
        go.set()
        return (await running).step

    with fitrl.LocalTrainer(**CPU) as trainer:
        assert asyncio.run(main(trainer)) == 1


def test_leaving_stops_the_call_that_runs_and_saves_after_it(model) -> None:
    async def main() -> None:
        started = asyncio.Event()
        loop = asyncio.get_running_loop()
        with fitrl.LocalTrainer(**CPU, callbacks=[At(1, lambda: loop.call_soon_threadsafe(started.set))]) as trainer:
            job = asyncio.create_task(
                trainer.fit_rl_async(model, make_groups(seed=1), num_epochs=500, save_checkpoint=False)
            )
            await started.wait()
            raise SystemExit(143)  # as SIGTERM does
        await job

    with pytest.raises(SystemExit):
        asyncio.run(main())
    [saved] = model.checkpoints()
    assert 1 < model.step < 500 and saved.name == f"{model.step:04d}"


def test_close_ends_the_thread(model) -> None:
    trainer = fitrl.LocalTrainer(**CPU)
    asyncio.run(trainer.fit_rl_async(model, make_groups(seed=1)))
    assert any("fit_rl" in thread.name for thread in threading.enumerate())
    trainer.close()
    assert not any("fit_rl" in thread.name for thread in threading.enumerate())


def test_a_launchers_sigterm_does_not_cut_short_what_is_said_of_a_lost_rank(model, monkeypatch) -> None:
    before = handlers()
    try:
        with fitrl.LocalTrainer(**CPU) as trainer:
            trainer.open(model)
            monkeypatch.setattr(ranks, "lost", lambda: "rank 1 was killed")
        os.kill(os.getpid(), signal.SIGTERM)  # by default the end of this process
    finally:
        signal.signal(signal.SIGTERM, before[1])
