"""A BERT checkpoint in our encoder gives BertModel's hidden states."""

import dataclasses

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from data.assets import fetch_checkpoint
from data.errors import DataError
from roberta.config import RobertaConfig
from roberta.weights import load_checkpoint
from tests.parity.oracle import assert_close, assert_same, ragged_batch


def compare(folder, dtype, tolerance, vocab):
    ours = load_checkpoint(folder).to(dtype).eval()
    theirs = transformers.BertModel.from_pretrained(folder).to(dtype).eval()
    batch = ragged_batch([17, 1, 30, 2], vocab=vocab, pad=0)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = theirs(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        assert_close(ours.roberta(batch["input_ids"], batch["attention_mask"])[real], expected[real], tolerance)


@pytest.fixture
def small_bert(tmp_path):
    config = transformers.BertConfig(
        vocab_size=97,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        max_position_embeddings=30,  # as long as the longest text: the shifted table must hold the last position too
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "kind",
    [transformers.BertConfig, transformers.RobertaConfig, transformers.XLMRobertaConfig, transformers.CamembertConfig],
)
def test_fields_that_a_file_leaves_out_have_the_values_of_transformers(kind):
    ours, theirs = RobertaConfig.from_dict({"model_type": kind.model_type}), kind()
    translated = {"problem_type": "single_label_classification"}  # theirs: None, which the labels decide
    if kind is transformers.BertConfig:
        translated |= {"max_position_embeddings": 512 + 1, "type_vocab_size": 1}
    for field in dataclasses.fields(ours):
        if field.name != "label_names":
            expected = translated.get(field.name, getattr(theirs, field.name))
            assert_same(getattr(ours, field.name), expected, field.name)


def test_a_small_bert_in_float64(small_bert):
    compare(small_bert, torch.float64, 1e-10, 97)


@pytest.mark.parametrize("prefix", ["bert.", ""])
def test_first_bert_names_are_read_too(small_bert, prefix):
    path = small_bert / "model.safetensors"
    renamed = {}
    for key, tensor in load_file(path).items():
        key = key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        renamed[prefix + key] = tensor
    renamed["cls.predictions.bias"] = torch.zeros(97)
    ours_before = load_checkpoint(small_bert)
    save_file(renamed, path)
    ours_after = load_checkpoint(small_bert)
    for (name, one), other in zip(ours_before.roberta.named_parameters(), ours_after.roberta.parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.real_cache
def test_minilm_in_float32():
    try:
        checkpoint = fetch_checkpoint("minilm")
    except DataError as error:
        pytest.skip(f"MiniLM is not cached and can't be fetched: {error}")
    compare(checkpoint.directory, torch.float32, 1e-5, 30522)
