"""What do autocast and GradScaler change? Number formats by module; gradients that underflow, counted.

    python -m experiments.lessons.loss_scaling

float16 knows nothing between 0 and 6e-8 and nothing above 65504. The loss is multiplied by a scale before the backward
pass, which moves all gradients up; autocast is what makes them float16 in the first place.
Source: Micikevicius et al. 2018, "Mixed Precision Training", sections 3.1 and 3.2.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from data.batching import Batch
from experiments.lessons.common import CPU, Lesson, Task, fit, run_lesson
from lora.config import LoRAConfig
from lora.inject import adapters
from lora.packed import PackedLoRALinear
from training.plots import PALETTE
from training.precision import Compute

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN = ("roberta.embeddings", "attention.self", "attention.output.dense", "attention.output", "classifier")
SHARES = {"zero": "G exactly zero", "subnormal": "G subnormal: bits lost", "broken": "G inf or nan"}
SCALES = tuple(2.0**k for k in range(0, 33, 4))


def backward(model: nn.Module, batch: Batch, compute: Compute, scale: float) -> list[torch.Tensor]:
    """G = dL/d[q|k|v] of every layer, as the backward pass sees it, and fills .grad; the loss times `scale`."""
    seen: list[torch.Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        output.register_hook(seen.append)

    handles = [m.register_forward_hook(keep) for m in model.modules() if isinstance(m, PackedLoRALinear)]
    model.zero_grad(set_to_none=True)
    with compute.autocast():
        loss = F.cross_entropy(model(batch.input_ids, batch.attention_mask), batch.labels)
    (scale * loss).backward()
    for handle in handles:
        handle.remove()
    return seen


def shares(model: nn.Module, batch: Batch, compute: Compute, scale: float) -> dict[str, float]:
    """Shares of the entries of G at real tokens: zero, subnormal in its format, inf or nan; and of dL/dB: zero."""
    gradients = backward(model, batch, compute, scale)
    entries = torch.cat([g[batch.attention_mask] for g in gradients if g.shape[1] > 1], dim=-1)
    of_B = torch.cat([layer.lora_B.grad.flatten() for layer in adapters(model).values()])
    return {
        "zero": (entries == 0).double().mean().item(),
        "subnormal": ((entries != 0) & (entries.abs() < torch.finfo(entries.dtype).tiny)).double().mean().item(),
        "broken": (~entries.isfinite()).double().mean().item(),
        "zero in dL/dB": (of_B == 0).double().mean().item(),
    }


def formats(model: nn.Module, batch: Batch, compute: Compute) -> dict[str, str]:
    """The number format of the outputs of some modules under autocast."""
    found: dict[str, str] = {}

    def note(name: str, output: torch.Tensor) -> None:
        found[name] = str(output.dtype).removeprefix("torch.")

    handles = []
    for name, module in model.named_modules():
        short = name.removeprefix("roberta.encoder.layer.0.")
        if short in SHOWN:
            handles.append(module.register_forward_hook(lambda _, __, output, short=short: note(short, output)))
    with torch.no_grad(), compute.autocast():
        model(batch.input_ids, batch.attention_mask)
    for handle in handles:
        handle.remove()
    return found


def lesson(
    task: Task,
    steps: int = 40,
    scales: Sequence[float] = SCALES,
    start_scale: float = 2.0**28,
    scaled_steps: int = 10,
) -> Lesson:
    """Count zeros and infinities among gradients in float16 at each scale; then watch GradScaler find its own."""
    fp16, bf16 = (Compute(torch.device("cpu"), precision) for precision in ("fp16", "bf16"))
    model = task.adapted(LoRAConfig(rank=6, alpha=14))
    batches = task.batches(steps + scaled_steps + 1)
    fit(model, batches[:steps])
    probe = batches[-1]
    found: dict[str, object] = {
        "formats": formats(model, probe, fp16),
        "fp32": shares(model, probe, CPU, 1.0),
        "bf16": shares(model, probe, bf16, 1.0),
        "fp16": {scale: shares(model, probe, fp16, scale) for scale in scales},
    }
    model.zero_grad(set_to_none=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=start_scale)
    trace: list[float] = []
    fit(
        model,
        batches[steps : steps + scaled_steps],
        compute=fp16,
        scaler=scaler,
        after_step=lambda step: trace.append(scaler.get_scale()),
    )
    found["trace"] = trace

    lines = ["output under autocast to fp16: " + ", ".join(f"{k} {v}" for k, v in found["formats"].items()), ""]
    lines.append("gradients            scale   G zero   G subnormal   G inf or nan   dL/dB zero")
    rows = [("fp32", 1.0, found["fp32"]), ("bf16", 1.0, found["bf16"])]
    rows += [("fp16", scale, row) for scale, row in found["fp16"].items()]
    for name, scale, row in rows:
        power = f"2^{math.log2(scale):.0f}"
        numbers = (
            f"{row['zero']:>6.2%}   {row['subnormal']:>11.2%}   {row['broken']:>12.2%}   {row['zero in dL/dB']:>10.2%}"
        )
        lines.append(f"{name:<18} {power:>7}   {numbers}")
    powers = " ".join(f"2^{math.log2(scale):.0f}" for scale in trace)
    lines += ["", f"GradScaler, begun at 2^{math.log2(start_scale):.0f}, after each step: {powers}"]

    def draw_shares(axes: Axes) -> None:
        for i, (key, label) in enumerate(SHARES.items()):
            values = [100 * row[key] for row in found["fp16"].values()]
            axes.plot(scales, values, color=PALETTE[i], marker="os^"[i], label=f"fp16: {label}")
        axes.set_xscale("log", base=2)
        axes.set_yscale("symlog", linthresh=0.01)  # a log axis that has a zero
        axes.set_ylim(-0.002, 300)
        axes.set(xlabel="loss scale", ylabel="share of the entries (%)", title="Underflow and overflow")

    def draw_trace(axes: Axes) -> None:
        axes.step(range(1, len(trace) + 1), trace, color=PALETTE[0], where="mid")
        axes.set_yscale("log", base=2)
        axes.set(xlabel="step", ylabel="loss scale after it", title="GradScaler halves until nothing overflows")

    return Lesson(lines, [draw_shares, draw_trace], found)


if __name__ == "__main__":
    sys.exit(run_lesson("loss_scaling", lesson))
