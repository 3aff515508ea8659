"""train.py from the command line: console output, files of a run, and errors for unusable settings."""

import dataclasses
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file

import train as train_module
from evaluate import Arguments, evaluate
from lora.linear import LoRALinear
from lora.peft_format import load_adapter
from roberta.config import PUBLISHED
from roberta.model import Layer
from roberta.tokenizer import TextTokenizer
from tests.conftest import tiny_rows, tiny_tokenizer
from train import make_optimizer, train
from training import recorder, scoring, setup
from training.command_line import EXIT_BAD_INPUT, EXIT_INTERRUPTED, run_command
from training.config import RunConfig, TrainConfig, parse_command_line, read_config
from training.errors import ConfigError
from training.progress import program

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def run(capsys):
    """Run train.py's command in this process: (exit code, stdout, stderr)."""

    def command(*arguments):
        code = run_command(lambda: train(parse_command_line([str(argument) for argument in arguments])))
        out, err = capsys.readouterr()
        return code, out, err

    return command


def test_a_run_learns_and_writes_all_files(run, tiny_config, tiny_data):
    code, out, _ = run(tiny_config)
    assert code == 0
    folder = tiny_data / "run"
    report = json.loads((folder / "report.json").read_text())
    assert report["complete"] and report["test"]["accuracy"] > 0.9
    assert f"test accuracy {100 * report['test']['accuracy']:.2f} %" in out
    calibration = report["calibration"]
    assert f"calibration error {calibration['error']:.3f} (" in out and calibration["coverage"][-1]["coverage"] == 1
    assert calibration["temperature"] == float((folder / "adapter" / "temperature.json").read_text())
    assert f"{report['trainable_parameters']:,}" in out and "evaluate.py" in out and "head        new\n" in out
    assert "training texts per class: business: 43, sports: 43" in out

    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "config.toml",
        "labels.json",
        "metrics.jsonl",
        "report.json",
        "report.html",
        "README.md",
        "adapter/adapter_config.json",
        "adapter/config.json",
        "adapter/adapter_model.safetensors",
        "adapter/labels.json",
        "adapter/temperature.json",
        "adapter/tokenizer.json",
        "adapter/tokenizer_config.json",
        "plots/loss.png",
        "plots/learning_rate.png",
        "plots/scores.png",
        "plots/confusion.png",
        "plots/reliability.png",
        "plots/coverage.png",
    }
    assert read_config(folder / "config.toml") == read_config(tiny_config)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "split" not in line]
    assert steps[-1]["step"] == report["steps"] == 4 * 11  # 86 rows to train on, in batches of 8
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert [line["epoch"] for line in lines if line.get("split") == "validation"] == [1, 2, 3, 4]


def test_the_same_seed_gives_the_same_run_and_another_seed_another(run, tiny_config, tiny_data):
    adapters = []
    for seed in (3, 3, 4):
        run(tiny_config, "--train.seed", seed, "--output", tiny_data / f"run{len(adapters)}", "--train.epochs", 1)
        adapters.append(load_file(tiny_data / f"run{len(adapters)}" / "adapter" / "adapter_model.safetensors"))
    assert all(torch.equal(adapters[0][key], adapters[1][key]) for key in adapters[0])
    assert not all(torch.equal(adapters[0][key], adapters[2][key]) for key in adapters[0])


def test_the_adapter_kept_and_tested_is_the_best_one_not_the_last(run, tiny_config, tiny_data, monkeypatch):
    real_score, real_save = train_module.score, recorder.save_adapter
    accuracies, saved = iter([0.9, 0.5, 0.4]), []

    def score(logits, labels, names):
        scores = real_score(logits, labels, names)
        return scores if len(labels) == 40 else dataclasses.replace(scores, accuracy=next(accuracies))

    def save(model, *arguments, **options):
        saved.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
        real_save(model, *arguments, **options)

    def load(model, folder):
        last = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        assert not all(torch.equal(last[name], saved[0][name]) for name in last), "three epochs changed nothing"
        load_adapter(model, folder)
        assert all(torch.equal(p, saved[0][name]) for name, p in model.named_parameters() if p.requires_grad)
        loaded.append(True)

    loaded = []
    monkeypatch.setattr(train_module, "score", score)
    monkeypatch.setattr(recorder, "save_adapter", save)
    monkeypatch.setattr(train_module, "load_adapter", load)
    run(tiny_config, "--train.epochs", 3, "--train.patience", 0)
    report = json.loads((tiny_data / "run" / "report.json").read_text())
    assert (report["best_epoch"], report["epochs_run"], len(saved), loaded) == (1, 3, 1, [True])


def test_the_run_calls_lora_linear_on_query(run, tiny_config, monkeypatch):
    """What is read is what runs: a hook on `query` of the model that is trained fires in every forward pass."""
    calls, real = [], train_module.inject_lora

    def hooked(model, config):
        query = real(model, config).roberta.encoder.layer[0].attention.self.query
        assert type(query) is LoRALinear
        query.register_forward_hook(lambda layer, *_: calls.append(layer.training))
        return model

    monkeypatch.setattr(train_module, "inject_lora", hooked)
    assert run(tiny_config, "--train.epochs", 1)[0] == 0
    assert calls.count(True) == 11 and calls.count(False) > 0  # 86 rows in batches of 8, then validation and test


def test_the_last_epoch_is_kept_where_too_few_texts_decide(run, tiny_config, tiny_data, monkeypatch):
    monkeypatch.setattr("train.is_better", lambda scores, best: best is None)  # the first epoch is the best
    options = (tiny_config, "--train.epochs", 2, "--overwrite")
    folder = Path(read_config(tiny_config).output)
    for keep, epoch, says, card in (
        ("best", 1, "best epoch 1 by validation accuracy", "best by validation accuracy"),
        ("last", 2, "\nepoch 2, the last; on the test split", "last"),
    ):
        code, out, _ = run(*options, "--train.patience", 0, "--train.keep", keep)
        report = json.loads((folder / "report.json").read_text())
        assert (code, report["best_epoch"]) == (0, epoch) and says in out
        assert f"adapter of epoch {epoch}, the {card}." in (folder / "README.md").read_text()
    code, _, err = run(*options, "--train.patience", 1, "--train.keep", "last")
    assert code == EXIT_BAD_INPUT and 'train.keep = "last" needs all epochs; set train.patience = 0' in err


def test_early_stopping_by_patience(run, tiny_config, tiny_data, monkeypatch):
    real_score, calls = train_module.score, []

    def falling(logits, labels, names):
        calls.append(1)
        return real_score(logits if len(calls) == 1 else torch.zeros_like(logits), labels, names)

    monkeypatch.setattr(train_module, "score", falling)
    code, out, _ = run(tiny_config, "--train.epochs", 20, "--train.patience", 2)
    report = json.loads((tiny_data / "run" / "report.json").read_text())
    assert code == 0 and report["best_epoch"] == 1 and report["epochs_run"] == 3
    assert "stopping early" in out


def test_recomputed_activations_give_the_same_bits(run, tiny_config, tiny_data, monkeypatch):
    """With dropout: the second forward pass draws the masks of the first."""
    metrics, calls, forward = {}, [], Layer.forward
    monkeypatch.setattr(Layer, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    for flag in ("no-gradient-checkpointing", "gradient-checkpointing"):
        options = ["--model.hidden-dropout", 0.2, "--model.attention-dropout", 0.2, "--lora.dropout", 0.2]
        output = tiny_data / flag
        assert run(tiny_config, *options, f"--train.{flag}", "--train.epochs", 1, "--output", output)[0] == 0
        metrics[flag] = [re.findall(r'"loss": [^,]+', line) for line in (output / "metrics.jsonl").open()]
        metrics[flag].append(len(calls))
    (*first, without), (*second, both) = metrics.values()
    assert first == second and both - without > without, "no layer was computed again"


def test_accumulation_steps_and_padding_settings_are_used(run, tiny_config, tiny_data):
    run(tiny_config, "--train.accumulation-steps", 3, "--data.padding", "max_length", "--train.epochs", 1)
    assert json.loads((tiny_data / "run" / "report.json").read_text())["steps"] == 4  # 11 batches in groups of 3


@pytest.mark.parametrize(("at", "kept"), [(3, "step 3"), (14, "epoch 1, the best so far")])
def test_ctrl_c_ends_after_the_step_with_a_usable_folder(run, tiny_config, tiny_data, monkeypatch, at, kept):
    real_step, steps, handler = train_module.train_step, [], signal.getsignal(signal.SIGINT)

    def step(*arguments):
        steps.append(1)
        if len(steps) == at:
            os.kill(os.getpid(), signal.SIGINT)
        return real_step(*arguments)

    monkeypatch.setattr(train_module, "train_step", step)
    monkeypatch.setattr(recorder, "draw_plots", lambda folder: 1 / 0)
    code, out, _ = run(tiny_config)
    assert code == EXIT_INTERRUPTED and len(steps) == at and f"adapter holds the adapter of {kept}\n" in out
    report = json.loads((tiny_data / "run" / "report.json").read_text())
    assert not report["complete"] and report["test"] is None and report["steps"] == at
    assert load_file(tiny_data / "run" / "adapter" / "adapter_model.safetensors")
    assert signal.getsignal(signal.SIGINT) is handler, "the run kept Ctrl-C to itself"


def test_the_command_to_try_works_from_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    python, script = shlex.split(program("evaluate.py"))
    assert Path(python).samefile(sys.executable) and Path(script).samefile(ROOT / "evaluate.py")


def test_a_picture_that_fails_takes_no_scores_with_it(run, tiny_config, tiny_data, monkeypatch):
    folder, drawn = tiny_data / "my run", []
    monkeypatch.setattr(recorder, "draw_plots", lambda folder: drawn.append(1) or 1 / 0)
    monkeypatch.setattr(recorder, "peak_memory_bytes", lambda compute: 70 * 2**20 * len(drawn))
    code, out, err = run(tiny_config, "--train.epochs", 1, "--output", folder)
    assert code == 0 and not err and json.loads((folder / "report.json").read_text())["complete"]
    warning = f"warning: {folder}/plots is not complete (ZeroDivisionError: division by zero); "
    assert out.count(warning) == 1 and "test accuracy" in out.split(warning)[0]
    assert "peak memory 70 MiB" in out
    assert (folder / "report.html").is_file() and (folder / "README.md").is_file()
    assert all(f"evaluate.py '{folder}' --text" in text for text in (out, (folder / "README.md").read_text()))
    code, out, _ = run(tiny_config, "--train.epochs", 1, "--output", folder, "--resume")
    assert code == 0 and warning in out and "is finished" in out


def test_weight_decay_excludes_vectors_unless_asked_for():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    model[0].weight.requires_grad_(False)
    groups = make_optimizer(model, TrainConfig(learning_rate=1e-3, weight_decay=0.1)).param_groups
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(3, 0.0)]
    groups = make_optimizer(
        model, TrainConfig(learning_rate=1e-3, weight_decay=0.1, decay_bias_and_norm=True)
    ).param_groups
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(3, 0.1)]


def refused(run, *arguments):
    """The one-line error of a refused command."""
    code, _, err = run(*arguments)
    assert code == EXIT_BAD_INPUT
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


def test_an_existing_run_folder_is_kept(run, tiny_config, tiny_data):
    run(tiny_config, "--train.epochs", 1)
    before = (tiny_data / "run" / "report.json").read_bytes()
    assert "--overwrite" in refused(run, tiny_config)
    assert (tiny_data / "run" / "report.json").read_bytes() == before
    assert run(tiny_config, "--train.epochs", 1, "--overwrite")[0] == 0


def test_a_folder_that_is_not_a_run_is_never_removed(run, tiny_config, tiny_data):
    (tiny_data / "precious").mkdir()
    (tiny_data / "precious" / "thesis.txt").write_text("years of work")
    assert "not a run folder" in refused(run, tiny_config, "--output", tiny_data / "precious", "--overwrite")
    assert (tiny_data / "precious" / "thesis.txt").read_text() == "years of work"


def test_unusable_settings_are_refused(run, tiny_config, tiny_data):
    for arguments, says in [
        (["--lora.rank", 0], "rank is 0"),
        (["--lora.target-modules", "qeury"], "'qeury' matches no linear layer"),
        (["--lora.modules-to-save", "head"], "'head' matches no module"),
        (["--lora.layers-to-transform", 7], "7"),
        (["--data.max-length", 400], "positions for 32 tokens"),
        (["--train.max-trainable", 10], "train.max_trainable = 10"),
        (["--model.checkpoint", tiny_data], "not a checkpoint folder"),
        (["--model.checkpoint", "no-such-model"], "no-such-model"),
        (["--data.source", tiny_data / "none.csv"], "none.csv"),
        (["--data.source", "imdb"], "imdb"),
        (["--train.device", "cuda"], "no GPU") if not torch.cuda.is_available() else (["--lora.alpha", 0], "alpha"),
    ]:
        assert says in refused(run, tiny_config, *arguments)
    assert not (tiny_data / "run").exists(), "a refused run left something behind"


def test_a_loss_that_is_not_finite_is_reported_with_step_and_rate(run, tiny_config, tiny_data):
    line = refused(run, tiny_config, "--train.learning-rate", "1e30", "--train.max-grad-norm", 0)
    assert "the loss is" in line and "at step" in line and "learning rate" in line


def test_the_last_good_adapter_survives_a_loss_that_is_not_finite(run, tiny_config, tiny_data, monkeypatch):
    real_step, steps = train_module.train_step, []

    def step(*arguments):
        steps.append(1)
        loss = real_step(*arguments)
        return loss * float("nan") if len(steps) == 15 else loss

    monkeypatch.setattr(train_module, "train_step", step)
    assert "at step 15 " in (line := refused(run, tiny_config)) and "adapter" in line
    kept = load_file(tiny_data / "run" / "adapter" / "adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in kept.values())


def test_a_full_disk_is_a_one_line_error(run, tiny_config, monkeypatch):
    def full(*_arguments, **_options):
        raise OSError(28, "No space left on device", "adapter_model.safetensors")

    monkeypatch.setattr(recorder, "save_adapter", full)
    assert "adapter_model.safetensors: can't be written, the disk is full" in refused(run, tiny_config)


def test_a_real_write_error_is_one_line_and_leaves_no_partial_file(run, tiny_config, tiny_data, monkeypatch):
    """No file of the run may grow beyond 5 kB, as on a full disk: the adapter does not fit, the settings do."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    real = recorder.save_adapter

    def limited(*arguments, **options):
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
        try:
            real(*arguments, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(recorder, "save_adapter", limited)
    assert "adapter_model.safetensors: can't be written, File too large" in refused(run, tiny_config)
    assert list((tiny_data / "run" / "adapter").iterdir()) == []


def test_a_run_folder_that_can_not_be_created_is_a_one_line_error(run, tiny_config, tiny_data):
    (tiny_data / "file").write_text("")
    assert "can't be written" in refused(run, tiny_config, "--output", tiny_data / "file" / "run")


def test_a_tokenizer_of_another_checkpoint_is_named_before_training(run, tiny_config, tiny_checkpoint, tmp_path):
    for path in tiny_checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["one", "more"])
    TextTokenizer(tokenizer, 32).save(tmp_path)
    assert "ids up to 25, the model rows for 24" in refused(run, tiny_config, "--model.checkpoint", tmp_path)


def test_a_partly_trained_new_head_is_saved_completely(run, tiny_config, tiny_data):
    code, _, _ = run(tiny_config, "--lora.modules-to-save", "classifier.out_proj", "--train.epochs", 2)
    assert code == 0
    saved = load_file(tiny_data / "run" / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.classifier.dense.weight" in saved


def test_checkpoint_with_another_head_asks_for_a_new_one(run, tiny_config, tiny_checkpoint, tmp_path):
    folder = tmp_path / "finetuned"
    folder.mkdir()
    for path in tiny_checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights |= {
        "classifier.dense.weight": torch.zeros(32, 32),
        "classifier.dense.bias": torch.zeros(32),
        "classifier.out_proj.weight": torch.zeros(5, 32),
        "classifier.out_proj.bias": torch.zeros(5),
    }
    save_file(weights, folder / "model.safetensors")
    line = refused(run, tiny_config, "--model.checkpoint", folder)
    assert "classifier.out_proj" in line and "new_head" in line
    assert run(tiny_config, "--model.checkpoint", folder, "--model.new-head", "--train.epochs", 1)[0] == 0


@pytest.fixture
def finetuned(finished_run, tmp_path):
    """The tiny run's merged model as a base checkpoint: business is logit 0, sports 1. Changes the names in it."""
    run_command(lambda: evaluate(Arguments(run=finished_run, export=tmp_path / "base")))
    path = tmp_path / "base" / "config.json"

    def named(*names):
        labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        path.write_text(json.dumps(json.loads(path.read_text()) | labels))
        return path.parent

    return named


STILL = ("--train.epochs", 1, "--train.learning-rate", 1e-12)  # the model stays as it is


@pytest.mark.parametrize(
    ("names", "files", "says"),
    [
        (("zebra", "apple"), ("zebra", "apple"), "classes     zebra, apple: in the order of the checkpoint"),
        (("apple", "zebra"), ("apple", "zebra"), "classes     apple, zebra: as in the checkpoint"),
        (("LABEL_0", "LABEL_1"), ("0", "1"), "0, 1: named by"),
        ((" zebra", "apple "), ("zebra", "apple"), "classes     zebra, apple: in the order of the checkpoint"),
    ],
)
def test_a_head_of_the_checkpoint_keeps_its_classes(run, finetuned, tiny_config, tiny_data, names, files, says, capsys):
    base = finetuned(*names)
    for path in tiny_data.glob("t*.csv"):
        path.write_text(path.read_text().replace("business,", f"{files[0]},").replace("sports,", f"{files[1]},"))
    code, out, err = run(tiny_config, "--model.checkpoint", base, "--output", tiny_data / "new", *STILL)
    assert code == 0, err
    assert "head        read from the checkpoint\n" in out and says in out
    (line,) = (line for line in out.splitlines() if line.startswith("test accuracy"))
    assert float(line.split()[2]) > 90
    assert json.loads((tiny_data / "new" / "adapter" / "labels.json").read_text()) == list(files)
    evaluate(Arguments(run=tiny_data / "new"))
    assert line in capsys.readouterr().out.splitlines()


def test_a_head_of_other_classes_is_refused_or_replaced(run, finetuned, tiny_config, tiny_data):
    options = (tiny_config, "--output", tiny_data / "new", *STILL, "--model.checkpoint")
    line = refused(run, *options, finetuned("ham", "spam"))
    assert "train.csv has 2 classes: business, sports; the checkpoint has 2: ham, spam; " in line
    assert "(case, blanks or invisible characters differ); " in refused(run, *options, finetuned("Business", "Sports"))
    assert "the checkpoint has 3: LABEL_0, LABEL_1, LABEL_2; " in refused(
        run, *options, finetuned("LABEL_0", "LABEL_1", "LABEL_2")
    )
    assert not (tiny_data / "new").exists()
    code, out, _ = run(*options, finetuned("ham", "spam"), "--model.new-head")
    assert code == 0 and "head        new; the checkpoint's is not used\n" in out
    assert json.loads((tiny_data / "new" / "labels.json").read_text()) == ["business", "sports"]


def test_the_program_imports_neither_transformers_nor_peft():
    code = (
        "import sys, train, evaluate; import lora.peft_format, training.plots\n"
        "print(sorted({'transformers', 'peft', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_process_with_a_bad_setting_exits_with_2_and_no_traceback(tiny_config):
    done = subprocess.run(
        [sys.executable, "train.py", str(tiny_config), "--lora.rnak", "8"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == EXIT_BAD_INPUT and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "--lora.rnak" in done.stderr


def test_output_into_a_pipe_is_a_few_lines(tiny_config):
    done = subprocess.run(
        [sys.executable, "train.py", str(tiny_config), "--train.epochs", "2"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "\r" not in done.stdout
    assert sum(line.startswith("step ") for line in done.stdout.splitlines()) <= 10
    assert np.isfinite(float(done.stdout.split("test accuracy ")[1].split()[0]))


def test_cleaning_reaches_training(run, tiny_config, tiny_data):
    for name in ("train", "test"):
        path = tiny_data / f"{name}.csv"
        header, *rows = path.read_text().splitlines()
        loud = (f"{row.partition(',')[0]},&lt;b&gt;{row.partition(',')[2].upper()}&lt;/b&gt;" for row in rows)
        path.write_text("\n".join([header, *loud]) + "\n")
    scores = {}
    for switch in ("--data.cleaning.html", "--data.cleaning.no-html"):
        options = (switch, "--data.cleaning.lowercase", "--overwrite")
        assert run(tiny_config, *options)[0] == 0
        scores[switch] = json.loads((tiny_data / "run" / "report.json").read_text())["test"]["loss"]
    assert scores["--data.cleaning.html"] != scores["--data.cleaning.no-html"]
    assert run(tiny_config, "--data.cleaning.html", "--data.cleaning.lowercase", "--overwrite")[0] == 0
    assert json.loads((tiny_data / "run" / "report.json").read_text())["test"]["accuracy"] > 0.9


def test_eda_makes_new_training_texts_every_epoch_and_none_elsewhere(run, tiny_config, tiny_data, monkeypatch):
    seen = []
    real = setup.encode_split

    def watching(split, *arguments, **options):
        seen.append(split)
        return real(split, *arguments, **options)

    monkeypatch.setattr(setup, "encode_split", watching)
    code, out, _ = run(tiny_config, "--data.augmentation.n-aug", 2, "--train.epochs", 2)
    assert code == 0 and "EDA: 2 new texts of each training text" in out
    report = json.loads((tiny_data / "run" / "report.json").read_text())
    assert report["steps"] == 2 * -(-3 * 86 // 8)
    train_split, _validation, _test, first, second = seen
    assert first.texts[::3] == second.texts[::3] == train_split.texts and first.texts != second.texts
    assert first.labels == [label for label in train_split.labels for _ in range(3)]

    seen.clear()
    options = ("--data.augmentation.n-aug", 2, "--data.augmentation.no-fresh", "--train.epochs", 2, "--overwrite")
    assert run(tiny_config, *options)[0] == 0
    assert seen[-1] == seen[-2] and len(seen) == 5

    seen.clear()
    options = ("--data.augmentation.kind", "aeda", "--data.augmentation.n-aug", 1, "--train.epochs", 2, "--overwrite")
    code, out, _ = run(tiny_config, *options, "--data.max-length", 8)
    assert code == 0 and "AEDA: 1 new texts of each training text\n" in out
    first, second = (split.texts[1::2] for split in seen[-2:])
    assert first != second and all(set(text) & set(".;?:!,") for text in first + second)
    cut = sum(len(text.split()) > 6 for text in first)  # of 8 tokens two are special
    assert out.count(f"{cut} new texts are longer than 8 tokens and are truncated") == out.count("new texts are") == 1


def test_balanced_class_weights_count_each_class_alike(run, tiny_config, tiny_data, monkeypatch):
    rows = [row for row in tiny_rows(96) if row[0] == "sports"] + tiny_rows(24, seed=3)
    (tiny_data / "train.csv").write_text("label,text\n" + "\n".join(",".join(row) for row in rows) + "\n")
    real_step, seen = train_module.train_step, []

    def step(model, batches, *rest):
        seen.extend(batches)
        return real_step(model, batches, *rest)

    monkeypatch.setattr(train_module, "train_step", step)
    options = ("--train.class-weights", "balanced", "--train.epochs", 1, "--data.augmentation.n-aug", 1)
    assert run(tiny_config, *options)[0] == 0
    labels, weights = (torch.cat([getattr(batch, name) for batch in seen]).numpy() for name in ("labels", "weights"))
    count = np.bincount(labels)
    assert count[1] > 3 * count[0]
    assert weights == pytest.approx(len(labels) / (2 * count)[labels])
    assert [batch.total_weight for batch in seen] == pytest.approx([batch.weights.sum().item() for batch in seen])


def test_r_drop_passes_each_batch_twice_and_needs_dropout(run, tiny_config, tiny_data, monkeypatch):
    real, seen = train_module.r_drop_losses, []
    monkeypatch.setattr(train_module, "r_drop_losses", lambda *values: seen.append(values) or real(*values))
    off = ("--model.hidden-dropout", 0, "--model.attention-dropout", 0, "--model.classifier-dropout", 0)
    options = ("--train.epochs", 1, "--train.r-drop", 0.5, *off)
    code, out, _ = run(tiny_config, *options, "--lora.dropout", 0.1)
    assert code == 0 and "R-Drop      each text twice in a step, alpha 0.5" in out
    assert len(seen) == json.loads((tiny_data / "run" / "report.json").read_text())["steps"]
    # B is 0 in the first two steps, as warm-up starts at a rate of 0: LoRA's dropout has no effect yet.
    assert all(alpha == 0.5 and not torch.equal(one, other) for one, other, _, alpha in seen[2:])

    code, _, err = run(tiny_config, *options, "--overwrite")
    assert code == EXIT_BAD_INPUT and "train.r_drop compares two passes" in err and err.count("\n") == 1


def test_tmix_mixes_each_batch_and_needs_two_texts(run, tiny_config, tiny_data, monkeypatch):
    real, seen = train_module.tmix_losses, []
    monkeypatch.setattr(train_module, "tmix_losses", lambda *values: seen.append(values) or real(*values))
    options = ("--train.epochs", 1, "--train.tmix", 0.4, "--train.accumulation-steps", 2)
    code, out, _ = run(tiny_config, *options)
    assert code == 0 and "TMix        texts mixed in pairs after layer 2, alpha 0.4\n" in out
    assert [len(mix.partner) for _, _, mix in seen] == [len(labels) for _, labels, _ in seen] and len(seen) == 11
    assert len({mix.lam for _, _, mix in seen}) == 11

    code, _, err = run(tiny_config, *options, "--train.batch-size", 1, "--overwrite")
    assert code == EXIT_BAD_INPUT and "train.tmix mixes texts of a batch" in err and err.count("\n") == 1
    config = RunConfig(train=TrainConfig(tmix=0.4, batch_size=5))  # of three processes, the last has one text
    with pytest.raises(ConfigError, match="of which a process has one"):
        setup.check_settings(config, PUBLISHED["roberta-base"], SimpleNamespace(size=3))
    setup.check_settings(config, PUBLISHED["roberta-base"], SimpleNamespace(size=2))
    code, _, err = run(tiny_config, *options, "--train.r-drop", 1, "--overwrite")
    assert code == EXIT_BAD_INPUT and "train.tmix and train.r_drop exclude" in err and err.count("\n") == 1


def test_unlabelled_texts_are_the_rest_or_a_file_and_learn_from_changed_copies(
    run, tiny_config, tiny_data, monkeypatch
):
    real, seen = train_module.train_step, []
    monkeypatch.setattr(train_module, "train_step", lambda *values: seen.append(values[1]) or real(*values))
    tiny_config.write_text(tiny_config.read_text() + "[unlabelled]\nratio = 2\n")
    few = ("--data.train-rows", 20, "--train.epochs", 1, "--overwrite")
    code, out, err = run(tiny_config, *few)
    assert code == 0 and "66 unlabelled texts, 2 per labelled text of a batch" in out, err
    assert len(seen) == 5 and sum(len(group[0].unlabelled.labels) for group in seen) == 66
    assert not torch.equal(seen[0][0].unlabelled.input_ids, seen[0][0].changed.input_ids)

    file = tiny_data / "other.csv"
    file.write_text("text,label\na rainy day,\nprofit in oil,business\n", encoding="utf-8")
    seen.clear()
    code, out, err = run(tiny_config, *few, "--unlabelled.source", file, "--unlabelled.method", "pseudo_label")
    assert code == 0 and "            2 unlabelled texts" in out and len(seen) == 3, err
    assert torch.equal(seen[0][0].unlabelled.input_ids, seen[0][0].changed.input_ids)

    table = {"text": ["a film", "oil"], "label": ["cinema", "business"]}
    pyarrow.parquet.write_table(pyarrow.table(table), tiny_data / "labels.parquet")
    plain = tiny_data / "plain.toml"
    plain.write_text(tiny_config.read_text().partition("[unlabelled]")[0])
    (tiny_data / "foreign.csv").write_text("text,label\nгол,business\nматч,sports\n", encoding="utf-8")
    (tiny_data / "labels.csv").write_text("text,label\na film,cinema\n", encoding="utf-8")
    for options, says in (
        (few[2:], 'unlabelled.source is "rest", but no training rows are left out'),
        ((*few, "--unlabelled.source", tiny_data / "none.csv"), "none.csv: "),
        (
            (*few, "--unlabelled.source", tiny_data / "labels.parquet"),
            "row 1: unlabelled texts with the label 'cinema'",
        ),
        (
            (*few, "--unlabelled.source", tiny_data / "foreign.csv"),
            "foreign.csv: 2 of 2 texts are not in Latin script",
        ),
        (
            (*few, "--unlabelled.source", tiny_data / "labels.csv"),
            "row 2: unlabelled texts with the label 'cinema', which",
        ),
    ):
        code, _, err = run(tiny_config, *options)
        assert code == EXIT_BAD_INPUT and says in err and err.count("\n") == 1, err
    code, _, err = run(plain, *few[:4], "--resume")
    assert code == EXIT_BAD_INPUT and "unlabelled.source (there: " in err and err.count("\n") == 1, err


def test_eda_on_another_script_is_refused(run, tiny_config, tiny_data):
    rows = "".join(f"{i % 2},слово номер {i}\n" for i in range(40))
    (tiny_data / "train.csv").write_text(f"label,text\n{rows}", encoding="utf-8")
    (tiny_data / "test.csv").write_text(f"label,text\n{rows}", encoding="utf-8")
    code, _, err = run(tiny_config, "--data.augmentation.n-aug", 1)
    assert code == EXIT_BAD_INPUT and "not in Latin script" in err and err.count("\n") == 1
    assert not (tiny_data / "run").exists()


def test_tensorboard_gets_what_is_logged(run, tiny_config, tiny_data):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert run(tiny_config, "--train.tensorboard", "--train.epochs", 1)[0] == 0
    board = accumulator.EventAccumulator(str(tiny_data / "run" / "tensorboard")).Reload()
    lines = [json.loads(line) for line in (tiny_data / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [(line["step"], line["loss"]) for line in lines if "split" not in line]
    assert [(event.step, pytest.approx(event.value)) for event in board.Scalars("training/loss")] == losses
    assert len(board.Scalars("validation/accuracy")) == 1


def test_a_resumed_run_continues_writing_for_tensorboard(run, tiny_config, tiny_data, monkeypatch):
    """With a stand-in for TensorBoard's writer, so that it needs no extra."""
    opened, written = [], []

    class Writer:
        def __init__(self, folder, purge_step=None):
            opened.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, step))

        def flush(self):
            pass

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setattr(recorder, "check_board", lambda: None)
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "score", lambda *_: os.kill(os.getpid(), signal.SIGINT) or real_score(*_))
        real_score = scoring.score
        code, out, _ = run(tiny_config, "--train.tensorboard", "--train.epochs", 2)
    assert code == EXIT_INTERRUPTED and "interrupted in epoch 1 after step 11;" in out
    assert run(tiny_config, "--train.tensorboard", "--train.epochs", 2, "--resume")[0] == 0
    folder = str(tiny_data / "run" / "tensorboard")
    assert opened == [(folder, None), (folder, 12)]
    assert [step for name, step in written if name == "validation/accuracy"] == [11, 22]


def test_without_tensorboard_the_extra_is_named(run, tiny_config, tiny_data, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = run(tiny_config, "--train.tensorboard")
    assert code == EXIT_BAD_INPUT and ".[tensorboard]" in err and not (tiny_data / "run").exists()
