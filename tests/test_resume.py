"""Exact resume: a run killed anywhere and resumed ends with the bits of a run never interrupted.

The runs here have everything on that could make a difference: dropout, EDA, accumulation, a short last batch, early
stopping, AdaLoRA's pruning, P-tuning's network, a base in 4 bits, moments in 8, recomputed activations. They are short:
5 steps in each of 3 epochs, of which the last brings nothing better. A killed run is a real process, a fork of this
one, that gets SIGKILL before its k-th event: an optimizer step, a batch of an evaluation, a logged line, a flush or a
rename of a file.
"""

import copy
import os
import re
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import train as train_module
from tests.conftest import write_tiny_config, write_tiny_data
from tests.forked import outcome, run_forked
from train import train
from training import adamw8bit, checkpoint, recorder
from training.command_line import EXIT_BAD_INPUT, run_command
from training.config import parse_command_line

OPTIONS = """
--data.augmentation.n-aug 1 --train.accumulation-steps 2 --train.batch-size 7 --train.epochs 5 --train.patience 1
--train.log-every 2 --train.checkpoint-steps 3 --train.eval-batch-size 4 --lora.dropout 0.1
--data.train-rows 32 --train.learning-rate 5e-2 --train.r-drop 0.5
--model.base-bits 4 --train.optimizer adamw8bit --train.gradient-checkpointing
""".split()
RESUMED = [*OPTIONS, "--p-tuning.encoder-dropout", "0.5"]


KINDS = ("train_step", "collate", "log", "fsync", "rename", "replace")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """A fork has only the thread that made it: torch must not wait for others."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def no_pages():
    """As in a fork: drawing takes longer than the training, and is not resumed but done again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorder, "draw_plots", lambda folder: None)
        patch.setattr(recorder, "write_html_report", lambda folder: None)
        patch.setattr(adamw8bit, "_SMALLEST", 64)  # tensors here are small
        yield


@pytest.fixture(scope="module")
def run_config(one_thread, no_pages, tiny_checkpoint, tmp_path_factory):
    """Settings of the runs; a first one has imported and read what every fork would import and read again."""
    config = write_tiny_config(tiny_checkpoint, write_tiny_data(tmp_path_factory.mktemp("resume")), more=True)
    arguments = [config, *RESUMED, "--output", config.with_name("first"), "--train.epochs", 1]
    assert train(parse_command_line([str(one) for one in arguments])) == 0
    return config


def in_a_fork(arguments, kill_at=-1):
    """Run train.py's command in a fork that is killed before event `kill_at`: (exit code, names of the events)."""
    ended = run_forked(arguments, kill_at)
    return ended.code, ended.events


@pytest.fixture
def command(run_config, tmp_path):
    """Arguments of a run into tmp_path/NAME."""

    def arguments(name, *more):
        return [run_config, *RESUMED, "--output", tmp_path / name, *more]

    return arguments


@pytest.fixture(scope="module")
def never_interrupted(run_config):
    """A run's folder, its outcome and its events."""
    folder = run_config.with_name("whole")
    status, events = in_a_fork([run_config, *RESUMED, "--output", folder])
    assert status == 0
    expected = outcome(folder)
    assert (expected[0]["epochs_run"], expected[0]["steps"]) == (3, 15), "it does not stop early"
    return folder, expected, events


@pytest.fixture
def whole(never_interrupted):
    """The outcome of a run never interrupted, and its events."""
    return copy.deepcopy(never_interrupted[1:])


def moments_of(kind, events):
    """Numbers of events of a kind, before which a run is killed: early and late, with and without a checkpoint."""
    of_kind = [i for i, name in enumerate(events) if name == kind]
    renames = [i for i, name in enumerate(events) if name == "rename"]  # of the run folder, then of each checkpoint
    before, after = ([i for i in of_kind if (i > renames[1]) == late] for late in (False, True))
    assert after, f"no {kind} after the first checkpoint"
    moments = {of_kind[0], of_kind[len(of_kind) // 2], of_kind[-1], after[0], *before[-1:]}
    if kind == "collate":  # within an evaluation
        evaluation = [i for i in of_kind if events[i - 2 : i + 1] == ["collate"] * 3]
        moments |= {evaluation[0], evaluation[-2]}
    if kind == "fsync":  # within the writing of the third checkpoint, and just before its rename
        moments |= {renames[3] - 1, renames[3] - 2}
    if kind == "rename":  # of the first checkpoint and of the third
        moments |= {renames[1], renames[3]}
    return sorted(moments)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_anywhere_and_resumed_is_the_run_never_interrupted(command, whole, tmp_path, kind):
    expected, events = whole
    assert set(events) == set(KINDS) and sum(len(moments_of(one, events)) for one in KINDS) >= 25
    for moment in moments_of(kind, events):
        shutil.rmtree(tmp_path / "cut", ignore_errors=True)
        status, _ = in_a_fork(command("cut", "--resume"), kill_at=moment)
        assert status == -signal.SIGKILL
        status, _ = in_a_fork(command("cut", "--resume"))
        assert status == 0, f"killed before event {moment}, {events[moment]}"
        assert outcome(tmp_path / "cut") == expected, f"killed before event {moment}, {events[moment]}"
        assert not (tmp_path / "cut" / "checkpoint").exists()


@pytest.mark.parametrize("kind", ["tmix", "unlabelled"])
def test_what_excludes_other_settings_is_resumed_too(command, run_config, tmp_path, kind):
    """TMix's mixtures, and the moving averages of unlabelled texts; killed after the checkpoint of the third step."""
    config = run_config.with_name(f"{kind}.toml")
    table = '[unlabelled]\nmethod = "softmatch"\nratio = 1\n' if kind == "unlabelled" else ""
    config.write_text(run_config.read_text() + table)

    def arguments(name, *more):
        mixed = ("--train.r-drop", 0, "--train.tmix", 0.5) if kind == "tmix" else ()
        return [config, *command(name, "--train.epochs", 2, *mixed, *more)[1:]]

    status, events = in_a_fork(arguments("whole"))
    assert status == 0
    middle = [i for i, name in enumerate(events) if name == "train_step"][4]
    assert in_a_fork(arguments("cut"), kill_at=middle)[0] == -signal.SIGKILL
    assert in_a_fork(arguments("cut", "--resume"))[0] == 0
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_a_run_killed_several_times_is_the_same_run(command, whole, tmp_path):
    expected, events = whole
    kills = 0
    for moment in (len(events) // 4, len(events) // 3, 5, len(events) // 4, len(events) // 2):
        status, _ = in_a_fork(command("cut", "--resume"), kill_at=moment)
        kills += status == -signal.SIGKILL
    assert kills >= 4
    assert in_a_fork(command("cut", "--resume"))[0] == 0
    assert outcome(tmp_path / "cut") == expected


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_writes_a_checkpoint_first(command, whole, tmp_path, monkeypatch, capsys, number, code):
    real, steps = train_module.train_step, []
    monkeypatch.setattr(signal, "getsignal", lambda _number: signal.default_int_handler)

    def interrupting(*arguments):
        steps.append(1)
        if len(steps) == 4:
            os.kill(os.getpid(), number)
        return real(*arguments)

    monkeypatch.setattr(train_module, "train_step", interrupting)
    assert run_command(lambda: train(parse_command_line([str(one) for one in command("cut")]))) == code
    assert "--resume" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "cut" / "checkpoint").iterdir()][-1:] and len(steps) == 4
    monkeypatch.undo()
    assert in_a_fork(command("cut", "--resume"))[0] == 0
    assert outcome(tmp_path / "cut") == whole[0]


@pytest.mark.parametrize("torchrun", [False, True])
def test_a_second_signal_stops_at_once_unless_it_may_be_the_first_passed_on(command, tmp_path, monkeypatch, torchrun):
    real, steps = train_module.train_step, []
    monkeypatch.setattr(signal, "getsignal", lambda _number: signal.default_int_handler)
    if torchrun:  # of one process: whoever ends the job signals it, and torchrun passes the signal on
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")

    def interrupting(*arguments):
        steps.append(1)
        if len(steps) == 4:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(train_module, "train_step", interrupting)
    code = run_command(lambda: train(parse_command_line([str(one) for one in command("cut")])))
    written = max((tmp_path / "cut" / "checkpoint").glob("step-*")).name
    assert written == ("step-00000004" if torchrun else "step-00000003") and len(steps) == 4
    assert code == 130


@pytest.fixture(scope="module")
def killed_once(run_config, never_interrupted):
    """The folder of a run killed after its second checkpoint."""
    _, _, events = never_interrupted
    renames = [i for i, name in enumerate(events) if name == "rename"]  # of the run folder, then of each checkpoint
    folder = run_config.with_name("cut")
    in_a_fork([run_config, *RESUMED, "--output", folder], kill_at=renames[3])
    assert len(list((folder / "checkpoint").glob("step-*"))) == 2
    return folder


@pytest.fixture
def cut(killed_once, tmp_path):
    """A copy of it, which a test may change."""
    return shutil.copytree(killed_once, tmp_path / "cut")


def resume(capsys, arguments):
    capsys.readouterr()
    code = run_command(lambda: train(parse_command_line([str(one) for one in arguments])))
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json", "sha256.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_checkpoint_is_found_out_and_the_one_before_it_used(cut, command, whole, capsys, file, damage):
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
    assert outcome(cut) == whole[0]


def test_checkpoints_all_damaged_are_one_line(cut, command, capsys):
    for path in (cut / "checkpoint").glob("step-*/state.json"):
        path.write_text("{}")
    code, _, err = resume(capsys, command("cut", "--resume"))
    assert code == EXIT_BAD_INPUT and "every checkpoint is damaged" in err and err.count("\n") == 1


def test_what_changed_since_is_named(cut, command, run_config, tiny_checkpoint, capsys):
    path = run_config.with_name("test.csv")
    kept = path.read_text()
    try:
        path.write_text(kept.replace("goal", "coach"))
        code, _, err = resume(capsys, command("cut", "--resume"))
    finally:
        path.write_text(kept)
    assert code == EXIT_BAD_INPUT and "the data changed since" in err

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
    assert re.search(r"other settings: lora.alpha \(there: 8.0\), train.learning_rate \(there: 0.05\)", err)
    code, _, err = resume(capsys, command("cut", "--resume", "--overwrite"))
    assert code == EXIT_BAD_INPUT and "exclude each other" in err


def test_harmless_settings_may_change_and_the_folder_may_move(cut, command, whole, tmp_path, capsys):
    moved = cut.rename(tmp_path / "moved")
    assert resume(capsys, command("moved", "--resume", "--train.checkpoint-steps", 2))[0] == 0
    (report, *rest), (expected, *expected_rest) = outcome(moved), whole[0]
    assert report["config"]["train"].pop("checkpoint_steps") == 2
    assert expected["config"]["train"].pop("checkpoint_steps") == 3
    assert (report, rest) == (expected, expected_rest)


def test_a_finished_run_is_left_alone_and_an_absent_one_started(command, never_interrupted, tmp_path, capsys):
    shutil.copytree(never_interrupted[0], tmp_path / "whole")
    before = (tmp_path / "whole" / "report.json").read_bytes()
    code, out, _ = resume(capsys, command("whole", "--resume"))
    assert code == 0 and "is finished" in out and (tmp_path / "whole" / "report.json").read_bytes() == before


def test_only_the_newest_checkpoints_are_kept(command, whole, tmp_path):
    _, events = whole
    in_a_fork(command("cut", "--train.checkpoint-keep", 3), kill_at=len(events) * 2 // 3)
    names = sorted(path.name for path in (tmp_path / "cut" / "checkpoint").glob("step-*"))
    # Of equal width, so that they sort by step; a step saved again, as at the end of an epoch, has a number behind it.
    assert len(names) == 3 and len({len(name.partition(".")[0]) for name in names}) == 1


class Killed(BaseException):
    pass


def test_a_step_saved_again_never_leaves_none(tmp_path, monkeypatch):
    """As after a resume that was stopped at once: one checkpoint is kept, and it is replaced."""
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
            if len(calls) >= at:  # whatever would have come after it does not come either
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


def test_checkpoints_come_by_the_clock_too(command, tmp_path, monkeypatch):
    clock = [0.0]

    def later():
        clock[0] += 1.0  # every look at the clock is a second later
        return clock[0]

    monkeypatch.setattr(time, "perf_counter", later)
    written = []
    real = checkpoint.save
    monkeypatch.setattr(recorder, "save", lambda *a: (written.append(a[1].step), real(*a)))
    by_time = ["--train.checkpoint-steps", 0, "--train.checkpoint-minutes", 0.1]
    arguments = command("timed", *by_time, "--data.train-rows", 80, "--train.epochs", 1)
    assert train(parse_command_line([str(one) for one in arguments])) == 0
    assert (len(written) > 2 and written == sorted(set(written))) or written[-1] == written[-2]
