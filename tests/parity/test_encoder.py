"""Hidden states, logits, loss and gradients of the encoder and its adapters equal those of transformers + peft."""

import re
import tempfile

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from cpu.dropout import dropout_mask, rounded, use_fast_dropout
from data.assets import fetch_checkpoint
from data.errors import DataError
from lora.config import LoRAConfig
from roberta import model as model_module
from roberta.files import weight_files
from roberta.tokenizer import TextTokenizer
from roberta.weights import head_of, load_checkpoint, save_checkpoint
from tests.conftest import tiny_tokenizer
from tests.parity.oracle import (
    BASE_WIDTH,
    adapted_pair,
    assert_close,
    assert_no_worse,
    assert_same,
    deviation,
    our_copy,
    our_name,
    ragged_batch,
    reference_model,
)

RAGGED = [17, 1, 9, 30, 2]
ALL_TARGETS = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
CONFIGS = {
    "final model": LoRAConfig(rank=6, alpha=14),
    "query and value": LoRAConfig(rank=4, alpha=32, target_modules=("query", "value")),
    "every matrix": LoRAConfig(rank=3, alpha=8, target_modules=ALL_TARGETS),
    "feed-forward only": LoRAConfig(rank=2, alpha=8, target_modules=("intermediate.dense",)),
    "upper layer, rsLoRA": LoRAConfig(rank=5, alpha=8, layers_to_transform=(1,), use_rslora=True),
    "patterns": LoRAConfig(rank=4, rank_pattern={"query": 2, "layer.1.*value": 7}, alpha_pattern={"key": 3.0}),
    "biases of adapted layers": LoRAConfig(rank=2, bias="lora_only", target_modules=("query", "output.dense")),
    "all biases": LoRAConfig(rank=2, bias="all"),
    "embeddings' norm too": LoRAConfig(rank=2, modules_to_save=("classifier", "embeddings.LayerNorm")),
}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("sizes", [{}, BASE_WIDTH], ids=["small", "base width"])
def test_hidden_states_and_logits_with_ragged_padding(tmp_path, attention, sizes):
    reference = reference_model(attention=attention, **sizes)
    ours, theirs = our_copy(reference, tmp_path), reference.double()
    batch = ragged_batch(RAGGED)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = theirs.roberta(**inputs).last_hidden_state
        real = batch["attention_mask"].bool()
        assert_close(ours.roberta(**inputs)[real], expected[real], what="hidden states")
        assert_close(ours(**inputs), theirs(**inputs).logits, what="logits")


@settings(max_examples=25, deadline=None)
@given(
    heads=st.integers(1, 4),
    head=st.integers(1, 9),
    intermediate=st.integers(1, 50),
    layers=st.integers(1, 3),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    pad=st.integers(0, 4),
    labels=st.integers(2, 5),
    seed=st.integers(0, 1000),
)
def test_logits_for_any_shape(heads, head, intermediate, layers, lengths, pad, labels, seed):
    sizes = {
        "hidden_size": heads * head,
        "num_attention_heads": heads,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "pad_token_id": pad,
        "num_labels": labels,
        "max_position_embeddings": 20 + pad + 1,
    }
    reference = reference_model(seed, **sizes)
    with tempfile.TemporaryDirectory() as folder:
        ours = our_copy(reference, folder)
    batch = ragged_batch(lengths, seed=seed, pad=pad)
    # transformers counts positions over ids that are not the padding id; a real token may not be one here.
    ids = batch["input_ids"].where(~((batch["input_ids"] == pad) & batch["attention_mask"].bool()), torch.tensor(50))
    inputs = {"input_ids": ids, "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        assert_close(ours(**inputs), reference.double()(**inputs).logits, what=str(sizes))


@pytest.mark.parametrize(("kind", "largest_part"), [("XLMRoberta", "5GB"), ("Camembert", "20KB")])
def test_relatives_and_weights_in_parts(tmp_path, kind, largest_part):
    """RoBERTa with another tokenizer: read, and exported as a RoBERTa."""
    theirs = reference_model(kind=kind)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=largest_part)
    assert (len(weight_files(tmp_path / "theirs")) > 1) == (largest_part == "20KB")
    ours, theirs = load_checkpoint(tmp_path / "theirs").double().eval(), theirs.double()
    save_checkpoint(ours, tmp_path / "exported")
    exported = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "exported").double().eval()
    batch = ragged_batch(RAGGED)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = theirs(**inputs).logits
        assert_close(ours(**inputs), expected, what="logits")
        assert_close(exported(**inputs).logits, expected, what="logits of the export")


@pytest.mark.parametrize(
    ("kind", "head", "found"),
    [
        ("Roberta", "QuestionAnswering", "qa_outputs"),
        ("Roberta", "TokenClassification", "classifier"),
        ("XLMRoberta", "MultipleChoice", "classifier, pooler"),
        ("Camembert", "MaskedLM", "lm_head"),
        ("Bert", "SequenceClassification", "classifier, pooler"),
        ("Bert", "TokenClassification", "classifier"),
        ("Bert", "QuestionAnswering", "qa_outputs"),
        ("Bert", "PreTraining", "cls, pooler"),
    ],
)
def test_the_encoder_of_a_checkpoint_with_another_head(tmp_path, kind, head, found):
    # Two token types: trained on pairs of texts. A single text has the first.
    reference = reference_model(kind=kind, head=head, type_vocab_size=2)
    ours, theirs = our_copy(reference, tmp_path), reference.base_model.double()
    assert head_of(tmp_path) == found
    assert ours.classifier.out_proj.bias.abs().max() == 0, "the head is not a new one"
    batch = ragged_batch(RAGGED)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        assert_close(ours.roberta(**inputs)[real], theirs(**inputs).last_hidden_state[real], what="hidden states")


def test_pickled_weights_are_refused_with_the_line_that_converts_them(tmp_path, monkeypatch):
    reference, folder = reference_model(), tmp_path / "pickled"
    ours = our_copy(reference, folder)
    TextTokenizer(tiny_tokenizer(), 30).save(folder)
    (folder / "model.safetensors").unlink()
    torch.save(reference.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(DataError, match="lacks model.safetensors; weights in pytorch_model.bin are not read") as error:
        fetch_checkpoint(str(folder))
    monkeypatch.chdir(tmp_path)
    exec(re.search(r'python -c "(.*?)"', str(error.value))[1], {})
    converted = load_checkpoint(fetch_checkpoint("converted").directory)
    for (name, one), other in zip(converted.roberta.named_parameters(), ours.roberta.parameters(), strict=True):
        assert_same(one.double(), other, name)


@pytest.fixture(params=["torch's masks", "masks of cpu/"])
def prepare(request, monkeypatch):
    """What is done to our model before it trains; one seed then draws the same masks on both sides."""
    if request.param == "torch's masks":
        return lambda model: model

    def as_ours(x, p=0.5, training=True, inplace=False):
        return x * dropout_mask(x.shape, p) / (1 - rounded(p)) if training and p else x

    monkeypatch.setattr(torch.nn.functional, "dropout", as_ours)
    return lambda model: use_fast_dropout(model) or model


def hidden_states_and_gradients(roberta, inputs, parameters, seed):
    """Of all tokens: the last layer on <s> alone would draw fewer masks."""
    torch.manual_seed(seed)
    hidden_states = roberta(**inputs)
    hidden_states = getattr(hidden_states, "last_hidden_state", hidden_states)[inputs["attention_mask"].bool()]
    gradients = torch.autograd.grad(hidden_states.square().sum(), [p for _, p in parameters])
    return hidden_states, {name: gradient for (name, _), gradient in zip(parameters, gradients, strict=True)}


@pytest.mark.parametrize("attention", ["formula", "kernel"])
def test_dropout_draws_the_same_masks_in_the_same_places(tmp_path, attention, prepare, monkeypatch):
    # Three different probabilities, so that none can stand for another. Both ways in which attention is computed: the
    # kernel with dropout is what a GPU runs; on a CPU it draws torch's masks itself.
    if attention == "kernel":
        monkeypatch.setattr(model_module, "kernel_has_dropout", lambda _: True)
    reference = reference_model(
        attention="sdpa" if attention == "kernel" else "eager",
        hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.4, classifier_dropout=0.6,
    )  # fmt: skip
    ours, theirs = prepare(our_copy(reference, tmp_path)).train(), reference.double().train()
    batch = ragged_batch(RAGGED)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    named = list(ours.roberta.named_parameters())
    wanted = dict(theirs.roberta.named_parameters())
    hidden_states, gradients = hidden_states_and_gradients(ours.roberta, inputs, named, seed=3)
    expected, their_gradients = hidden_states_and_gradients(
        theirs.roberta, inputs, [(name, wanted[name]) for name, _ in named], seed=3
    )
    assert_close(hidden_states, expected, what="hidden states")
    for name, gradient in gradients.items():
        if not name.endswith("key.bias"):  # cancels in the softmax: its gradient is rounding alone
            assert_close(gradient, their_gradients[name], what=name)
    states = torch.randn(4, 7, 24, dtype=torch.float64)
    torch.manual_seed(4)
    logits = ours.classifier(states[:, 0])
    torch.manual_seed(4)
    assert_close(logits, theirs.classifier(states), what="logits")

    ours.eval(), theirs.eval()
    assert_close(ours(**inputs), theirs(**inputs).logits, what="logits without dropout")


def test_dropout_of_adapters_draws_the_same_masks_in_the_same_places(tmp_path, prepare):
    ours, theirs = adapted_pair(tmp_path, LoRAConfig(rank=3, dropout=0.4, target_modules=ALL_TARGETS))
    prepare(ours).train(), theirs.train()
    batch = ragged_batch(RAGGED)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    named = [(name, p) for name, p in ours.roberta.named_parameters() if p.requires_grad]
    wanted = {our_name(name): p for name, p in theirs.named_parameters()}
    hidden_states, gradients = hidden_states_and_gradients(ours.roberta, inputs, named, seed=5)
    expected, their_gradients = hidden_states_and_gradients(
        theirs.base_model.model.roberta, inputs, [(name, wanted[f"roberta.{name}"]) for name, _ in named], seed=5
    )
    assert_close(hidden_states, expected, what="hidden states")
    for name, gradient in gradients.items():
        assert_close(gradient, their_gradients[name], what=name)
    ours.eval()
    assert deviation(ours.roberta(**inputs)[inputs["attention_mask"].bool()], expected) > 1e-3, "nothing was dropped"


def test_positions_count_real_tokens_wherever_the_padding_is(tmp_path):
    reference = reference_model()
    ours, theirs = our_copy(reference, tmp_path), reference.double()
    batch = ragged_batch(RAGGED)
    ids, mask = batch["input_ids"].flip(1), batch["attention_mask"].flip(1)  # padding on the left
    with torch.no_grad():
        expected = theirs.roberta(input_ids=ids, attention_mask=mask).last_hidden_state
        assert_close(ours.roberta(ids, mask)[mask.bool()], expected[mask.bool()], what="hidden states")


def test_last_layer_on_the_first_token_alone_gives_the_same_vector(tmp_path):
    ours, _ = adapted_pair(tmp_path, CONFIGS["every matrix"])
    batch = ragged_batch(RAGGED)
    with torch.no_grad():
        whole = ours.roberta(batch["input_ids"], batch["attention_mask"])
        first = ours.roberta(batch["input_ids"], batch["attention_mask"], first_token_only=True)
    assert first.shape[1] == 1
    assert_close(first[:, 0], whole[:, 0], 1e-13, "first token")


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_loss_and_gradients_of_adapters(tmp_path, config):
    ours, theirs = adapted_pair(tmp_path, config)
    ours.train(), theirs.train()
    batch = ragged_batch(RAGGED)
    expected = theirs(**batch)
    logits = ours(batch["input_ids"], batch["attention_mask"])
    loss = F.cross_entropy(logits, batch["labels"])
    assert_close(logits, expected.logits, what="logits")
    assert_close(loss, expected.loss, what="loss")

    loss.backward(), expected.loss.backward()
    gradients = {our_name(name): p.grad for name, p in theirs.named_parameters() if p.requires_grad and our_name(name)}
    mine = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    assert_same(set(mine), set(gradients), "names of the trained tensors")
    for name, parameter in mine.items():
        assert parameter.grad.abs().max() > 0 or gradients[name].abs().max() == 0, name
        # The bias of key cancels in the softmax: its gradient is rounding alone, on both sides.
        if name.endswith("key.base.bias") or name.endswith("key.bias"):
            assert max(parameter.grad.abs().max(), gradients[name].abs().max()) < 1e-12, name
        else:
            assert_close(parameter.grad, gradients[name], what=name)
    assert all(p.grad is None for p in ours.parameters() if not p.requires_grad)


def test_gradients_at_roberta_base_width(tmp_path):
    ours, theirs = adapted_pair(tmp_path, CONFIGS["final model"], **BASE_WIDTH)
    batch = ragged_batch(RAGGED)
    theirs(**batch).loss.backward()
    F.cross_entropy(ours(batch["input_ids"], batch["attention_mask"]), batch["labels"]).backward()
    mine = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            assert_close(mine[our_name(name)].grad, parameter.grad, what=name)


def test_float32_at_its_own_tolerance(tmp_path):
    ours, theirs = adapted_pair(tmp_path, CONFIGS["every matrix"], dtype=torch.float32)
    batch = ragged_batch(RAGGED)
    with torch.no_grad():
        logits = ours(batch["input_ids"], batch["attention_mask"])
        assert_close(logits, theirs(batch["input_ids"], batch["attention_mask"]).logits, 1e-5, "float32")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_error_is_at_most_theirs(tmp_path, dtype):
    # Two orders of 8-bit roundings differ by more than any tolerance worth stating, so both are held to float64.
    ours, theirs = adapted_pair(tmp_path, CONFIGS["every matrix"], dtype=torch.float32)
    errors = []
    for seed in range(8):
        batch = ragged_batch(RAGGED, seed=seed)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            truth = theirs.double()(**inputs).logits
            theirs.float()
            with torch.autocast("cpu", dtype=dtype):
                pair = ours(**inputs), theirs(**inputs).logits
        errors.append([(logits.double() - truth).square().mean().sqrt() for logits in pair])
    mine, others = torch.tensor(errors).square().mean(dim=0).sqrt()
    assert_no_worse(mine.item(), others.item(), 1.25, "root mean square error")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_logits_and_gradients_on_a_gpu(tmp_path, dtype):
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype]
    kept = dtype if dtype == torch.float64 else torch.float32
    ours, theirs = adapted_pair(tmp_path, CONFIGS["every matrix"], dtype=kept)
    ours, theirs = ours.cuda(), theirs.cuda()
    batch = {name: tensor.cuda() for name, tensor in ragged_batch(RAGGED).items()}
    with torch.autocast("cuda", dtype=dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
        logits, expected = ours(batch["input_ids"], batch["attention_mask"]), theirs(**batch)
    assert_close(logits.float(), expected.logits.float(), tolerance, "logits")
    F.cross_entropy(logits.float(), batch["labels"]).backward()
    F.cross_entropy(expected.logits.float(), batch["labels"]).backward()
    mine = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            assert_close(mine[our_name(name)].grad, parameter.grad, 3 * tolerance, name)
