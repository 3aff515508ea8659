"""Checkpoints: which keys are read, which are ignored, and errors for files that don't fit."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from roberta.config import RobertaConfig
from roberta.files import CheckpointError
from roberta.model import RobertaForSequenceClassification
from roberta.tokenizer import TextTokenizer
from roberta.weights import head_of, load_checkpoint, save_checkpoint

SMALL = RobertaConfig(
    vocab_size=20,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=12,
    max_position_embeddings=12,
    label_names=("a", "b", "c"),
)


@pytest.fixture
def folder(tmp_path):
    """A fine-tuned checkpoint, head included, and the model it was written from."""
    torch.manual_seed(0)
    save_checkpoint(RobertaForSequenceClassification(SMALL), tmp_path)
    return tmp_path


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors")


def edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_what_is_saved_is_loaded(folder):
    model = load_checkpoint(folder)
    assert model.config == SMALL
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(model.get_parameter(name), tensor), name
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_prefix_is_optional_and_pretraining_parts_are_ignored(folder):
    before = load_checkpoint(folder)

    def encoder_alone(weights):
        encoder = {
            name.removeprefix("roberta."): t for name, t in weights.items() if not name.startswith("classifier.")
        }
        extra = ("lm_head.dense.weight", "lm_head.bias", "pooler.dense.weight", "embeddings.position_ids")
        return encoder | {name: torch.zeros(3) for name in extra}

    edit_weights(folder, encoder_alone)
    assert head_of(folder) == "lm_head, pooler"
    after = load_checkpoint(folder)
    for (name, one), other in zip(before.roberta.named_parameters(), after.roberta.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_a_missing_head_is_drawn_from_the_published_distribution(folder):
    edit_weights(folder, lambda weights: {n: t for n, t in weights.items() if not n.startswith("classifier.")})
    config = dataclasses.replace(SMALL, initializer_range=0.5, label_names=tuple("abcdefgh") * 50)
    torch.manual_seed(1)
    head = load_checkpoint(folder, config).classifier
    assert head.out_proj.weight.std().item() == pytest.approx(0.5, rel=0.1)
    assert head.out_proj.bias.abs().max() == 0 and head.dense.bias.abs().max() == 0
    torch.manual_seed(1)
    assert torch.equal(head.out_proj.weight, load_checkpoint(folder, config).classifier.out_proj.weight)


def test_a_present_head_is_read_unless_a_new_one_is_asked_for(folder):
    saved = load_file(folder / "model.safetensors")["classifier.dense.weight"]
    assert head_of(folder) == "ours"
    assert torch.equal(load_checkpoint(folder).classifier.dense.weight, saved)
    assert not torch.equal(load_checkpoint(folder, new_head=True).classifier.dense.weight, saved)


def test_labels_may_be_given_by_their_number(folder):
    path = folder / "config.json"
    raw = {name: value for name, value in json.loads(path.read_text()).items() if name not in ("id2label", "label2id")}
    path.write_text(json.dumps(raw | {"num_labels": 3}))
    assert load_checkpoint(folder).config.label_names == ("LABEL_0", "LABEL_1", "LABEL_2")


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"label2id": {"b": 1, "a": 0, "c": 2}}, "abc"),
        ({"label2id": {"b": 1, "a": 0, "c": 2}, "num_labels": 3}, "abc"),
        ({"label2id": {"c": 0, "a": 1, "b": 2}, "id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}}, "cab"),
        ({"label2id": {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}, "id2label": {"0": "c", "1": "a", "2": "b"}}, "cab"),
        ({"label2id": {"b": 1, "a": 0, "c": 1}, "id2label": {"0": "c", "1": "a", "2": "b"}}, "cab"),
        ({"label2id": {"a": 0, "b": 1, "c": 2}, "id2label": {"0": "c", "1": "a", "2": "b"}}, None),
    ],
)
def test_labels_may_be_named_in_label2id_alone(fields, names):
    raw = {name: value for name, value in SMALL.to_dict().items() if name not in ("id2label", "label2id")}
    if names:
        assert RobertaConfig.from_dict(raw | fields).label_names == tuple(names)
    else:
        with pytest.raises(CheckpointError, match="id2label and label2id number the same labels differently"):
            RobertaConfig.from_dict(raw | fields)


@pytest.mark.parametrize("prefix", ["base_model.model.", "module._orig_mod.", "_orig_mod.base_model.model."])
def test_names_of_wrappers_are_removed(folder, prefix):
    before = load_checkpoint(folder)
    edit_weights(folder, lambda weights: {prefix + name: tensor for name, tensor in weights.items()})
    assert head_of(folder) == "ours"
    for name, parameter in load_checkpoint(folder).named_parameters():
        assert torch.equal(parameter, before.get_parameter(name)), name


def test_two_keys_of_one_parameter_are_refused(folder):
    key = "roberta.embeddings.LayerNorm.weight"
    edit_weights(folder, lambda weights: weights | {f"module.{key}": weights[key] + 1})
    with pytest.raises(CheckpointError, match=rf"another key for the parameter of (module\.)?{key}; it mixes"):
        load_checkpoint(folder)


@pytest.mark.parametrize("part", ["base_layer", "original_module", "modules_to_save.default", "lora_A.default"])
def test_a_peft_model_that_is_not_merged_is_named(folder, part):
    edit_weights(folder, lambda w: {name.replace("out_proj", f"out_proj.{part}"): tensor for name, tensor in w.items()})
    with pytest.raises(CheckpointError, match=r"holds classifier\.out_proj.* not merged; call merge_and_unload"):
        load_checkpoint(folder)


@pytest.mark.parametrize("single_output", [False, True])
def test_a_head_for_regression_is_refused_unless_it_is_not_used(folder, single_output):
    if single_output:
        save_checkpoint(RobertaForSequenceClassification(dataclasses.replace(SMALL, label_names=("a",))), folder)
    else:
        edit_config(folder, problem_type="regression")
    for given in (None, SMALL):  # with other labels, as a program gives them
        says = "the head has a single output" if single_output else "problem_type is 'regression'"
        with pytest.raises(CheckpointError, match=rf"config\.json: {says}: .*draw a new head \(model\.new_head\)"):
            load_checkpoint(folder, given)
        load_checkpoint(folder, given, new_head=True)
    if single_output:  # one label that a text has or not
        edit_config(folder, problem_type="multi_label_classification")
        load_checkpoint(folder)


@pytest.fixture
def in_parts(folder):
    """The checkpoint as transformers writes a large one: two parts and an index."""
    path = folder / "model.safetensors"
    weights, parts = load_file(path), ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    path.unlink()
    weight_map = {name: parts[name.startswith("classifier.")] for name in weights}
    for part in parts:
        save_file({name: tensor for name, tensor in weights.items() if weight_map[name] == part}, folder / part)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weights


def test_weights_in_parts(folder, in_parts):
    assert head_of(folder) == "ours"
    for name, parameter in load_checkpoint(folder).named_parameters():
        assert torch.equal(parameter, in_parts[name]), name


def test_parts_that_do_not_fit_their_index(folder, in_parts):
    index, last = folder / "model.safetensors.index.json", folder / "model-00002-of-00002.safetensors"
    content, placed = index.read_text(), json.loads(index.read_text())["weight_map"]
    for weight_map in ({}, [], None, placed | {"a": 1}, placed | {"a": "../b.safetensors"}, placed | {"a": "b.bin"}):
        index.write_text(json.dumps({"weight_map": weight_map}))
        refused(folder, r"index\.json: its weight_map must name \.safetensors files")
    index.write_text(json.dumps({"weight_map": placed | {"classifier.dense.bias": "model-00001-of-00002.safetensors"}}))
    refused(folder, r"00002-of-00002\.safetensors: holds 'classifier\.dense\.bias', which .* does not place there")
    index.write_text(content)
    last.write_bytes(last.read_bytes()[:-4])
    refused(folder, r"00002-of-00002\.safetensors: not a complete safetensors file")
    save_file({"classifier.dense.bias": torch.zeros(8)}, last)
    refused(folder, r"index\.json: lacks classifier\.dense\.weight, .*; the rest can be used with a new head")
    last.unlink()
    refused(folder, r"00002-of-00002\.safetensors: no such file")


def test_half_precision_files_become_float32(folder):
    edit_weights(folder, lambda weights: {name: tensor.half() for name, tensor in weights.items()})
    assert {p.dtype for p in load_checkpoint(folder).parameters()} == {torch.float32}


def refused(folder, says):
    with pytest.raises(CheckpointError, match=says) as error:
        load_checkpoint(folder)
    assert "\n" not in str(error.value)


def test_missing_unexpected_and_misshapen_keys_are_listed(folder):
    key = "roberta.encoder.layer.1.output.dense.bias"
    weights = load_file(folder / "model.safetensors")
    save_file({name: t for name, t in weights.items() if name != key}, folder / "model.safetensors")
    refused(folder, rf"model\.safetensors: lacks {key}")
    save_file(weights | {"roberta.encoder.layer.2.output.dense.bias": torch.zeros(8)}, folder / "model.safetensors")
    refused(folder, r"holds unexpected roberta\.encoder\.layer\.2\.output\.dense\.bias")
    save_file(weights | {key: torch.zeros(9)}, folder / "model.safetensors")
    refused(folder, rf"has the wrong shape in {key} \(\[9\], not \[8\]\)")
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    refused(folder, r"lacks .* and 3\d more")


@pytest.mark.parametrize("content", [b"", b"short", b"not safetensors at all", b"\xff" * 100])
def test_a_file_that_is_not_safetensors(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, r"model\.safetensors: not a complete safetensors file")


def test_a_truncated_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    refused(folder, r"model\.safetensors: not a complete safetensors file")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_missing_file(folder, name):
    (folder / name).unlink()
    refused(folder, rf"{name}: no such file")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"model_type": None}, "model_type is None"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": "8"}, "hidden_size is '8'"),
        ({"num_attention_heads": 3}, "3 equal attention heads"),
        ({"max_position_embeddings": 2}, "leaves no room"),
        ({"pad_token_id": 5000}, "pad_token_id 5000 is not in the vocabulary"),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label"),
        ({"id2label": ["a", "b", "c"]}, "id2label"),
        ({"id2label": None, "num_labels": 10**9}, "num_labels is 1000000000"),
    ],
)
def test_a_configuration_that_can_not_be_used(folder, fields, says):
    edit_config(folder, **fields)
    refused(folder, rf"config\.json: .*{says}")


@pytest.mark.parametrize("content", ["{broken", "[1, 2]", "\xff\xfe{"])
def test_a_broken_configuration(folder, content):
    (folder / "config.json").write_text(content, encoding="latin-1")
    refused(folder, r"config\.json: ")


def test_fields_at_their_default_may_be_absent(folder):
    path = folder / "config.json"
    raw = {"model_type": "roberta", "hidden_size": 16, "num_attention_heads": 2}
    path.write_text(json.dumps(raw))
    config = RobertaConfig.from_file(path)
    assert (config.vocab_size, config.pad_token_id, config.max_length) == (50265, 1, 510)


def test_published_sizes():
    assert RobertaConfig().max_length == 512
    bert = RobertaConfig.from_dict({"model_type": "bert"})
    assert bert.max_length == 512 and bert.max_position_embeddings == 513 and bert.type_vocab_size == 1


def test_an_interrupted_save_leaves_the_old_file(folder, monkeypatch):
    before = (folder / "model.safetensors").read_bytes()

    def full(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("roberta.weights.save_file", full)
    with pytest.raises(OSError):
        save_checkpoint(RobertaForSequenceClassification(SMALL), folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert not list(folder.glob("*.part"))


WORDS = {"tokenizer.json": '{"model": {"type": "WordPiece", "vocab": {}}}'}


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "holds no tokenizer"),
        ({"vocab.json": "{}"}, "holds no tokenizer"),
        ({"tokenizer.json": "{}"}, "tokenizer.json: not a tokenizer"),
        ({"vocab.json": "{broken", "merges.txt": "#version"}, "vocab.json: not a tokenizer"),
        ({"vocab.txt": "a", "config.json": '{"model_type": "roberta"}'}, "holds no tokenizer"),
        ({"sentencepiece.bpe.model": ""}, r"from_pretrained\('.*'\).save_pretrained\('.*'\)"),
        (WORDS | {"config.json": '{"model_type": "roberta"}'}, "holds 'WordPiece', and RobertaTokenizer is BPE; name"),
        (WORDS | {"tokenizer_config.json": '{"tokenizer_class": "GPT2Tokenizer"}'}, "'GPT2Tokenizer' is not supported"),
        (WORDS | {"tokenizer_config.json": "[]"}, "tokenizer_config.json: does not hold a JSON object"),
        *(
            (WORDS | {"tokenizer_config.json": json.dumps(fields)}, f"tokenizer_config.json: {says}")
            for fields, says in (
                ({"split_special_tokens": True}, "split_special_tokens is True, only False is supported"),
                ({"padding_side": "left"}, "padding_side is 'left', only 'right' is supported"),
                ({"auto_map": {"AutoTokenizer": ["a.B", None]}}, "auto_map is .* is supported"),
                ({"fast_tokenizer_files": ["tokenizer.4.json"]}, "fast_tokenizer_files is .* is supported"),
                ({"vocab": {"a": 0}}, "vocab is .* is supported"),
                ({"do_lower_case": "yes"}, "do_lower_case is 'yes', a value of the wrong type"),
                ({"truncation_side": "top"}, "truncation_side is 'top', it must be 'right' or 'left'"),
                ({"mask_token": 5}, "mask_token is 5, it must be a text"),
                ({"mask_token": {"content": "m", "lstrip": 5}}, "mask_token is .*, it must be a text"),
                ({"added_tokens_decoder": {"x": "a"}}, "an added token or its id is damaged"),
            )
        ),
    ],
)
def test_a_folder_without_a_usable_tokenizer(tmp_path, files, says):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=says) as error:
        TextTokenizer.from_directory(tmp_path, 16)
    assert "\n" not in str(error.value)


LOAD_WITHIN = """
import re, resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from roberta.weights import load_checkpoint

def allowed(mebibytes):  # memory of this process's own
    held = int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (held + mebibytes * 2**20, resource.RLIM_INFINITY))

load_checkpoint(sys.argv[2])  # late imports happen now
weights = Path(sys.argv[1], "model.safetensors").stat().st_size / 2**20
allowed(int(2.4 * weights))  # the model, the mapped file, and less than half a copy to spare
model = load_checkpoint(sys.argv[1])
try:
    torch.empty(int(1.6 * weights * 2**18))  # shows that the limit is in force; the file is no longer mapped
except RuntimeError:
    print("one copy")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on a process's own memory is Linux's")
def test_loading_takes_the_memory_of_one_copy(tmp_path, tiny_checkpoint):
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 512, "num_hidden_layers": 2}
    config = RobertaConfig(vocab_size=100_000, pad_token_id=1, max_position_embeddings=66, **sizes)
    save_checkpoint(RobertaForSequenceClassification(config), tmp_path)
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", LOAD_WITHIN, tmp_path, tiny_checkpoint],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "one copy\n", done.stderr[-400:]


def test_saved_weights_have_the_permissions_of_the_settings(folder):
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert len(modes) == 1
