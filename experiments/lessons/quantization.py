"""What do 8 and 4 bits do to a weight, to logits and to training, and how does LoRA make up for it?

    python -m experiments.lessons.quantization

LoRA is trained over a base in float32, in 8 and in 4 bits (W', see `lora.quantized`), each from the same A and B = 0;
and in 4 bits from where LoftQ starts, alternating two steps so that W' + s B A is near W:

    W' <- quantize(W - s B A),     s B A <- the first r terms of the singular value decomposition of W - W'

Source: Li et al. 2023, "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", algorithm 1.
"""

from __future__ import annotations

import copy
import statistics
import sys

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from experiments.lessons.common import Lesson, Task, draw_losses, fit, relative_error, run_lesson
from lora.adapter import Adapter, adapters
from lora.config import LoRAConfig
from lora.inject import inject_lora
from lora.quantized import quantize
from training.plots import PALETTE

BASES = {"not quantized": 16, "8 bits": 8, "4 bits": 4, "4 bits, LoftQ": 4}


@torch.no_grad()
def start_by_loftq(layer: Adapter, weight: Tensor, rounds: int = 3) -> None:
    """Choose W', A and B of a LoRA layer so that W' + s B A is near W (out, in)."""
    for _ in range(rounds):
        layer.base.store(weight - layer.delta_weight())
        U, S, Vh = torch.linalg.svd(weight - layer.base.weight, full_matrices=False)
        root = (S[: layer.rank] / layer.scaling).sqrt()  # (r,)
        layer.lora_A.copy_(root[:, None] * Vh[: layer.rank])
        layer.lora_B.copy_(U[:, : layer.rank] * root)


def adapted(task: Task, base: str, rank: int) -> nn.Module:
    """The task's model over one of BASES, with LoRA on every linear layer of the encoder."""
    model = copy.deepcopy(task.model)
    weights = {name: layer.weight for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    if BASES[base] < 16:
        quantize(model.roberta, BASES[base])
    torch.manual_seed(task.seed)
    inject_lora(model, LoRAConfig(rank=rank, alpha=8, target_modules="all-linear"))
    if "LoftQ" in base:
        for name, layer in adapters(model).items():
            start_by_loftq(layer, weights[name])
    return model


def lesson(task: Task, steps: int = 45, rank: int = 8) -> Lesson:
    """Error of the weights and of the logits before training, and the training loss, over each base."""
    batches = task.batches(steps)
    plain = {name: layer.weight for name, layer in task.model.roberta.named_modules() if isinstance(layer, nn.Linear)}
    found, losses = {}, {}
    lines = ["base             error of W   error of logits   loss, last 10 steps   accuracy"]
    reference = pictured = torch.empty(0)
    rounded: dict[str, Tensor] = {}
    for base in BASES:
        model = adapted(task, base, rank)
        layers = adapters(model.roberta)
        errors = [relative_error(layer.merged()[0].detach(), plain[name]) for name, layer in layers.items()]
        with torch.no_grad():
            logits = torch.cat([model(batch.input_ids, batch.attention_mask) for batch in batches[:5]])
        if base == "not quantized":
            reference = logits
        name, layer = next(iter(layers.items()))
        pictured, rounded[base] = plain[name].detach().flatten()[:64], layer.base.weight.detach().flatten()[:64]
        losses[base] = fit(model, batches)
        error, of_logits = statistics.median(errors), relative_error(logits, reference)
        last, accuracy = statistics.mean(losses[base][-10:]), task.accuracy(model)
        found[base] = {"weights": error, "logits": of_logits, "loss": last}
        lines.append(f"{base:<16} {error:>9.2%} {of_logits:>16.2%} {last:>21.3f} {accuracy:>10.1%}")

    def draw_weights(axes: Axes) -> None:
        for number, base in enumerate(("4 bits", "8 bits")):
            axes.plot(pictured, rounded[base], "os"[number], color=PALETTE[number], markersize=4, label=base)
        axes.set(xlabel="W, the first 64 of a matrix", ylabel="W', dequantized", title="What a weight becomes")

    def draw_errors(axes: Axes) -> None:
        bases = [base for base in BASES if base != "not quantized"]
        for number, what in enumerate(("weights", "logits")):
            heights = [100 * found[base][what] for base in bases]
            places = [place + 0.4 * number - 0.2 for place in range(len(bases))]
            axes.bar(places, heights, width=0.38, color=PALETTE[number], label=what)
        axes.set_xticks(range(len(bases)), bases)
        axes.set(ylabel="relative error (%)", title="Before training, against W")

    def draw_training(axes: Axes) -> None:
        draw_losses(axes, losses)
        axes.set_title("LoRA over each base")

    return Lesson(lines, [draw_weights, draw_errors, draw_training], found)


if __name__ == "__main__":
    sys.exit(run_lesson("quantization", lesson))
