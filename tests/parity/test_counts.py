"""What is trained, and how many parameters that is: equal to peft for base and large, over a grid of settings."""

import copy
import functools

import peft
import pytest
import torch
import transformers

from lora.adapter import adapters
from lora.config import LoRAConfig
from lora.inject import count_parameters, inject_lora
from roberta.config import RobertaConfig
from roberta.model import RobertaForSequenceClassification
from tests.parity.oracle import assert_same, our_name, peft_config

SIZES = {
    "base": {},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
}
LABELS = ("World", "Sports", "Business", "Sci/Tech")
TARGETS = {
    "q,v": ("query", "value"),
    "q,k,v": ("query", "key", "value"),
    "attention output": ("query", "attention.output.dense"),
    "output.dense": ("query", "output.dense"),
    "intermediate": ("key", "intermediate.dense"),
    "all": ("query", "key", "value", "output.dense", "intermediate.dense"),
    "regex": r".*layer\.(0|11)\..*(query|output\.dense)",
}
REST = {
    "plain": {},
    "lora_only": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
    "two layers": {"layers_to_transform": (1, 10)},
    "two layers, all biases": {"layers_to_transform": (1, 10), "bias": "all"},
    "embeddings' norm": {"modules_to_save": ("classifier", "embeddings.LayerNorm")},
    "every norm, lora_only": {"modules_to_save": ("classifier", "LayerNorm"), "bias": "lora_only"},
    "patterns": {"rank_pattern": {"query|key": 3, r"layer\.(1|11)\..*": 9}},
}
GRID = [
    pytest.param(size, TARGETS[targets], rank, REST[rest], id=f"{size}-{targets}-r{rank}-{rest}")
    for size in SIZES
    for targets in TARGETS
    for rank in (4, 12)
    for rest in REST
    if not (targets == "regex" and "layers_to_transform" in REST[rest])
]


@functools.cache
def plain_models(size: str):
    """Ours and transformers' model of a size, on the meta device: shapes without memory."""
    with torch.device("meta"):
        ours = RobertaForSequenceClassification(RobertaConfig(label_names=LABELS, **SIZES[size]))
        config = transformers.RobertaConfig(
            vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, num_labels=len(LABELS), **SIZES[size]
        )
        theirs = transformers.RobertaForSequenceClassification(config)
    return ours, theirs


@pytest.mark.parametrize(("size", "targets", "rank", "rest"), GRID)
def test_counts_and_names_equal_peft(size, targets, rank, rest):
    config = LoRAConfig(rank=rank, target_modules=targets, **rest)
    ours, theirs = (copy.deepcopy(model) for model in plain_models(size))
    with torch.device("meta"):
        inject_lora(ours, config)
        theirs = peft.get_peft_model(theirs, peft_config(config))
    count = count_parameters(ours)
    trainable, total = theirs.get_nb_trainable_parameters()

    expected = {our_name(name) for name, p in theirs.named_parameters() if p.requires_grad and our_name(name)}
    assert_same({name for name, p in ours.named_parameters() if p.requires_grad}, expected, "names")
    # peft keeps a frozen original beside each module trained in full. With bias="all" it trains that one's biases too,
    # which nothing reads: they are counted there and not here.
    originals = [(name, p) for name, p in theirs.named_parameters() if ".original_module." in name]
    trained_twice = sum(p.numel() for _, p in originals if p.requires_grad)
    assert_same(count.trainable, trainable - trained_twice, "trainable parameters")
    assert_same(count.total, total - sum(p.numel() for _, p in originals), "all parameters")


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_targets_mean_the_modules_that_they_mean_in_peft(targets):
    ours, theirs = (copy.deepcopy(model) for model in plain_models("base"))
    config = LoRAConfig(target_modules=targets)
    with torch.device("meta"):
        inject_lora(ours, config)
        theirs = peft.get_peft_model(theirs, peft_config(config))
    matched = set(theirs.base_model.targeted_module_names)
    assert_same(set(adapters(ours)), matched, "adapted modules")


def test_output_dense_means_both_matrices_of_a_layer():
    ours, _ = (copy.deepcopy(model) for model in plain_models("base"))
    with torch.device("meta"):
        inject_lora(ours, LoRAConfig(target_modules=("output.dense",)))
    assert {name.split(".", 4)[4] for name in adapters(ours)} == {"attention.output.dense", "output.dense"}
    assert len(adapters(ours)) == 24
