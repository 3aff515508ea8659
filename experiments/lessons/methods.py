"""LoRA, all weights, the head alone, the biases alone (BitFit): the same steps on the same batches.

    python -m experiments.lessons.methods

Sources: Hu et al. 2021; Ben Zaken et al. 2021, "BitFit", section 3.
"""

from __future__ import annotations

import copy
import statistics
import sys

from matplotlib.axes import Axes
from torch import nn

from experiments.lessons.common import Lesson, Task, draw_losses, fit, run_lesson
from lora.config import LoRAConfig
from lora.inject import count_parameters
from training.plots import PALETTE

# The best of the learning rates that docs/lessons.md lists, by validation accuracy with seed 1.
RATES = {"LoRA": 3e-3, "all weights": 3e-4, "head only": 1e-2, "BitFit": 3e-3}


def prepare(task: Task, method: str) -> nn.Module:
    """A copy of the model in which only the parameters of `method` and the head are trainable."""
    if method == "LoRA":
        return task.adapted(LoRAConfig(rank=6, alpha=14))
    model = copy.deepcopy(task.model)
    for name, parameter in model.named_parameters():
        bias = method == "BitFit" and name.endswith("bias")
        parameter.requires_grad_(method == "all weights" or bias or name.startswith("classifier."))
    return model


def lesson(task: Task, steps: int = 60, rates: dict[str, float] = RATES) -> Lesson:
    """Train with each method. Records trained parameters, losses and validation accuracy."""
    batches = task.batches(steps)
    losses, found = {}, {}
    for method, rate in rates.items():
        model = prepare(task, method)
        losses[method] = fit(model, batches, rate)
        found[method] = {
            "trained": count_parameters(model).trainable,
            "loss": statistics.fmean(losses[method][-10:]),
            "accuracy": task.accuracy(model),
        }
    lines = ["method        trained parameters   learning rate   loss of the last 10   validation accuracy"]
    for method, row in found.items():
        numbers = f"{row['trained']:>18,}   {rates[method]:>13.0e}   {row['loss']:>19.3f}   {row['accuracy']:>19.1%}"
        lines.append(f"{method:<13} {numbers}")

    def draw_curves(axes: Axes) -> None:
        draw_losses(axes, losses)
        axes.set_title("The same batches")

    def draw_accuracy(axes: Axes) -> None:
        for (method, row), colour, marker in zip(found.items(), PALETTE, "os^D", strict=False):
            axes.plot(row["trained"], 100 * row["accuracy"], marker, color=colour, markersize=8, label=method)
        axes.set(xscale="log", xlabel="trained parameters", ylabel="validation accuracy (%)", title="After training")

    return Lesson(lines, [draw_curves, draw_accuracy], found)


if __name__ == "__main__":
    sys.exit(run_lesson("methods", lesson))
