"""Which layers does training change most, when all matrices of the encoder have adapters?

python -m experiments.lessons.layer_updates
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from matplotlib.axes import Axes

from experiments.lessons.common import Lesson, Task, fit, run_lesson
from lora.adapter import adapters
from lora.config import LoRAConfig

MATRICES = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)


def lesson(task: Task, steps: int = 100) -> Lesson:
    """Train with adapters of rank 6 on all matrices. Measures |s B A| / |W| of each matrix of each layer."""
    model = task.adapted(LoRAConfig(rank=6, alpha=14, target_modules=MATRICES))
    losses = fit(model, task.batches(steps))
    layers = adapters(model)
    sizes = np.zeros((len(layers) // len(MATRICES), len(MATRICES)))
    with torch.no_grad():
        for i, j in np.ndindex(sizes.shape):
            layer = layers[f"roberta.encoder.layer.{i}.{MATRICES[j]}"]
            sizes[i, j] = layer.delta_weight().norm() / layer.base.weight.norm()
    lines = [f"|update| / |W| in %, after {steps} steps (loss {losses[0]:.2f} to {np.mean(losses[-10:]):.2f})"]
    lines.append("layer" + "".join(f"{name.removeprefix('attention.'):>20}" for name in MATRICES))
    lines += [f"{i:>5}" + "".join(f"{100 * size:>20.2f}" for size in row) for i, row in enumerate(sizes)]

    def draw(axes: Axes) -> None:
        image = axes.imshow(100 * sizes, cmap="cividis", origin="lower", aspect="auto", vmin=0)
        axes.figure.colorbar(image, ax=axes, label="|s B A| / |W| (%)")
        axes.grid(visible=False)
        axes.set_xticks(range(len(MATRICES)), [name.replace("attention.", "att.") for name in MATRICES])
        axes.tick_params(axis="x", rotation=35, labelsize=8)
        axes.set_yticks(range(len(sizes)))
        for (i, j), size in np.ndenumerate(sizes):
            colour = "black" if size > 0.6 * sizes.max() else "white"
            axes.text(j, i, f"{100 * size:.1f}", ha="center", va="center", fontsize=8, color=colour)
        axes.set(ylabel="layer (0 is next to the embeddings)", title="Size of the trained update")

    return Lesson(lines, [draw], {"sizes": sizes, "losses": losses})


if __name__ == "__main__":
    sys.exit(run_lesson("layer_updates", lesson))
