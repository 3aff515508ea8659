"""What do autocast and GradScaler change? Number formats by module, and the share of gradients that underflow.

    python -m experiments.lessons.loss_scaling

float16 represents no magnitude between 0 and 6e-8 and none above 65504. Autocast computes matmuls and their gradients
in float16. Multiplying the loss by a scale before the backward pass moves all gradients away from underflow.
Source: Micikevicius et al. 2018, "Mixed Precision Training", sections 3.1 and 3.2.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from torch import Tensor, nn

from data.batching import Batch
from experiments.lessons.common import CPU, Lesson, Task, fit, run_lesson
from lora.adapter import adapters
from lora.config import LoRAConfig
from training.plots import PALETTE
from training.precision import Compute

MODULES = ("roberta.embeddings", "attention.self", "attention.output.dense", "attention.output", "classifier")
SHARES = {"zero": "G exactly zero", "subnormal": "G subnormal: bits lost", "broken": "G inf or nan"}
SCALES = tuple(2.0**k for k in range(0, 33, 4))


def backward(model: nn.Module, batch: Batch, compute: Compute, scale: float) -> list[Tensor]:
    """Backward pass of `scale` times the loss, which fills .grad. Returns G = dL/dY of every adapted layer Y."""
    gradients: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        output.register_hook(gradients.append)

    handles = [layer.register_forward_hook(keep) for layer in adapters(model).values()]
    model.zero_grad(set_to_none=True)
    with compute.autocast():
        loss = F.cross_entropy(model(batch.input_ids, batch.attention_mask), batch.labels)
    (scale * loss).backward()
    for handle in handles:
        handle.remove()
    return gradients


def shares(model: nn.Module, batch: Batch, compute: Compute, scale: float) -> dict[str, float]:
    """Shares of the entries of G at real tokens that are zero, subnormal, inf or nan; share of zeros in dL/dB."""
    gradients = backward(model, batch, compute, scale)
    # The query of the last layer, computed on <s> alone, is left out.
    G = torch.cat([g[batch.attention_mask] for g in gradients if g.shape[1] > 1], dim=-1)
    dB = torch.cat([layer.lora_B.grad.flatten() for layer in adapters(model).values()])
    masks = {
        "zero": G == 0,
        "subnormal": (G != 0) & (G.abs() < torch.finfo(G.dtype).tiny),
        "broken": ~G.isfinite(),
        "zero in dL/dB": dB == 0,
    }
    return {name: mask.double().mean().item() for name, mask in masks.items()}


def formats(model: nn.Module, batch: Batch, compute: Compute) -> dict[str, str]:
    """Number formats of the outputs of MODULES, of the first layer and around it, under autocast."""
    found: dict[str, str] = {}

    def note(name: str, _module: nn.Module, _inputs: object, output: Tensor) -> None:
        found[name] = str(output.dtype).removeprefix("torch.")

    handles = []
    for name, module in model.named_modules():
        name = name.removeprefix("roberta.encoder.layer.0.")
        if name in MODULES:
            handles.append(module.register_forward_hook(partial(note, name)))
    with torch.no_grad(), compute.autocast():
        model(batch.input_ids, batch.attention_mask)
    for handle in handles:
        handle.remove()
    return found


def power_of_two(scale: float) -> str:
    """256.0 as 2^8."""
    return f"2^{math.log2(scale):.0f}"


def lesson(
    task: Task,
    steps: int = 40,
    scales: Sequence[float] = SCALES,
    start_scale: float = 2.0**28,
    scaled_steps: int = 10,
) -> Lesson:
    """Count zeros and infinities among float16 gradients at each scale, then follow the scale of GradScaler."""
    fp16, bf16 = (Compute(torch.device("cpu"), precision) for precision in ("fp16", "bf16"))
    model = task.adapted(LoRAConfig(rank=6, alpha=14))
    batches = task.batches(steps + scaled_steps + 1)
    fit(model, batches[:steps])
    probe = batches[-1]
    found: dict[str, Any] = {
        "formats": formats(model, probe, fp16),
        "fp32": shares(model, probe, CPU, 1.0),
        "bf16": shares(model, probe, bf16, 1.0),
        "fp16": {scale: shares(model, probe, fp16, scale) for scale in scales},
    }
    model.zero_grad(set_to_none=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=start_scale)
    trace: list[float] = []
    scaled_batches = batches[steps : steps + scaled_steps]
    fit(model, scaled_batches, compute=fp16, scaler=scaler, after_step=lambda: trace.append(scaler.get_scale()))
    found["trace"] = trace

    lines = ["output under autocast to fp16: " + ", ".join(f"{k} {v}" for k, v in found["formats"].items()), ""]
    lines.append("gradients            scale   G zero   G subnormal   G inf or nan   dL/dB zero")
    rows = [("fp32", 1.0, found["fp32"]), ("bf16", 1.0, found["bf16"])]
    rows += [("fp16", scale, row) for scale, row in found["fp16"].items()]
    for name, scale, row in rows:
        zero, subnormal, broken, zero_in_dB = row.values()
        numbers = f"{zero:>6.2%}   {subnormal:>11.2%}   {broken:>12.2%}   {zero_in_dB:>10.2%}"
        lines.append(f"{name:<18} {power_of_two(scale):>7}   {numbers}")
    lines += ["", f"GradScaler, initial scale {power_of_two(start_scale)}, scale after each step:"]
    lines[-1] += "".join(f" {power_of_two(scale)}" for scale in trace)

    def draw_shares(axes: Axes) -> None:
        for i, (key, label) in enumerate(SHARES.items()):
            values = [100 * row[key] for row in found["fp16"].values()]
            axes.plot(scales, values, color=PALETTE[i], marker="os^"[i], label=f"fp16: {label}")
        axes.set_xscale("log", base=2)
        axes.set_yscale("symlog", linthresh=0.01)  # logarithmic, with a zero
        axes.set_ylim(-0.002, 300)
        axes.set(xlabel="loss scale", ylabel="share of the entries (%)", title="Underflow and overflow")

    def draw_trace(axes: Axes) -> None:
        axes.step(range(1, len(trace) + 1), trace, color=PALETTE[0], where="mid")
        axes.set_yscale("log", base=2)
        axes.set(xlabel="step", ylabel="loss scale after it", title="GradScaler halves until nothing overflows")

    return Lesson(lines, [draw_shares, draw_trace], found)


if __name__ == "__main__":
    sys.exit(run_lesson("loss_scaling", lesson))
