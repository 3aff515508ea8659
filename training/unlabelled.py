"""Learning from texts without labels: the model labels a text, then learns to give that label to a changed copy of it.

Each optimizer step adds to its supervised loss, for n unlabelled texts beside the labelled ones,

    weight r(t) (1 / n) sum over i of v_i L(logits of the changed copy of text i, y_i)
    r(t) = (1 - cos(pi min(1, t / (ramp T)))) / 2,   t steps of T done

Label y_i and weight v_i come from p = softmax(logits of text i), with dropout and without gradients:

    method         changed by     label y    weight v
    pseudo_label   dropout        argmax p   1 if max p >= threshold, else 0                     (Lee 2013)
    fixmatch       EDA, dropout   argmax p   1 if max p >= threshold, else 0                     (Sohn et al. 2020)
    adamatch       EDA, dropout   argmax q   1 if max q >= threshold c, else 0                   (Berthelot et al. 2021)
    softmatch      EDA, dropout   argmax p   exp(-min(max q - mu, 0)^2 / (2 (sigma / 2)^2))      (Chen et al. 2023)

    adamatch       q = p M(l) / M(p), normalized; l: p of the labelled texts; c: the mean of max l in this step
    softmatch      q = p / M(p), normalized; mu, sigma^2 = M(max q), moving average of the variance of max q

M is an exponential moving average of the mean over the texts of a step, M <- momentum M + (1 - momentum) mean, which
starts as the first step's mean.

A fixed threshold lets a class that the model is sure of for the wrong reasons take over. q gives the classes the
frequencies that they have among the labelled texts (AdaMatch) or equal ones (SoftMatch), and "sure" is relative to the
model's own confidence. Differences from the papers: dropout is the weak augmentation and EDA the strong one, in place
of shifts and colours of pictures; Lee has no threshold (as with 0); AdaMatch trains on strong copies of labelled texts,
too (here with `data.augmentation`, whose copies also count in M(l) and c), and interpolates logits (section 3.2) for
batch normalization; its ramp (section 3.5) is used with every method; its M(p) is a mean of 128 batches, and its
program scores a moving average of the weights; the averages have no fixed initial value, and their momentum is 0.9
instead of 0.999, as runs here have some hundred steps, in which p changes; sigma is halved as in SoftMatch's program.

The changed copies are texts of the step as any others: R-Drop passes them twice, too.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from data.batching import Batch
from training.config import UnlabelledConfig
from training.distributed import World
from training.precision import Compute
from training.scoring import batch_logits


class PseudoLabels:
    """Labels that a model gives to unlabelled texts, and the moving averages behind them."""

    def __init__(self, settings: UnlabelledConfig, total_steps: int) -> None:
        self.settings, self.total_steps = settings, total_steps
        self.averages: dict[str, Tensor] = {}
        """Moving averages by name, float64 on the device; the same in all processes, and part of a checkpoint."""

    @torch.no_grad()
    def label(self, model: nn.Module, batches: list[Batch], step: int, compute: Compute, world: World) -> list[Batch]:
        """The changed copies of the unlabelled texts of `batches`, each with its label and its weight in the loss.

        `train_step` divides by W, the weight of all labelled texts of the step, so a copy has the weight
        weight r(t) v_i W / n. W, n and the means are over all batches of the step, in all processes.
        """
        settings = self.settings
        p = torch.cat([_probabilities(model, batch.unlabelled, compute) for batch in batches])  # (texts, classes)
        counts = torch.cat([batch.unlabelled.weights for batch in batches]).to(p)  # 0 for a text that fills a share
        n = sum(batch.unlabelled.total_weight for batch in batches)
        confidence, labels = p.max(dim=1)
        if settings.method == "adamatch":
            labelled = torch.cat([_probabilities(model, batch, compute) for batch in batches])  # (labelled, classes)
            present = torch.cat([batch.weights > 0 for batch in batches]).to(p)
            means = _mean(torch.cat([labelled, labelled.amax(dim=1, keepdim=True)], dim=1), present, world)
            target = self._average("labelled", means[:-1])
            confidence, labels = self._aligned(p, target, counts, world).max(dim=1)
            weights = (confidence >= settings.cutoff * means[-1]).double()
        elif settings.method == "softmatch":
            confidence = self._aligned(p, torch.ones_like(p[0]), counts, world).amax(dim=1)
            mean, square = _mean(torch.stack([confidence, confidence**2], dim=1), counts, world)
            mu = self._average("mu", mean)
            variance = self._average("variance", (square - mean**2) * n / max(1, n - 1)).clamp(min=1e-12)
            weights = torch.exp(-((confidence - mu).clamp(max=0) ** 2) / (2 * variance / 4))
        else:
            weights = (confidence >= settings.cutoff).double()
        weights *= counts * self._factor(step) * sum(batch.total_weight for batch in batches) / n
        parts = [len(batch.unlabelled.labels) for batch in batches]
        return [
            dataclasses.replace(batch.changed, labels=label, weights=weight)
            for batch, label, weight in zip(batches, labels.split(parts), weights.split(parts), strict=True)
        ]

    def _factor(self, step: int) -> float:
        """weight r(t)"""
        part = min(1.0, step / (self.settings.ramp * self.total_steps)) if self.settings.ramp else 1.0
        return self.settings.weight * (1 - math.cos(math.pi * part)) / 2

    def _aligned(self, p: Tensor, target: Tensor, counts: Tensor, world: World) -> Tensor:
        """p times target / M(p), with rows that sum to 1: (texts, classes)."""
        found = self._average("unlabelled", _mean(p, counts, world))
        return torch.nn.functional.normalize(p * (target + 1e-6) / (found + 1e-6), p=1, dim=1)

    def _average(self, name: str, mean: Tensor) -> Tensor:
        """The moving average after a step with this mean; where that is not finite (fp16), as before the step."""
        old = self.averages.get(name, mean)
        mean = torch.where(mean.isfinite(), mean, old)
        old = torch.where(old.isfinite(), old, mean)
        self.averages[name] = self.settings.momentum * old + (1 - self.settings.momentum) * mean
        return self.averages[name]

    def state(self) -> dict[str, list[float] | float]:
        """The averages as JSON, exactly."""
        return {name: value.tolist() for name, value in self.averages.items()}

    def load_state(self, state: dict[str, list[float] | float], device: torch.device) -> None:
        """The averages of `state`."""
        self.averages = {name: torch.tensor(value, dtype=torch.float64, device=device) for name, value in state.items()}


def _probabilities(model: nn.Module, batch: Batch, compute: Compute) -> Tensor:
    """softmax of the logits, (batch, classes) float64, with the dropout of the model's mode."""
    return batch_logits(model, batch, compute).double().softmax(dim=1)


def _mean(rows: Tensor, counts: Tensor, world: World) -> Tensor:
    """Mean of rows (texts, n) whose count is 1, over all processes: (n,)."""
    sums = world.sum(torch.cat([counts @ rows, counts.sum()[None]]), in_step=True)
    return sums[:-1] / sums[-1]
