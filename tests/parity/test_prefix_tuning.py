"""Prefix tuning against peft's numbers (see prefix_peft.py), its files, and attention written out."""

import copy
import json
import math

import peft
import pytest
import torch
import torch.nn.functional as F

from lora.config import PrefixTuningConfig
from lora.inject import count_parameters, drop_encoders, inject_lora
from lora.peft_format import load_adapter, save_adapter
from roberta.config import RobertaConfig
from roberta.model import SelfAttention
from tests.parity.oracle import assert_close, assert_same, our_copy, ragged_batch, reference_model
from tests.parity.prefix_peft import CASES, LABELS, PATH, logits, our_model, parameters_by_their_names, train

THEIRS = json.loads(PATH.read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", CASES)
def test_logits_gradients_counts_and_twenty_steps(case):
    model, expected = our_model(case), THEIRS[case]
    assert_same(count_parameters(model).trainable, expected["trainable"], "trained parameters")
    found = logits(model)
    assert_close(found, torch.tensor(expected["logits"], dtype=torch.float64), what="logits")
    F.cross_entropy(found, LABELS).backward()
    gradients = expected["gradients"]
    parts = parameters_by_their_names(model)
    assert set(parts) == set(gradients)
    for name, (tensors, dim) in parts.items():
        gradient = torch.cat([tensor.grad for tensor in tensors], dim)
        assert_close(gradient, torch.tensor(gradients[name], dtype=torch.float64), what=f"gradient of {name}")
    model.zero_grad()
    found = train(model)
    assert_close(found, torch.tensor(expected["trained"], dtype=torch.float64), 1e-8, "logits after 20 steps")
    drop_encoders(model)
    assert_close(logits(model), found, what="logits without the projection")


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_files_both_ways(settings, tmp_path):
    """peft can't run RoBERTa with a prefix here, but it reads and writes files, and computes prefixes."""
    reference = reference_model()
    ours = inject_lora(our_copy(reference, tmp_path / "base"), PrefixTuningConfig(num_virtual_tokens=3, **settings))
    batch = ragged_batch([5, 12, 3])
    expected = ours(batch["input_ids"], batch["attention_mask"])
    save_adapter(ours, tmp_path / "ours", task_type="SEQ_CLS")
    torch.set_default_dtype(torch.float64)
    try:
        read = peft.PeftModel.from_pretrained(copy.deepcopy(reference).double(), tmp_path / "ours")
    finally:
        torch.set_default_dtype(torch.float32)
    for layer, past in zip(ours.roberta.encoder.layer, read.get_prompt(batch_size=1).layers, strict=True):
        attention = layer.attention.self
        for adapter, found in ((attention.key, past.keys), (attention.value, past.values)):
            assert_close(attention.split_heads(adapter.rows()[None]), found, what="prefix of a layer")
    read.save_pretrained(tmp_path / "theirs")
    again = our_copy(reference, tmp_path / "again")
    (config,) = load_adapter(again, tmp_path / "theirs")
    assert config.num_virtual_tokens == 3 and config.prefix_projection == bool(settings)
    assert_same(again(batch["input_ids"], batch["attention_mask"]), expected, "logits by way of peft's file")


def test_attention_written_out():
    """One head after the other, in float64: each token attends to the prefix and to the text's real tokens."""
    torch.manual_seed(0)
    config = RobertaConfig(hidden_size=8, num_attention_heads=2, attention_probs_dropout_prob=0.0)
    attention = torch.nn.ModuleDict({"self": SelfAttention(config), "position_embeddings": torch.nn.Embedding(9, 8, 1)})
    inject_lora(attention.double(), PrefixTuningConfig(num_virtual_tokens=3, modules_to_save=()))
    layer, x = attention["self"], torch.randn(2, 5, 8, dtype=torch.float64)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    found = layer(x, mask[:, None, None, :])
    for row, real in enumerate(mask):
        tokens = x[row][real]
        K = torch.cat((layer.key.prefix, F.linear(tokens, layer.key.base.weight, layer.key.base.bias)))
        V = torch.cat((layer.value.prefix, F.linear(tokens, layer.value.base.weight, layer.value.base.bias)))
        Q = layer.query(tokens)
        for head in (slice(0, 4), slice(4, 8)):
            context = torch.softmax(Q[:, head] @ K[:, head].T / math.sqrt(4), dim=-1) @ V[:, head]
            assert_close(found[row, real, head], context, what="context")
    assert_same(
        attention["position_embeddings"](torch.tensor([2, 3, 1])),
        attention["position_embeddings"].base(torch.tensor([5, 6, 1])),
        "positions",
    )
