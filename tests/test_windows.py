"""Texts read in windows (data.windows): their tokens, weights and logits, and runs that train on them and use them."""

import itertools
import json
import os
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given
from hypothesis import strategies as st

import train as train_module
from data.batching import collate, encode_split, evaluation_batches, joined, training_batches
from data.sources import Split, load_source
from evaluate import Arguments, evaluate
from roberta.tokenizer import TextTokenizer
from tests.conftest import tiny_rows, tiny_tokenizer, write_tiny_config, write_tiny_data
from tests.forked import outcome
from tests.parity.oracle import assert_close, our_copy, reference_model
from train import train
from training import recorder
from training.command_line import EXIT_BAD_INPUT, parse_options, run_command
from training.config import parse_command_line
from training.distributed import World
from training.precision import Compute
from training.scoring import mean_of_windows, predict

CPU = Compute(torch.device("cpu"), "fp32")
LONG = Split(["the goal " * 9, "oil", "a price on " * 5, "new match today"], [1, 0, 0, 1])  # 18, 1, 15, 3 tokens


def cutter(max_length=8, windows=9, overlap=None, side="right"):
    return TextTokenizer(tiny_tokenizer(), max_length, None, side, windows, overlap)


@given(st.integers(0, 50), st.integers(3, 12), st.integers(2, 9), st.data())
def test_windows_hold_each_token_once_outside_the_overlap(length, max_length, count, data):
    overlap, side = data.draw(st.integers(0, max_length - 3)), data.draw(st.sampled_from(["right", "left"]))
    ids = [4 + i % 20 for i in range(length)]
    words = [tiny_tokenizer().id_to_token(number) for number in ids]
    (windows,), (cut,) = cutter(max_length, count, overlap, side).encode_windows([" ".join(words)])
    assert {(window[0], window[-1]) for window in windows} == {(0, 2)}  # <s> ... </s>
    assert all(len(window) == max_length for window in windows[:-1]) and len(windows[-1]) <= max_length
    turn = 1 if side == "right" else -1
    inner, ids = [window[1:-1][::turn] for window in windows], ids[::turn]
    for window, following in itertools.pairwise(inner):
        assert window[len(window) - overlap :] == following[:overlap] and len(following) > overlap
    read = inner[0] + [token for window in inner[1:] for token in window[overlap:]]
    assert read == ids[: len(read)] and cut == (len(read) < len(ids))
    assert len(windows) == count if cut else len(windows) <= count


def test_windows_are_those_of_transformers(tiny_checkpoint):
    theirs = transformers.AutoTokenizer.from_pretrained(tiny_checkpoint)(
        LONG.texts, truncation=True, max_length=8, stride=3, return_overflowing_tokens=True
    )
    split = encode_split(LONG, TextTokenizer.from_directory(tiny_checkpoint, 8, windows=9, overlap=3))
    assert np.split(split.input_ids, split.offsets[1:-1])[-1].tolist() == theirs["input_ids"][-1]
    assert split.input_ids.tolist() == [*itertools.chain.from_iterable(theirs["input_ids"])]
    assert split.texts.tolist() == theirs["overflow_to_sample_mapping"] and split.texts.tolist().count(0) == 5


def test_one_window_is_truncation():
    plain, one = (encode_split(LONG, tokenizer) for tokenizer in (TextTokenizer(tiny_tokenizer(), 8), cutter(8, 1)))
    assert one.texts is None and one.weights is None and one.truncated == one.longer == 2
    assert np.array_equal(one.input_ids, plain.input_ids) and cutter(8, 1).fingerprint == cutter(8, 1, 3).fingerprint


def test_rows_have_label_and_weight_of_their_text():
    split = encode_split(LONG, cutter(8, 3, 2))
    assert split.texts.tolist() == [0, 0, 0, 1, 2, 2, 2, 3] and (split.longer, split.truncated) == (2, 2)
    weights, third = split.weighted(np.array([3.0, 1.0, 6.0, 5.0])).weights, 1 / 3
    assert split.weights.tolist() == [third, third, third, 1, third, third, third, 1]
    assert weights.tolist() == [1, 1, 1, 1, 2, 2, 2, 5]
    for batch in training_batches(split, 3, 1, seed=0, epoch=1):
        assert batch.labels.tolist() == [LONG.labels[split.texts[row]] for row in batch.indices]
        assert batch.weights.tolist() == split.weights[batch.indices].tolist()
        assert batch.total_weight == pytest.approx(batch.weights.sum().item())
    both = joined([split, encode_split(LONG, cutter(8, 1))])
    assert both.labels.tolist() == [1, 1, 1, 0, 0, 0, 0, 1, *LONG.labels] and len(both.lengths) == 12


@pytest.mark.parametrize("class_weights", [None, (1.0, 3.0)])
def test_loss_and_logits_are_the_means_over_the_windows_in_float64(tmp_path, class_weights):
    """Against transformers, one window at a time without padding."""
    theirs = reference_model().double()
    ours = our_copy(reference_model(), tmp_path)
    split = encode_split(LONG, cutter(8, 9, 2))
    if class_weights:
        split = split.weighted(np.array(class_weights)[LONG.labels])
    rows = [torch.tensor([ids.tolist()]) for ids in np.split(split.input_ids, split.offsets[1:-1])]
    each = torch.cat([theirs(row).logits for row in rows])
    texts = [[row for row, text in enumerate(split.texts) if text == number] for number in range(4)]
    assert [len(windows) for windows in texts] == [4, 1, 4, 1]

    batch = collate(split, np.arange(10), 1, "longest")
    logits = mean_of_windows(ours(batch.input_ids, batch.attention_mask), split)
    assert_close(logits, torch.stack([each[windows].mean(dim=0) for windows in texts]), 1e-10, "logits")

    losses = F.cross_entropy(each, torch.tensor([LONG.labels[text] for text in split.texts]), reduction="none")
    w = torch.tensor([(class_weights or (1.0, 1.0))[label] for label in LONG.labels], dtype=torch.float64)
    expected = (w * torch.stack([losses[windows].mean() for windows in texts])).sum() / w.sum()
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.0)
    schedule = train_module.make_schedule(optimizer, 2, 0)
    found = train_module.train_step(ours, [batch], optimizer, schedule, CPU.grad_scaler(), CPU, 0.0)
    assert_close(found, expected.detach(), 1e-10, "loss")


def test_several_processes_compute_the_same_bits(tmp_path):
    ours, split = our_copy(reference_model(), tmp_path, torch.float32), encode_split(LONG, cutter(8, 9, 2))
    shares = [evaluation_batches(split, 2, 1, share=World(rank, 3).share) for rank in range(3)]
    parts = [predict(ours, batches, len(split.lengths), CPU) for batches in shares]
    alone = predict(ours, evaluation_batches(split, 2, 1), len(split.lengths), CPU)
    assert torch.equal(mean_of_windows(sum(parts), split), mean_of_windows(alone, split))


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_config(tiny_checkpoint, tmp_path_factory):
    """Settings of a run of long texts, whose class is in any window, with windows; pages are not drawn."""
    folder = write_tiny_data(tmp_path_factory.mktemp("windows"))
    for name, seed in (("train", 0), ("test", 1)):
        rows = [f"{label},{'the report ' * (i % 9)}{text}" for i, (label, text) in enumerate(tiny_rows(60, seed))]
        (folder / f"{name}.csv").write_text("\n".join(["label,text", *rows]) + "\n")
    config = write_tiny_config(tiny_checkpoint, folder)
    settings = "max_length = 8\nwindows = 3\nwindow_overlap = 2"
    config.write_text(config.read_text().replace("max_length = 16", settings).replace("epochs = 4", "epochs = 2"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorder, "draw_plots", lambda folder: None)
        patch.setattr(recorder, "write_html_report", lambda folder: None)
        yield config


@pytest.fixture(scope="module")
def long_run(long_config):
    """The folder of the finished run."""
    assert train(parse_command_line([str(long_config)])) == 0
    return long_config.parent / "run"


@pytest.fixture
def command(capsys):
    """Run evaluate.py's command in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        words = [str(argument) for argument in arguments]
        code = run_command(lambda: evaluate(parse_options(Arguments, words, prog="evaluate.py")))
        return code, *capsys.readouterr()

    return run


def test_a_run_is_scored_and_used_with_its_windows(long_run, command, tmp_path):
    report = json.loads((long_run / "report.json").read_text())
    text = "the report " * 8 + "after the coach says goal"
    code, out, _ = command(long_run, "--export", tmp_path / "merged", "--text", text, "oil price")
    shown = out.splitlines()
    assert code == 0 and "average the logits of a long text's windows" in out
    assert "1 texts are longer than 8 tokens and are read in at most 3 windows that share 2 tokens, 1 of them in" in out
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    (windows, _), _ = cutter(8, 3, 2).encode_windows([text, ""])
    with torch.no_grad():
        z = torch.cat([model(torch.tensor([window])).logits for window in windows]).mean(dim=0)
    first = dict(zip(model.config.id2label.values(), z.softmax(dim=0).tolist(), strict=True))
    answers = [line for line in shown if line.startswith(("sports", "business"))]
    name, probability = answers[0].split()[:2]
    assert float(probability) == pytest.approx(first[name], abs=1e-3) and len(windows) == 3

    _, out, _ = command(long_run)
    assert f"loss {report['test']['loss']:.4f}" in out and "of them in part" in out
    _, truncated, _ = command(long_run, "--config", without_windows(long_run, tmp_path))
    assert f"loss {report['test']['loss']:.4f}" not in truncated and "and are truncated" in truncated
    _, both, _ = command("--adapter", long_run, "--adapter", long_run / "adapter", "--text", text, "oil price")
    assert answers[0] in both and answers[1] in both  # in one batch with an adapter that truncates to 128 tokens
    (tmp_path / "new.csv").write_text(f"text\n{text}\noil price\n")
    assert command(long_run, "--predict", tmp_path / "new.csv", "--out", tmp_path / "out.csv")[0] == 0
    assert (tmp_path / "out.csv").read_text() == f"ID,label\n0,{name}\n1,{answers[1].split()[0]}\n"
    _, out, _ = command(long_run, "--noise")
    assert f"{'typing errors':<14}{100 * report['test']['accuracy']:>8.2f}" in out
    _, out, _ = command(long_run, "--on", long_run.with_name("test.csv"))
    assert f"accuracy {100 * report['test']['accuracy']:.2f} % on 60 texts" in out
    assert "each window counts as a text" in command(long_run, "--speed")[1]
    assert "at most 3 windows of 8 tokens" in (long_run / "README.md").read_text()


def without_windows(run, folder):
    """The run's settings, with truncation."""
    lines = (run / "config.toml").read_text().splitlines()
    (folder / "plain.toml").write_text("\n".join(line for line in lines if not line.startswith("window")))
    return folder / "plain.toml"


def test_steps_count_windows_and_a_resumed_run_has_the_same_bits(long_config, tmp_path, monkeypatch, capsys):
    arguments = [str(long_config), "--output", str(tmp_path / "cut"), "--train.class-weights", "balanced"]
    assert train(parse_command_line([*arguments, "--output", str(tmp_path / "whole")])) == 0
    real, steps = train_module.train_step, []

    def interrupting(*rest):
        steps.append(1)
        if len(steps) == 15:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*rest)

    monkeypatch.setattr(train_module, "train_step", interrupting)
    assert train(parse_command_line(arguments)) == 128 + signal.SIGTERM and len(steps) == 15
    assert train(parse_command_line([*arguments, "--resume"])) == 0
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
    settings = parse_command_line([str(long_config)])
    texts = load_source(settings.data, settings.train.seed).train.texts
    rows = np.minimum(3, [1 + max(0, -(-(len(text.split()) - 6) // 4)) for text in texts]).sum()
    assert len(steps) == 2 * -(-rows // 8) and f" {-(-rows // 8)} per epoch, {len(steps)} in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--data.windows 0", "data.windows is 0; it must be 1 or more"),
        ("--data.windows 2 --data.window-overlap -1", "data.window_overlap is -1; it must be 0 or more and below 14"),
        ("--data.windows 2 --data.window-overlap 14", "data.window_overlap is 14; it must be 0 or more and below 14"),
        ("--data.window-overlap 4", "data.window_overlap has no effect with data.windows = 1; remove it"),
        ("--data.windows 2 --data.augmentation.n-aug 1", "data.windows and data.augmentation.n_aug exclude each other"),
    ],
)
def test_values_that_mean_nothing_are_one_line(tiny_config, capsys, options, says):
    assert run_command(lambda: train(parse_command_line([str(tiny_config), *options.split()]))) == EXIT_BAD_INPUT
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


def test_an_overlap_that_a_base_has_no_positions_for_is_one_line(long_run, command, tmp_path):
    settings = without_windows(long_run, tmp_path)
    text = settings.read_text().replace("max_length = 8", "max_length = 400\nwindows = 2\nwindow_overlap = 30")
    settings.write_text(text)  # as if another base with more positions had been trained
    code, _, err = command(long_run, "--config", settings, "--text", "oil")
    assert code == EXIT_BAD_INPUT and "windows of 30 tokens can't overlap by 30" in err and err.count("\n") == 1
