"""Logits and gradients are finite for every batch, and texts that are too long are truncated and counted."""

import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluate import Arguments, evaluate
from lora.config import LoRAConfig
from lora.inject import inject_lora
from roberta.config import RobertaConfig
from roberta.model import RobertaForSequenceClassification
from train import train
from training.command_line import parse_options
from training.config import parse_command_line

LONGEST = 12
SIZES = {
    "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20,
    "max_position_embeddings": LONGEST + 2, "pad_token_id": 1, "label_names": ("a", "b", "c"),
}  # fmt: skip
SPECIAL = ("all the same token", "one embedding for all", "nothing special")


def model_of(dropout: float, epsilon: float, special: str) -> RobertaForSequenceClassification:
    """A tiny adapted model; `epsilon` is LayerNorm's, 1e-12 in BERT's checkpoints."""
    torch.manual_seed(0)
    probabilities = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), dropout)
    model = RobertaForSequenceClassification(RobertaConfig(**SIZES, **probabilities, layer_norm_eps=epsilon))
    inject_lora(model, LoRAConfig(rank=2, dropout=dropout, bias="all"))
    model.requires_grad_(True)  # also what is frozen in a run: every gradient must be finite
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                torch.nn.init.normal_(parameter)
            if special == "one embedding for all" and "_embeddings." in name:
                parameter.fill_(0.5)  # a vector without variance, which LayerNorm divides by
    return model


@st.composite
def batches(draw):
    """Ids and a mask with at least one real token per text at any position, also after padding or with gaps."""
    rows = draw(st.integers(1, 4))
    length = draw(st.one_of(st.sampled_from([1, LONGEST]), st.integers(1, LONGEST)))
    mask = torch.tensor(
        [draw(st.lists(st.booleans(), min_size=length, max_size=length).filter(any)) for _ in range(rows)]
    )
    ids = torch.tensor([draw(st.lists(st.integers(0, 19), min_size=length, max_size=length)) for _ in range(rows)])
    return ids, mask


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@settings(max_examples=60)
@given(
    batch=batches(), special=st.sampled_from(SPECIAL), epsilon=st.sampled_from([1e-5, 1e-12]), training=st.booleans()
)
def test_logits_and_gradients_are_finite(dropout, precision, batch, special, epsilon, training):
    ids, mask = batch
    if special == "all the same token":
        ids = torch.full_like(ids, 7)
    model = model_of(dropout, epsilon, special).train(training)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        logits = model(ids, mask)
        loss = F.cross_entropy(logits, torch.arange(len(ids)) % 3)
    loss.backward()
    assert logits.shape == (len(ids), 3) and logits.isfinite().all() and loss.isfinite()
    for name, parameter in model.named_parameters():
        # Every parameter has a gradient, though only <s> is classified.
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_logits_of_a_text_do_not_depend_on_the_batch():
    """Alone, with other texts, padded to the maximum: the same logits."""
    model = model_of(0.0, 1e-5, "nothing special").double().eval()
    torch.manual_seed(1)
    ids, lengths = torch.randint(4, 20, (4, LONGEST)), (1, 5, LONGEST, 1)
    mask = torch.arange(LONGEST) < torch.tensor(lengths)[:, None]
    together = model(ids, mask)
    for row, length in enumerate(lengths):
        alone = model(ids[row : row + 1, :length], mask[row : row + 1, :length])
        torch.testing.assert_close(alone[0], together[row], rtol=1e-12, atol=1e-12)


def test_a_text_longer_than_the_position_table_is_truncated_and_counted(tiny_config, tiny_data, capsys):
    rows = (tiny_data / "train.csv").read_text().splitlines()
    rows[1] += " report" * 500
    rows[2] += " report" * 40
    rows[3] += " quux quux"
    (tiny_data / "train.csv").write_text("\n".join(rows) + "\n")
    run = tiny_data / "run"
    # The table of the tiny checkpoint ends at 32 tokens.
    options = ["--train.epochs", "1", "--data.max-length", "32", "--data.padding", "max_length"]
    assert train(parse_command_line([str(tiny_config), *options])) == 0
    out = capsys.readouterr().out
    assert "2 texts are longer than 32 tokens and are truncated" in out
    assert re.search(r" 2 of [\d,]+ tokens are unknown to the tokenizer", out)
    words = [str(run), "--text", "new goal" + " report" * 500, "oil price"]
    assert evaluate(parse_options(Arguments, words, prog="evaluate.py")) == 0
    assert "1 texts are longer than 32 tokens and are truncated" in capsys.readouterr().out
    settings_of_run = run / "config.toml"  # as if another base with more positions had been trained
    settings_of_run.write_text(settings_of_run.read_text().replace("max_length = 32", "max_length = 400"))
    assert evaluate(parse_options(Arguments, words, prog="evaluate.py")) == 0
    assert "1 texts are longer than 32 tokens" in capsys.readouterr().out
