"""How many directions does a trained update use? Singular values at several ranks, and with all weights trained.

    python -m experiments.lessons.singular_values

Source: Hu et al. 2021, section 7.2, which compares the subspaces of updates of different ranks.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

from experiments.lessons.common import Lesson, Task, fit, run_lesson
from lora.adapter import adapters
from lora.config import LoRAConfig
from training.plots import PALETTE

FULL_RATE = 1e-4  # learning rate for all weights; LoRA's would be too large


@torch.no_grad()
def spectrum(updates: list[Tensor]) -> Tensor:
    """Singular values of each matrix over its largest, the median over the matrices: (min(out, in),)."""
    values = torch.stack([torch.linalg.svdvals(update.double()) for update in updates])
    return (values / values[:, :1]).median(dim=0).values


def lesson(task: Task, steps: int = 45, ranks: Sequence[int] = (4, 16, 64)) -> Lesson:
    """Train with each rank (scale alpha / sqrt(r)) and with all weights. Spectra of the updates of q, k and v."""
    batches = task.batches(steps)
    spectra: dict[str, Tensor] = {}
    for rank in ranks:
        model = task.adapted(LoRAConfig(rank=rank, alpha=8, use_rslora=True))
        fit(model, batches)
        layers = adapters(model)
        spectra[f"rank {rank}"] = spectrum([layer.delta_weight() for layer in layers.values()])
    model = copy.deepcopy(task.model)
    fit(model, batches, FULL_RATE)
    updates = [model.get_submodule(name).weight - task.model.get_submodule(name).weight for name in layers]
    spectra["all weights free"] = spectrum(updates)

    found: dict[str, Any] = {"spectra": spectra}
    lines = ["update             values above 1 % of the first   share of |update|² in the first 4"]
    for name, values in spectra.items():
        squares = values.square()
        used, first_4 = int((values > 0.01).sum()), (squares[:4].sum() / squares.sum()).item()
        found[name] = {"used": used, "first 4": first_4}
        lines.append(f"{name:<18} {used:>30}   {first_4:>30.0%}")

    def draw(axes: Axes) -> None:
        for (name, values), colour, marker in zip(spectra.items(), PALETTE, "os^D", strict=False):
            shown = values[values > 1e-5]  # smaller ones are rounding: a matrix of rank r has r singular values
            axes.plot(range(1, len(shown) + 1), shown, color=colour, marker=marker, markersize=3, label=name)
        axes.set(xscale="log", yscale="log", xlabel="index of the singular value")
        axes.set_ylabel("value / largest, median over layers")
        axes.set_title("Singular values of the update of q, k, v")

    return Lesson(lines, [draw], found)


if __name__ == "__main__":
    sys.exit(run_lesson("singular_values", lesson))
