"""Merged weights equal peft's, the merged model gives the same answers, unmerging restores the bits."""

import copy
import dataclasses

import pytest
import torch
import transformers

from lora.config import LoRAConfig
from lora.inject import merge_lora, unload_lora, unmerge_lora
from roberta.weights import save_checkpoint
from tests.parity.oracle import adapted_pair, assert_close, assert_same, our_name, ragged_batch

CONFIG = LoRAConfig(
    rank=3, alpha=8, target_modules=("query", "value", "attention.output.dense", "output.dense"), bias="lora_only"
)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
@pytest.mark.parametrize("rslora", [False, True])
def test_merged_weights_equal_pefts(tmp_path, dtype, tolerance, rslora):
    config = LoRAConfig(rank=3, alpha=8, target_modules=("query", "value", "output.dense"), use_rslora=rslora)
    ours, theirs = adapted_pair(tmp_path, config, dtype=dtype)
    batch = ragged_batch([17, 1, 9])
    before = ours(batch["input_ids"], batch["attention_mask"])
    plain = {name: p.detach().clone() for name, p in theirs.named_parameters() if "base_layer.weight" in name}
    merge_lora(ours)
    merged = ours(batch["input_ids"], batch["attention_mask"])
    assert_close(merged, before, 10 * tolerance, "logits of the merged model")
    unload_lora(ours)
    expected = dict(theirs.merge_and_unload().named_parameters())
    mine = dict(ours.named_parameters())
    assert set(mine) == set(expected)
    for name, parameter in mine.items():
        assert_close(parameter, expected[name], tolerance, name)
    changed = [our_name(name).replace(".base.", ".") for name, p in plain.items()]
    for name, before_merge in zip(changed, plain.values(), strict=True):
        assert not torch.allclose(mine[name], before_merge), f"{name}: the update is missing"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_unmerge_restores_the_original_bits(tmp_path, dtype):
    ours, _ = adapted_pair(tmp_path, CONFIG, dtype=dtype)
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    merge_lora(ours)
    assert any(not torch.equal(p, before[name]) for name, p in ours.named_parameters())
    unmerge_lora(ours)
    for name, parameter in ours.named_parameters():
        assert_same(parameter, before[name], name)


def test_merging_twice_and_unmerging_twice_are_errors(tmp_path):
    ours, _ = adapted_pair(tmp_path, CONFIG)
    with pytest.raises(RuntimeError, match="not merged"):
        unmerge_lora(ours)
    merge_lora(ours)
    with pytest.raises(RuntimeError, match="merged already"):
        merge_lora(ours)


def test_exported_model_opens_in_transformers(tmp_path):
    ours, _ = adapted_pair(tmp_path / "base", CONFIG, dtype=torch.float32)
    batch = ragged_batch([17, 1, 9])
    before = ours(batch["input_ids"], batch["attention_mask"])
    merge_lora(ours)
    with pytest.raises(ValueError, match="carries adapters"):
        save_checkpoint(copy.deepcopy(ours), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    ours.config = dataclasses.replace(ours.config, label_names=("World", "Sports", "Business"))
    save_checkpoint(unload_lora(ours), tmp_path / "merged")
    opened, report = transformers.RobertaForSequenceClassification.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert opened.config.id2label == {0: "World", 1: "Sports", 2: "Business"}
    assert opened.config.label2id == {"World": 0, "Sports": 1, "Business": 2}
    logits = opened.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert_close(logits, before, 1e-5, "logits")
