"""TMix: the encoder continues with mixtures of two texts, and is trained on the labels of both in the same proportion.

    h = lambda h_m(x) + (1 - lambda) h_m(x'),   lambda = max(l, 1 - l),   l ~ Beta(alpha, alpha)

h_m is the output of layer m. At positions that x' does not have, the vectors of x stay as they are; the layers above m
attend to the positions of x, so what x' has beyond them is not seen, and lambda = 1 is training without TMix. Virtual
tokens are at the same positions of all texts, and are mixed too.
Source: Chen, Yang & Yang 2020, "MixText", section 3.1. As in its program, lambda, m and the pairs are drawn once for
each forward pass; there all texts have one length, padding is mixed and attended to like any token, and the command for
TMix (`--separate-mix`) has lambda = l.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from roberta.model import prepend_true
from training.scoring import text_losses


@dataclass(frozen=True)
class Mix:
    """What is mixed in one forward pass."""

    lam: float
    """lambda, from 0.5 to 1: the share of x."""
    layer: int
    """m, from 1: the layer whose output is mixed."""
    partner: Tensor
    """(batch,) int64, a permutation: x' of text i is text partner[i], which may be i itself."""


def mix_layers(depth: int) -> list[int]:
    """The layers m to draw from: 7, 9 and 12 of `depth` = 12, the paper's choice, else in proportion, rounded up."""
    return sorted({-(-depth * m // 12) for m in (7, 9, 12)})


def draw_mix(alpha: float, texts: int, depth: int) -> Mix:
    """A mix of `texts` texts in an encoder of `depth` layers, from the state of torch's CPU generator alone."""
    random = np.random.default_rng(int(torch.randint(2**62, ())))  # its Beta is also right for a tiny alpha
    lam = random.beta(alpha, alpha)
    return Mix(max(lam, 1 - lam), int(random.choice(mix_layers(depth))), torch.from_numpy(random.permutation(texts)))


def mixed(hidden_states: Tensor, real: Tensor, mix: Mix) -> Tensor:
    """h from h_m, both (batch, seq, hidden), and the mask `real` (batch, seq), true at tokens: see above."""
    share = (1 - mix.lam) * real[mix.partner, :, None].to(hidden_states.dtype)  # of x'
    return hidden_states.lerp(hidden_states[mix.partner], share)  # (1 - share) x + share x'


def tmix_losses(logits: Tensor, labels: Tensor, mix: Mix) -> Tensor:
    """Loss of each text, (texts,), from logits (texts, classes) of the mixtures: over both in which it takes part.

        lambda L(z_i, y_i) + (1 - lambda) L(z_k, y_i),   text i is x of mixture i and x' of mixture k; L: `text_losses`

    With weights w of the texts, the sum is that of the paper's losses, in which each label has the weight of its text:

        sum over i of (lambda w_i L(z_i, y_i) + (1 - lambda) w_j L(z_i, y_j)),   j = partner[i]

    as i -> j is a permutation. For the same reason the weights lambda w_i + (1 - lambda) w_j sum to the sum of all w_i.
    """
    second = logits[mix.partner.argsort()]  # z_k
    return mix.lam * text_losses(logits, labels) + (1 - mix.lam) * text_losses(second, labels)


@contextlib.contextmanager
def mixing(model: nn.Module, alpha: float, labels: Tensor) -> Iterator[Mix | None]:
    """A context in which the encoder mixes the texts of these labels; None, and nothing is mixed, if `alpha` is 0."""
    if alpha == 0:
        yield None
        return
    layers = [*model.get_submodule("roberta.encoder.layer").children()]
    drawn = draw_mix(alpha, len(labels), len(layers))
    mix = Mix(drawn.lam, drawn.layer, drawn.partner.to(labels.device, non_blocking=True))

    def after_layer(layer: nn.Module, inputs: tuple[Tensor, Tensor], output: Tensor) -> Tensor:
        real = prepend_true(inputs[1], inputs[0].shape[1])[:, 0, 0]  # (batch, seq)
        return mixed(output, real[:, : output.shape[1]], mix)  # of the last layer <s> alone

    handle = layers[mix.layer - 1].register_forward_hook(after_layer)
    try:
        yield mix
    finally:
        handle.remove()
