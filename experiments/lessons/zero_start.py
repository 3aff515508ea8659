"""Why does B start at zero, and A not? The four possible initializations.

    python -m experiments.lessons.zero_start

dL/dA = s B^T G^T X and dL/dB = s G^T X A^T: each gradient has the other matrix as a factor.
Source: Hu et al. 2021, section 4.1; docs/walkthrough.md, section 8.
"""

from __future__ import annotations

import math
import statistics
import sys

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from torch import Tensor, nn

from data.batching import Batch
from experiments.lessons.common import Lesson, Task, draw_losses, fit, relative_error, run_lesson
from lora.adapter import adapters
from lora.config import LoRAConfig
from training.plots import PALETTE

# name: whether A is random, whether B is
STARTS = {
    "A random, B zero": (True, False),
    "A zero, B random": (False, True),
    "both random": (True, True),
    "both zero": (False, False),
}


def start(model: nn.Module, random_A: bool, random_B: bool) -> None:
    """Initialize all A and B: Kaiming-uniform, as `LoRALinear.reset_parameters` draws A, or zero."""
    for layer in adapters(model).values():
        for matrix, random in ((layer.lora_A, random_A), (layer.lora_B, random_B)):
            if random:
                nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
            else:
                nn.init.zeros_(matrix)


def probe(model: nn.Module, batch: Batch) -> tuple[Tensor, tuple[float, float]]:
    """Logits, and the norms |dL/dA| and |dL/dB| over all layers. Leaves no .grad behind."""
    logits = model(batch.input_ids, batch.attention_mask)
    F.cross_entropy(logits, batch.labels).backward()
    layers = adapters(model).values()
    norm_A, norm_B = (
        torch.stack([matrix.grad.norm() for matrix in matrices]).norm().item()
        for matrices in ([layer.lora_A for layer in layers], [layer.lora_B for layer in layers])
    )
    model.zero_grad(set_to_none=True)
    return logits.detach(), (norm_A, norm_B)


def lesson(task: Task, steps: int = 40) -> Lesson:
    """Train from each initialization. Gradients of A and B before the first step and after the last."""
    *batches, held_out = task.batches(steps + 1)
    with torch.no_grad():
        pretrained = task.model.eval()(held_out.input_ids, held_out.attention_mask)
    losses, found = {}, {}
    for name, random in STARTS.items():
        model = task.adapted(LoRAConfig(rank=6, alpha=14))
        start(model, *random)
        logits, first = probe(model, held_out)
        losses[name] = fit(model, batches)
        _, last = probe(model, held_out)
        loss = statistics.fmean(losses[name][-10:])
        found[name] = {"moved": relative_error(logits, pretrained), "first": first, "last": last, "loss": loss}

    lines = [
        f"{'start':<18} {'logits moved':>12}   {'|dL/dA|, |dL/dB| first':>22}   {'and at the end':>19}   last loss"
    ]
    for name, row in found.items():
        first, last = (f"{a:9.1e} {b:9.1e}" for a, b in (row["first"], row["last"]))
        lines.append(f"{name:<18} {row['moved']:>12.0%}   {first:>22}   {last:>19}   {row['loss']:>9.3f}")

    def draw_gradients(axes: Axes) -> None:
        for k, label in enumerate(("|dL/dA|", "|dL/dB|")):
            norms = [row["first"][k] for row in found.values()]
            at = [i - 0.2 + 0.4 * k for i in range(len(norms))]
            bars = axes.bar(at, norms, width=0.36, color=PALETTE[k], label=label)
            axes.bar_label(bars, ["" if norm else "0" for norm in norms])
        axes.set_xticks(range(len(found)), [name.replace(", ", ",\n") for name in found], fontsize=8)
        axes.set(title="Gradients before the first step", ylabel="norm over all layers")

    def draw_curves(axes: Axes) -> None:
        draw_losses(axes, losses)
        axes.set_title("Training, the head included")

    return Lesson(lines, [draw_curves, draw_gradients], found)


if __name__ == "__main__":
    sys.exit(run_lesson("zero_start", lesson))
