"""docs/walkthrough.md: each formula, computed a second time from the page alone, equals what the program computes."""

import copy
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from data.batching import Batch
from lora.adapter import adapters
from lora.config import LoRAConfig
from lora.inject import count_parameters, inject_lora, merge_lora, unload_lora
from lora.linear import LoRALinear
from roberta.config import RobertaConfig
from roberta.model import RobertaForSequenceClassification
from roberta.tokenizer import TextTokenizer
from tests.parity.oracle import deviation
from train import make_optimizer, make_schedule, train_step
from training.config import TrainConfig
from training.precision import Compute

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "walkthrough.md").read_text(encoding="utf-8")
SENTENCE = "Oil prices rise as OPEC cuts output"
IDS = [0, 32397, 850, 1430, 25, 9349, 2599, 4195, 2]
EXACT = 1e-12  # relative, in float64: rounding in another order and nothing else
CPU = Compute(torch.device("cpu"), "fp32")


def close(ours, by_hand, what=""):
    found = deviation(ours.detach(), by_hand.detach())
    assert found <= EXACT, f"{what}: relative deviation {found:.1e}"


@pytest.fixture(scope="module")
def model():
    """A small RoBERTa in float64 with adapters on q, k and v, every value random, B included."""
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=50,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        max_position_embeddings=30,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        label_names=("a", "b", "c"),
    )
    model = inject_lora(RobertaForSequenceClassification(config).double(), LoRAConfig(rank=3, alpha=7))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, dtype=torch.float64))
    return model


@pytest.fixture(scope="module")
def batch():
    ids = torch.tensor([[0, 7, 30, 9, 4, 2], [0, 12, 2, 1, 1, 1]])
    return Batch(ids, ids != 1, torch.tensor([2, 0]), torch.ones(2), torch.arange(2), 9, 2.0)


def layer_norm(x, norm):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias


def test_tokens_of_the_sentence(shared):
    tokenizer = TextTokenizer.from_directory(shared / "roberta-base-tokenizer", 128)
    assert tokenizer.encode_batch([SENTENCE]) == [IDS]
    assert str(IDS) in PAGE and f'"{SENTENCE}"' in PAGE and f"{len(SENTENCE.encode())} bytes" in PAGE


def test_shapes_and_counts_of_the_page():
    """The table of shapes, against hooks on a model of roberta-base's size; two layers stand for the twelve."""
    config = RobertaConfig(num_hidden_layers=2, label_names=("World", "Sports", "Business", "Sci/Tech"))
    with torch.device("meta"):
        model = RobertaForSequenceClassification(config)
        inject_lora(model, LoRAConfig(rank=6, alpha=14))
        count = count_parameters(model)
        seen: dict[str, list[str]] = {}
        for name, module in model.named_modules():
            hook = lambda _, __, out, name=name: seen.setdefault(name, []).append(str(tuple(out.shape)))  # noqa: E731
            module.register_forward_hook(hook)
        model(torch.zeros(1, len(IDS), dtype=torch.long), torch.ones(1, len(IDS), dtype=torch.bool))
    seen |= {name: [str(tuple(parameter.shape))] for name, parameter in model.named_parameters()}
    rows = re.findall(r"^\| `([\w.]+)` \| ((?:`\([\d, ]+\)`(?:, )?)+) \|", PAGE, re.MULTILINE)
    assert len(rows) >= 12
    for name, shapes in rows:
        name = name.replace("layer.11.", "layer.1.")
        assert re.findall(r"\(.*?\)", shapes) == seen[name], name
    adapters = sum(trainable for part, (trainable, _) in count.parts.items() if part.startswith("LoRA"))
    assert f"{12 // 2 * adapters:,}" in PAGE and f"{count.trainable - adapters:,}" in PAGE
    assert f"{12 // 2 * adapters + count.trainable - adapters:,}" in PAGE


def test_embeddings(model, batch):
    embeddings, padding = model.roberta.embeddings, 1
    rows = []
    for ids in batch.input_ids.tolist():
        position = padding
        for token in ids:
            position = position + 1 if token != padding else position
            at = position if token != padding else padding
            word, place = embeddings.word_embeddings.weight[token], embeddings.position_embeddings.weight[at]
            rows.append(layer_norm(word + place + embeddings.token_type_embeddings.weight[0], embeddings.LayerNorm))
    by_hand = torch.stack(rows).view(2, 6, 24)
    close(embeddings(batch.input_ids, batch.attention_mask), by_hand)


def test_lora_on_query_key_and_value(model):
    x = torch.randn(2, 6, 24, dtype=torch.float64)
    for name, layer in adapters(model).items():
        W, b, A, B, s = layer.base.weight, layer.base.bias, layer.lora_A, layer.lora_B, 7 / 3
        close(layer(x), x @ W.T + b + s * (x @ A.T) @ B.T, name)


@pytest.mark.parametrize("written_out", [False, True])
def test_attention(model, batch, written_out):
    attention = copy.deepcopy(model.roberta.encoder.layer[0].attention).train()
    # Any probability above 0 takes the branch that is written out; this one drops nothing.
    attention.self.dropout.p = 1e-15 if written_out else 0.0
    x = torch.randn(2, 6, 24, dtype=torch.float64)
    q, k, v = attention.self.query(x), attention.self.key(x), attention.self.value(x)
    contexts = []
    for head in range(4):
        part = slice(6 * head, 6 * head + 6)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(6)
        scores = scores.masked_fill(~batch.attention_mask[:, None, :], -math.inf)
        probabilities = scores.exp() / scores.exp().sum(-1, keepdim=True)
        contexts.append(probabilities @ v[..., part])
    projected = torch.cat(contexts, dim=-1) @ attention.output.dense.weight.T + attention.output.dense.bias
    by_hand = layer_norm(x + projected, attention.output.LayerNorm)
    close(attention(x, batch.attention_mask[:, None, None, :]), by_hand)


def test_feed_forward(model):
    layer, x = model.roberta.encoder.layer[0], torch.randn(2, 6, 24, dtype=torch.float64)
    wide = x @ layer.intermediate.dense.weight.T + layer.intermediate.dense.bias
    wide = wide * 0.5 * (1 + torch.erf(wide / math.sqrt(2)))
    by_hand = layer_norm(x + wide @ layer.output.dense.weight.T + layer.output.dense.bias, layer.output.LayerNorm)
    close(layer.output(layer.intermediate(x), residual=x), by_hand)


def test_head_and_loss(model, batch):
    head, h = model.classifier, torch.randn(2, 24, dtype=torch.float64)
    by_hand = torch.tanh(h @ head.dense.weight.T + head.dense.bias) @ head.out_proj.weight.T + head.out_proj.bias
    logits = head(h)
    close(logits, by_hand, "logits")
    p = logits.exp() / logits.exp().sum(-1, keepdim=True)
    loss = -(p[0, 2].log() + p[1, 0].log()) / 2
    close(F.cross_entropy(logits, batch.labels, reduction="sum") / 2, loss, "loss")


def test_gradient_of_the_logits(batch):
    logits = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    (F.cross_entropy(logits, batch.labels, reduction="sum") / 2).backward()
    onehot = torch.tensor([[0.0, 0, 1], [1, 0, 0]], dtype=torch.float64)
    close(logits.grad, (logits.softmax(-1) - onehot) / 2)


def gradients_by_hand(G, X, layer):
    """The page's formulas: X (tokens, in) and G = dL/dY (tokens, out) -> dL/dA, dL/dB."""
    A, B, s = layer.lora_A, layer.lora_B, layer.scaling
    return s * B.T @ G.T @ X, s * G.T @ (X @ A.T)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_gradients_of_one_layer(use_rslora):
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(7, 5).double(), 3, 8, use_rslora=use_rslora)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(11, 7, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    y.retain_grad()
    y.sin().square().sum().backward()
    dA, dB = gradients_by_hand(y.grad, x, layer)
    close(layer.lora_A.grad, dA, "dL/dA")
    close(layer.lora_B.grad, dB, "dL/dB")
    close(x.grad, y.grad @ layer.base.weight + layer.scaling * (y.grad @ layer.lora_B) @ layer.lora_A, "dL/dX")
    assert layer.base.weight.grad is None and layer.base.bias.grad is None


def test_gradients_in_the_whole_model(model, batch):
    """dL/dA and dL/dB of every adapter, from the X and G that pass it during a step."""
    kept = {}

    def keep(layer, inputs, output):
        kept[layer] = inputs[0], output
        output.retain_grad()

    handles = [layer.register_forward_hook(keep) for layer in adapters(model).values()]
    (F.cross_entropy(model(batch.input_ids, batch.attention_mask), batch.labels, reduction="sum") / 2).backward()
    for handle in handles:
        handle.remove()
    for name, layer in adapters(model).items():
        X, Y = kept[layer]
        dA, dB = gradients_by_hand(Y.grad.flatten(0, 1), X.flatten(0, 1), layer)
        close(layer.lora_A.grad, dA, f"dL/dA of {name}")
        close(layer.lora_B.grad, dB, f"dL/dB of {name}")
        assert layer.lora_A.grad.abs().max() > 1e-6 and layer.lora_B.grad.abs().max() > 1e-6
    model.zero_grad(set_to_none=True)


def test_at_the_start_only_b_has_a_gradient():
    layer = LoRALinear(nn.Linear(7, 5).double(), 3, 8)
    layer(torch.randn(11, 7, dtype=torch.float64)).square().sum().backward()
    assert not layer.lora_A.grad.any() and layer.lora_B.grad.all()


def test_steps_of_adamw(batch):
    """Two full `train_step`s, with clipping and decay, against the page's arithmetic."""
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, label_names=("a", "b", "c")
    )
    model = inject_lora(RobertaForSequenceClassification(config).double().eval(), LoRAConfig(rank=2, alpha=4))
    rate, decay, clip = 1e-2, 0.1, 0.05
    optimizer = make_optimizer(model, TrainConfig(learning_rate=rate, weight_decay=decay))
    schedule, scaler = make_schedule(optimizer, total_steps=10, warmup_steps=0), CPU.grad_scaler()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    by_hand = {name: p.detach().clone() for name, p in trained.items()}
    m, v = ({name: torch.zeros_like(p) for name, p in trained.items()} for _ in range(2))
    for t in (1, 2):
        loss = F.cross_entropy(model(batch.input_ids, batch.attention_mask), batch.labels)
        gradients = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
        assert norm > clip, "clipping must bite here"
        lr = rate * (10 - (t - 1)) / 10
        for name, g in gradients.items():
            g = g * clip / (norm + 1e-6)
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g**2
            wd = decay if g.ndim > 1 else 0.0
            step = (m[name] / (1 - 0.9**t)) / ((v[name] / (1 - 0.999**t)).sqrt() + 1e-8)
            if t == 1:  # ... which is the sign of g, nearly
                close(step, g / (g.abs() + 1e-8), "first step")
            by_hand[name] = by_hand[name] * (1 - lr * wd) - lr * step
        train_step(model, [batch], optimizer, schedule, scaler, CPU, clip)
        for name, parameter in trained.items():
            close(parameter, by_hand[name], f"{name} after step {t}")


def test_merged_matrix(model, batch):
    model = copy.deepcopy(model)
    before = model(batch.input_ids, batch.attention_mask)
    layers = adapters(model)
    by_hand = {name: layer.base.weight + 7 / 3 * layer.lora_B @ layer.lora_A for name, layer in layers.items()}
    merge_lora(model)
    close(model(batch.input_ids, batch.attention_mask), before, "logits")
    unload_lora(model)
    for name, expected in by_hand.items():
        close(model.get_submodule(name).weight, expected, name)
