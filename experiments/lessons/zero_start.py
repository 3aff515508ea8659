"""Why does B start at zero, and A not? The four ways to begin.

    python -m experiments.lessons.zero_start

dL/dA = s B^T G^T X and dL/dB = s G^T X A^T: each gradient holds the other matrix as a factor.
Source: Hu et al. 2021, section 4.1; docs/walkthrough.md, section 8.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from experiments.lessons.common import Lesson, Task, draw_losses, fit, run_lesson
from lora.config import LoRAConfig
from lora.inject import adapters
from training.plots import PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STARTS = {
    "A random, B zero": ("random", "zero"),
    "A zero, B random": ("zero", "random"),
    "both random": ("random", "random"),
    "both zero": ("zero", "zero"),
}


def start(model: nn.Module, start_of_A: str, start_of_B: str) -> None:
    """Fill all A and B: "random" is the Kaiming-uniform draw of `LoRALinear.reset_parameters`, for B too."""
    for layer in adapters(model).values():
        for matrix, how in ((layer.lora_A, start_of_A), (layer.lora_B, start_of_B)):
            if how == "random":
                nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
            else:
                nn.init.zeros_(matrix)


def gradient_norms(model: nn.Module) -> tuple[float, float]:
    """The norms of the gradients of all A together and of all B together."""
    layers = adapters(model).values()
    norms = [[getattr(layer, name).grad.norm() for layer in layers] for name in ("lora_A", "lora_B")]
    return tuple(torch.stack(each).norm().item() for each in norms)


def lesson(task: Task, steps: int = 40) -> Lesson:
    """Train from each of the four starts; gradients of A and B before the first step and after the last."""
    batches = task.batches(steps + 1)
    probe, batches = batches[-1], batches[:-1]
    losses, found = {}, {}
    with torch.no_grad():
        pretrained = task.model.eval()(probe.input_ids, probe.attention_mask)
    for name, ways in STARTS.items():
        model = task.adapted(LoRAConfig(rank=6, alpha=14))
        start(model, *ways)
        norms = []
        for trained in (False, True):
            if trained:
                losses[name] = fit(model, batches)
            logits = model(probe.input_ids, probe.attention_mask)
            if not trained:
                moved = ((logits - pretrained).norm() / pretrained.norm()).item()
            F.cross_entropy(logits, probe.labels).backward()
            norms.append(gradient_norms(model))
            model.zero_grad(set_to_none=True)
        tail = losses[name][-10:]
        found[name] = {"moved": moved, "first": norms[0], "last": norms[1], "loss": sum(tail) / len(tail)}

    lines = [
        f"{'start':<18} {'logits moved':>12}   {'|dL/dA|, |dL/dB| first':>22}   {'and at the end':>19}   last loss"
    ]
    for name, row in found.items():
        first, last = (f"{a:9.1e} {b:9.1e}" for a, b in (row["first"], row["last"]))
        lines.append(f"{name:<18} {row['moved']:>12.0%}   {first:>22}   {last:>19}   {row['loss']:>9.3f}")

    def bars(axes: Axes) -> None:
        for i, row in enumerate(found.values()):
            axes.bar([i - 0.2, i + 0.2], row["first"], width=0.36, color=[PALETTE[0], PALETTE[1]])
            for place, norm in zip((i - 0.2, i + 0.2), row["first"], strict=True):
                if norm == 0:
                    axes.text(place, 0, "0", ha="center", va="bottom")
        axes.bar([0], [0], color=PALETTE[0], label="|dL/dA|")
        axes.bar([0], [0], color=PALETTE[1], label="|dL/dB|")
        axes.set_xticks(range(len(found)), [name.replace(", ", ",\n") for name in found], fontsize=8)
        axes.set(title="Gradients before the first step", ylabel="norm over all layers")

    def curves(axes: Axes) -> None:
        draw_losses(axes, losses)
        axes.set_title("Training, the head included")

    return Lesson(lines, [curves, bars], found)


if __name__ == "__main__":
    sys.exit(run_lesson("zero_start", lesson))
