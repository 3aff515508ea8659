"""Are merged and unmerged logits the same? In fp32, bf16 and fp16, each against float64.

    python -m experiments.lessons.merged

x (W + s B A)^T and x W^T + s x A^T B^T are one function; in floating point they round in different places.
"""

from __future__ import annotations

import copy
import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from experiments.lessons.common import Lesson, Task, fit, run_lesson
from lora.config import LoRAConfig
from lora.inject import merge_lora
from training.plots import PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def forms(model: nn.Module, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The trained model with weights in `dtype`, in three forms."""
    unmerged, merged_first, merged_last = (copy.deepcopy(model) for _ in range(3))
    merge_lora(merged_first)  # W + s B A rounded once, from float32
    merge_lora(merged_last.to(dtype))  # the sum is made in the short format itself
    return {
        "unmerged": unmerged.to(dtype),
        "merged in fp32, then rounded": merged_first.to(dtype),
        "rounded, then merged": merged_last,
    }


@torch.no_grad()
def lesson(task: Task, steps: int = 40, number: int = 5) -> Lesson:
    """Error of the logits: root mean square over that of the logits in float64, on `number` batches."""
    model = task.adapted(LoRAConfig(rank=6, alpha=14))
    with torch.enable_grad():
        fit(model, task.batches(steps))
    batches = task.batches(number)

    def logits(of: nn.Module) -> Tensor:
        return torch.cat([of(batch.input_ids, batch.attention_mask).double() for batch in batches])

    exact = copy.deepcopy(model).double()
    truth = logits(exact)
    merge_lora(exact)
    exactly = ((logits(exact) - truth).norm() / truth.norm()).item()
    found = {"float64": exactly}
    lines = [f"float64: merged and unmerged differ by {exactly:.0e} of the logits", ""]
    lines.append("format   form                           error of the logits   other class than float64")
    for name, dtype in FORMATS.items():
        for form, one in forms(model, dtype).items():
            values = logits(one)
            error = ((values - truth).norm() / truth.norm()).item()
            other = int((values.argmax(1) != truth.argmax(1)).sum())
            found[name, form] = error
            lines.append(f"{name:<8} {form:<30} {error:>19.1e}   {other:>8} of {len(truth)}")

    def draw(axes: Axes) -> None:
        kinds = list(dict.fromkeys(form for key in found if key != "float64" for form in key[1:]))
        for i, form in enumerate(kinds):
            heights = [found[name, form] for name in FORMATS]
            axes.bar([j + 0.27 * (i - 1) for j in range(3)], heights, width=0.25, color=PALETTE[i], label=form)
        axes.set_xticks(range(3), FORMATS)
        axes.set(yscale="log", ylabel="relative error of the logits", title="Against float64, unmerged")
        axes.set_ylim(1e-8, 1)  # room for the legend

    return Lesson(lines, [draw], found)


if __name__ == "__main__":
    sys.exit(run_lesson("merged", lesson))
