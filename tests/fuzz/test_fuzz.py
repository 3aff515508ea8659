"""Every reader on mutated files: it reads them or raises one of the program's own errors.

LORABERTA_FUZZ sets the number of files per reader (`make fuzz`: 100,000); the test suite uses 150. Each file is
determined by its number, so a failure can be reproduced.
"""

import gzip
import json
import os
import random
import shutil
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.errors import DataError
from data.sources import DataConfig, load_source, read_unlabelled
from lora.config import BottleneckConfig, LoRAConfig, LoRAError
from lora.inject import inject_lora
from lora.peft_format import adapter_shapes, load_adapter, read_base_model, save_adapter
from roberta.config import RobertaConfig
from roberta.files import CheckpointError
from roberta.model import RobertaForSequenceClassification
from roberta.tokenizer import TextTokenizer
from roberta.weights import head_of, load_checkpoint, save_checkpoint
from tests.conftest import tiny_rows, tiny_tokenizer
from tests.fuzz.mutate import mutate_bytes, mutate_json, mutate_safetensors
from training import checkpoint
from training.config import read_config
from training.errors import ConfigError
from training.run_folder import RunFolder

NUMBER = int(os.environ.get("LORABERTA_FUZZ", "150"))
SMALL = RobertaConfig(
    vocab_size=24, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
    max_position_embeddings=12, label_names=("a", "b"),
)  # fmt: skip


def fuzz(path: Path, read, errors, *mutations):
    """Call `read` on mutations of the file in place; fail on any other error. Prints a summary."""
    content = path.read_bytes()
    refused, slowest = 0, 0.0
    for number in range(NUMBER):
        draw = random.Random(f"{path.name} {number}")
        path.write_bytes(draw.choice(mutations)(content, draw))
        started = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read()
        except errors as error:
            refused += 1
            assert "\n" not in str(error).strip(), f"file {number}: more than one line: {error}"
        except Exception as error:
            raise AssertionError(f"file {number}: {type(error).__name__}: {error}") from error
        slowest = max(slowest, time.perf_counter() - started)
    path.write_bytes(content)
    print(f"{path.name}: {NUMBER:,} files, {refused:,} refused, slowest {slowest:.3f} s")
    assert refused, "no file was refused"
    read()  # the original can still be read


@pytest.fixture
def folder(tmp_path):
    """A checkpoint with a tokenizer, and an adapter for it."""
    torch.manual_seed(0)
    model = RobertaForSequenceClassification(SMALL)
    save_checkpoint(model, tmp_path / "base", TextTokenizer(tiny_tokenizer(), 10))
    config = LoRAConfig(rank=2, bias="lora_only", rank_pattern={"value": 1})
    inject_lora(model, config)
    save_adapter(model, tmp_path / "adapter", base_model="base")
    return tmp_path


def read_base(folder):
    head_of(folder / "base")
    return load_checkpoint(folder / "base")


def test_checkpoint_weights(folder):
    path = folder / "base" / "model.safetensors"
    fuzz(path, lambda: read_base(folder), CheckpointError, mutate_safetensors, mutate_bytes)


def test_checkpoint_config(folder):
    fuzz(folder / "base" / "config.json", lambda: read_base(folder), CheckpointError, mutate_json, mutate_bytes)


def test_checkpoint_index(folder):
    path, part = folder / "base" / "model.safetensors", "model-00001-of-00001.safetensors"
    index = path.with_name("model.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(load_file(path), part)}))
    path.rename(path.with_name(part))
    fuzz(index, lambda: read_base(folder), CheckpointError, mutate_json, mutate_bytes)


def test_tokenizer(folder):
    def read():
        tokenizer = TextTokenizer.from_directory(folder / "base", 10)
        tokenizer.check_fits(SMALL, folder)
        for ids in tokenizer.encode_batch(["the goal", "", "<s> oil"]):
            assert len(ids) <= 10 and all(0 <= i < SMALL.vocab_size for i in ids)

    fuzz(folder / "base" / "tokenizer.json", read, CheckpointError, mutate_json, mutate_bytes)


@pytest.mark.parametrize(
    "file",
    ["vocab.json", "merges.txt", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"],
)
def test_vocabulary_and_merges(tmp_path, file):
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "g", "o", "a", "l", "go", "al", "goal"]
    if file == "vocab.txt":
        (tmp_path / "vocab.txt").write_text("\n".join(["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]", *tokens[5:]]))
    else:
        (tmp_path / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
        (tmp_path / "merges.txt").write_text("#version: 0.2\ng o\na l\ngo al\n")
    new = {"content": "oil", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
    settings = {"add_prefix_space": True, "truncation_side": "left", "mask_token": new, "extra_special_tokens": ["<x>"]}
    for name, content in (
        ("tokenizer_config.json", settings | {"added_tokens_decoder": {"12": new}}),
        ("special_tokens_map.json", {"mask_token": new, "additional_special_tokens": ["<a>"], "pad_token": "<pad>"}),
        ("added_tokens.json", {"oil": 12, "<a>": 13}),
    ):
        if file == name:
            (tmp_path / name).write_text(json.dumps(content))

    def read():
        tokenizer = TextTokenizer.from_directory(tmp_path, 10)
        tokenizer.check_fits(SMALL, tmp_path)
        for ids in tokenizer.encode_batch(["the goal", "", "<s> oil"]):
            assert len(ids) <= 10 and all(0 <= i < SMALL.vocab_size for i in ids)

    fuzz(tmp_path / file, read, CheckpointError, mutate_bytes, *([mutate_json] if file.endswith(".json") else []))


def test_labels_of_a_run(tmp_path):
    folder = RunFolder(tmp_path)
    folder.labels.write_text(json.dumps(["business", "sports", "w\u00f6rld"]))
    fuzz(folder.labels, folder.read_labels, ConfigError, mutate_json, mutate_bytes)


def read_adapter(folder, model):
    read_base_model(folder / "adapter")
    adapter_shapes(folder / "adapter")
    load_adapter(load_checkpoint(folder / "base"), folder / "adapter")


def test_adapter_weights(folder):
    path = folder / "adapter" / "adapter_model.safetensors"
    fuzz(path, lambda: read_adapter(folder, None), LoRAError, mutate_safetensors, mutate_bytes)


def test_adapter_config(folder):
    path = folder / "adapter" / "adapter_config.json"
    fuzz(path, lambda: read_adapter(folder, None), LoRAError, mutate_json, mutate_bytes)


@pytest.mark.parametrize("file", ["adapter_config.json", "head_config.json", "model_head.safetensors"])
def test_bottleneck(folder, file):
    shutil.rmtree(folder / "adapter")
    save_adapter(inject_lora(RobertaForSequenceClassification(SMALL), BottleneckConfig()), folder / "adapter")
    mutate = mutate_json if file.endswith(".json") else mutate_safetensors
    fuzz(folder / "adapter" / file, lambda: read_adapter(folder, None), LoRAError, mutate, mutate_bytes)


def test_run_settings(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text((Path(__file__).resolve().parents[2] / "experiments" / "quickstart.toml").read_text())
    fuzz(path, lambda: read_config(path), (ConfigError, LoRAError, DataError), mutate_bytes)


@pytest.mark.parametrize("kind", ["csv", "tsv", "txt", "csv.gz", "jsonl", "json", "parquet", "class names"])
def test_labelled_and_unlabelled_files(tmp_path, kind):
    import datasets
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / ("data.parquet" if kind == "class names" else f"data.{kind}")
    rows = [{"id": str(i), "label": label, "text": text} for i, (label, text) in enumerate(tiny_rows(30))]
    mark = "," if "csv" in kind else "\t"
    lines = "\n".join(mark.join(line) for line in [rows[0], *(row.values() for row in rows)]) + "\n"
    if path.suffix == ".parquet":
        if kind == "class names":
            datasets.Dataset.from_list(rows).class_encode_column("label").to_parquet(path)
        else:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind in ("jsonl", "json"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) if kind == "jsonl" else json.dumps(rows))
    else:
        content = lines.encode("utf-16" if kind == "txt" else "utf-8")
        path.write_bytes(gzip.compress(content) if kind == "csv.gz" else content)

    def read():
        read_unlabelled(path)
        load_source(DataConfig(source=str(path)), 0)

    fuzz(path, read, DataError, mutate_bytes)


@pytest.mark.parametrize(
    "file", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow", "../dataset_dict.json"]
)
def test_folders_that_datasets_saved(tmp_path, file):
    import datasets

    rows = [{"label": label, "text": text} for label, text in tiny_rows(30)]
    data = datasets.Dataset.from_list(rows).class_encode_column("label")
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path)
    config = DataConfig(source=str(tmp_path))
    mutations = [mutate_bytes] if file.endswith(".arrow") else [mutate_json, mutate_bytes]
    fuzz((tmp_path / "train" / file).resolve(), lambda: load_source(config, 0), DataError, *mutations)


def test_classic_ag_news_files(tmp_path):
    for name in ("train", "test"):
        lines = (f'"{i % 4 + 1}","title {i}","text, of {i}"' for i in range(60))
        (tmp_path / f"{name}.csv").write_text("\n".join(lines) + "\n")
    config = DataConfig(source="ag_news", directory=str(tmp_path))
    fuzz(tmp_path / "train.csv", lambda: load_source(config, 0), DataError, mutate_bytes)


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json", "sha256.json"])
def test_checkpoints_of_a_run(tmp_path, file):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _step: 1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    path = checkpoint.save(tmp_path, checkpoint.TrainState(), model, optimizer, schedule, scaler, {}, keep=1)
    mutation = mutate_bytes if file == "sha256.json" else (mutate_safetensors if "tensors" in file else mutate_json)
    fuzz(path / file, lambda: checkpoint.load(tmp_path), ConfigError, mutation, mutate_bytes)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(folder, value):
    for path, read, error in (
        (folder / "base" / "model.safetensors", lambda: read_base(folder), CheckpointError),
        (folder / "adapter" / "adapter_model.safetensors", lambda: read_adapter(folder, None), LoRAError),
    ):
        weights = load_file(path)
        name = sorted(weights)[0]
        original = path.read_bytes()
        weights[name].view(-1)[0] = value
        save_file(weights, path)
        with pytest.raises(error, match=rf"not finite in .*{name.removeprefix('base_model.model.')}"):
            read()
        path.write_bytes(original)
