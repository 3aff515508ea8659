"""Are merged and unmerged logits the same? In fp32, bf16 and fp16, each compared with float64.

    python -m experiments.lessons.merged

x (W + s B A)^T and x W^T + s x A^T B^T are the same function; in floating point they round at different places.
"""

from __future__ import annotations

import copy
import sys

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from experiments.lessons.common import Lesson, Task, fit, relative_error, run_lesson
from lora.config import LoRAConfig
from lora.inject import merge_lora
from training.plots import PALETTE

FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORMS = ("unmerged", "merged in fp32, then rounded", "rounded, then merged")


def forms(model: nn.Module, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The trained model with weights in `dtype`, by the names in FORMS."""
    unmerged, merged_first, rounded_first = (copy.deepcopy(model) for _ in FORMS)
    merge_lora(merged_first)  # W + s B A in float32, then rounded once
    merge_lora(rounded_first.to(dtype))  # W + s B A in `dtype`
    return dict(zip(FORMS, (unmerged.to(dtype), merged_first.to(dtype), rounded_first), strict=True))


@torch.no_grad()
def lesson(task: Task, steps: int = 40, number: int = 5) -> Lesson:
    """Relative error of the logits on `number` batches, against the unmerged model in float64."""
    model = task.adapted(LoRAConfig(rank=6, alpha=14))
    with torch.enable_grad():
        fit(model, task.batches(steps))
    batches = task.batches(number)

    def logits(of: nn.Module) -> Tensor:
        return torch.cat([of(batch.input_ids, batch.attention_mask).double() for batch in batches])

    exact = copy.deepcopy(model).double()
    reference = logits(exact)
    merge_lora(exact)
    found: dict[str | tuple[str, str], float] = {"float64": relative_error(logits(exact), reference)}
    lines = [f"float64: merged and unmerged logits differ by a relative {found['float64']:.0e}", ""]
    lines.append("format   form                           error of the logits   other class than float64")
    for name, dtype in FORMATS.items():
        for form, variant in forms(model, dtype).items():
            values = logits(variant)
            found[name, form] = error = relative_error(values, reference)
            other = int((values.argmax(1) != reference.argmax(1)).sum())
            lines.append(f"{name:<8} {form:<30} {error:>19.1e}   {other:>8} of {len(reference)}")

    def draw(axes: Axes) -> None:
        for i, form in enumerate(FORMS):
            heights = [found[name, form] for name in FORMATS]
            axes.bar([j + 0.27 * (i - 1) for j in range(3)], heights, width=0.25, color=PALETTE[i], label=form)
        axes.set_xticks(range(3), FORMATS)
        axes.set(yscale="log", ylabel="relative error of the logits", title="Against float64, unmerged")
        axes.set_ylim(1e-8, 1)  # room for the legend

    return Lesson(lines, [draw], found)


if __name__ == "__main__":
    sys.exit(run_lesson("merged", lesson))
