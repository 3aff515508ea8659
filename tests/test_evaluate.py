"""evaluate.py from the command line: test scores, texts, merging, export, adapters written by peft."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import peft
import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers

from data.noise import CORRUPTIONS
from evaluate import Arguments, evaluate, load_several
from lora.config import LoRAConfig
from lora.inject import inject_lora
from lora.peft_format import save_adapter
from lora.quantized import QuantizedLinear
from roberta.config import RobertaConfig
from roberta.tokenizer import TextTokenizer
from roberta.weights import load_checkpoint, save_checkpoint
from tests.conftest import tiny_rows
from train import train
from training import recorder
from training.command_line import EXIT_BAD_INPUT, parse_options, run_command
from training.config import parse_command_line, read_config, write_config
from training.speed import measure_speed


@pytest.fixture
def command(capsys):
    """Run evaluate.py's command in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        words = [str(argument) for argument in arguments]
        code = run_command(lambda: evaluate(parse_options(Arguments, words, prog="evaluate.py")))
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def finished(finished_run, trained_once):
    """A finished run's folder and the line of test scores that its training printed."""
    return finished_run, next(line for line in trained_once[1].splitlines() if line.startswith("test accuracy"))


def test_the_test_split_scores_as_training_printed(command, finished):
    folder, line = finished
    code, out, _ = command(folder)
    assert code == 0 and line in out.splitlines()
    code, merged, _ = command(folder, "--merged")
    assert code == 0 and "folded into the weights" in merged
    assert line.split("loss")[0] in merged


def test_a_run_over_a_base_in_4_bits(command, tiny_config, tmp_path, monkeypatch):
    """Scored, continued and exported over the same base; `--base-bits 16` gives another function."""
    folder = tmp_path / "run4"
    options = [str(tiny_config), "--model.base-bits", "4", "--train.epochs", "1", "--output", str(folder)]
    assert train(parse_command_line(options)) == 0
    scores = json.loads((folder / "report.json").read_text())["test"]
    _, out, _ = command(folder)
    assert f"loss {scores['loss']:.4f}" in out
    _, out, _ = command(folder, "--config", tiny_config)  # names the data, not the base
    assert f"loss {scores['loss']:.4f}" in out and "matrices in 4 bits" in out
    _, exact, _ = command(folder, "--base-bits", 16)
    assert f"loss {scores['loss']:.4f}" not in exact
    assert "4 bits" in (folder / "README.md").read_text()
    timed: dict[str, torch.nn.Module] = {}

    def watched(models, *rest):
        timed.update(models)
        return measure_speed(models, *rest)

    with monkeypatch.context() as patch:
        patch.setattr("evaluate.measure_speed", watched)
        _, out, _ = command(folder, "--speed")
    quantized = [any(isinstance(one, QuantizedLinear) for one in model.modules()) for model in timed.values()]
    assert quantized == [True, False] and "dequantized the base's weights of the merged copy" in out
    _, text, _ = command(folder, "--text", "oil price")
    code, out, _ = command(folder, "--text", "oil price", "--export", tmp_path / "merged")
    assert code == 0 and "dequantized the base's weights" in out and text.splitlines()[-1] in out
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    levels = theirs.roberta.encoder.layer[0].intermediate.dense.weight.unique()
    assert len(levels) <= 16 * 48 * 32 // 64, "the export is not of the base that was trained on"


def probabilities(line):
    words = line.split()
    return dict(zip(words[0:4:2], map(float, words[1:4:2]), strict=True))


def test_other_settings_for_a_run_change_its_data_but_not_its_base(command, finished, tiny_config, tmp_path):
    folder, line = finished
    text = tiny_config.read_text()
    (tmp_path / "data.toml").write_text(text[text.index("[data]") :])  # without [model]
    code, out, err = command(folder, "--config", tmp_path / "data.toml")
    assert code == 0 and line in out.splitlines(), err


def test_texts_are_classified_with_probabilities(command, finished, tmp_path):
    folder, _ = finished
    code, out, _ = command(folder, "--text", "the goal of the match", "oil price today")
    lines = out.splitlines()[-2:]
    assert code == 0 and lines[0].startswith("sports") and lines[1].startswith("business")
    for line in lines:
        assert sum(probabilities(line).values()) == pytest.approx(1, abs=2e-3)
    file = tmp_path / "texts.txt"
    file.write_text("the goal of the match\noil price today\n", encoding="utf-8")
    assert command(folder, "--file", file)[1].splitlines()[-2:] == lines
    # A byte-order mark is not part of a text, and only a newline ends one.
    file.write_bytes("\ufeffthe goal of\x0cthe match\r\noil\u2028price today".encode())
    code, out, _ = command(folder, "--file", file)
    shown = [line[-30:] for line in out.split("\n") if line.startswith(("sports", "business"))]
    assert code == 0 and [line.split("   ")[-1] for line in shown] == [
        "the goal of\x0cthe match",
        "oil\u2028price today",
    ]


def test_exported_model_opens_in_transformers_with_equal_probabilities(command, finished, tmp_path):
    folder, _ = finished
    code, out, _ = command(folder, "--export", tmp_path / "merged")
    assert code == 0 and "exported" in out
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert model.config.id2label == {0: "business", 1: "sports"}
    texts = [text for _, text in tiny_rows(10, seed=9)]
    expected = [probabilities(line) for line in command(folder, "--text", *texts)[1].splitlines()[-10:]]
    with torch.no_grad():
        theirs = model(**tokenizer(texts, return_tensors="pt", padding=True)).logits.softmax(dim=1)
    for row, shown in zip(theirs, expected, strict=True):
        assert row[0].item() == pytest.approx(shown["business"], abs=1e-3)
    assert command(folder, "--export", tmp_path / "merged")[0] == EXIT_BAD_INPUT, "an export overwrote another"


def test_an_adapter_that_peft_wrote(command, tiny_checkpoint, tiny_config, tmp_path):
    torch.manual_seed(3)
    base = transformers.RobertaForSequenceClassification.from_pretrained(tiny_checkpoint, num_labels=2)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=3, target_modules=["query", "value"], init_lora_weights=False)
    model = peft.get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "theirs")
    texts = [text for _, text in tiny_rows(6, seed=5)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_checkpoint)
    with torch.no_grad():
        expected = model(**tokenizer(texts, return_tensors="pt", padding=True)).logits.softmax(dim=1)

    code, out, err = command(tmp_path / "theirs", "--base", tiny_checkpoint, "--text", *texts)
    assert code == 0, err
    for row, line in zip(expected, out.splitlines()[-6:], strict=True):
        assert row[0].item() == pytest.approx(probabilities(line)["LABEL_0"], abs=1e-3)
    code, out, _ = command(tmp_path / "theirs", "--base", tiny_checkpoint, "--config", tiny_config)
    assert code == 0 and "test accuracy" in out
    code, _, err = command(tmp_path / "theirs", "--base", tiny_checkpoint)
    assert code == EXIT_BAD_INPUT and "--config" in err

    settings = tmp_path / "theirs" / "adapter_config.json"
    settings.write_text(settings.read_text().replace(str(tiny_checkpoint), "/moved/elsewhere"))
    code, _, err = command(tmp_path / "theirs", "--text", "oil")
    assert code == EXIT_BAD_INPUT and "'/moved/elsewhere': no such folder" in err and "with --base" in err
    settings.write_text(settings.read_text().replace('"revision": null', '"revision": "v2"'))
    code, _, err = command(tmp_path / "theirs", "--text", "oil")
    assert code == EXIT_BAD_INPUT and "trained on revision 'v2' of /moved/elsewhere; fetch that" in err
    assert command(tmp_path / "theirs", "--base", tiny_checkpoint, "--text", "oil")[0] == 0


def self_labelled(folder, tiny_checkpoint, base_names, own_head, stored, file_names):
    """A base with a head of `base_names`, an adapter over it, and settings of texts labelled by its own answers.

    The answer 0 is called file_names[0] there, 1 file_names[1].
    """
    config = RobertaConfig.from_file(tiny_checkpoint / "config.json")
    base = load_checkpoint(tiny_checkpoint, dataclasses.replace(config, label_names=base_names))
    tokenizer = TextTokenizer.from_directory(tiny_checkpoint, 16)
    lora = LoRAConfig(modules_to_save=("classifier",) if own_head else ())
    model = inject_lora(copy.deepcopy(base), lora)
    texts = [text for _, text in tiny_rows(30)]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.1)
        ids = [torch.tensor([ids]) for ids in tokenizer.encode_batch(texts)]
        logits = torch.cat([model.eval()(row, torch.ones_like(row)) for row in ids])
        shift = (logits[:, 0] - logits[:, 1]).median()  # so that half of the answers are 1
        for head in (base.classifier, model.classifier):
            head.out_proj.bias[1] += shift + 1e-4
    save_checkpoint(base, folder / "base", tokenizer)
    save_adapter(model, folder / "adapter", task_type="SEQ_CLS" if own_head else None)
    if stored:
        (folder / "adapter" / "labels.json").write_text(json.dumps(stored))
    answers = (logits[:, 0] < logits[:, 1] + shift + 1e-4).tolist()
    rows = [f"{file_names[answer]},{text}" for answer, text in zip(answers, texts, strict=True)]
    (folder / "own.csv").write_text("\n".join(["label,text", *rows]))
    (folder / "own.toml").write_text(f'[data]\nsource = "{folder}/own.csv"\ntest_file = "{folder}/own.csv"\n')
    return folder / "adapter", "--base", folder / "base", "--config", folder / "own.toml"


NUMBERED, FRUIT, MOOD, MAIL = ("LABEL_0", "LABEL_1"), ("zebra", "apple"), ("negative", "positive"), ("spam", "ham")


@pytest.mark.parametrize(("names", "problem"), [(("a", "b"), "regression"), (("a",), None)])
def test_an_adapter_whose_head_predicts_a_number_is_refused(command, tiny_checkpoint, tmp_path, names, problem):
    base = load_checkpoint(
        tiny_checkpoint,
        dataclasses.replace(RobertaConfig.from_file(tiny_checkpoint / "config.json"), label_names=names),
        new_head=True,
    )
    save_checkpoint(base, tmp_path / "base", TextTokenizer.from_directory(tiny_checkpoint, 16))
    save_adapter(inject_lora(base, LoRAConfig()), tmp_path / "adapter", task_type="SEQ_CLS")
    described = tmp_path / "base" / "config.json"
    described.write_text(json.dumps(json.loads(described.read_text()) | {"problem_type": problem}))
    arguments = [tmp_path / "adapter", "--base", tmp_path / "base", "--text", "oil"]
    code, _, err = command(*arguments)
    assert code == EXIT_BAD_INPUT and f"{described}: " in err and "predicts a number, not a class" in err
    described.write_text(json.dumps(json.loads(described.read_text()) | {"problem_type": "multi_label_classification"}))
    assert command(*arguments)[0] == 0


@pytest.mark.parametrize(
    ("base_names", "own_head", "stored", "file_names", "says"),
    [
        (FRUIT, True, None, FRUIT, "zebra, apple: in the order of the base checkpoint"),
        (FRUIT, False, None, FRUIT, "zebra, apple: in the order of the base checkpoint"),
        (NUMBERED, True, FRUIT, FRUIT, "zebra, apple: in the order of the adapter"),
        (MOOD, True, FRUIT, FRUIT, "zebra, apple: in the order of the adapter"),
        (MOOD, True, FRUIT, FRUIT[::-1], None),  # the same names, and every answer is wrong
        (NUMBERED, True, None, ("0", "1"), "0, 1: named by"),
        (NUMBERED, False, None, ("0", "1"), "the base checkpoint has LABEL_0, LABEL_1"),
        (MOOD, True, None, MAIL[::-1], "ham, spam: named by"),
        (MOOD, True, None, MAIL[::-1], "the base checkpoint has negative, positive"),
    ],
)
def test_classes_are_matched_by_name(
    command, tiny_checkpoint, tmp_path, base_names, own_head, stored, file_names, says
):
    arguments = self_labelled(tmp_path, tiny_checkpoint, base_names, own_head, stored, file_names)
    code, out, err = command(*arguments)
    assert code == 0, err
    assert f"test accuracy {100 if says else 0:.2f} %" in out and (says or "") in out
    _, out, _ = command(*arguments, "--text", "oil price", "--export", tmp_path / "merged")
    assert set(probabilities(out.splitlines()[-2])) == set(file_names)
    exported = RobertaConfig.from_file(tmp_path / "merged" / "config.json").label_names
    assert exported == (stored or file_names)


@pytest.mark.parametrize(
    ("base_names", "own_head", "stored", "file_names", "says"),
    [
        (MOOD, False, None, MAIL, "own.csv has 2 classes: ham, spam; the base checkpoint has 2: negative, positive; "),
        (NUMBERED, True, FRUIT, MAIL, "own.csv has 2 classes: ham, spam; the adapter has 2: zebra, apple; "),
        (
            NUMBERED,
            True,
            FRUIT,
            ("Zebra", "apple"),
            "the adapter has 2: zebra, apple (case, blanks or invisible characters differ); ",
        ),
        (NUMBERED, True, ("a", "b", "c"), ("a", "b"), "labels.json names 3 classes, but the adapter's head has 2"),
        (NUMBERED, True, ("a", "a"), ("a", "b"), "labels.json: must be a list of different names"),
    ],
)
def test_other_class_names_are_refused(
    command, tiny_checkpoint, tmp_path, base_names, own_head, stored, file_names, says
):
    code, _, err = command(*self_labelled(tmp_path, tiny_checkpoint, base_names, own_head, stored, file_names))
    assert code == EXIT_BAD_INPUT and says in err and err.count("\n") == 1, err


def test_another_number_of_classes_is_refused(command, tiny_checkpoint, tmp_path):
    arguments = self_labelled(tmp_path, tiny_checkpoint, MOOD, True, None, MAIL)
    with (tmp_path / "own.csv").open("a") as file:
        file.write("\nhoax,oil price")
    code, _, err = command(*arguments)
    assert code == EXIT_BAD_INPUT and "own.csv has 3 classes: ham, hoax, spam; the base checkpoint has 2: " in err


def test_a_run_over_exchanged_data_is_refused(command, finished, tmp_path):
    folder, _ = finished
    config = read_config(folder / "config.toml")
    for name in ("train", "test"):
        text = Path(config.data.source).with_name(f"{name}.csv").read_text()
        (tmp_path / f"{name}.csv").write_text(text.replace("sports,", "cricket,"))
    files = {"source": str(tmp_path / "train.csv"), "test_file": str(tmp_path / "test.csv")}
    write_config(dataclasses.replace(config, data=dataclasses.replace(config.data, **files)), folder / "config.toml")
    code, _, err = command(folder)
    assert code == EXIT_BAD_INPUT and "2 classes: cricket, business; the adapter has 2: sports, business; " in err


def test_names_travel_with_the_adapter_folder(command, finished, tiny_checkpoint):
    folder, _ = finished
    code, out, _ = command(folder / "adapter", "--base", tiny_checkpoint, "--text", "the goal of the match")
    assert code == 0 and out.splitlines()[-1].startswith("sports")
    (folder / "adapter" / "labels.json").write_text('["sports", "business"]')
    code, _, err = command(folder)
    assert code == EXIT_BAD_INPUT and "labels.json differ" in err and err.count("\n") == 1
    (folder / "adapter" / "labels.json").unlink()  # as in the folder of an earlier version
    assert command(folder)[0] == 0
    (folder / "labels.json").unlink()
    code, _, err = command(folder)
    assert code == EXIT_BAD_INPUT and "labels.json: can't be read (no such file)" in err


@pytest.mark.parametrize("table", ["[lora]\nrank = 4", "[bitfit]", "[full]"])
def test_a_partly_trained_head_scores_the_same_again(command, tiny_config, tiny_data, capsys, monkeypatch, table):
    monkeypatch.setattr(recorder, "write_pages", lambda folder: None)
    text = tiny_config.read_text().replace("[lora]\nrank = 4\nalpha = 8", table)
    tiny_config.write_text(text.replace(table, f'{table}\nmodules_to_save = ["classifier.out_proj"]'))
    train(parse_command_line([str(tiny_config), "--train.epochs", "2"]))
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("test accuracy"))
    assert line in command(tiny_data / "run")[1].splitlines()


def test_a_missing_head_is_an_error_not_a_random_head(command, tiny_checkpoint, tmp_path, capsys):
    base = transformers.RobertaModel.from_pretrained(tiny_checkpoint)
    wrapped = torch.nn.Module()
    wrapped.roberta = base
    model = peft.get_peft_model(wrapped, peft.LoraConfig(r=2, target_modules=["query"]))
    model.save_pretrained(tmp_path / "headless")
    capsys.readouterr()  # transformers' own progress bar
    code, _, err = command(tmp_path / "headless", "--base", tiny_checkpoint, "--text", "oil price")
    assert code == EXIT_BAD_INPUT and "classifier.out_proj.weight" in err and err.count("\n") == 1


def test_unusable_arguments_are_a_one_line_error(command, finished, tmp_path):
    folder, _ = finished
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "gap.txt").write_text("oil price\n\nthe cup\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "nothing").mkdir()
    shutil.copytree(folder / "adapter", tmp_path / "training" / "checkpoint-500")
    for arguments, says in [
        ([tmp_path / "nothing"], "neither a run folder"),
        ([tmp_path / "missing"], "neither a run folder"),
        ([tmp_path / "training", "--text", "oil"], "neither a run folder"),
        ([folder, "--text"], "--text has no text; write one after it"),
        ([folder, "--text", " "], "--text number 1: the text is empty"),
        ([folder, "--file", tmp_path / "empty.txt"], "empty.txt: is empty"),
        ([folder, "--file", tmp_path / "gap.txt"], "gap.txt, line 2: the text is empty"),
        ([folder, "--file", tmp_path / "latin.txt"], "latin.txt: not UTF-8 at byte 3"),
        ([folder, "--text", "oil", "caf\udce9"], "--text number 2: is not UTF-8"),
        ([folder, "--file", tmp_path / "none.txt"], "none.txt: can't be read"),
        ([folder, "--base", "nothing-here"], "nothing-here"),
        ([folder, "--text", "oil", "--speed"], "--text and --file, --speed ask for different things"),
        ([folder, "--text", "oil", "--noise"], "--text and --file, --noise ask for different things"),
        ([folder, "--text", "oil", "--predict", "a.csv", "--out", "b.csv"], "--predict ask for different things"),
        ([folder, "--export", tmp_path / "gap.txt"], "gap.txt: exists and is not an empty folder"),
        ([folder, "--predict", "a.csv", "--out", tmp_path / "no" / "b.csv"], "there is no folder"),
        ([folder, "--text", "oil", "--encoding", "cp1252"], "--encoding has no effect without --predict; remove it"),
        ([folder, "--txet", "x"], "--txet"),
    ]:
        code, _, err = command(*arguments)
        assert code == EXIT_BAD_INPUT and says in err and err.count("\n") == 1, (arguments, err)


def test_the_tokenizer_saved_with_an_adapter_is_used(command, finished, tiny_checkpoint):
    adapter, words = finished[0] / "adapter", ("--text", "oil", "goal")
    before = command(adapter, "--base", tiny_checkpoint, *words)[1].splitlines()[-2:]
    raw = json.loads((adapter / "tokenizer.json").read_text())
    vocabulary = raw["model"]["vocab"]
    vocabulary["oil"], vocabulary["goal"] = vocabulary["goal"], vocabulary["oil"]
    (adapter / "tokenizer.json").write_text(json.dumps(raw))
    _, out, _ = command(adapter, "--base", tiny_checkpoint, *words)
    assert list(map(probabilities, out.splitlines()[-2:])) == list(map(probabilities, before[::-1]))
    assert f"tokenizer   {adapter}" in out


def test_a_damaged_adapter_is_a_one_line_error(command, finished):
    folder, _ = finished
    weights = folder / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    code, _, err = command(folder)
    assert code == EXIT_BAD_INPUT and "adapter_model.safetensors: not a complete safetensors file" in err
    weights.rename(weights.with_suffix(".bin"))
    code, _, err = command(folder)
    assert code == EXIT_BAD_INPUT and "adapter_model.bin: not read, as its format can run code; convert it" in err
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"})[:-3])
    code, _, err = command(folder)
    assert code == EXIT_BAD_INPUT and err.count("\n") == 1


def test_texts_are_cleaned_as_in_training(command, tiny_config, tiny_data):
    options = ["--data.cleaning.html", "--data.cleaning.lowercase", "--output", str(tiny_data / "clean")]
    assert train(parse_command_line([str(tiny_config), *options])) == 0
    _, plain, _ = command(tiny_data / "clean", "--text", "a goal in the match")
    _, loud, _ = command(tiny_data / "clean", "--text", "&lt;b&gt;A GOAL&lt;/b&gt; IN  THE MATCH")
    assert plain.splitlines()[-1].split("   ")[0] == loud.splitlines()[-1].split("   ")[0]


def write_unlabelled(path, rows):
    """The same rows as CSV, TSV, JSONL or Parquet."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        mark = "," if path.suffix == ".csv" else "\t"
        path.write_text("\n".join(mark.join(line) for line in [rows[0], *(row.values() for row in rows)]) + "\n")
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_unlabelled_files_are_classified_into_a_submission(command, finished, tmp_path, kind):
    folder, _ = finished
    rows = [{"id": "b7", "text": "the goal of the match"}, {"id": "a1", "text": "oil price today"}]
    source = write_unlabelled(tmp_path / f"new.{kind}", rows)
    out = tmp_path / "submission.csv"
    code, _, err = command(folder, "--predict", source, "--out", out)
    assert code == 0, err
    assert out.read_text() == "ID,label\nb7,sports\na1,business\n"
    assert command(folder, "--predict", source, "--out", tmp_path / "i.csv", "--indices")[0] == 0
    assert (tmp_path / "i.csv").read_text() == "ID,label\nb7,1\na1,0\n"  # business before sports
    assert sorted(path.name for path in tmp_path.glob("*.part")) == []


def test_predict_reads_another_encoding_and_says_what_it_noticed(command, finished, tmp_path):
    (tmp_path / "new.csv").write_bytes(b'text\n"goal\nof the caf\xe9"\n')
    options = ("--predict", tmp_path / "new.csv", "--out", tmp_path / "o.csv")
    code, _, err = command(finished[0], *options)
    assert code == EXIT_BAD_INPUT and "row 3: not UTF-8 (byte 21); save the file as UTF-8, or set" in err
    code, out, _ = command(finished[0], *options, "--encoding", "cp1252")
    assert code == 0 and "a field that spans lines: 1, the first is 2" in out


def test_columns_of_text_and_id_are_chosen_or_numbered(command, finished, tmp_path):
    folder, _ = finished
    rows = [{"n": "x", "title": "the goal", "body": "of the match"}, {"n": "y", "title": "oil price", "body": "today"}]
    source = write_unlabelled(tmp_path / "new.csv", rows)
    options = ("--predict", source, "--text-columns", "title", "body")
    assert command(folder, *options, "--out", tmp_path / "a.csv")[0] == 0
    assert (tmp_path / "a.csv").read_text() == "ID,label\n0,sports\n1,business\n"
    assert command(folder, *options, "--id-column", "n", "--out", tmp_path / "b.csv")[0] == 0
    assert (tmp_path / "b.csv").read_text() == "ID,label\nx,sports\ny,business\n"


def test_columns_of_text_are_those_of_the_run_unless_given(command, finished, tmp_path):
    folder, _ = finished
    shutil.copytree(folder, tmp_path / "mine")
    config = read_config(folder / "config.toml")
    mine = tmp_path / "mine.csv"
    mine.write_text("label,title,body\n")
    data = dataclasses.replace(config.data, source=str(mine), directory=None, text_columns=("title", "body"))
    (tmp_path / "mine" / "config.toml").unlink()
    write_config(dataclasses.replace(config, data=data), tmp_path / "mine" / "config.toml")
    source = write_unlabelled(
        tmp_path / "new.csv", [{"title": "the goal", "body": "of the match", "text": "oil price"}]
    )
    assert command(tmp_path / "mine", "--predict", source, "--out", tmp_path / "a.csv")[0] == 0
    assert (tmp_path / "a.csv").read_text() == "ID,label\n0,sports\n"
    options = ("--text-columns", "text", "--out", tmp_path / "b.csv")
    assert command(tmp_path / "mine", "--predict", source, *options)[0] == 0
    assert (tmp_path / "b.csv").read_text() == "ID,label\n0,business\n"


@pytest.mark.parametrize(
    ("content", "options", "says"),
    [
        ("id,text\n1,\n", (), r"new.csv, row 2: the text is empty"),
        ("id,words\n1,a\n", (), "no column 'text'; there are id, words"),
        ("id,text\n", (), "new.csv: no rows"),
        ("id,text\n1,a\n", ("--id-column", "key"), "no column 'key'"),
        ("id,text\n1,a\n,b\n", (), "new.csv, row 3: the ID in 'id' is empty"),
    ],
)
def test_unusable_unlabelled_files_are_refused(command, finished, tmp_path, content, options, says):
    folder, _ = finished
    (tmp_path / "new.csv").write_text(content)
    code, _, err = command(folder, "--predict", tmp_path / "new.csv", "--out", tmp_path / "o.csv", *options)
    assert code == EXIT_BAD_INPUT and says in err and err.count("\n") == 1
    assert not (tmp_path / "o.csv").exists()


def test_predict_does_not_overwrite_a_file(command, finished, tmp_path):
    folder, _ = finished
    source = write_unlabelled(tmp_path / "new.csv", [{"text": "oil"}])
    code, _, err = command(folder, "--predict", source)
    assert code == EXIT_BAD_INPUT and "--out" in err
    (tmp_path / "o.csv").write_text("mine")
    code, _, err = command(folder, "--predict", source, "--out", tmp_path / "o.csv")
    assert code == EXIT_BAD_INPUT and "exists" in err and (tmp_path / "o.csv").read_text() == "mine"


def test_speed_is_reported_for_both_forms_and_batch_sizes(command, finished):
    folder, _ = finished
    code, out, _ = command(folder, "--speed")
    lines = [line.split() for line in out.splitlines() if line.startswith("adapters ")]
    assert code == 0
    # 40 test texts: no full batch of 64.
    assert [(line[1], line[2]) for line in lines] == [("separate", "1"), ("merged", "1")]
    for line in lines:
        rate, median, p95 = (float(number.replace(",", "")) for number in line[3:6])
        assert rate > 0 and 0 < median <= p95
    code, _, err = command(folder, "--speed", "--merged")
    assert code == EXIT_BAD_INPUT and "--speed measures both" in err


def test_another_source_is_scored_by_a_map(command, finished, tmp_path):
    folder, line = finished
    config = read_config(folder / "config.toml")
    table = command(folder)[1].split("\n\n")[1]
    # Its own test split, by its settings and as a file.
    for own in (folder / "config.toml", config.data.test_file):
        code, out, err = command(folder, "--on", own)
        assert code == 0 and table in out and f"\n{line.split('   ')[0].removeprefix('test ')} on 40 texts" in out, err
    for name, setting in (("max_length", "max_length = 17"), ("cleaning", "[data.cleaning]\nhtml = true")):
        (tmp_path / "set.toml").write_text(f'[data]\nsource = "{config.data.test_file}"\n{setting}\n')
        code, _, err = command(folder, "--on", tmp_path / "set.toml")
        assert code == EXIT_BAD_INPUT and f"set.toml: data.{name} has no effect with --on" in err, err
        code, _, err = command(folder, "--on", tmp_path / "set.toml", "--config", tmp_path / "set.toml")
        assert code == 0, err
    names = {"sports": "cricket", "business": "trade"}
    rows = [(names[label], text) for label, text in tiny_rows(40, seed=1)] + [
        ("weather", "rain"),
        ("art", "a play"),
    ] * 3
    (tmp_path / "other.csv").write_text("".join(f"{label},{text}\n" for label, text in [("label", "text"), *rows]))
    (tmp_path / "map.toml").write_text('cricket = "sports"\ntrade = "business"\n')
    on = (folder, "--on", tmp_path / "other.csv")
    for more in ((), ("--merged",)):
        code, out, _ = command(*on, "--map", tmp_path / "map.toml", *more)
        assert code == 0 and table in out and "6 texts of classes that are not mapped: weather 3, art 3" in out
    (tmp_path / "map.toml").write_text('cricket = "sports"\nweather = ["business", "sports"]\n')
    for arguments, says in [
        (on, "no name is equal; map them by --map FILE"),
        ((*on, "--map", tmp_path / "map.toml"), "'weather' and 'cricket' share classes"),
        ((folder, "--map", tmp_path / "map.toml"), "--map has no effect without --on; remove it"),
        ((folder, "--on", tmp_path / "none.csv"), "none.csv"),
        ((*on, "--noise"), "--on, --noise ask for different things"),
        (("--adapter", folder, *on[1:]), "--adapter needs --text, --file or --predict"),
    ]:
        code, _, err = command(*arguments)
        assert code == EXIT_BAD_INPUT and says in err and err.count("\n") == 1, (arguments, err)


def test_how_a_run_was_computed_is_its_own_and_not_that_of_other_data(command, finished):
    folder, line = finished
    settings = (folder / "config.toml").read_text()
    (folder / "data.toml").write_text(settings)
    own = settings.replace('compile = "off"', 'compile = "cuda-graphs"').replace(
        'precision = "auto"', 'precision = "bf16"'
    )
    (folder / "config.toml").write_text(own)
    assert command(folder)[0] == 0, "nothing is compiled here"
    assert ", bf16, from" in command(folder, "--config", folder / "data.toml", "--speed")[1]


def test_noise_lowers_the_accuracy_from_that_of_the_test_split(command, finished, tiny_checkpoint):
    folder, line = finished
    (folder / "clean.toml").write_text((folder / "config.toml").read_text().replace("html = false", "html = true"))
    alone = (folder / "adapter", "--base", tiny_checkpoint, "--config", folder / "clean.toml")
    for given in ((folder,), alone):
        code, out, err = command(*given, "--noise")
        assert code == 0, err
        rows = {words[:14].strip(): words[14:].split() for words in out.split("accuracy (%)")[1].splitlines()[2:8]}
        assert list(rows) == list(CORRUPTIONS) and {row[0] for row in rows.values()} == {line.split()[2]}
        # The tiny tokenizer knows whole words in lower case alone; the texts have no punctuation.
        assert float(rows["typing errors"][4]) < float(rows["typing errors"][0]) == float(rows["no punctuation"][4])
        assert ({*rows["markup"]} == {rows["markup"][0]}) == (given == alone)  # cleaning comes after the corruption
        assert (given[0] / "plots" / "noise.png").is_file()
        kept = json.loads((given[0] / "noise.json").read_text())
        assert {name: [f"{100 * each:.2f}" for each in accuracies] for name, accuracies in kept.items()} == rows
    for options in (("--config", folder / "clean.toml"), ("--precision", "fp32"), ("--export", folder / "merged")):
        code, out, _ = command(folder, "--noise", *options)
        assert code == 0 and "not written: they are for the run's own settings\n" in out
    assert json.loads((folder / "noise.json").read_text())["markup"][4] < kept["markup"][4]


@pytest.fixture
def second(finished, tiny_config, tiny_data):
    """A run over the same base with other classes: one more, and in another order."""
    config = read_config(finished[0] / "config.toml")
    for split in ("train", "test"):
        rows = [f"{'zoo' if 'report' in text else label},{text}" for label, text in tiny_rows(96, seed=2)]
        (tiny_data / f"{split}.csv").write_text("\n".join(["label,text", *rows]) + "\n")
    options = (
        "--output",
        str(tiny_data / "second"),
        "--data.cleaning.lowercase",
        "--data.max-length",
        "5",
        "--train.epochs",
        "1",
    )
    assert train(parse_command_line([str(tiny_config), *options, "--lora.target-modules", "value", "dense"])) == 0
    assert read_config(tiny_data / "second" / "config.toml").model.checkpoint == config.model.checkpoint
    return tiny_data / "second"


def test_several_adapters_classify_each_text_as_each_alone(command, finished, second, tmp_path):
    one, other = load_several(Arguments(adapter=(finished[0], second))).values()
    assert one.model.roberta.encoder.layer[0].output.dense.bias is other.model.get_parameter(
        "roberta.encoder.layer.0.output.dense.base.bias"
    )
    first, texts = finished[0], ["the Goal of the match", "oil price today report on the bank in the new report", "cup"]
    both = ("--adapter", first, "--adapter", second)
    code, out, err = command(*both, "--text", *texts)
    assert code == 0, err
    lines = out.splitlines()[-2 * len(texts) :]
    for number, folder in enumerate((first, second)):
        alone = command(folder, "--text", *texts)[1].splitlines()[-len(texts) :]
        assert [line.removeprefix(str(folder)).strip() for line in lines[number::2]] == alone
    source = write_unlabelled(tmp_path / "new.csv", [{"id": f"n{i}", "text": text} for i, text in enumerate(texts)])
    code, _, err = command(*both, "--predict", source, "--out", tmp_path / "both.csv")
    assert code == 0, err
    columns = []
    for folder in (first, second):
        assert command(folder, "--predict", source, "--out", tmp_path / f"{folder.name}.csv")[0] == 0
        columns.append([line.split(",") for line in (tmp_path / f"{folder.name}.csv").read_text().splitlines()])
    expected = [f"{ID},{a},{b}" for (ID, a), (_, b) in zip(*columns, strict=True)]
    assert (tmp_path / "both.csv").read_text().splitlines() == [f"ID,{first},{second}", *expected[1:]]


def test_what_several_adapters_can_not_do_is_refused(command, finished, tiny_checkpoint, tmp_path):
    folder, other = finished[0], tmp_path / "other"
    both = ["--adapter", folder, "--adapter", other]
    model = load_checkpoint(tiny_checkpoint, new_head=True)
    for name in ("eps", "key"):
        save_checkpoint(model, tmp_path / name, TextTokenizer.from_directory(tiny_checkpoint, 16))
        model.roberta.encoder.layer[1].attention.self.key.weight.data[0, 0] += 1
    settings = tmp_path / "eps" / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"layer_norm_eps": 0.5}))
    for section, changes, arguments, says in [
        ("model", {}, [], "give either one folder, or several with --adapter FOLDER before each"),
        ("model", {}, [folder, *both, "--text", "oil"], "give either one folder, or several"),
        ("model", {}, ["--adapter", folder, "--adapter", folder, "--text", "oil"], "a folder is given twice"),
        ("model", {}, both, "--adapter needs --text, --file or --predict"),
        ("model", {}, [*both, "--speed"], "--adapter needs --text, --file or --predict"),
        ("model", {}, [*both, "--text", "oil", "--merged"], "--merged and --export are for one folder"),
        (
            "model",
            {"checkpoint": str(tmp_path / "key")},
            [*both, "--text", "oil"],
            "self.key.weight is not that of the",
        ),
        ("model", {"checkpoint": str(tmp_path / "eps")}, [*both, "--text", "oil"], "its base differs from that of "),
        ("train", {"precision": "bf16"}, [*both, "--text", "oil"], "trained in another precision than the first"),
        ("data", {"text_columns": ("a",)}, [*both, "--predict", "a.csv", "--out", "b.csv"], "of different names"),
    ]:
        shutil.copytree(folder, other)
        config = read_config(folder / "config.toml")
        (other / "config.toml").unlink()
        changed = {section: dataclasses.replace(getattr(config, section), **changes)}
        write_config(dataclasses.replace(config, **changed), other / "config.toml")
        code, _, err = command(*arguments)
        assert code == EXIT_BAD_INPUT and says in err and err.count("\n") == 1, (arguments, err)
        shutil.rmtree(other)


TEMPERATURE = 8.0


@pytest.fixture
def tempered(finished, tmp_path):
    """The finished run with a temperature that leaves some texts in doubt."""
    folder = shutil.copytree(finished[0], tmp_path / "tempered")
    (folder / "adapter" / "temperature.json").write_text(f"{TEMPERATURE}\n")
    return folder


def test_probabilities_are_divided_by_the_temperature_and_scores_are_not(command, finished, tempered, tmp_path):
    (folder, line), texts = finished, [text for _, text in tiny_rows(10, seed=9)]
    (folder / "adapter" / "temperature.json").unlink()  # as in the folder of an earlier version
    plain = [probabilities(line) for line in command(folder, "--text", *texts)[1].splitlines()[-10:]]
    code, out, err = command(tempered, "--text", *texts)
    shown = [probabilities(line) for line in out.splitlines()[-10:]]
    assert code == 0 and "temperature 8.000" in out, err
    for before, after in zip(plain, shown, strict=True):
        odds = (before["sports"] / before["business"]) ** (1 / TEMPERATURE) if min(before.values()) > 0.01 else None
        assert max(after, key=after.get) == max(before, key=before.get) and max(after.values()) < max(before.values())
        assert odds is None or after["sports"] / after["business"] == pytest.approx(odds, rel=0.1)
    code, out, _ = command(tempered)
    assert code == 0 and line in out.splitlines() and "before temperature 8.000)" in out.splitlines()[-1]
    assert "(no temperature was fitted)" in command(folder)[1].splitlines()[-1]
    both = command("--adapter", folder, "--adapter", tempered, "--text", *texts)[1].splitlines()[-20:]
    for start, name, expected in ((0, folder, plain), (1, tempered, shown)):
        assert [probabilities(line.removeprefix(str(name))) for line in both[start::2]] == expected

    code, out, _ = command(tempered, "--export", tmp_path / "merged")
    assert code == 0 and "the last layer by the temperature: logits are z / 8.000" in out
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        theirs = model(**tokenizer(texts, return_tensors="pt", padding=True)).logits.softmax(dim=1)
    assert theirs[:, 0].tolist() == pytest.approx([row["business"] for row in shown], abs=1e-3)


def test_texts_below_a_probability_are_undecided(command, finished, tempered, tmp_path):
    texts = [text for _, text in tiny_rows(12, seed=9)]
    lines = command(tempered, "--text", *texts)[1].splitlines()[-12:]
    highest = [max(probabilities(line).values()) for line in lines]
    least = round((sorted(highest)[5] + sorted(highest)[6]) / 2, 4)
    below = [value < least for value in highest]
    assert sum(below) == 6
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    for asked in (("--text", *texts), ("--file", tmp_path / "texts.txt")):
        shown = command(tempered, *asked, "--abstain", least)[1].splitlines()[-12:]
        expected = [f"undecided  {line}" if doubt else line for doubt, line in zip(below, lines, strict=True)]
        assert shown == expected

    source = write_unlabelled(tmp_path / "new.csv", [{"text": text} for text in texts])
    options = ("--predict", source, "--abstain", least, "--out")
    code, out, _ = command(tempered, *options, tmp_path / "one.csv", "--indices")
    assert code == 0 and "undecided   6 of 12 rows: their label is empty" in out
    labels = [line.split(",")[1] for line in (tmp_path / "one.csv").read_text().splitlines()[1:]]
    assert [label == "" for label in labels] == below
    code, out, _ = command("--adapter", finished[0], "--adapter", tempered, *options, tmp_path / "two.csv")
    assert code == 0 and f"undecided   6 of 12 rows by {tempered}: " in out and f" rows by {finished[0]}: " in out
    rows = [line.split(",") for line in (tmp_path / "two.csv").read_text().splitlines()[1:]]
    assert [row[2] == "" for row in rows] == below and all(row[1] for row in rows)

    out = command(tempered, "--abstain", least)[1].splitlines()
    assert out[-1].startswith("decided ") and f" of 40 texts) at {least:g}   accuracy on these " in out[-1]
    for arguments, says in [
        *(([tempered, "--abstain", p], f"--abstain {p}: give a probability between") for p in ("0.0", "1.0", "nan")),
        *(
            ([tempered, "--abstain", 0.5, *words], f"--abstain has no effect with {name}; remove it")
            for words, name in [
                (["--speed"], "--speed"),
                (["--noise"], "--noise"),
                (["--on", "imdb"], "--on"),
                (["--export", tmp_path / "m"], "--export alone"),
            ]
        ),
    ]:
        code, _, err = command(*arguments)
        assert code == EXIT_BAD_INPUT and says in err and err.count("\n") == 1, (arguments, err)
    (tempered / "adapter" / "temperature.json").write_text("warm")
    code, _, err = command(tempered)
    assert code == EXIT_BAD_INPUT and "temperature.json: not a temperature (" in err and err.count("\n") == 1
