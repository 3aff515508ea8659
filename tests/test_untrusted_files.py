"""Untrusted files: none causes a hang, exhausts memory, or raises anything but a one-line error.

That none can run code is checked by `make lint` (ruff's rules S and TID251).
"""

import contextlib
import gzip
import json
import os
import re
import resource
import shutil
import signal
import struct
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch

from data import files
from data.errors import DataError
from data.sources import DataConfig, load_source, read_unlabelled
from evaluate import Arguments, evaluate
from lora.config import LoRAConfig, LoRAError
from lora.inject import inject_lora
from lora.peft_format import load_adapter, save_adapter
from roberta.files import CheckpointError
from roberta.model import RobertaForSequenceClassification
from roberta.tokenizer import TextTokenizer
from roberta.weights import load_checkpoint, save_checkpoint
from tests.conftest import tiny_tokenizer
from tests.fuzz.test_fuzz import SMALL
from train import train
from training import checkpoint
from training.command_line import EXIT_BAD_INPUT, run_command
from training.config import parse_command_line
from training.errors import ConfigError


@contextlib.contextmanager
def bounded(mebibytes=300, seconds=60):
    """Within the block: at most this much additional memory, and this many seconds."""

    def stop(*_):
        raise AssertionError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    if sys.platform == "linux":
        held = int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (held + mebibytes * 2**20, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refused(error, says, read):
    with pytest.raises(error, match=says) as caught, bounded():
        read()
    assert "\n" not in str(caught.value)


# --- safetensors --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A folder with a checkpoint and an adapter for it."""
    torch.manual_seed(0)
    model = RobertaForSequenceClassification(SMALL)
    save_checkpoint(model, tmp_path / "base", TextTokenizer(tiny_tokenizer(), 10))
    config = LoRAConfig(rank=2)
    inject_lora(model, config)
    save_adapter(model, tmp_path / "adapter", base_model="base")
    return tmp_path


@pytest.fixture(params=["checkpoint", "adapter"])
def weights(request, folder):
    """(safetensors file, function that reads it, type of error that it raises)."""
    if request.param == "checkpoint":
        return folder / "base" / "model.safetensors", lambda: load_checkpoint(folder / "base"), CheckpointError
    path = folder / "adapter" / "adapter_model.safetensors"
    return path, lambda: load_adapter(load_checkpoint(folder / "base"), folder / "adapter"), LoRAError


def parts(path):
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write(path, header, body, stated=None):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if stated is None else stated) + text + body)


KINDS = {"I64": 8, "I32": 4, "U16": 2, "BOOL": 1, "C64": 8, "F8_E4M3": 1, "F8_E8M0": 1, "F4": 0.5, "F6_E2M3": 0.75}


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_of_other_types_are_named(weights, kind):
    path, read, error = weights
    header, body = parts(path)
    changed, moved = {}, b""
    names = sorted(set(header) - {"__metadata__"}, key=lambda name: header[name]["data_offsets"])
    for name in names:
        begin, end = header[name]["data_offsets"]
        data, entry = body[begin:end], dict(header[name])
        if name == names[0]:
            data, entry["dtype"] = b"\x01" * int(KINDS[kind] * (end - begin) / 4), kind
        changed[name] = entry | {"data_offsets": [len(moved), len(moved) + len(data)]}
        moved += data
    write(path, changed, moved)
    refused(error, rf"holds no floating-point numbers in {re.escape(names[0])} \({kind}\)", read)


@pytest.mark.parametrize("stated", [0, 5, 1 << 23, 1 << 40, (1 << 64) - 1])
def test_wrong_header_lengths(weights, stated):
    path, read, error = weights
    write(path, *parts(path), stated=stated)
    refused(error, "not a complete safetensors file", read)


def test_a_header_of_a_million_names_is_not_read(weights):
    path, read, error = weights
    header, body = parts(path)
    end = len(body)
    many = {f"tensor {i}": {"dtype": "F32", "shape": [0], "data_offsets": [end, end]} for i in range(60_000)}
    write(path, header | many, body)
    assert path.stat().st_size > 4 << 20
    refused(error, r"its header claims [\d,]+ bytes", read)


def test_overlapping_tensors_and_gaps(weights):
    path, read, error = weights
    header, body = parts(path)
    first, second, *_ = sorted(set(header) - {"__metadata__"}, key=lambda name: header[name]["data_offsets"])
    write(path, header | {second: header[second] | {"data_offsets": header[first]["data_offsets"]}}, body)
    refused(error, "not a complete safetensors file", read)
    write(path, header, body + b"more than stated")
    refused(error, "not a complete safetensors file", read)


@pytest.mark.parametrize("own", [True, False], ids=["a known tensor", "an unknown one"])
def test_a_huge_tensor_uses_no_memory(weights, own):
    """A sparse file of 16 GiB, which takes no space on the disk."""
    path, read, error = weights
    header, body = parts(path)
    last = max(set(header) - {"__metadata__"}, key=lambda name: header[name]["data_offsets"])
    begin = header[last]["data_offsets"][0] if own else len(body)
    entry = {"dtype": "F32", "shape": [1 << 32], "data_offsets": [begin, begin + (1 << 34)]}
    write(path, header | {last if own else "unknown": entry}, body[:begin])
    os.truncate(path, path.stat().st_size + (1 << 34))
    refused(error, "wrong shape|holds unexpected|not a complete safetensors file", read)


def test_a_model_larger_than_the_memory_is_named(folder, monkeypatch):
    real = os.sysconf
    monkeypatch.setattr("roberta.weights.os.sysconf", lambda name: 0 if name == "SC_PHYS_PAGES" else real(name))
    refused(CheckpointError, "GiB of memory, and this machine has", lambda: load_checkpoint(folder / "base"))


@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "folder"])
def test_files_that_are_not_regular(weights, folder, kind):
    path, read, error = weights
    settings = path.with_name("config.json" if path.name == "model.safetensors" else "adapter_config.json")
    for one in (path, settings):
        kept = one.rename(folder / "kept")
        if kind == "pipe":
            os.mkfifo(one)
        elif kind == "folder":
            one.mkdir()
        else:
            one.symlink_to(kind)
        refused(error, rf"{one.name}: .*not a regular file", read)
        one.rmdir() if kind == "folder" else one.unlink()
        one.symlink_to(kept)  # as the hub's library keeps its files
        read()
        one.unlink()
        kept.rename(one)


def test_settings_that_are_too_large_or_nested_too_deeply(folder):
    base, adapter = folder / "base" / "config.json", folder / "adapter" / "adapter_config.json"
    (base.parent / "special_tokens_map.json").write_text("{}")
    (base.parent / "added_tokens.json").write_text("{}")
    for path, read, error in (
        (base, lambda: load_checkpoint(base.parent), CheckpointError),
        *(
            (base.parent / name, lambda: TextTokenizer.from_directory(base.parent, 10), CheckpointError)
            for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
        ),
        (adapter, lambda: load_adapter(load_checkpoint(base.parent), adapter.parent), LoRAError),
    ):
        original = path.read_text()
        path.write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")
        refused(error, f"{path.name}: not valid JSON", read)
        path.write_text(original)
        os.truncate(path, 1 << 34)
        refused(error, f"{path.name}: has 17,179,869,184 bytes, more than", read)
        path.write_text(original)


# --- adapters -----------------------------------------------------------------------------------------------------


def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": r"(.*)*(query|key|value)x"},
        {"target_modules": r".*.*.*.*.*.*.*x"},
        {"exclude_modules": ".?" * 60 + "x"},
        {"layers_pattern": ["layer", "(.*)*x"], "layers_to_transform": [0]},
        {"rank_pattern": {"query": 2, "(?:){1000000000}": 2}},  # uses memory rather than time
        {"alpha_pattern": {r"(\w|[a-z.]{1,2})*x": 2}},
        {"target_modules": "(?i)[" + r"\x00-\U0010ffff" * 50_000 + "]"},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_expressions_whose_matching_would_not_finish(folder, fields, monkeypatch):
    monkeypatch.setattr("lora.untrusted._TRIAL_SECONDS", 0.1)
    edit(folder / "adapter" / "adapter_config.json", **fields)
    read = lambda: load_adapter(load_checkpoint(folder / "base"), folder / "adapter")  # noqa: E731
    refused(LoRAError, "may not finish matching; name the layers", read)


def test_a_list_of_other_things_than_names(folder):
    edit(folder / "adapter" / "adapter_config.json", modules_to_save=[["classifier"]])
    read = lambda: load_adapter(load_checkpoint(folder / "base"), folder / "adapter")  # noqa: E731
    refused(LoRAError, "must be a list of names", read)


def test_lists_that_are_too_long(folder):
    path = folder / "adapter" / "adapter_config.json"
    read = lambda: load_adapter(load_checkpoint(folder / "base"), folder / "adapter")  # noqa: E731
    original = path.read_text()
    for fields in (
        {"target_modules": [f"query{i}" for i in range(50_000)]},
        {"modules_to_save": [f"part{i}" for i in range(50_000)]},
        {"rank_pattern": {f"a{i}": 2 for i in range(50_000)}},
        {"layers_to_transform": list(range(50_000))},
    ):
        path.write_text(original)
        edit(path, **fields)
        refused(LoRAError, "has 50,000 entries", read)


def test_an_update_that_is_not_finite(folder):
    from safetensors.torch import load_file, save_file

    path = folder / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({name: torch.full_like(tensor, 1e20) for name, tensor in weights.items()}, path)
    read = lambda: load_adapter(load_checkpoint(folder / "base"), folder / "adapter")  # noqa: E731
    refused(LoRAError, "the update of .*query is not finite", read)


@pytest.mark.parametrize(
    "name", ["../../etc", "/etc", "a/../../b", "~root", "..", "x/..", "\x00", "a" * 9000, "\ud800/x", "/dev/zero"]
)
def test_a_base_model_whose_name_is_a_path(folder, name, monkeypatch):
    monkeypatch.setattr("data.assets.hub_is_reachable", lambda: False)
    monkeypatch.chdir(folder)
    edit(folder / "adapter" / "adapter_config.json", base_model_name_or_path=name)
    refused((DataError, LoRAError, ConfigError), ".", lambda: evaluate(Arguments(folder / "adapter", text=("a",))))


# --- tokenizers ---------------------------------------------------------------------------------------------------


def template(*tokens):
    special = {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}
    pair = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}] * len(tokens) + [{"Sequence": {"id": "A", "type_id": 0}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"post_processor": {"type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<s>", 5000]}}, "adds id 5000"),
        ({"post_processor": None}, "adds no token before a text"),
        ({"post_processor": template(*range(40))}, "adds 40 tokens to a text, and the maximum is 16"),
        ({"model": "larger"}, "has ids up to 999, the model rows for 24"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_does_not_fit_is_named_before_training(
    tiny_config, tiny_checkpoint, tmp_path, capsys, change, says
):
    shutil.copytree(tiny_checkpoint, tmp_path / "base")
    path = tmp_path / "base" / "tokenizer.json"
    raw = json.loads(path.read_text())
    if change == {"model": "larger"}:
        change = {"model": raw["model"] | {"vocab": raw["model"]["vocab"] | {"news": 999}}}
    path.write_text(json.dumps(raw | change))
    options = [str(tiny_config), "--model.checkpoint", str(tmp_path / "base")]
    assert run_command(lambda: train(parse_command_line(options))) == EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_whose_expression_does_not_finish(folder):
    path = folder / "base" / "tokenizer.json"
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    edit(path, pre_tokenizer=split)
    tokenizer = TextTokenizer.from_directory(folder / "base", 10)
    refused(CheckpointError, "the tokenizer fails on a text", lambda: tokenizer.encode_batch(["a" * 40 + "b"]))


def test_a_tokenizer_that_is_too_large(folder):
    path = folder / "base" / "tokenizer.json"
    os.truncate(path, 1 << 34)
    refused(CheckpointError, "17,179,869,184 bytes", lambda: TextTokenizer.from_directory(folder / "base", 10))


# --- text ---------------------------------------------------------------------------------------------------------


def readers(path):
    return lambda: load_source(DataConfig(source=str(path)), 0), lambda: read_unlabelled(path)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
@pytest.mark.parametrize("start", ["at the start", "after a row"])
def test_a_line_of_a_gigabyte_is_refused_by_its_first_bytes(tmp_path, kind, start):
    """The file is sparse and reads as zeros."""
    path = tmp_path / f"data.{kind}"
    mark = {"csv": ",", "tsv": "\t"}.get(kind)
    head = f"text{mark}label\na{mark}b\n" if mark else '{"text": "a", "label": "b"}\n'
    path.write_text(head if start == "after a row" else "")
    os.truncate(path, 1 << 30)
    for read in readers(path):
        refused(DataError, rf"data\.{kind}, row [123]: longer than 10,000,000 characters", read)


def test_rows_within_quotes_do_not_escape_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_LONGEST_ROW", 1000)
    path = tmp_path / "data.csv"
    path.write_text('text,label\n"a",b\n"a,b\n' + "c,d\n" * 2000)  # the quote is never closed
    for read in readers(path):
        refused(DataError, r"data\.csv, row 3: (longer than|field larger)", read)
    long, high = "word " * 190, "x\n" * 400  # rows just below the limit
    path.write_text("text,label\n" + f'"{long}",b\n"{high}",c\n' * 50)
    assert len(load_source(DataConfig(source=str(path)), 0).train.texts) == 81


def test_a_gzip_file_that_unpacks_to_many_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_UNPACKED_MINIMUM", 1 << 20)
    path = tmp_path / "bomb.csv.gz"
    path.write_bytes(gzip.compress(b"text,label\n" + b"a,b\n" * 1_000_000))
    for read in readers(path):
        refused(DataError, "bytes unpack to more than", read)


def test_a_json_array_of_a_gigabyte(tmp_path):
    path = tmp_path / "data.json"
    path.write_text("[")
    os.truncate(path, 1 << 30)
    for read in readers(path):
        refused(DataError, "an array of more than 268,435,456 bytes; write one object per line", read)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_data_file_that_is_not_regular(tmp_path, kind):
    (tmp_path / f"data.{kind}").symlink_to("/dev/zero")
    for read in readers(tmp_path / f"data.{kind}"):
        refused(DataError, "not a regular file", read)


def test_bytes_that_are_not_utf8_are_found_in_any_block(tmp_path):
    path = tmp_path / "data.csv"
    line = "é news,b\n".encode()
    for rows in (1, 6553, 20_000):  # some blocks of 65,536 bytes end inside a character
        path.write_bytes(b"text,label\n" + line * rows + b"ab\xff,c\n" + line)
        at = 11 + len(line) * rows + 2
        refused(DataError, rf"row {rows + 2}: not UTF-8 \(byte {at}\)", readers(path)[0])


@pytest.mark.parametrize(("rows", "length"), [(3_000_000, 10), (60_000, 100_000)], ids=["rows", "long texts"])
def test_a_parquet_file_that_unpacks_to_gigabytes(tmp_path, rows, length):
    """A text that repeats in every row is stored once."""
    path = tmp_path / "bomb.parquet"
    indices = pyarrow.array([i % 2 for i in range(rows)], pyarrow.int32())
    texts = pyarrow.DictionaryArray.from_arrays(indices, ["a" * length, "b" * length])
    labels = pyarrow.DictionaryArray.from_arrays(indices, ["x", "y"])
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "label": labels}), path, store_schema=False)
    assert path.stat().st_size < 100_000
    for read in readers(path):
        with pytest.raises(DataError, match="bytes unpack to more than"), bounded(1000):
            read()


def test_a_parquet_file_whose_column_has_no_name(tmp_path):
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"], "label": ["x", "y"]}), path, store_schema=False)
    original = path.read_bytes()
    for name, says in ((b"l\x89bel", "not a Parquet file"), (b"l\nbel", "there are text, l bel;")):
        path.write_bytes(original.replace(b"label", name))
        for read in readers(path)[:1]:
            refused(DataError, says, read)


def test_of_many_columns_only_the_first_are_listed(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text(",".join(f"column {i}" for i in range(10_000)) + "\n")
    refused(DataError, r"no column 'text'; there are column 0, .*, column 11, \.\.\.; name the ones", readers(path)[0])


def test_json_lines_nested_deeply(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a", "label": "b"}\n{"text": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    for read in readers(path):
        refused(DataError, "row 2: not JSON", read)


# --- checkpoints of a run -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda state, tensors: state.pop("python"),
        lambda state, tensors: state["train_state"].update(surprise=1),
        lambda state, tensors: state.update(numpy=["MT19937", [1, 2], 0, 0, 0.0]),
        lambda state, tensors: state.update(python=[3, [1], None]),
        lambda state, tensors: tensors.update({"parameter/weight": torch.zeros(1)}),
        lambda state, tensors: tensors.pop("parameter/bias"),
        lambda state, tensors: tensors.update({"random/torch": torch.zeros(3)}),
        lambda state, tensors: state.update(learning_rates=[]),
    ],
)
def test_a_checkpoint_of_another_run_is_one_line(tmp_path, change):
    """Its hashes are correct: it is not damaged but from another run."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _step: 1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    checkpoint.save(tmp_path, checkpoint.TrainState(), model, optimizer, schedule, scaler, {}, keep=1)
    state, tensors, _ = checkpoint.load(tmp_path)
    checkpoint.restore(state, tensors, model, optimizer, schedule, scaler)
    change(state, tensors)
    with pytest.raises(ConfigError, match="does not belong to this run .*--overwrite") as error:
        checkpoint.restore(state, tensors, model, optimizer, schedule, scaler)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", ["state.json", "sha256.json"])
def test_a_checkpoint_nested_deeply_is_damaged(tmp_path, file):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _step: 1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    path = checkpoint.save(tmp_path, checkpoint.TrainState(), model, optimizer, schedule, scaler, {}, keep=1)
    (path / file).write_text("[" * 100_000)
    refused(ConfigError, "every checkpoint is damaged", lambda: checkpoint.load(tmp_path))
