"""The masked language model against `transformers.RobertaForMaskedLM`."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from roberta.files import CheckpointError
from roberta.masked_lm import load_masked_lm
from tests.parity.oracle import assert_close, assert_same, ragged_batch, reference_model

RAGGED = [17, 9, 1, 4]


@pytest.mark.parametrize(("kind", "largest_part"), [("Roberta", "5GB"), ("XLMRoberta", "20KB"), ("Camembert", "5GB")])
def test_logits_with_ragged_padding(tmp_path, kind, largest_part):
    reference = reference_model(kind=kind, head="MaskedLM")
    reference.save_pretrained(tmp_path, max_shard_size=largest_part)
    before = torch.get_rng_state()
    ours, theirs = load_masked_lm(tmp_path).double(), reference.double()
    assert_same(torch.get_rng_state(), before, "torch's random numbers")
    assert theirs.lm_head.bias.abs().min() > 0, "the reference has no bias"
    batch = ragged_batch(RAGGED)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = theirs(**inputs).logits[real]
        assert_close(ours(**inputs)[real], expected, what="logits")
        assert_close(ours(**inputs, positions=real), expected, what="logits of the tokens of interest alone")


def test_a_checkpoint_without_the_head_or_with_another_is_refused_by_name(tmp_path):
    reference_model(head="MaskedLM").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    table = weights["roberta.embeddings.word_embeddings.weight"]
    for changed, says in (
        ({"lm_head.decoder.weight": table + 1}, "lm_head.decoder.weight is not the table of word embeddings"),
        ({"lm_head.dense.bias": weights["lm_head.dense.bias"].long()}, "no usable lm_head.dense.bias"),
        ({"lm_head.dense.weight": table}, "no usable lm_head.dense.weight"),
        ({"lm_head.layer_norm.bias": None}, "no usable lm_head.layer_norm.bias; it is not a masked language model"),
    ):
        new = {key: tensor for key, tensor in (weights | changed).items() if tensor is not None}
        save_file({key: tensor.clone() for key, tensor in new.items()}, path)
        with pytest.raises(CheckpointError, match=says):
            load_masked_lm(tmp_path)
    reference_model(kind="Bert").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"no usable lm_head\.bias; it is not a masked language model"):
        load_masked_lm(tmp_path)
