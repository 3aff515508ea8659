"""Texts with any number of classes, from the file to the exported model."""

import json
import os
import random
import shutil
import signal

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import train as train_module
from evaluate import Arguments, evaluate
from tests.conftest import BUSINESS, FILLER, SPORTS, write_tiny_config
from train import train
from training import recorder
from training.command_line import EXIT_BAD_INPUT, EXIT_INTERRUPTED, parse_options, run_command
from training.config import parse_command_line

OPTIONS = "--train.epochs 4 --train.accumulation-steps 2 --train.batch-size 2 --data.augmentation.n-aug 1".split()


@pytest.fixture
def command(capsys):
    """Run train.py's or evaluate.py's command in this process: (exit code, stdout, stderr)."""

    def run(program, *arguments):
        words = [str(argument) for argument in arguments]
        work = {
            "train": lambda: train(parse_command_line(words)),
            "evaluate": lambda: evaluate(parse_options(Arguments, words, prog="evaluate.py")),
        }[program]
        code = run_command(work)
        return code, *capsys.readouterr()

    return run


def write_lists(folder):
    """train.jsonl and test.jsonl: each text has words of none, one or both classes, and lists those."""
    draw = random.Random(0)
    for name, rows in (("train", 96), ("test", 40)):
        lines = []
        for i in range(rows):
            label = [[], ["sports"], ["business"], ["sports", "business"]][i % 4]
            words = draw.choices(FILLER, k=4) + [
                draw.choice({"sports": SPORTS, "business": BUSINESS}[c]) for c in label
            ]
            draw.shuffle(words)
            lines.append(json.dumps({"text": " ".join(words), "label": label}) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines))
    path = folder / "tiny.toml"
    path.write_text(path.read_text().replace(".csv", ".jsonl"))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_checkpoint):
    """Settings of a multi-label run, and its folder."""
    folder = tmp_path_factory.mktemp("multi-label")
    write_tiny_config(tiny_checkpoint, folder)
    config = write_lists(folder)
    assert train(parse_command_line([str(config), *OPTIONS])) == 0
    return config, folder / "run"


def test_a_run_learns_and_resumes_with_the_same_bits(command, trained, tmp_path, monkeypatch):
    config, folder = trained
    report = json.loads((folder / "report.json").read_text())
    assert report["test"]["micro"]["f1"] > 0.9 and report["test"]["confusion"] == []
    assert 2 * len(report["label_names"]) == 4 and not (folder / "plots" / "confusion.png").exists()
    assert report["calibration"] is None and not (folder / "adapter" / "temperature.json").exists()

    real_step, steps = train_module.train_step, []

    def step(*arguments):
        steps.append(1)
        if len(steps) == 60:  # in the second of four epochs
            os.kill(os.getpid(), signal.SIGINT)
        return real_step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "train_step", step)
        patch.setattr(recorder, "write_pages", lambda folder: None)  # drawing takes longer than training
        assert command("train", config, *OPTIONS, "--output", tmp_path / "cut")[0] == EXIT_INTERRUPTED
        code, out, _ = command("train", config, *OPTIONS, "--output", tmp_path / "cut", "--resume")
    assert code == 0 and "exact match" in out and "by validation micro F1" in out and "2 classes, multi-label" in out
    again, first = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (tmp_path / "cut", folder))
    assert all(torch.equal(again[key], first[key]) for key in first)
    assert json.loads((tmp_path / "cut" / "report.json").read_text())["test"] == report["test"]


def probabilities(out, texts):
    """Probability of each class in the last lines of evaluate.py --text."""
    words = [line.split() for line in out.splitlines()[-texts:]]
    return [dict(zip(line[0:4:2], map(float, line[1:4:2]), strict=True)) for line in words]


def test_a_finished_run_scores_classifies_and_exports(command, trained, tmp_path, tiny_checkpoint):
    _, folder = trained
    report = json.loads((folder / "report.json").read_text())
    code, out, err = command("evaluate", folder)
    assert code == 0, err
    assert f"test exact match {100 * report['test']['accuracy']:.2f} %  micro F1" in out

    texts = ["the goal of the match", "oil price and the cup", "a new report"]
    out = command("evaluate", folder, "--text", *texts)[1]
    shown = probabilities(out, 3)
    assert "multi-label" in out and sum(shown[1].values()) > 1.5 and sum(shown[2].values()) < 0.5
    # The adapter's folder alone is enough.
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    assert probabilities(command("evaluate", tmp_path / "adapter", "--text", *texts)[1], 3) == shown

    (tmp_path / "new.csv").write_text("text\n" + "\n".join(texts) + "\n")
    for options, labels in (((), ["sports", "business|sports", ""]), (("--indices",), ["1", "0|1", ""])):
        path = tmp_path / f"out{len(options)}.csv"
        assert command("evaluate", folder, "--predict", tmp_path / "new.csv", "--out", path, *options)[0] == 0
        assert path.read_text().splitlines()[1:] == [f"{i},{label}" for i, label in enumerate(labels)]

    assert command("evaluate", folder, "--export", tmp_path / "merged")[0] == 0
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert model.config.problem_type == "multi_label_classification"
    with torch.no_grad():
        theirs = model(**tokenizer(texts, return_tensors="pt", padding=True)).logits.sigmoid().tolist()
    for row, ours in zip(theirs, shown, strict=True):
        assert row == pytest.approx([ours["business"], ours["sports"]], abs=1e-3)
    code, _, err = command("evaluate", folder, "--text", "oil", "--abstain", 0.9)
    assert code == EXIT_BAD_INPUT and f"--abstain is for one class per text; {folder} is multi-label" in err
    card, page = ((folder / name).read_text() for name in ("README.md", "report.html"))
    assert "micro F1" in card and "logits[0].sigmoid()" in card and "test exact match" in page


def test_an_adapter_that_peft_wrote_over_a_base_that_says_so(command, tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"problem_type": "multi_label_classification"}))
    base = transformers.RobertaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=2)
    base.classifier.out_proj.bias.data = torch.tensor([2.0, 1.0])
    config = peft.LoraConfig(task_type="SEQ_CLS", r=3, target_modules=["query", "value"], init_lora_weights=False)
    model = peft.get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "theirs")
    texts = ["the goal of the match", "oil price today"]
    ids = transformers.AutoTokenizer.from_pretrained(tiny_checkpoint)(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = model(**ids).logits.sigmoid().tolist()
    code, out, err = command("evaluate", tmp_path / "theirs", "--base", tmp_path / "base", "--text", *texts)
    assert code == 0, err
    for row, shown in zip(expected, probabilities(out, 2), strict=True):
        assert [shown["LABEL_0"], shown["LABEL_1"]] == pytest.approx(row, abs=1e-3) and abs(sum(row) - 1) > 0.01


def test_class_weights_and_data_of_the_other_kind_are_refused(command, trained, tiny_config, tmp_path):
    config, folder = trained
    code, _, err = command("train", config, "--output", tmp_path / "weighted", "--train.class-weights", "balanced")
    assert code == EXIT_BAD_INPUT and "train.class_weights" in err and not (tmp_path / "weighted").exists()
    (tmp_path / "unlabelled.toml").write_text(config.read_text() + "[unlabelled]\n")
    code, _, err = command("train", tmp_path / "unlabelled.toml", "--output", tmp_path / "unlabelled")
    assert code == EXIT_BAD_INPUT and "[unlabelled] needs one class per text" in err
    code, _, err = command("evaluate", folder / "adapter", "--config", tiny_config)
    assert code == EXIT_BAD_INPUT and "multi-label" in err and err.count("\n") == 1


def test_noise_lowers_the_share_of_exact_matches_and_another_source_is_refused(command, trained):
    _, folder = trained
    report = json.loads((folder / "report.json").read_text())
    code, out, err = command("evaluate", folder, "--noise")
    rows = [line.split() for line in out.splitlines() if line.startswith("lost words")]
    assert code == 0 and float(rows[0][2]) == pytest.approx(100 * report["test"]["accuracy"], abs=0.005), err
    assert float(rows[0][6]) < float(rows[0][2]) and "\nexact match (%) by severity" in out
    code, _, err = command("evaluate", folder, "--on", folder / "config.toml")
    assert code == EXIT_BAD_INPUT and "--on needs one class per text" in err and err.count("\n") == 1
