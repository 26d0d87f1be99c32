"""Lightning's loggers and callbacks around `fit_rl`: one file for all calls, each number once, at its step."""

import csv
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import fitrl
from samples import make_groups

CPU = {"accelerator": "cpu", "devices": 1, "enable_model_summary": False}
CALLS = 3


def rewarded(seed: int, reward: float) -> list[fitrl.TrajectoryGroup]:
    """Groups that teach, with this mean reward."""
    groups = make_groups(seed=seed, num_groups=2, group_size=2)
    for group in groups:
        for sign, trajectory in zip((-0.5, 0.5), group, strict=True):
            trajectory.reward = reward + sign
    return groups


def learn(tmp_path: Path, *, of_trainer=(), of_model=(), callbacks=(), **options) -> list[fitrl.LocalTrainResult]:
    model = fitrl.TrainableModel("run", "project", "tiny", lora=None, root=tmp_path / "runs", loggers=of_model)
    results = []
    with fitrl.LocalTrainer(**CPU, logger=list(of_trainer), callbacks=list(callbacks), **options) as trainer:
        for call in range(CALLS):
            groups = rewarded(call, reward=float(call))
            results.append(trainer.fit_rl(model, groups, learning_rate=1e-4, save_checkpoint=False))
            model.log(groups, metrics=results[-1].metrics, step=results[-1].step)
        model.log(rewarded(0, reward=7.0), split="val", step=CALLS)
    for logger in of_model:  # the trainer closes its own
        logger.finalize("success")
    return results


def board(folder: Path) -> EventAccumulator:
    [file] = folder.rglob("events.out.*")  # one for all calls
    read = EventAccumulator(str(file))
    read.Reload()
    return read


def scalars(read: EventAccumulator, key: str) -> list[tuple[int, float]]:
    return [(event.step, pytest.approx(event.value, rel=1e-5)) for event in read.Scalars(key)]


def column(folder: Path, key: str) -> list[tuple[int, float]]:
    [file] = folder.rglob("metrics.csv")
    with file.open() as lines:
        return [(int(row["step"]), float(row[key])) for row in csv.DictReader(lines) if row.get(key)]


# -- loggers ----------------------------------------------------------------------------------------------------------

WHO = {"the trainer": (True, False), "the model": (False, True), "both": (True, True)}


@pytest.mark.parametrize("who", WHO)
def test_every_number_once_at_its_step(who, tmp_path) -> None:
    trainers, models = WHO[who]
    loggers = [TensorBoardLogger(tmp_path / "board"), CSVLogger(tmp_path / "table")]
    results = learn(tmp_path, of_trainer=loggers if trainers else (), of_model=loggers if models else ())
    read = board(tmp_path / "board")
    for key in ("reward/mean", "loss/grad_norm", "mismatch/kl", "throughput/tokens_per_s", "time/train_s"):
        expected = [(result.step, result.metrics[key]) for result in results]
        assert scalars(read, key) == expected
        assert column(tmp_path / "table", key) == [(step, pytest.approx(value)) for step, value in expected]
    tags = set(read.Tags()["scalars"])
    # what only `model.log` knows goes to the model's loggers
    assert ("val/reward/mean" in tags) == ("data/num_exceptions" in tags) == models
    if models:
        assert scalars(read, "val/reward/mean") == [(CALLS, 7.0)]
        assert column(tmp_path / "table", "val/reward/mean") == [(CALLS, 7.0)]


def test_what_the_model_tells_differently_is_told(tmp_path) -> None:
    logger = CSVLogger(tmp_path / "table")
    model = fitrl.TrainableModel("run", "project", "tiny", lora=None, root=tmp_path, loggers=[logger])
    with fitrl.LocalTrainer(**CPU, logger=logger) as trainer:
        result = trainer.fit_rl(model, make_groups(seed=1), save_checkpoint=False)
        model.log(metrics=result.metrics | {"loss/train": 5.0}, step=result.step)
        model.log(metrics=result.metrics, step=result.step + 1)  # of another step, so it is news
    losses = column(tmp_path / "table", "loss/train")
    assert losses == [(1, pytest.approx(result.metrics["loss/train"])), (1, 5.0), (2, losses[0][1])]


def test_nothing_is_lost_when_the_process_dies(tmp_path) -> None:
    """Each `log` reaches the disk: nobody closes a model's loggers."""
    code = (
        "import os, sys, fitrl\n"
        "from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger\n"
        "loggers = [CSVLogger(sys.argv[1] + '/table'), TensorBoardLogger(sys.argv[1] + '/board')]\n"
        "model = fitrl.TrainableModel('run', 'project', 'tiny', root=sys.argv[1], loggers=loggers)\n"
        "model.log(metrics={'a': 0.5}, step=3)\n"
        "os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert column(tmp_path / "table", "a") == scalars(board(tmp_path / "board"), "a") == [(3, 0.5)]


WANDB = """
import json, sys
sys.path[:0] = sys.argv[2:]
from pathlib import Path
import wandb
from lightning.pytorch.loggers import WandbLogger
from test_logging import learn, wandb_rewards
root = Path(sys.argv[1])
(root / "wandb-files").mkdir()
logger = WandbLogger(project="p", save_dir=str(root / "wandb-files"), offline=True)
results = learn(root, of_trainer=[logger], of_model=[logger])
wandb.teardown()  # waits for the service, and so for the file
[file] = (root / "wandb-files" / "wandb").glob("offline-run-*/*.wandb")
print(json.dumps([[[result.step, result.metrics["reward/mean"]] for result in results], list(wandb_rewards(file))]))
"""


def wandb_records(path: Path):
    """The records of an offline run: a LevelDB log of protocol buffers, in blocks of 32 KiB, after a 7-byte header."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if kind == 0:
            at = (at // 32768 + 1) * 32768
            continue
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if 32768 - at % 32768 < 7:
            at = (at // 32768 + 1) * 32768
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def wandb_rewards(path: Path):
    """Step and reward of each line of an offline run's history that has one."""
    for record in wandb_records(path):
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            if "reward/mean" in items:
                yield items["trainer/global_step"], items["reward/mean"]


@pytest.mark.slow
def test_wandb_offline_is_one_run(tmp_path) -> None:
    """In a process of its own, because wandb starts a service and leaves temporary folders; without a network."""
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "OMP_NUM_THREADS": "1"}
    environment |= {"TMPDIR": str(tmp_path), "HOME": str(tmp_path)}
    paths = [str(Path(__file__).parent), *sys.path]
    command = [sys.executable, "-c", WANDB, str(tmp_path), *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    told, seen = json.loads(done.stdout.splitlines()[-1])
    assert seen == told and [step for step, _ in seen] == [1, 2, 3]


# -- callbacks --------------------------------------------------------------------------------------------------------


def test_learning_rate_monitor_tells_the_rate_of_each_step(tmp_path) -> None:
    """Lightning names a rate by the step before it: the rate at s is that of the step from s to s + 1."""
    logger = TensorBoardLogger(tmp_path / "board")
    results = learn(
        tmp_path, of_trainer=[logger], callbacks=[LearningRateMonitor()], lr_schedule=lambda step: 1 / (1 + step)
    )
    told = scalars(board(tmp_path / "board"), "lr-AdamW")
    assert told == [(0, 1e-4), (1, 0.5e-4), (2, 1e-4 / 3)]
    assert [value for _, value in told] == [result.metrics["loss/learning_rate"] for result in results]


def test_model_checkpoint_keeps_the_best_by_reward(tmp_path) -> None:
    keeper = ModelCheckpoint(tmp_path / "best", monitor="reward/mean", mode="max", filename="{step}", save_top_k=1)
    learn(tmp_path, callbacks=[keeper])
    assert float(keeper.best_model_score) == CALLS - 1
    assert [path.name for path in (tmp_path / "best").iterdir()] == [f"step={CALLS}.ckpt"]
    worst = ModelCheckpoint(tmp_path / "worst", monitor="reward/mean", mode="min", filename="{step}", save_top_k=1)
    learn(tmp_path / "again", callbacks=[worst])
    assert [path.name for path in (tmp_path / "worst").iterdir()] == ["step=1.ckpt"]


def test_early_stopping_tells_the_loop(tmp_path) -> None:
    """The loop is the user's: `trainer.should_stop` is what callbacks said during the call before."""
    stopper = EarlyStopping(monitor="reward/mean", mode="max", patience=2)
    model = fitrl.TrainableModel("run", "project", "tiny", lora=None, root=tmp_path)
    asked = []
    with fitrl.LocalTrainer(**CPU, callbacks=stopper) as trainer:
        for reward in (1.0, 2.0, 1.0, 1.0, 3.0):
            result = trainer.fit_rl(model, rewarded(0, reward), save_checkpoint=False)
            asked.append(trainer.should_stop)
    # patience: two calls without a better reward; a further call trains, and takes the wish back if it does better
    assert asked == [False, False, False, True, False]
    assert result.step == 5 and result.num_optimizer_steps == 1
    assert stopper.stopped_epoch == 3


def test_early_stopping_lets_the_call_finish(tmp_path) -> None:
    stopper = EarlyStopping(monitor="reward/mean", mode="max", stopping_threshold=0.0)
    model = fitrl.TrainableModel("run", "project", "tiny", lora=None, root=tmp_path)
    with fitrl.LocalTrainer(**CPU, callbacks=stopper) as trainer:
        result = trainer.fit_rl(model, rewarded(0, 1.0), num_minibatches=2, num_epochs=2)
        assert trainer.should_stop and result.num_optimizer_steps == 4 and result.checkpoint_path is not None


def test_a_metric_that_is_not_there_is_lightnings_error(tmp_path) -> None:
    with pytest.raises(RuntimeError, match="reward/maen"):
        learn(tmp_path, callbacks=[EarlyStopping(monitor="reward/maen")])


def test_none_asks_for_the_defaults(tmp_path) -> None:
    """The command line passes every option of Lightning, most of them as None."""
    names = ("logger", "enable_checkpointing", "enable_progress_bar", "log_every_n_steps", "num_sanity_val_steps")
    trainer = fitrl.LocalTrainer(**CPU, **dict.fromkeys(names), max_epochs=None, callbacks=None)
    assert trainer.loggers == [] and trainer.log_every_n_steps == 1 and trainer.num_sanity_val_steps == 0
    assert trainer.max_epochs == -1 and trainer.progress_bar_callback is None and trainer.checkpoint_callback is None
