"""Learning from unlabelled texts against the papers' formulas, written out over transformers and peft."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from lora.config import LoRAConfig
from tests.parity.oracle import adapted_pair, assert_close, our_name
from tests.parity.test_training import CPU, collate, encoded_texts
from train import train_step
from training.config import UnlabelledConfig
from training.distributed import ALONE
from training.unlabelled import PseudoLabels

STEPS, WEIGHT, RAMP, MOMENTUM = 4, 1.7, 0.5, 0.6
THRESHOLDS = {"pseudo_label": 0.45, "fixmatch": 0.45, "adamatch": 0.9}


def steps(split, unlabelled, changed):
    """Groups of three micro-batches of 5, 3 and 1 labelled texts with weights, and of 7, 4 and 2 unlabelled ones."""
    random = np.random.default_rng(1)
    for _ in range(STEPS):
        rows = np.split(random.choice(64, 9, replace=False), [5, 8])
        others = np.split(random.choice(64, 13, replace=False), [7, 11])
        yield [
            dataclasses.replace(
                collate(split, some, 1, "longest"),
                unlabelled=collate(unlabelled, other, 1, "longest"),
                changed=collate(changed, other, 1, "longest"),
            )
            for some, other in zip(rows, others, strict=True)
        ]


def reference_loss(theirs, batches, method, t, averages):
    """The loss of step t, and the weights v; `averages` holds the moving ones, and is changed."""

    def probabilities(batch):
        with torch.no_grad():
            return [torch.softmax(row, 0) for row in theirs(batch.input_ids, batch.attention_mask).logits]

    def moved(name, value):
        averages[name] = MOMENTUM * averages[name] + (1 - MOMENTUM) * value if name in averages else value
        return averages[name]

    def aligned(rows, target):
        found = moved("unlabelled", sum(rows) / len(rows))
        ratios = [row * (target + 1e-6) / (found + 1e-6) for row in rows]
        return [row / row.sum() for row in ratios]

    p = [row for batch in batches for row in probabilities(batch.unlabelled)]
    q, cut = p, THRESHOLDS.get(method)
    if method == "adamatch":
        labelled = [row for batch in batches for row in probabilities(batch)]
        q = aligned(p, moved("labelled", sum(labelled) / len(labelled)))
        cut = cut * sum(row.max() for row in labelled) / len(labelled)
    if method != "softmatch":
        v = [float(row.max() >= cut) for row in q]
    else:
        top = torch.stack([row.max() for row in aligned(p, torch.full((3,), 1.0).double())])
        mu, variance = moved("mu", top.mean()), moved("variance", top.var())
        v = [1.0 if x >= mu else math.exp(-((x - mu) ** 2) / (2 * (variance.sqrt() / 2) ** 2)) for x in top]
    y = [int(row.argmax()) for row in (p if method == "softmatch" else q)]

    supervised, total, unsupervised, i = 0.0, 0.0, 0.0, 0
    for batch in batches:
        logs = torch.log_softmax(theirs(batch.input_ids, batch.attention_mask).logits, 1)
        for row, label, weight in zip(logs, batch.labels, batch.weights, strict=True):
            supervised, total = supervised - weight * row[label], total + weight
    for batch in batches:
        for row in torch.log_softmax(theirs(batch.changed.input_ids, batch.changed.attention_mask).logits, 1):
            unsupervised, i = unsupervised - v[i] * row[y[i]], i + 1
    ramp = (1 - math.cos(math.pi * min(1, t / (RAMP * STEPS)))) / 2
    return supervised / total + WEIGHT * ramp * unsupervised / len(v), v


@pytest.mark.parametrize("method", ["pseudo_label", "fixmatch", "adamatch", "softmatch"])
def test_labels_weights_and_gradients_are_those_of_the_papers(tmp_path, method):
    """Four steps of accumulated batches with dropout, whose masks are drawn in the same order."""
    config = LoRAConfig(rank=3, dropout=0.4, layers_to_transform=(0,))  # the last layer draws masks for <s> alone
    ours, theirs = adapted_pair(tmp_path, config, classifier_dropout=0.3)
    ours.train(), theirs.train()
    named = {our_name(name): p for name, p in theirs.named_parameters() if p.requires_grad}
    classes = np.resize([0, 0, 2, 0, 1, 0, 0], 64)
    split = dataclasses.replace(encoded_texts(), labels=classes, weights=0.5 + classes)
    unlabelled = encoded_texts(seed=1)
    changed = unlabelled if method == "pseudo_label" else encoded_texts(seed=2)
    options = {"threshold": THRESHOLDS.get(method)} | ({"momentum": MOMENTUM} if method[0] in "as" else {})
    settings = UnlabelledConfig(method=method, weight=WEIGHT, ramp=RAMP, **options)
    pseudo_labels, averages, weights = PseudoLabels(settings, STEPS), {}, []
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.05) for m in (ours, theirs)]
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizers[0], factor=1.0)
    for t, batches in enumerate(steps(split, unlabelled, changed)):
        torch.manual_seed(t)
        loss, v = reference_loss(theirs, batches, method, t, averages)
        loss.backward()
        optimizers[1].step(), optimizers[1].zero_grad()
        weights += v
        torch.manual_seed(t)
        found = train_step(
            ours, batches, optimizers[0], schedule, CPU.grad_scaler(), CPU, 0.0, pseudo_labels=pseudo_labels
        )
        assert_close(found, loss, what=f"loss of step {t}")
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            assert_close(parameter, named[name], what=name)
    assert pseudo_labels.averages.keys() == averages.keys()
    for name, value in averages.items():
        assert_close(pseudo_labels.averages[name], value, what=name)
    assert 0 < sum(v > 0.99 for v in weights) < len(weights), "all texts have the same weight"


def test_the_default_threshold_is_the_methods_and_no_ramp_is_the_full_weight_at_once():
    cutoffs = {name: UnlabelledConfig(method=name).cutoff for name in THRESHOLDS}
    assert cutoffs == {"pseudo_label": 0.95, "fixmatch": 0.95, "adamatch": 0.9}
    assert PseudoLabels(UnlabelledConfig(ramp=0.0, weight=1.7), STEPS)._factor(0) == 1.7


@pytest.mark.parametrize("method", ["adamatch", "softmatch"])
def test_a_step_that_overflows_leaves_the_averages(method):
    """As under fp16, where the step itself is skipped; a nan in the averages would give every later text weight 0."""
    scale, settings = torch.tensor(float("inf")), UnlabelledConfig(method=method, ramp=0)
    pseudo_labels, random = PseudoLabels(settings, STEPS), torch.Generator().manual_seed(0)

    def model(input_ids, attention_mask):
        return torch.randn(len(input_ids), 3, generator=random) * scale

    batches = next(iter(steps(encoded_texts(), encoded_texts(seed=1), encoded_texts(seed=2))))
    pseudo_labels.label(model, batches, 0, CPU, ALONE)
    scale.fill_(1.0)
    pseudo_labels.label(model, batches, 1, CPU, ALONE)
    before = pseudo_labels.state()
    scale.fill_(float("inf"))
    pseudo_labels.label(model, batches, 2, CPU, ALONE)
    assert pseudo_labels.state() == before
    scale.fill_(1.0)
    changed = pseudo_labels.label(model, batches, 3, CPU, ALONE)
    assert pseudo_labels.state() != before and sum(batch.weights.sum() for batch in changed) > 0
