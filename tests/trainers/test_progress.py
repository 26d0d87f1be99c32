"""`RewardProgressBar`: one line for all calls, given back to the terminal at the end."""

import io
import re

import pytest
from lightning.pytorch.callbacks import TQDMProgressBar
from rich.console import Console

import fitrl
from fitrl.errors import InvalidArgumentError
from samples import make_groups

CPU = {"accelerator": "cpu", "devices": 1, "enable_model_summary": False}


@pytest.fixture
def model(tmp_path) -> fitrl.TrainableModel:
    return fitrl.TrainableModel("run", "project", "tiny", lora=None, root=tmp_path)


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=160)


def lines(console: Console) -> list[str]:
    """What stays on the screen: a line that is drawn again takes its own place."""
    text = re.sub(r"\x1b\[\??[\d;]*[A-Za-z]", "", console.file.getvalue())
    return [line.split("\r")[-1] for line in text.split("\n") if line.strip()]


def flat() -> list[fitrl.TrajectoryGroup]:
    groups = make_groups(seed=1)
    for group in groups:
        for trajectory in group:
            trajectory.reward = 1.0
    return groups


def test_one_line_for_all_calls(model) -> None:
    console = terminal()
    bar = fitrl.RewardProgressBar(5, console=console)
    with fitrl.LocalTrainer(**CPU, callbacks=bar) as trainer:
        assert trainer.progress_bar_callback is bar
        for seed in range(3):
            result = trainer.fit_rl(model, make_groups(seed=seed), save_checkpoint=False)
    [line] = lines(console)
    assert "3/5" in line and f"reward {result.metrics['reward/mean']:.3f}" in line
    assert re.search(r"[\d,]+ tokens/s", line) and f"mismatch {result.metrics['mismatch/kl']:.4f}" in line
    assert "kl " not in line.replace("mismatch", "")  # there is no KL to a reference here
    assert console.file.getvalue().endswith("\x1b[?25h")  # the cursor is back


def test_lightnings_own_bar_leaves_a_line_for_each_call(model, capfd) -> None:
    """Why there is one of ours; should this fail some day, ours may go."""
    with fitrl.LocalTrainer(**CPU, callbacks=TQDMProgressBar(leave=True)) as trainer:
        for seed in range(3):
            trainer.fit_rl(model, make_groups(seed=seed), save_checkpoint=False)
    told = capfd.readouterr()
    assert {f"Epoch {call}" for call in range(3)} <= set(re.findall(r"Epoch \d", told.out + told.err))
    assert "reward/mean=" in told.out + told.err  # it shows what it can all the same


def test_kl_to_a_reference_is_shown(model) -> None:
    console = terminal()
    with fitrl.LocalTrainer(**CPU, callbacks=fitrl.RewardProgressBar(console=console)) as trainer:
        trainer.fit_rl(model, make_groups(seed=1), kl_coef=0.1, reference="base", save_checkpoint=False)
    assert re.search(r" kl -?\d\.\d{4}", lines(console)[0])


def test_only_keys_that_are_there() -> None:
    bar = fitrl.RewardProgressBar(shown={"a/b": "a {:.1f}", "c": "c {:.0f}"})
    assert (
        bar.line({"a/b": 1.25, "z": 1.0}) == "a 1.2"
        and bar.line({}) == ""
        and bar.line({"c": 3, "a/b": 0}) == "a 0.0  c 3"
    )


def test_a_call_without_anything_to_learn_is_counted_by_the_loop(model) -> None:
    console = terminal()
    bar = fitrl.RewardProgressBar(2, completed=1, console=console)
    with fitrl.LocalTrainer(**CPU, callbacks=bar) as trainer:
        trainer.sampler(model)
        bar.start()
        result = trainer.fit_rl(model, flat())
        bar.advance(result.metrics)
    [line] = lines(console)
    assert "2/2" in line and "reward 1.000" in line


def test_an_error_gives_the_terminal_back_first(model) -> None:
    console = terminal()

    class Broken:
        inputs = "logprobs"

        def __call__(self, inputs: fitrl.LossInputs) -> fitrl.PolicyLoss:
            raise ValueError("mine")

    with fitrl.LocalTrainer(**CPU, callbacks=fitrl.RewardProgressBar(console=console)) as trainer:
        with pytest.raises(ValueError, match="mine"):
            trainer.fit_rl(model, make_groups(seed=1), objective=Broken())
        assert console.file.getvalue().endswith("\x1b[?25h")
        trainer.fit_rl(model, make_groups(seed=1), save_checkpoint=False)  # and it comes back
    assert len(lines(console)) == 2


def test_disabled_draws_nothing(model) -> None:
    console = terminal()
    bar = fitrl.RewardProgressBar(console=console)
    bar.disable()
    with fitrl.LocalTrainer(**CPU, callbacks=bar) as trainer:
        trainer.fit_rl(model, make_groups(seed=1), save_checkpoint=False)
    assert console.file.getvalue() == "" and bar.completed == 1
    bar.enable()
    bar.start()
    bar.print("said")
    bar.close()
    bar.close()
    assert "said" in console.file.getvalue()


def test_a_total_that_is_none() -> None:
    with pytest.raises(InvalidArgumentError, match="total must be at least 1 or None, got 0"):
        fitrl.RewardProgressBar(0)


def test_what_is_printed_to_a_file_stays_there(capsys) -> None:
    """Rich would send it to the terminal of the bar."""
    console = terminal()
    bar = fitrl.RewardProgressBar(console=console)
    bar.start()
    print("a line of the user")
    bar.close()
    assert capsys.readouterr().out == "a line of the user\n" and "user" not in console.file.getvalue()
