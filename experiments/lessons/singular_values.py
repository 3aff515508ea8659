"""How many directions does a trained update really use? Its singular values, against rank and against a free update.

    python -m experiments.lessons.singular_values

Source: Hu et al. 2021, section 7.2, which compares the subspaces of updates of different ranks.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from experiments.lessons.common import Lesson, Task, fit, run_lesson
from lora.config import LoRAConfig
from lora.inject import adapters
from training.plots import PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FREE_RATE = 1e-4  # for all weights at once: LoRA's rate would be too large


@torch.no_grad()
def spectrum(updates: list[torch.Tensor]) -> torch.Tensor:
    """Singular values of each matrix over its largest, the median over the matrices: (min(out, in),)."""
    values = torch.stack([torch.linalg.svdvals(update.double()) for update in updates])
    return (values / values[:, :1]).median(dim=0).values


def lesson(task: Task, steps: int = 45, ranks: Sequence[int] = (4, 16, 64)) -> Lesson:
    """Train with each rank (rank-stabilised scale) and with all weights free; spectra of the updates of q, k and v."""
    batches = task.batches(steps)
    spectra: dict[str, torch.Tensor] = {}
    found: dict[str, dict[str, float]] = {}
    for rank in ranks:
        model = task.adapted(LoRAConfig(rank=rank, alpha=8, use_rslora=True))
        fit(model, batches)
        spectra[f"rank {rank}"] = spectrum([layer.delta_weight() for layer in adapters(model).values()])
    names = list(adapters(model))
    model = copy.deepcopy(task.model)
    fit(model, batches, FREE_RATE)
    updates = [model.get_submodule(name).weight - task.model.get_submodule(name).weight for name in names]
    spectra["all weights free"] = spectrum(updates)

    lines = ["update             values above 1 % of the first   share of |update|² in the first 4"]
    for name, values in spectra.items():
        squares = values.square()
        found[name] = {"used": int((values > 0.01).sum()), "first 4": (squares[:4].sum() / squares.sum()).item()}
        lines.append(f"{name:<18} {found[name]['used']:>30}   {found[name]['first 4']:>30.0%}")

    def draw(axes: Axes) -> None:
        for (name, values), colour, marker in zip(spectra.items(), PALETTE, "os^D", strict=False):
            shown = values[values > 1e-5]  # below lies rounding: a matrix of rank r has r values
            axes.plot(range(1, len(shown) + 1), shown, color=colour, marker=marker, markersize=3, label=name)
        axes.set(xscale="log", yscale="log", xlabel="number of the singular value")
        axes.set_ylabel("value / largest, median over layers")
        axes.set_title("Singular values of the update of q, k, v")

    return Lesson(lines, [draw], found | {"spectra": spectra})


if __name__ == "__main__":
    sys.exit(run_lesson("singular_values", lesson))
