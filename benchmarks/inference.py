"""How much faster RoBERTa-base answers than RoBERTa-large: random weights of both sizes, interleaved.

    python -m benchmarks.inference --batch-size 64 --length 64

Speed does not depend on the values of the weights. The published experiment reports a factor of 1.8.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from benchmarks.measure import MODELS, interleaved, placed, random_batch
from roberta.model import RobertaForSequenceClassification
from training.command_line import parse_options, run_command
from training.config import TrainConfig
from training.precision import choose_compute
from training.progress import say


@dataclass(frozen=True)
class Arguments:
    """Time RoBERTa-base and RoBERTa-large, interleaved."""

    batch_size: int = 64
    """Texts per call."""
    length: int = 64
    """Tokens per text."""
    calls: int = 5
    """Timed calls of each model."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""


def main(arguments: Arguments) -> int:
    """Print the time of a call of each and the ratio of every pair of calls. Returns the exit code."""
    compute = choose_compute(TrainConfig(device=arguments.device))
    batch = random_batch(MODELS["base"], arguments.batch_size, arguments.length, compute.device)

    def infer(size: str) -> Callable[[], torch.Tensor]:
        model = placed(RobertaForSequenceClassification(MODELS[size]), compute).eval()

        @torch.no_grad()
        def call() -> torch.Tensor:
            with compute.autocast():
                return model(batch.input_ids, batch.attention_mask)

        return call

    ratio = interleaved("base against large", infer("base"), infer("large"), compute, arguments.calls)
    texts = [f"{arguments.batch_size / seconds:,.1f}" for seconds in (ratio.ours, ratio.theirs)]
    say(f"{arguments.batch_size} texts of {arguments.length} tokens, {compute.describe()}")
    say(f"{ratio.line()} per call   {' and '.join(texts)} texts/s")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(parse_options(Arguments, sys.argv[1:], prog="benchmarks.inference"))))
