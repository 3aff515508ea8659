"""The arithmetic against peft's count of real models, on shapes alone; and the command that prints it."""

import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers

from lora.budget import SHAPES, adapter_parameters, head_parameters, largest_rank, main, total_parameters

ROOT = Path(__file__).resolve().parents[2]


def test_figures_of_the_reference():
    base, large = SHAPES["roberta-base"], SHAPES["roberta-large"]
    qkv = ("query", "key", "value")
    assert adapter_parameters(base, qkv, 6) == 331_776 and head_parameters(base, 4) == 593_668
    assert adapter_parameters(base, (*qkv, "intermediate.dense"), 4) + head_parameters(base, 4) == 999_172
    assert head_parameters(large, 4) == 1_053_700
    assert adapter_parameters(large, qkv, 8) == 1_179_648


@pytest.mark.parametrize("size", ["roberta-base", "roberta-large"])
@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
@pytest.mark.parametrize("layers", [None, [0, 5]])
@pytest.mark.parametrize("targets", [["query", "value"], ["key", "output.dense"], ["intermediate.dense"]])
def test_arithmetic_equals_pefts_count(size, bias, layers, targets):
    shape = SHAPES[size]
    with torch.device("meta"):
        config = transformers.RobertaConfig(
            vocab_size=shape.vocab,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.hidden // 64,
            max_position_embeddings=shape.positions,
            type_vocab_size=1,
            num_labels=4,
        )
        model = transformers.RobertaForSequenceClassification(config)
        total = sum(p.numel() for p in model.parameters())
        lora = peft.LoraConfig(task_type="SEQ_CLS", r=5, target_modules=targets, bias=bias, layers_to_transform=layers)
        model = peft.get_peft_model(model, lora)
    trained = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "original_module" not in n)
    assert adapter_parameters(shape, targets, 5, layers, bias) + head_parameters(shape, 4, "full", bias) == trained
    assert total_parameters(shape, 4) == total


@pytest.mark.parametrize("size", ["roberta-base", "roberta-large"])
@pytest.mark.parametrize("head", ["full", "out_proj", "none"])
@pytest.mark.parametrize("targets", [["query", "value"], ["query", "key", "value", "output.dense"]])
def test_the_largest_rank_fits_and_the_next_does_not(size, head, targets):
    shape, budget = SHAPES[size], 1_000_000
    rank = largest_rank(shape, targets, 4, budget, head)
    fixed = head_parameters(shape, 4, head)
    assert rank == 0 or adapter_parameters(shape, targets, rank) + fixed <= budget
    assert adapter_parameters(shape, targets, rank + 1) + fixed > budget


def test_no_target_is_no_answer():
    with pytest.raises(ValueError, match="no target"):
        largest_rank(SHAPES["roberta-base"], (), 4, 1_000_000)


def test_command_prints_the_reference_figures(capsys):
    assert main(["roberta-base", "--rank", "6", "--targets", "query", "key", "value", "--labels", "4"]) == 0
    out = capsys.readouterr().out
    assert "925,444" in out and "331,776 in the adapters + 593,668 in the head" in out
    assert main(["--budget", "1000000"]) == 0
    out = capsys.readouterr().out
    assert "roberta-base" in out and "roberta-large" in out and "over" in out
    rows = [line.split() for line in out.splitlines() if line.startswith("query, key, value  ")]
    assert [row[-3:] for row in rows] == [["7", "18", "18"], ["over", "6", "6"]]


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
        (["roberta-base", "--targets", "qeury"], "'qeury' matches no linear layer; there are query, key"),
        (["roberta-base", "--layers", "12"], "no layer 12"),
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


def test_command_needs_no_torch():
    code = "import sys, lora.budget; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
