"""What each method changes in one weight matrix W: the same task and batches, and dW = W' - W afterwards.

    python -m experiments.lessons.methods

W is the value matrix of the middle layer, which all methods with a dW have among their targets.
Sources: those in docs/methods.md. Lengths and directions of rows: Liu et al. 2024, "DoRA", section 3.2.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from torch import Tensor

from experiments.lessons.common import Lesson, Task, fit, run_lesson
from lora.adapter import Adapter
from lora.config import AdaLoRAConfig, BitFitConfig, FullConfig, IA3Config, LoRAConfig, MethodConfig, VeRAConfig
from lora.inject import count_parameters
from training.plots import PALETTE

FIRST = 6  # the rank of LoRA here, and so the number of W's singular directions that PiSSA starts from
CORNER = 48  # rows and columns of dW in the picture


def methods(steps: int) -> dict[str, tuple[MethodConfig, float]]:
    """Settings and learning rate of each method: the best rate of those in docs/lessons.md, with seed 1.

    LoRA and its three variants have about as many parameters, VeRA has as many as (IA)^3.
    """
    pruning = {"target_r": 4, "tinit": steps // 6, "tfinal": steps // 3, "total_step": steps}
    return {
        "LoRA": (LoRAConfig(rank=FIRST, alpha=14), 3e-3),
        "DoRA": (LoRAConfig(rank=FIRST, alpha=14, use_dora=True), 3e-3),
        "PiSSA": (LoRAConfig(rank=FIRST, alpha=14, init="pissa"), 3e-3),
        "AdaLoRA": (AdaLoRAConfig(init_r=FIRST, alpha=14, **pruning), 1e-2),
        "VeRA": (VeRAConfig(rank=512), 3e-2),
        "(IA)³": (IA3Config(), 1e-2),
        "all weights": (FullConfig(), 3e-4),
        "BitFit": (BitFitConfig(), 3e-3),
        "head only": (FullConfig(modules_to_save=("classifier",)), 1e-2),
    }


@torch.no_grad()
def compare(old: Tensor, new: Tensor) -> dict[str, Any]:
    """dW = new - old, (out, in) in float64, and its numbers: size, singular values, lengths and angles of the rows."""
    delta, values = new - old, torch.linalg.svdvals(new - old)
    U, _, Vh = torch.linalg.svd(old)
    U, Vh = U[:, :FIRST], Vh[:FIRST]  # W's first singular directions
    outside = delta - U @ (U.T @ delta)
    outside = outside - outside @ Vh.T @ Vh  # (I - U U^T) dW (I - V V^T)
    length = new.norm(dim=1) / old.norm(dim=1) - 1  # of each row, (out,)
    angle = F.cosine_similarity(old, new).clamp(max=1).arccos().rad2deg()
    energy = values.square().cumsum(0) / values.square().sum()
    return {
        "size": (delta.norm() / old.norm()).item(),
        "rank": int((values > 1e-9 * values[0]).sum()),
        "90 %": 1 + int((energy < 0.9).sum()),
        "inside": 1 - (outside.norm() / delta.norm()).square().item(),
        "length": length.abs().mean().item(),
        "angle": angle.mean().item(),
        "delta": delta,
        "values": values,
        "rows": (angle, 100 * length),
    }


def lesson(task: Task, steps: int = 60) -> Lesson:
    """Train with each method. Records trained parameters, validation accuracy and what has changed in W."""
    batches, found = task.batches(steps), {}
    name = f"roberta.encoder.layer.{task.model.config.num_hidden_layers // 2}.attention.self.value"
    old = task.model.get_submodule(name).weight.detach().double()
    panels: list[Callable[[Axes], None]] = []
    lines = [f"W: {name}", ""]
    lines.append("method           trained    rate  accuracy  |dW|/|W|  rank  90 %  inside    length    angle")
    for (method, (config, rate)), colour in zip(methods(steps).items(), (*PALETTE, "black"), strict=True):
        model = task.adapted(config)
        fit(model, batches, rate)
        row: dict[str, Any] = {"trained": count_parameters(model).trainable, "accuracy": task.accuracy(model)}
        layer = model.double().get_submodule(name)  # float64: dW without the rounding of W'
        new = layer.merged()[0] if isinstance(layer, Adapter) else layer.weight
        line = f"{method:<12} {row['trained']:>11,}  {rate:>6.0e}  {row['accuracy']:>8.1%}"
        if torch.equal(old, new):
            line += "      W is as it was"
        else:
            row |= compare(old, new)
            line += f"  {row['size']:>8.2%}  {row['rank']:>4}  {row['90 %']:>4}  {row['inside']:>6.1%}"
            line += f"  {row['length']:>8.2%}  {row['angle']:>6.2f}°"
            panels += draw(method, row, torch.linalg.svdvals(old), colour)
        found[method] = row
        lines.append(line)
    return Lesson(lines, panels, found, columns=3)


def draw(method: str, row: dict[str, Any], values_of_W: Tensor, colour: str) -> list[Callable[[Axes], None]]:
    """Three panels of one method: a corner of dW, its singular values, and each row's length and angle."""
    corner, values, first = row["delta"][:CORNER, :CORNER].numpy(), row["values"][: row["rank"]], method == "LoRA"
    most = abs(corner).max()

    def image(axes: Axes) -> None:
        axes.imshow(corner, cmap="RdBu", vmin=-most, vmax=most, interpolation="nearest")
        axes.set_title(f"{method}: dW, ±{most:.2g}")
        axes.set_axis_off()

    def spectrum(axes: Axes) -> None:
        axes.plot(range(1, len(values_of_W) + 1), values_of_W, color="0.6", label="W" if first else None)
        axes.plot(range(1, len(values) + 1), values, ".-", color=colour, label="dW" if first else None)
        axes.set(xscale="log", yscale="log", xlim=(0.9, None), ylim=(3e-4, 20), ylabel="singular value")
        axes.set_title(f"rank {row['rank']}, |dW| = {row['size']:.1%} of |W|")

    def rows(axes: Axes) -> None:
        axes.plot(*row["rows"], ".", color=colour, markersize=3)
        axes.set(xlim=(-0.5, 16), ylim=(-21, 21), xlabel="angle (°)", ylabel="length (%)")
        axes.set_title(f"rows: length {row['length']:.2%}, angle {row['angle']:.2f}°")

    return [image, spectrum, rows]


if __name__ == "__main__":
    sys.exit(run_lesson("methods", lesson))
