"""Counts on the meta device against peft's, the largest rank that fits, and the command that prints them."""

import dataclasses

import peft
import pytest
import torch
import transformers

from lora.budget import HEADS, count_on_meta, largest_rank, main, smallest_reduction
from lora.config import BottleneckConfig, LoRAConfig, LoRAError
from roberta.config import PUBLISHED
from roberta.model import RobertaForSequenceClassification


def builder(size):
    return lambda: RobertaForSequenceClassification(dataclasses.replace(PUBLISHED[size], label_names=tuple("abcd")))


def test_figures_of_the_reference():
    base, large, qkv = builder("roberta-base"), builder("roberta-large"), ("query", "key", "value")
    assert count_on_meta(base, LoRAConfig(rank=6, target_modules=qkv)).trainable == 331_776 + 593_668
    assert count_on_meta(base, LoRAConfig(rank=4, target_modules=(*qkv, "intermediate.dense"))).trainable == 999_172
    assert count_on_meta(large, LoRAConfig(rank=8, target_modules=qkv)).trainable == 1_179_648 + 1_053_700


@pytest.mark.parametrize("size", ["roberta-base", "roberta-large"])
def test_named_sizes_are_those_of_the_published_models(size):
    ours = PUBLISHED[size]
    names = [field.name for field in dataclasses.fields(ours) if field.type == "int"]
    config = transformers.RobertaConfig(**{name: getattr(ours, name) for name in names}, num_labels=4)
    with torch.device("meta"):
        theirs = transformers.RobertaForSequenceClassification(config)
        lora = peft.LoraConfig(task_type="SEQ_CLS", r=5, target_modules=["query", "value"])
        total = sum(p.numel() for p in theirs.parameters())
        trained, _ = peft.get_peft_model(theirs, lora).get_nb_trainable_parameters()
    count = count_on_meta(builder(size), LoRAConfig(rank=5, target_modules=("query", "value")))
    assert count.trainable == trained and count.total == total + count.parts["LoRA on attention.self.query"][1] * 2
    assert total == {"roberta-base": 124_648_708, "roberta-large": 355_363_844}[size]


@pytest.mark.parametrize("size", ["roberta-base", "roberta-large"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("targets", [("query", "value"), ("query", "key", "value", "output.dense")])
def test_the_largest_rank_fits_and_the_next_does_not(size, head, targets):
    config, budget = LoRAConfig(target_modules=targets, modules_to_save=HEADS[head]), 1_000_000
    rank = largest_rank(builder(size), config, budget)
    trained = [
        count_on_meta(builder(size), dataclasses.replace(config, rank=r)).trainable for r in (rank or 1, rank + 1)
    ]
    assert (rank == 0 or trained[0] <= budget) and trained[1] > budget


@pytest.mark.parametrize("form", ["pfeiffer", "houlsby"])
def test_the_smallest_reduction_factor_fits_and_a_smaller_one_does_not(form):
    sizes = {"hidden_size": 50, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 4}
    small = dataclasses.replace(PUBLISHED["roberta-base"], **sizes, vocab_size=9, max_position_embeddings=9)

    def count(factor):
        return count_on_meta(build, dataclasses.replace(config, reduction_factor=factor)).trainable

    build, config = lambda: RobertaForSequenceClassification(small), BottleneckConfig(form=form)
    for budget in (count(50), count(7), count(7) - 1, count(2) + 30, count(1) - 1):
        factor = smallest_reduction(build, config, budget)
        assert count(factor) <= budget < count(factor - 1)
    assert smallest_reduction(build, config, count(1)) == 1
    assert smallest_reduction(build, config, count(50) - 1) == 0


def test_bottlenecks_of_the_reference():
    def count(**settings):
        return count_on_meta(builder("roberta-base"), BottleneckConfig(**settings)).trainable - 593_668  # the head

    assert count(reduction_factor=48) == 12 * (2 * 768 * 16 + 16 + 768) == 304_320
    assert count(form="houlsby", reduction_factor=70) == 24 * (2 * 768 * 10 + 10 + 768)
    assert count(leave_out=(0, 5)) * 12 == count() * 10


def test_a_rank_that_only_patterns_decide_has_no_largest():
    config = LoRAConfig(rank_pattern={"query|key|value": 3})
    assert largest_rank(builder("roberta-base"), config, 10_000_000) == 0


def test_no_target_is_no_answer():
    with pytest.raises(LoRAError, match="target_modules is empty"):
        LoRAConfig(target_modules=())


def test_command_prints_the_reference_figures(capsys):
    assert main(["roberta-base", "--rank", "6", "--targets", "query", "key", "value", "--labels", "4"]) == 0
    out = capsys.readouterr().out
    assert "925,444" in out and "331,776 in the adapters + 593,668 in the head" in out
    assert main(["--budget", "1000000"]) == 0
    out = capsys.readouterr().out
    assert "roberta-base" in out and "roberta-large" in out and "over" in out
    rows = [line.split() for line in out.splitlines() if line.startswith("query, key, value  ")]
    assert [row[-3:] for row in rows] == [["7", "18", "18"], ["over", "6", "6"]]
    rows = [line.split() for line in out.splitlines() if line.startswith("bottleneck, pfeiffer")]
    assert [row[-3:] for row in rows] == [["35", "15", "15"], ["over", "52", "52"]]


def test_command_counts_all_linear_layers_without_some(capsys):
    main(["roberta-base", "--targets", "all-linear", "--exclude", "key", "attention.output.dense", "--head", "none"])
    assert f"{12 * 8 * (2 * 2 * 768 + 2 * (768 + 3072)):,} trainable" in capsys.readouterr().out


def test_budget_keeps_to_the_targets_and_the_head_that_were_asked_for(capsys):
    assert main(["roberta-base", "--budget", "1000000", "--targets", "key", "--head", "full"]) == 0
    _, _, heads, row = capsys.readouterr().out.rstrip().splitlines()
    assert heads.split() == ["roberta-base", "head:", "full"]
    # (1,000,000 - 593,668) // (12 * 2 * 768)
    assert row.split() == ["key", "22"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["roberta-base", "--rank", "0"], "rank is 0"),
        (
            ["roberta-base", "--targets", "qeury"],
            "'qeury' matches no linear layer; there are attention.self.query, attention.self.key",
        ),
        (["roberta-base", "--layers", "12"], "no layer 12; the model has layers 0 to 11"),
        (["roberta-base", "--labels", "0"], "--labels is 0"),
        (["--budget", "-5"], "--budget is -5"),
        (["roberta-base", "--budget", "1000000", "--rank", "4"], "not allowed with argument"),
        (["gpt2"], "gpt2"),
        ([], "name a model"),
    ],
)
def test_bad_arguments_are_one_line(arguments, says, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and says in err and err.count("\n") == 1
