"""`fitrl fit_rl`: from a configuration to a run folder, and on from there."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import fitrl
from fitrl.cli.fit_rl import choose_backend
from fitrl.cli.loop import calls_done
from fitrl.trainers.settings import UpdateSettings
from fitrl_command import main

REPOSITORY = Path(__file__).parents[2]
COMMAND = str(Path(sys.executable).parent / "fitrl")


@pytest.fixture
def config(tmp_path, monkeypatch) -> dict:
    """A configuration that is over in a moment, and its file."""
    monkeypatch.chdir(tmp_path)
    content = yaml.safe_load((REPOSITORY / "configs" / "smoke" / "local.yaml").read_text())
    content["rollout"] |= {"tasks_per_step": 4, "group_size": 4}
    content["progress"] = False
    write(content)
    return content


def write(content: dict, name: str = "x.yaml") -> str:
    Path(name).write_text(yaml.safe_dump(content))
    return name


def runs(project: str = "smoke") -> list[Path]:
    return sorted(Path(".fitrl", project).glob("*"))


def fit(*arguments: str, status: int = 0) -> None:
    assert main(["fit_rl", *arguments]) == status


def calls(run: Path) -> list[int]:
    lines = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    return [int(line["metrics"]["loop/call"]) for line in lines]


def gap(one: Path, two: Path, step: int) -> float:
    """Mean distance of two runs' weights. Equal runs may differ in last bits, of which Adam makes a few whole steps:
    matrix products on a CPU depend on where in memory their operands lie."""
    states = [load_file(run / "checkpoints" / f"{step:04d}" / "model.safetensors") for run in (one, two)]
    columns = [torch.cat([tensor.flatten() for _, tensor in sorted(state.items())]) for state in states]
    return float((columns[0] - columns[1]).abs().mean())


def groups_of(run: Path, step: int) -> list[fitrl.TrajectoryGroup]:
    lines = (run / "trajectories" / "train" / f"{step:04d}.jsonl").read_text().splitlines()
    return [fitrl.TrajectoryGroup.from_json(line) for line in lines]


def sampled(run: Path, step: int) -> list[list[tuple[int, ...]]]:
    return [[said.token_ids for t in group for said in t.completions()] for group in groups_of(run, step)]


def prompts(run: Path, step: int) -> list[str]:
    return [group.trajectories[0].messages()[0]["content"] for group in groups_of(run, step)]


# -- as a user types it -----------------------------------------------------------------------------------------------


def test_the_smoke_configuration_through_the_real_command(tmp_path) -> None:
    command = [COMMAND, "fit_rl", "--backend", "local", "--config", str(REPOSITORY / "configs/smoke/local.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rise, *paths = done.stdout.splitlines()
    assert re.fullmatch(r"reward \d\.\d{3} -> \d\.\d{3} in 2 steps, \d+\.\d s", rise)
    assert [line.split()[0] for line in paths] == ["run", "configuration", "checkpoint"]
    run, configuration, checkpoint = (Path(line.split()[-1]) for line in paths)
    assert re.fullmatch(r"adder-\d{8}-\d{6}-\d{6}", run.name) and run.parent == tmp_path / ".fitrl" / "smoke"
    assert configuration == run / "config.yaml" and checkpoint == run / "checkpoints" / "0002"
    assert len(list((run / "trajectories" / "train").glob("*.jsonl"))) == 2
    assert "2/2" in done.stderr and "reward 0." in done.stderr and "tokens/s" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr  # the progress bar and nothing else


def test_the_modules_of_the_working_directory_are_found(tmp_path, config) -> None:
    Path("fitrl_tasks_of_a_test.py").write_text(
        "def tasks():\n    return ['1+1=', '2+2=']\n"
        "class Length:\n"
        "    def __init__(self, scale): self.scale = scale\n"
        "    async def __call__(self, task, trajectory): return self.scale * len(trajectory.completions()[0].text)\n"
        "async def agent(chat, task):\n"
        "    import fitrl\n"
        "    said = [{'role': 'user', 'content': task}]\n"
        "    said.append(await chat(said))\n"
        "    return fitrl.Trajectory(messages_and_choices=said, metadata={'mine': True})\n"
    )
    config["rollout"] |= {
        "tasks": "fitrl_tasks_of_a_test:tasks",
        "reward": {"class_path": "fitrl_tasks_of_a_test.Length", "init_args": {"scale": 2}},
        "agent": "fitrl_tasks_of_a_test.agent",
        "tasks_per_step": None,
    }
    path = list(sys.path)
    fit("--config", write(config), "--steps", "1")
    assert sys.path == path
    [run] = runs()
    groups = [fitrl.TrajectoryGroup.from_json(line) for line in next(run.rglob("0001.jsonl")).read_text().splitlines()]
    assert len(groups) == 2 and groups[0].trajectories[0].metadata == {"mine": True}
    assert all(t.reward == 2 * len(t.completions()[0].text) for g in groups for t in g)
    sys.modules.pop("fitrl_tasks_of_a_test")


def test_tasks_of_a_file(config) -> None:
    Path("tasks.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n\n{"prompt": "é", "answer": "5"}\n')
    config["rollout"] |= {"tasks": "tasks.jsonl", "tasks_per_step": 2}
    fit("--config", write(config), "--steps", "1")
    [run] = runs()
    told = next(run.rglob("0001.jsonl")).read_text() if list(run.rglob("0001.jsonl")) else ""
    told = told or next(run.rglob("0000.jsonl")).read_text()  # two tasks may teach nothing
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert Path(saved["rollout"]["tasks"]) == Path("tasks.jsonl").resolve()
    assert "1+1=" in told and "\\u00e9" in told


# -- runs -------------------------------------------------------------------------------------------------------------


def test_every_run_is_a_new_one_and_its_configuration_reproduces_it(config, capsys) -> None:
    fit("--config", "x.yaml", "--fit_rl.learning_rate", "1e-3", "--rollout.group_size", "6")
    [first] = runs()
    resolved = yaml.safe_load((first / "config.yaml").read_text())
    assert resolved["fit_rl"]["learning_rate"] == 1e-3 and resolved["rollout"]["group_size"] == 6
    assert resolved["backend"] == "local" and resolved["model"]["name"] == "adder" and resolved["resume"] is None
    assert set(resolved["fit_rl"]) == LOCAL_FIT_RL  # what was left to its default is written down too
    assert resolved["trainer"]["gradient_clip_val"] == 1.0 and resolved["trainer"]["devices"] == 1
    assert resolved["trainer"]["max_time"] is None  # an option of Lightning that the short help does not show
    torch.manual_seed(99)
    fit("--config", str(first / "config.yaml"))
    [second] = set(runs()) - {first}
    assert (second / "config.yaml").read_text() == (first / "config.yaml").read_text()
    assert gap(first, second, 2) < 2e-4
    assert sampled(first, 1) == sampled(second, 1)
    fit("--config", "x.yaml", "--seed", "1")
    [third] = set(runs()) - {first, second}
    assert sampled(first, 1) != sampled(third, 1)
    assert gap(first, third, 2) > 5e-4


def test_a_run_is_resumed_and_ends_where_an_undisturbed_one_does(config, capsys) -> None:
    fit("--config", "x.yaml", "--steps", "3")
    [whole] = runs()
    fit("--config", "x.yaml")
    [run] = set(runs()) - {whole}
    fit("--resume", f"smoke/{run.name}", "--steps", "3")
    assert len(runs()) == 2 and calls(run) == [1, 2, 3]
    assert prompts(run, 3) == prompts(whole, 3) != prompts(run, 2)
    assert gap(run, whole, 3) < 2e-4
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert resolved["steps"] == 3 and resolved["resume"] is None  # a configuration is always that of a new run
    assert yaml.safe_load((run / "config-until-0002.yaml").read_text())["steps"] == 2
    capsys.readouterr()
    fit("--resume", str(run.resolve()))  # a folder is a name too; there is nothing left to do
    assert "nothing left to do" in capsys.readouterr().out and calls(run) == [1, 2, 3]


def test_a_run_goes_asynchronous_by_one_line_and_is_resumed(config) -> None:
    path = str(REPOSITORY / "configs/smoke/asynchronous.yaml")
    fit("--config", path, "--progress", "false", "--steps", "3")
    [run] = runs()
    fit("--resume", str(run), "--steps", "5")
    assert calls(run) == [1, 2, 3, 4, 5]
    numbers = [group.metadata["number"] for step in range(1, 6) for group in groups_of(run, step)]
    assert len(set(numbers)) == len(numbers) == 5 * 16
    told = [json.loads(line)["metrics"] for line in (run / "history.jsonl").read_text().splitlines()]
    assert max(metrics["off_policy/steps_max"] for metrics in told) == 1.0 and "pipeline/queue_depth" in told[0]
    smoke, ours = (yaml.safe_load((REPOSITORY / "configs/smoke" / name).read_text()) for name in ("local.yaml", path))
    assert ours["rollout"] == smoke["rollout"] | {"max_steps_off_policy": 1}


def test_a_resumed_run_may_have_another_configuration_or_root(config, tmp_path) -> None:
    fit("--config", "x.yaml", "--model.root", "elsewhere", "--steps", "1")
    [run] = Path("elsewhere/smoke").glob("*")
    fit("--config", "x.yaml", "--model.root", "elsewhere", "--resume", f"smoke/{run.name}", "--model.name", "other")
    assert [path.name for path in Path("elsewhere/smoke").glob("*")] == [run.name] and calls(run) == [1, 2]
    assert not runs()


def test_checkpoints_may_be_further_apart(config) -> None:
    fit("--config", write(config), "--steps", "5", "--save_every", "2")
    [run] = runs()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["0002", "0004", "0005"]
    fit("--config", write(config), "--steps", "3", "--save_every", "2", "--fit_rl.save_checkpoint", "false")
    [second] = [found for found in runs() if found != run]
    assert not (second / "checkpoints").exists()


def test_a_run_that_stops_between_two_saves_is_saved(config) -> None:
    stop = {"class_path": "EarlyStopping", "init_args": {"monitor": "reward/mean", "patience": 1, "min_delta": 10}}
    config["trainer"]["callbacks"] = [stop]
    fit("--config", write(config), "--steps", "9", "--save_every", "4")
    [run] = runs()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["0002"]


def test_where_a_resumed_run_stands(tmp_path) -> None:
    model = fitrl.TrainableModel("run", "project", "tiny", lora=None, root=tmp_path)
    assert calls_done(model) == 0
    for call, step in ((1, 1), (2, 1), (3, 2), (4, 2), (5, 3)):  # calls 2 and 4 had nothing to learn from
        model.log(metrics={"loop/call": call}, step=step)
    assert calls_done(model) == 0  # no checkpoint: the run starts anew
    for step, done in ((1, 1), (2, 3), (3, 5), (4, 6)):  # 4: saved, and died before it was logged
        model.checkpoints = lambda: [tmp_path]
        model.step = step
        assert calls_done(model) == done


def test_a_first_call_that_fails_leaves_no_folder(config, capsys) -> None:
    fit("--config", "x.yaml", "--fit_rl.kl_coef", "0.1", status=1)
    assert "kl_coef=0.1 needs reference" in capsys.readouterr().err
    assert not runs()


def test_early_stopping_ends_the_run(config, capsys) -> None:
    config["trainer"] |= {
        "callbacks": [
            {
                "class_path": "lightning.pytorch.callbacks.EarlyStopping",
                "init_args": {"monitor": "reward/mean", "mode": "max", "stopping_threshold": 0.0},
            },
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"monitor": "reward/mean", "mode": "max"},
            },
        ],
        "logger": True,
    }
    fit("--config", write(config), "--steps", "50")
    [run] = runs()
    assert calls(run) == [1] and "a callback asked to stop after 1 of 50 steps" in capsys.readouterr().out
    assert list(run.rglob("events.out.*")) and list(run.rglob("*.ckpt"))  # Lightning's files are in the run folder
    assert not Path("lightning_logs").exists()


def test_lightnings_bars_and_ours_do_not_meet(config, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr("fitrl.cli.fit_rl.learn", lambda cli: seen.append(cli.trainer))
    bar = {"class_path": "lightning.pytorch.callbacks.TQDMProgressBar"}
    config["progress"] = True
    for trainer in ({}, {"callbacks": [bar]}, {"callbacks": bar}, {"enable_progress_bar": True}):
        fit("--config", write(config | {"trainer": config["trainer"] | trainer}))
    fit("--config", write(config), "--progress", "false")
    names = [type(trainer.progress_bar_callback).__name__ for trainer in seen]
    assert names[:4] == ["RewardProgressBar", "TQDMProgressBar", "TQDMProgressBar", names[3]]
    assert names[3] in ("TQDMProgressBar", "RichProgressBar") and names[4] == "NoneType"


# -- mistakes ---------------------------------------------------------------------------------------------------------

MISTAKES = {
    "an argument of another backend": (["--fit_rl.deploy_checkpoint", "true"], "backend 'local' takes: learning_rate"),
    "a flag without its value": (["--config"], "expected one argument"),
    "a wrong type": (["--fit_rl.ppo", "3"], 'key "fit_rl.ppo": Expected a <class \'bool\'>'),
    "not one of the choices": (["--fit_rl.kl_in", "nowhere"], "fit_rl.kl_in"),
    "an unknown option": (["--trainer.divices", "1"], "trainer.divices"),
    "an unknown backend": (["--backend", "nowhere"], "fitrl.trainers has no 'nowhere'; installed: "),
    "no such file": (["--config", "nowhere.yaml"], "File does not exist: .*nowhere.yaml"),
    "no such module": (["--rollout.tasks", "fitrl_no_such_module:x"], "rollout.tasks=.* cannot be imported"),
    "no such name": (["--rollout.reward", "fitrl.demo:nothing"], "fitrl.demo has no nothing"),
    "no import path": (["--rollout.reward", "correct"], "must be an import path"),
    "a reward that cannot be called": (["--rollout.reward", "fitrl.demo:TASKS"], "is a list, which cannot be called"),
    "tasks that are none": (["--rollout.tasks", "fitrl.demo:_SAVE_EVERY"], "is a int; a list of tasks"),
    "tasks that need arguments": (["--rollout.tasks", "fitrl.demo:correct"], "cannot be called without arguments"),
    "no such file of tasks": (["--rollout.tasks", "nowhere.jsonl"], "there is no file nowhere.jsonl"),
    "more tasks than there are": (["--rollout.tasks_per_step", "101"], "between 1 and the number of tasks, 100"),
    "asynchronous options without it": (
        ["--rollout.max_retries", "3"], "rollout.max_retries has no effect with max_steps_off_policy=0"),
    "synchronous options beside training": (
        ["--rollout.max_steps_off_policy", "1", "--rollout.max_exceptions", "2"], "see rollout.max_retries"),
    "steps that are less than none": (["--rollout.max_steps_off_policy", "-1"], "must be at least 0, got -1"),
    "no such run": (["--resume", "smoke/nowhere"], "'smoke/nowhere' is neither a run folder"),
    "another trainer's strategy": (["--trainer.strategy", "ddp"], "a PolicyVerbs, got DDPStrategy"),
    "what Lightning refuses": (["--trainer.devices", "x"], "trainer.devices|devices"),
    "a name that is no folder": (["--model.name", "../up"], "name must be letters"),
    "no steps": (["--steps", "0"], "steps"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_status_2(case, config, capsys) -> None:
    arguments, complaint = MISTAKES[case]
    before = set(Path().iterdir())
    fit("--config", "x.yaml", *arguments, status=2)
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("fitrl: ") and told.err.count("\n") == 1, told.err
    assert re.search(complaint, told.err), told.err
    assert set(Path().iterdir()) == before


def test_mistakes_in_the_file(config, capsys) -> None:
    fit("--config", write(config | {"fit_rl": {"deploy_checkpoint": True}}), status=2)
    assert "'deploy_checkpoint'; fit_rl of the backend 'local' takes: learning_rate, ppo" in capsys.readouterr().err
    fit("--config", write(config | {"backend": "nowhere"}), status=2)
    assert "installed: " in capsys.readouterr().err
    Path("x.yaml").write_text("fit_rl: [")
    fit("--config", "x.yaml", status=2)
    assert capsys.readouterr().err.startswith("fitrl: ")
    fit(status=2)
    assert "required: model.name, model.project, model.base_model, rollout.tasks, rollout.reward" in (
        capsys.readouterr().err
    )
    Path("tasks.jsonl").write_text('"fine"\nnot fine\n')
    config["rollout"]["tasks"] = "tasks.jsonl"
    fit("--config", write(config), status=2)
    assert "line 2 of tasks.jsonl is no JSON" in capsys.readouterr().err
    for named in ({"init_args": {}}, {"class_path": "fitrl.demo.correct", "x": 1}):
        config["rollout"] |= {"tasks": "fitrl.demo:TASKS", "reward": named}
        fit("--config", write(config), status=2)
        assert "rollout.reward must be 'package.module:name' or a mapping" in capsys.readouterr().err
    config["rollout"]["reward"] = {"class_path": "fitrl.Chat", "init_args": {"wrong": 1}}
    fit("--config", write(config), status=2)
    assert "fitrl.Chat and init_args do not fit" in capsys.readouterr().err


def test_a_reward_that_raises_is_named_with_its_line(config, capsys) -> None:
    Path("fitrl_broken_reward.py").write_text("def reward(task, trajectory):\n    return task['missing']\n")
    fit("--config", "x.yaml", "--rollout.reward", "fitrl_broken_reward:reward", status=1)
    told = capsys.readouterr().err
    assert "KeyError: 'missing'" in told and "fitrl_broken_reward.py:2)" in told and told.count("\n") == 1
    sys.modules.pop("fitrl_broken_reward")


@pytest.mark.parametrize("learned", [True, False])
def test_interrupted_says_how_to_go_on(learned, config, capsys, monkeypatch) -> None:
    def stop(cli):
        if learned:
            (cli.model.run_dir / "checkpoints" / "0001").mkdir(parents=True)
            cli.model.checkpoints = lambda: [cli.model.run_dir / "checkpoints" / "0001"]
        raise KeyboardInterrupt

    monkeypatch.setattr("fitrl.cli.fit_rl.learn", stop)
    fit("--config", "x.yaml", status=130)
    told = "interrupted; go on with: fitrl fit_rl --resume .*adder-" if learned else "before anything was learned"
    assert re.search(told, capsys.readouterr().err)


def test_the_backend_is_the_command_lines_or_the_last_files(tmp_path) -> None:
    one, two, none = (tmp_path / name for name in ("1.yaml", "2.yaml", "3.yaml"))
    one.write_text("backend: one")
    two.write_text("backend: two")
    none.write_text("steps: 3")
    assert choose_backend([]) == "local"
    assert choose_backend(["--config", str(one), "-c", str(two), f"--config={none}"]) == "two"
    assert choose_backend(["--config", str(one), "--backend", "three"]) == "three"
    assert choose_backend(["--config", str(tmp_path / "absent.yaml")]) == "local"


# -- what the backend takes -------------------------------------------------------------------------------------------

LOCAL_FIT_RL = set(
    """learning_rate ppo epsilon epsilon_high advantage_balance scale_rewards importance_sampling_level
    max_negative_advantage_importance_sampling_weight mask_prob_ratio kimi_k2_tau precalculate_logprobs
    allow_training_without_logprobs plot_tensors truncated_importance_sampling scale_learning_rate_by_reward_std_dev
    logprob_calculation_chunk_size save_checkpoint verbose loss_aggregation num_minibatches num_epochs seed norm_length
    dual_clip ratio_cap kl_coef kl_in kl_estimator reference entropy_coef max_tokens_per_microbatch
    num_trajectories_learning_rate_multiplier_power objective""".split()
)


def test_the_flags_of_the_local_backend_are_frozen(capsys) -> None:
    """Configurations in the wild name them: add, never rename."""
    assert main(["fit_rl", "--help_all"]) == 0
    text = capsys.readouterr().out
    assert set(re.findall(r"^  --fit_rl\.(\w+) ", text, re.MULTILINE)) == LOCAL_FIT_RL
    own = {"backend", "config", "steps", "seed", "resume", "progress", "help", "help_all", "print_config"}
    assert own <= set(re.findall(r"--(\w+)\b", text))


def test_values_reach_fit_rl_typed(config, monkeypatch) -> None:
    seen = {}

    def record(self, model, groups, settings: UpdateSettings):
        seen["settings"] = settings
        raise KeyboardInterrupt

    monkeypatch.setattr(fitrl.LocalTrainer, "_update", record)
    Path("objective_of_a_test.py").write_text(
        "import fitrl\n"
        "class Mine:\n    inputs = 'logprobs'\n    def __init__(self, scale: float): self.scale = scale\n"
        "    def __call__(self, inputs: fitrl.LossInputs) -> fitrl.PolicyLoss: return None\n"
    )
    flags = "--fit_rl.num_minibatches 2 --fit_rl.kl_coef 0.1 --fit_rl.reference 12 --fit_rl.kl_estimator k3"
    fit("--config", "x.yaml", *flags.split(), status=130)
    settings = seen["settings"]
    assert (settings.num_minibatches, settings.reference, settings.learning_rate) == (2, 12, 3e-4)
    assert (settings.objective.kl_coef, settings.objective.kl_estimator) == (0.1, "k3")
    config["fit_rl"]["objective"] = {"class_path": "objective_of_a_test.Mine", "init_args": {"scale": 0.5}}
    fit("--config", write(config), status=130)
    assert type(seen["settings"].objective).__name__ == "Mine" and seen["settings"].objective.scale == 0.5
    sys.modules.pop("objective_of_a_test")


def test_help_that_a_person_can_read(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit_rl", "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    top = text[:2500]
    for part in ("Teach a model by reinforcement", "examples:", "--config configs/smoke/local.yaml", "torchrun"):
        assert part in top
    for section in ("run", "model", "rollout", "fit_rl", "trainer"):
        assert re.search(rf"^{section}\b.*:$", text, re.MULTILINE)
    assert "--trainer.compile" in text and "--trainer.overfit_batches" not in text and "known subclasses" not in text
    assert "<class" not in text and len(text.splitlines()) < 280
    assert main(["fit_rl", "--help_all"]) == 0
    assert "--trainer.overfit_batches" in capsys.readouterr().out
