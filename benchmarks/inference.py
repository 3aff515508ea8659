"""How much faster RoBERTa-base answers than RoBERTa-large: random weights of both sizes, side by side.

    python -m benchmarks.inference --batch-size 64 --length 64

Speed does not depend on what the weights are. The published experiment reports a factor of 1.8.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass
from typing import Literal

import torch
from ops.memory import keep_freed_memory

from roberta.config import RobertaConfig
from roberta.model import RobertaForSequenceClassification
from training.command_line import parse_options, run_command
from training.config import TrainConfig
from training.precision import choose_compute


@dataclass(frozen=True)
class Arguments:
    """Time RoBERTa-base and RoBERTa-large by turns."""

    batch_size: int = 64
    """Texts in a call."""
    length: int = 64
    """Tokens of every text."""
    calls: int = 5
    """Calls of each model, after one to warm up."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""


@torch.no_grad()
def main(arguments: Arguments) -> int:
    """Print the time of a call of each and the ratio of every pair of calls: median and range."""
    compute = choose_compute(TrainConfig(device=arguments.device))
    keep_freed_memory()
    labels = tuple("abcd")
    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    models = {
        "base": RobertaForSequenceClassification(RobertaConfig(label_names=labels)),
        "large": RobertaForSequenceClassification(RobertaConfig(label_names=labels, **sizes)),
    }
    ids = torch.randint(3, 50_000, (arguments.batch_size, arguments.length), device=compute.device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        model.to(compute.device).eval()
    for call in range(arguments.calls + 1):
        for name, model in models.items():
            started = time.perf_counter()
            with compute.autocast():
                model(ids, mask).float().cpu()  # waits for a GPU
            if call > 0:
                seconds[name].append(time.perf_counter() - started)
    for name, times in seconds.items():
        texts = arguments.batch_size / statistics.median(times)
        print(f"{name:<6} {1000 * statistics.median(times):>9,.1f} ms a call (median)  {texts:>8,.1f} texts/s")
    ratios = [large / base for base, large in zip(seconds["base"], seconds["large"], strict=True)]
    print(
        f"base is {statistics.median(ratios):.2f} times faster than large ({min(ratios):.2f} to {max(ratios):.2f}), "
        f"{arguments.batch_size} texts of {arguments.length} tokens, {compute.describe()}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(parse_options(Arguments, sys.argv[1:], prog="benchmarks.inference"))))
