"""What do alpha / r and alpha / sqrt(r) do to the size of the update, as r grows?

    python -m experiments.lessons.scaling

Source: Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", theorem 3.2.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from experiments.lessons.common import Lesson, Task, fit, run_lesson
from lora.config import LoRAConfig
from lora.inject import adapters
from training.plots import PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMES = {False: "alpha / r", True: "alpha / sqrt(r)"}


@torch.no_grad()
def update_size(model: torch.nn.Module) -> float:
    """|s B A| / |W| (Frobenius norms), the mean over all adapted layers."""
    sizes = [layer.delta_weight().norm() / layer.base.weight.norm() for layer in adapters(model).values()]
    return torch.stack(sizes).mean().item()


def lesson(task: Task, steps: int = 25, ranks: Sequence[int] = (1, 4, 16, 64), alpha: float = 8.0) -> Lesson:
    """Train with each rank and each of the two scales, alpha the same; the size of the update after the last step."""
    batches = task.batches(steps)
    found: dict[tuple[bool, int], dict[str, float]] = {}
    for use_rslora in (False, True):
        for rank in ranks:
            model = task.adapted(LoRAConfig(rank=rank, alpha=alpha, use_rslora=use_rslora))
            losses = fit(model, batches)
            scale = next(iter(adapters(model).values())).scaling
            tail = losses[-5:]
            found[use_rslora, rank] = {
                "scale": scale,
                "size": update_size(model),
                "loss": sum(tail) / len(tail),
            }
    lines = [f"alpha = {alpha:g}          rank   scale   |update| / |W|   loss of the last 5"]
    for (use_rslora, rank), row in found.items():
        size, loss = 100 * row["size"], row["loss"]
        lines.append(f"{NAMES[use_rslora]:<17} {rank:>5}  {row['scale']:>6.3f}   {size:>12.2f} %   {loss:>18.3f}")

    def panel(key: str, label: str, factor: float) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            for use_rslora, colour, marker in ((False, PALETTE[0], "o"), (True, PALETTE[1], "s")):
                values = [factor * found[use_rslora, rank][key] for rank in ranks]
                axes.plot(ranks, values, color=colour, marker=marker, label=NAMES[use_rslora])
            axes.set_xscale("log", base=2)
            axes.set_xticks(ranks, [str(rank) for rank in ranks])
            axes.set(xlabel="rank r", ylabel=label)
            axes.set_ylim(bottom=0)

        return draw

    panels = [panel("size", "|s B A| / |W|, mean over layers (%)", 100), panel("loss", "loss of the last 5 steps", 1)]
    return Lesson(lines, panels, found)


if __name__ == "__main__":
    sys.exit(run_lesson("scaling", lesson))
