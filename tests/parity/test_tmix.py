"""TMix: loss and gradients of a step against each text of a pair run alone, so without padding and key masks."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from data.batching import collate
from lora.adalora import orthogonality_penalty
from lora.config import (
    AdaLoRAConfig,
    BitFitConfig,
    BottleneckConfig,
    LoRAConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningConfig,
)
from lora.inject import inject_lora
from lora.quantized import quantize
from tests.parity.oracle import adapted_pair, assert_close, our_copy, our_name, reference_model
from tests.parity.test_training import CPU, _Summed, encoded_texts, one_pass_alone
from train import make_schedule, train_step
from training import tmix
from training.setup import recompute_activations
from training.tmix import Mix, draw_mix, mix_layers

LAYERS = 3
LORA = LoRAConfig(rank=3, target_modules=("query", "value", "output.dense"))
HERE = {  # the parts of our own model stand in for those of `transformers` and `peft`
    "AdaLoRA": (AdaLoRAConfig(init_r=4, target_r=2, tinit=1, tfinal=1, total_step=9),),
    "LoRA + prompt tuning + bottleneck": (LORA, PromptTuningConfig(num_virtual_tokens=4), BottleneckConfig()),
    "P-tuning": (PTuningConfig(num_virtual_tokens=3),),
    "prefix tuning + BitFit": (PrefixTuningConfig(num_virtual_tokens=3), BitFitConfig()),
}


@pytest.fixture
def drawn(monkeypatch):
    """The mixes of the passes of a test: layers and shares in turn, and pairs that are not mutual."""
    made = []

    def draw(alpha, texts, depth):
        made.append(Mix((0.8, 0.55, 0.95)[len(made) % 3], len(made) % LAYERS + 1, torch.arange(1, texts + 1) % texts))
        return made[-1]

    monkeypatch.setattr(tmix, "draw_mix", draw)
    return made


def texts_and_shares(multi_label=False, processes=1):
    split, classes = encoded_texts(), np.resize([0, 0, 2, 0, 1, 0, 0], 64)
    labels = np.random.default_rng(2).integers(0, 2, (64, 3)) if multi_label else classes
    split = dataclasses.replace(split, labels=labels, weights=None if multi_label else 0.5 + classes)
    rows = [np.array(part) for part in ([0, 1, 2, 3, 4], [5, 6, 7], [8])]
    return split, [[collate(split, p, 1, "longest", slice(k, None, processes)) for p in rows] for k in range(processes)]


def step(model, shares, alpha):
    """Loss and gradients of one step of all processes, by the names of the parameters."""
    world, optimizer = _Summed(), torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    for share in shares:
        schedule = make_schedule(optimizer, 9, 0)
        train_step(model, share, optimizer, schedule, CPU.grad_scaler(), CPU, 0.0, world, 0.0, alpha)
    names = [name for name, _ in model.named_parameters()]
    return world.loss, {names[i]: gradient for i, gradient in world.gradients.items()}


def by_hand(embed, layers, head, split, shares, mixes):
    """The paper's loss: lambda w_i L(z_i, y_i) + (1 - lambda) w_j L(z_i, y_j), over all weights; each text alone."""

    def up_to(row, m):
        h = embed(torch.from_numpy(split.input_ids[split.offsets[row] : split.offsets[row + 1]]).long()[None])
        for layer in layers[:m]:
            h = layer(h)
        return h

    total = 0.0
    for batch, mix in zip((batch for share in shares for batch in share), mixes, strict=True):
        rows, lam = batch.indices.tolist(), mix.lam
        for i, j in enumerate(mix.partner.tolist()):
            h, other = up_to(rows[i], mix.layer), up_to(rows[j], mix.layer)
            both = min(h.shape[1], other.shape[1])
            h = torch.cat([lam * h[:, :both] + (1 - lam) * other[:, :both], h[:, both:]], dim=1)
            for layer in layers[mix.layer :]:
                h = layer(h)
            for part, share in ((slice(i, i + 1), lam), (slice(j, j + 1), 1 - lam)):
                total = total + share * one_pass_alone(head(h), batch.labels[part], batch.weights[part])[0]
    return total / sum(batch.total_weight for batch in shares[0])


def check(found, loss, expected):
    assert_close(found[0], loss, what="loss")
    assert found[1].keys() == {name for name, gradient in expected.items() if gradient is not None}
    for name, gradient in found[1].items():
        if not name.endswith(("key.bias", "key.base.bias")):  # rounding alone
            assert_close(gradient, expected[name], what=name)


@pytest.mark.parametrize("processes", [1, 4])
@pytest.mark.parametrize("multi_label", [False, True], ids=["class weights", "multi-label"])
def test_a_step_mixes_the_pairs_as_each_alone_in_transformers(tmp_path, drawn, multi_label, processes):
    """Three accumulated batches, mixed after layers 1, 2 and 3; four processes leave some of them without a text."""
    ours, theirs = adapted_pair(tmp_path, LORA, num_hidden_layers=LAYERS)
    split, shares = texts_and_shares(multi_label, processes)
    found = step(ours, shares, 0.4)
    model = theirs.base_model.model
    parts = model.roberta.embeddings, model.roberta.encoder.layer, model.classifier
    loss = by_hand(*parts, split, shares, drawn)
    loss.backward()
    check(found, loss, {our_name(name): p.grad for name, p in theirs.named_parameters() if p.requires_grad})
    assert not any(layer._forward_hooks for layer in ours.roberta.encoder.layer)


@pytest.mark.parametrize("recompute", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("method", HERE)
def test_every_kind_of_method_is_mixed_alike(tmp_path, drawn, method, bits, recompute):
    """Virtual tokens are mixed as others are; a base in 4 bits and recomputed activations change nothing."""
    ours = our_copy(reference_model(num_hidden_layers=LAYERS), tmp_path)
    if bits < 16:
        quantize(ours.roberta, bits)
    inject_lora(ours, *HERE[method])
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    split, shares = texts_and_shares()
    plain = copy.deepcopy(ours)
    if recompute:
        recompute_activations(ours.roberta.encoder)
    found = step(ours, shares, 0.4)

    def masked(layer):
        return lambda h: layer(h, torch.ones(1, 1, 1, h.shape[1], dtype=torch.bool))

    def embed(ids):
        return plain.roberta.embeddings(ids, torch.ones_like(ids))

    layers = [masked(layer) for layer in plain.roberta.encoder.layer]
    loss = by_hand(embed, layers, lambda h: plain.classifier(h[:, 0]), split, shares, drawn)
    loss = loss + orthogonality_penalty(plain, 1.0)
    loss.backward()
    check(found, loss, {name: p.grad for name, p in plain.named_parameters() if p.requires_grad})


def test_a_lambda_of_one_is_a_step_without_tmix_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(tmix, "draw_mix", lambda alpha, texts, depth: Mix(1.0, 1, torch.randperm(texts).flip(0)))
    ours, _ = adapted_pair(tmp_path, LORA, dtype=torch.float32, num_hidden_layers=LAYERS)
    results = [step(ours, texts_and_shares()[1], alpha) for alpha in (0.0, 0.4)]
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(gradient, results[1][1][name]) for name, gradient in results[0][1].items())


def test_what_is_drawn():
    assert [mix_layers(depth) for depth in (12, 24, 6, 2, 1)] == [[7, 9, 12], [14, 18, 24], [4, 5, 6], [2], [1]]
    mixes = [draw_mix(1.0, 5, 12) for _ in range(2000)]
    assert all(0.5 <= mix.lam <= 1 and sorted(mix.partner.tolist()) == [0, 1, 2, 3, 4] for mix in mixes)
    assert np.mean([mix.lam for mix in mixes]) == pytest.approx(0.75, abs=0.02)  # of max(l, 1 - l), l uniform
    assert np.bincount([mix.layer for mix in mixes])[[7, 9, 12]] == pytest.approx(2000 / 3, rel=0.1)
    assert min(draw_mix(1e-9, 5, 12).lam for _ in range(100)) == 1 and draw_mix(1e9, 5, 12).lam < 0.51
