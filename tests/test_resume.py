"""Exact resume: a run killed anywhere and resumed ends with the same bits as an uninterrupted run.

The runs use every feature that could make a difference: dropout, EDA, accumulation, a short last batch, early stopping.
A killed run is a forked process that receives SIGKILL before its k-th event: an optimizer step, a batch of an
evaluation, a logged line, a flush or a rename of a file.
"""

import os
import random
import re
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import train as train_module
from tests.forked import outcome, run_forked
from train import train
from training import checkpoint, recorder
from training.command_line import EXIT_BAD_INPUT, run_command
from training.config import parse_command_line

OPTIONS = """
--data.augmentation.n-aug 1 --train.accumulation-steps 2 --train.batch-size 7 --train.epochs 7 --train.patience 2
--train.log-every 4 --train.checkpoint-steps 3 --train.eval-batch-size 4 --lora.dropout 0.2
""".split()


@pytest.fixture(autouse=True)
def one_thread():
    """A fork has only one thread: torch must not wait for others."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def warm():
    """Late imports happen now, once, instead of in every fork."""
    import datasets
    import matplotlib
    import sklearn.metrics

    return datasets, matplotlib, sklearn.metrics


def in_a_fork(arguments, kill_at=-1):
    """Run train.py's command in a fork that is killed before event `kill_at`: (exit code, names of the events)."""
    ended = run_forked(arguments, kill_at)
    return ended.code, ended.events


@pytest.fixture
def command(tiny_config, tiny_checkpoint, tmp_path, warm):
    """Arguments of a run into tmp_path/NAME."""

    def arguments(name, *more):
        return [tiny_config, *OPTIONS, "--output", tmp_path / name, *more]

    return arguments


@pytest.fixture
def uninterrupted(command, tmp_path):
    """The outcome of an uninterrupted run, and its events."""
    status, events = in_a_fork(command("uninterrupted"))
    assert status == 0
    return outcome(tmp_path / "uninterrupted"), events


def test_a_run_killed_anywhere_and_resumed_equals_an_uninterrupted_run(command, uninterrupted, tmp_path):
    expected, events = uninterrupted
    assert {"train_step", "collate", "log", "fsync", "rename", "replace"} <= set(events)
    draw = random.Random(0)
    moments = draw.sample(range(len(events)), 22)
    # Always: while a checkpoint is written, before its rename, during an evaluation, at the very end.
    renames = [i for i, name in enumerate(events) if name == "rename"]
    evaluations = [i for i in range(2, len(events)) if events[i - 2 : i + 1] == ["collate"] * 3]
    moments += [
        renames[0],
        renames[3] - 1,
        renames[4] - 2,
        draw.choice(evaluations),
        events.index("train_step"),
        len(events) - 1,
    ]
    assert len(moments) >= 25
    for moment in moments:
        shutil.rmtree(tmp_path / "cut", ignore_errors=True)
        status, _ = in_a_fork(command("cut", "--resume"), kill_at=moment)
        assert status == -signal.SIGKILL
        status, _ = in_a_fork(command("cut", "--resume"))
        assert status == 0, f"killed before event {moment}, {events[moment]}"
        assert outcome(tmp_path / "cut") == expected, f"killed before event {moment}, {events[moment]}"
        assert not (tmp_path / "cut" / "checkpoint").exists()


def test_a_run_killed_several_times_equals_an_uninterrupted_run(command, uninterrupted, tmp_path):
    expected, events = uninterrupted
    kills = 0
    for moment in (len(events) // 4, len(events) // 3, 5, len(events) // 4, len(events) // 2):
        status, _ = in_a_fork(command("cut", "--resume"), kill_at=moment)
        kills += status == -signal.SIGKILL
    assert kills >= 4
    assert in_a_fork(command("cut", "--resume"))[0] == 0
    assert outcome(tmp_path / "cut") == expected


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_writes_a_checkpoint_first(command, uninterrupted, tmp_path, monkeypatch, capsys, number, code):
    real, steps = train_module.train_step, []
    monkeypatch.setattr(signal, "getsignal", lambda _number: signal.default_int_handler)

    def interrupting(*arguments):
        steps.append(1)
        if len(steps) == 5:
            os.kill(os.getpid(), number)
        return real(*arguments)

    monkeypatch.setattr(train_module, "train_step", interrupting)
    assert run_command(lambda: train(parse_command_line([str(one) for one in command("cut")]))) == code
    assert "--resume" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "cut" / "checkpoint").iterdir()][-1:] and len(steps) == 5
    monkeypatch.undo()
    assert in_a_fork(command("cut", "--resume"))[0] == 0
    assert outcome(tmp_path / "cut") == uninterrupted[0]


@pytest.mark.parametrize("torchrun", [False, True])
def test_a_second_signal_stops_immediately_unless_forwarded_by_torchrun(command, tmp_path, monkeypatch, torchrun):
    real, steps = train_module.train_step, []
    monkeypatch.setattr(signal, "getsignal", lambda _number: signal.default_int_handler)
    if torchrun:  # one process: the scheduler signals it, and torchrun forwards the signal
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")

    def interrupting(*arguments):
        steps.append(1)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(train_module, "train_step", interrupting)
    code = run_command(lambda: train(parse_command_line([str(one) for one in command("cut")])))
    written = max((tmp_path / "cut" / "checkpoint").glob("step-*")).name
    assert written == ("step-00000005" if torchrun else "step-00000003") and len(steps) == 5
    assert code == 130


@pytest.fixture
def cut(command, tmp_path, uninterrupted):
    """A run killed after its second checkpoint."""
    _, events = uninterrupted
    renames = [i for i, name in enumerate(events) if name == "rename"]  # of the run folder, then of each checkpoint
    in_a_fork(command("cut"), kill_at=renames[3])
    folder = tmp_path / "cut"
    assert len(list((folder / "checkpoint").glob("step-*"))) == 2
    return folder


def resume(capsys, arguments):
    capsys.readouterr()
    code = run_command(lambda: train(parse_command_line([str(one) for one in arguments])))
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json", "sha256.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_checkpoint_is_detected_and_the_one_before_it_used(cut, command, uninterrupted, capsys, file, damage):
    newest = max((cut / "checkpoint").glob("step-*"))
    path = newest / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    code, out, _ = resume(capsys, command("cut", "--resume"))
    assert code == 0
    assert f"{newest} is damaged" in out and "the one before it is used" in out
    assert outcome(cut) == uninterrupted[0]


def test_only_damaged_checkpoints_are_a_one_line_error(cut, command, capsys):
    for path in (cut / "checkpoint").glob("step-*/state.json"):
        path.write_text("{}")
    code, _, err = resume(capsys, command("cut", "--resume"))
    assert code == EXIT_BAD_INPUT and "every checkpoint is damaged" in err and err.count("\n") == 1


def test_changed_inputs_and_settings_are_named(cut, command, tiny_data, tiny_checkpoint, tmp_path, capsys):
    path = tiny_data / "test.csv"
    kept = path.read_text()
    path.write_text(kept.replace("goal", "coach"))
    code, _, err = resume(capsys, command("cut", "--resume"))
    assert code == EXIT_BAD_INPUT and "the data changed since" in err
    path.write_text(kept)

    weights = load_file(tiny_checkpoint / "model.safetensors")
    original = (tiny_checkpoint / "model.safetensors").read_bytes()
    name = next(iter(weights))
    try:
        save_file({**weights, name: weights[name] + 1}, tiny_checkpoint / "model.safetensors")
        code, _, err = resume(capsys, command("cut", "--resume"))
    finally:
        (tiny_checkpoint / "model.safetensors").write_bytes(original)
    assert code == EXIT_BAD_INPUT and "the base weights changed since" in err

    code, _, err = resume(capsys, command("cut", "--resume", "--train.learning-rate", 0.5, "--lora.alpha", 3))
    assert code == EXIT_BAD_INPUT
    assert re.search(r"other settings: lora.alpha \(there: 8.0\), train.learning_rate \(there: 0.02\)", err)
    code, _, err = resume(capsys, command("cut", "--resume", "--overwrite"))
    assert code == EXIT_BAD_INPUT and "exclude each other" in err


def test_settings_of_output_may_change_and_the_folder_may_move(cut, command, uninterrupted, tmp_path, capsys):
    moved = cut.rename(tmp_path / "moved")
    assert resume(capsys, command("moved", "--resume", "--train.checkpoint-steps", 2))[0] == 0
    (report, *rest), (expected, *expected_rest) = outcome(moved), uninterrupted[0]
    assert report["config"]["train"].pop("checkpoint_steps") == 2
    assert expected["config"]["train"].pop("checkpoint_steps") == 3
    assert (report, rest) == (expected, expected_rest)


def test_a_finished_run_is_left_alone_and_an_absent_one_started(command, uninterrupted, tmp_path, capsys):
    before = (tmp_path / "uninterrupted" / "report.json").read_bytes()
    code, out, _ = resume(capsys, command("uninterrupted", "--resume"))
    assert code == 0 and "is finished" in out and (tmp_path / "uninterrupted" / "report.json").read_bytes() == before


def test_only_the_newest_checkpoints_are_kept(command, uninterrupted, tmp_path):
    _, events = uninterrupted
    in_a_fork(command("cut", "--train.checkpoint-keep", 3), kill_at=len(events) * 2 // 3)
    names = sorted(path.name for path in (tmp_path / "cut" / "checkpoint").glob("step-*"))
    # Of equal width, so that they sort by step; a step saved again, as at the end of an epoch, has a suffix.
    assert len(names) == 3 and len({len(name.partition(".")[0]) for name in names}) == 1


class Killed(BaseException):
    pass


def test_saving_a_step_again_always_leaves_a_checkpoint(tmp_path, monkeypatch):
    """As after a resume that was stopped immediately: the only checkpoint is replaced."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _step: 1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def save(seconds):
        train_state = checkpoint.TrainState(step=5, seconds=seconds)
        checkpoint.save(tmp_path, train_state, model, optimizer, schedule, scaler, {}, keep=1)

    def killing(real, calls, at):
        def call(*arguments, **options):
            calls.append(real)
            if len(calls) >= at:  # and no later call happens either
                raise Killed
            return real(*arguments, **options)

        return call

    def killed(seconds, at):
        calls = []
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.Path, "rename", killing(checkpoint.Path.rename, calls, at))
            patch.setattr(checkpoint.shutil, "rmtree", killing(shutil.rmtree, calls, at))
            try:
                save(seconds)
            except Killed:
                return True
        return False

    save(0.0)
    seconds, ends = 0.0, set()
    for first in range(1, 20):
        for second in range(1, 20):
            again = killed(seconds + 1, first), killed(seconds + 2, second)
            state, _, complaints = checkpoint.load(tmp_path)
            assert seconds <= state["train_state"]["seconds"] <= seconds + 2 and not complaints, (first, second)
            assert state["train_state"]["step"] == 5 and (again[1] or state["train_state"]["seconds"] == seconds + 2)
            seconds = state["train_state"]["seconds"]
            ends.add(again)
    assert ends == {(True, True), (True, False), (False, True), (False, False)}
    assert len([path for path in tmp_path.iterdir() if path.name.startswith("step-")]) == 1


def test_checkpoints_are_also_saved_by_time(command, tmp_path, monkeypatch):
    clock = [0.0]

    def later():
        clock[0] += 1.0  # every reading is a second later
        return clock[0]

    monkeypatch.setattr(time, "perf_counter", later)
    written = []
    real = checkpoint.save
    monkeypatch.setattr(recorder, "save", lambda *a: (written.append(a[1].step), real(*a)))
    arguments = command("timed", "--train.checkpoint-steps", 0, "--train.checkpoint-minutes", 0.1, "--train.epochs", 1)
    assert train(parse_command_line([str(one) for one in arguments])) == 0
    assert (len(written) > 2 and written == sorted(set(written))) or written[-1] == written[-2]
