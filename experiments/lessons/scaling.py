"""How does the size of the update depend on the rank r, with scale alpha / r and with alpha / sqrt(r)?

    python -m experiments.lessons.scaling

Source: Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", theorem 3.2.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence

import torch
from matplotlib.axes import Axes
from torch import nn

from experiments.lessons.common import Lesson, Task, fit, run_lesson
from lora.adapter import adapters
from lora.config import LoRAConfig
from training.plots import PALETTE

NAMES = {False: "alpha / r", True: "alpha / sqrt(r)"}


@torch.no_grad()
def update_size(model: nn.Module) -> float:
    """|s B A| / |W| (Frobenius norms), the mean over all adapted layers."""
    sizes = [layer.delta_weight().norm() / layer.base.weight.norm() for layer in adapters(model).values()]
    return torch.stack(sizes).mean().item()


def lesson(task: Task, steps: int = 25, ranks: Sequence[int] = (1, 4, 16, 64), alpha: float = 8.0) -> Lesson:
    """Train with each rank and both scales at the same alpha. Measures the update after the last step."""
    batches = task.batches(steps)
    found: dict[tuple[bool, int], dict[str, float]] = {}
    for use_rslora in NAMES:
        for rank in ranks:
            model = task.adapted(LoRAConfig(rank=rank, alpha=alpha, use_rslora=use_rslora))
            losses = fit(model, batches)
            found[use_rslora, rank] = {
                "scale": next(iter(adapters(model).values())).scaling,
                "size": update_size(model),
                "loss": statistics.fmean(losses[-5:]),
            }
    lines = [f"alpha = {alpha:g}          rank   scale   |update| / |W|   loss of the last 5"]
    for (use_rslora, rank), row in found.items():
        size, loss = 100 * row["size"], row["loss"]
        lines.append(f"{NAMES[use_rslora]:<17} {rank:>5}  {row['scale']:>6.3f}   {size:>12.2f} %   {loss:>18.3f}")

    def panel(key: str, label: str, factor: float) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            for (use_rslora, name), colour, marker in zip(NAMES.items(), PALETTE, "os", strict=False):
                values = [factor * found[use_rslora, rank][key] for rank in ranks]
                axes.plot(ranks, values, color=colour, marker=marker, label=name)
            axes.set_xscale("log", base=2)
            axes.set_xticks(ranks, [str(rank) for rank in ranks])
            axes.set(xlabel="rank r", ylabel=label)
            axes.set_ylim(bottom=0)

        return draw

    panels = [panel("size", "|s B A| / |W|, mean over layers (%)", 100), panel("loss", "loss of the last 5 steps", 1)]
    return Lesson(lines, panels, found)


if __name__ == "__main__":
    sys.exit(run_lesson("scaling", lesson))
