"""The pipeline's books: what a process finds that begins after another one was killed."""

from __future__ import annotations

import json

import pytest

import fitrl
from fitrl.errors import CheckpointError
from fitrl.policy import checkpoints
from fitrl.rollout.ledger import Ledger
from helpers import facts, group


@pytest.fixture
def model(tmp_path) -> fitrl.TrainableModel:
    return fitrl.TrainableModel("books", "p", "tiny", root=tmp_path)


def save(model, step: int) -> None:
    """A checkpoint of a step, as far as the books look at it."""
    manifest = checkpoints.Manifest(step=step, base_model="tiny", adapter=True, weights_only=True)
    model.checkpoints_dir.mkdir(parents=True, exist_ok=True)
    checkpoints.write(model.checkpoints_dir / f"{step:04d}", manifest, lambda folder: None, None)


def again(model) -> Ledger:
    """What another process reads, which resumes the newest checkpoint."""
    there = fitrl.TrainableModel(model.name, model.project, "tiny", root=model.root)
    return Ledger(there, keeps_waiting=True)


def one(number: int):
    return group([0.25, float(number)], metadata={"number": number})


def files(model) -> list[str]:
    return sorted(path.name for path in (model.run_dir / "pipeline" / "groups").iterdir())


def test_a_batch_is_handed_out_again_until_a_checkpoint_holds_what_it_taught(model) -> None:
    books = Ledger(model, keeps_waiting=True)
    for number in range(6):
        books.keep(number, one(number))
    books.hand_out({0: one(0), 2: one(2)}, [0])
    model.step = 1  # trained, and not saved
    books.hand_out({1: one(1), 3: one(3)}, [0, 1])
    found = again(model)
    assert [[g.metadata["number"] for g in batch] for batch in found.replays] == [[0, 2], [1, 3]]
    assert facts(found.replays[0][0]) == facts(one(0)) and list(found.waiting) == [4, 5]
    assert found.versions == [0, 1] and found.next_number(found.waiting) == 6
    save(model, 1)
    found = again(model)
    assert [[g.metadata["number"] for g in batch] for batch in found.replays] == [[1, 3]]
    save(model, 2)
    found = again(model)
    assert found.replays == [] and list(found.waiting) == [4, 5]
    assert files(model) == ["000004.json", "000005.json"]


def test_what_a_checkpoint_holds_is_deleted_when_the_next_batch_is_handed_out(model) -> None:
    books = Ledger(model, keeps_waiting=True)
    for step in range(3):
        books.keep(step, one(step))
        books.hand_out({step: one(step)}, [step])
        model.step = step + 1
        if step != 1:
            save(model, step + 1)
        # of step 2 there is no checkpoint, so what it was trained on stays
        assert files(model) == [["000000.json"], ["000001.json"], ["000001.json", "000002.json"]][step]


def test_a_run_that_goes_back_while_it_is_open_is_handed_its_batches_again(model) -> None:
    books = Ledger(model, keeps_waiting=True)
    for step in range(3):
        model.step = step
        books.keep(step, one(step))
        books.hand_out({step: one(step)}, [step])
    books.look_back()
    assert books.replays == []
    model.step = 1  # the newest checkpoint, after a gradient that was not finite
    books.look_back()
    assert [[g.metadata["number"] for g in batch] for batch in books.replays] == [[1], [2]]
    assert len(again(model).replays) == 3  # of a process that finds no checkpoint


def replays(books: Ledger) -> list[list[int]]:
    return [[g.metadata["number"] for g in batch] for batch in books.replays]


def test_a_run_that_goes_back_while_its_batches_are_replayed_is_handed_them_from_the_begin(model) -> None:
    books = Ledger(model, keeps_waiting=True)
    for step in range(4):
        model.step = step
        books.keep(step, one(step))
        books.hand_out({step: one(step)}, [step])
    model.step = 1
    books.look_back()
    books.hand_out_again()
    model.step = 2
    books.look_back()
    books.hand_out_again()
    assert replays(books) == [[3]]
    model.step = 1  # the second one could not be trained on again
    books.look_back()
    assert replays(books) == [[1], [2], [3]]


def test_a_batch_that_the_run_goes_back_from_twice_is_left_out(model) -> None:
    books = Ledger(model, keeps_waiting=True)
    for step in range(3):
        model.step = step
        books.keep(step, one(step))
        books.hand_out({step: one(step)}, [step])
    model.step = 1  # the newest checkpoint: the last batch could not be trained on
    assert books.look_back() == 0 and replays(books) == [[1], [2]]
    books.hand_out_again()
    model.step = 2
    books.hand_out_again()
    model.step = 1  # nor could it again
    assert books.look_back() == 1 and replays(books) == [[1]]
    assert replays(again(model)) == [[0], [1]]  # of a process that finds no checkpoint
    books.hand_out_again()
    model.step = 2
    assert books.look_back() == 0 and replays(books) == [] and books.next_number(()) == 3


def test_a_replay_that_takes_more_steps_than_before_leaves_those_after_it_to_be_handed_out(model) -> None:
    books = Ledger(model, keeps_waiting=True)
    for step in range(2):
        model.step = step
        books.keep(step, one(step))
        books.hand_out({step: one(step)}, [step])
    books = again(model)
    assert replays(books) == [[0], [1]]
    books.hand_out_again()
    save(model, 4)  # with num_minibatches=4 this time
    assert replays(again(model)) == [[1]]


def test_other_books_of_the_same_process_keep_what_no_checkpoint_holds(model) -> None:
    books = Ledger(model, keeps_waiting=True)
    books.keep(0, one(0))
    books.hand_out({0: one(0)}, [0])
    model.step = 1  # trained, and not saved
    assert Ledger(model, keeps_waiting=True).replays == []
    assert replays(again(model)) == [[0]]


def test_a_batch_that_could_not_be_noted_is_noted_once(model, monkeypatch) -> None:
    def full(file: int) -> None:
        raise OSError("no space left")

    books = Ledger(model, keeps_waiting=True)
    books.keep(0, one(0))
    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="no space left"):
        patch.setattr("os.fsync", full)
        books.hand_out({0: one(0)}, [0])
    books.hand_out({0: one(0)}, [0])
    assert replays(again(model)) == [[0]]


def test_what_was_finished_before_the_first_batch_waits(model) -> None:
    Ledger(model, keeps_waiting=True).keep(1, one(1))
    found = again(model)
    assert list(found.waiting) == [1] and found.next_number(found.waiting) == 0


def test_groups_that_were_under_way_or_dropped(model) -> None:
    books = Ledger(model, keeps_waiting=True)
    for number in (1, 3):
        books.keep(number, one(number))
    assert books.next_number({0, 1, 2, 3}) == 4
    books.drop(3)
    books.hand_out({1: one(1)}, [0])
    found = again(model)
    assert not found.waiting and files(model) == ["000001.json"]
    assert [found.next_number(taken) for taken in ((), {0}, {0, 2})] == [0, 2, 4]


def test_what_a_crash_left_over_is_cleared(model) -> None:
    books = Ledger(model, keeps_waiting=True)
    books.keep(0, one(0))
    books.hand_out({0: one(0)}, [0])
    folder = model.run_dir / "pipeline" / "groups"
    (folder / ".000001.json.tmp").write_text('{"traj')
    save(model, 1)
    assert again(model).replays == [] and files(model) == []


def test_without_waiting_groups_a_step_begins_as_a_whole(model) -> None:
    books = Ledger(model, keeps_waiting=False)
    books.keep(0, one(0))
    books.hand_out({1: one(1)}, [0])
    assert files(model) == ["000001.json"]
    there = fitrl.TrainableModel(model.name, model.project, "tiny", root=model.root)
    found = Ledger(there, keeps_waiting=False)
    assert not found.waiting and len(found.replays) == 1 and found.next_number(()) == 0


def test_damaged_books_are_named(model) -> None:
    books = Ledger(model, keeps_waiting=True)
    books.keep(0, one(0))
    books.hand_out({0: one(0)}, [0])
    path = model.run_dir / "pipeline" / "groups" / "000000.json"
    path.write_text(path.read_text()[:50])
    with pytest.raises(CheckpointError, match="000000.json.*delete .*pipeline to begin anew"):
        again(model)
    queue = model.run_dir / "pipeline" / "queue.json"
    queue.write_text(json.dumps({"floor": 0}))
    with pytest.raises(CheckpointError, match="queue.json cannot be read"):
        again(model)


def test_in_memory_nothing_is_written(tmp_path) -> None:
    books = Ledger(None, keeps_waiting=True)
    books.keep(0, one(0))
    books.hand_out({0: one(0)}, [0])
    books.drop(1)
    assert books.next_number(()) == 2 and not list(tmp_path.iterdir())
