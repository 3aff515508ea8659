"""What each change for speed is worth: a training step with it against one without it, interleaved.

    python -m benchmarks.ablations

Each change is undone alone. The result is the ratio of the two times (without over with: more is better) as median and
range of the pairs. What was expected of each is in docs/performance.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

import data.batching
from benchmarks import measure
from benchmarks.own_process import step_in_own_process
from benchmarks.theirs import minilm_directory
from cpu.dropout import FastDropout
from data.batching import encode_split, training_batches
from roberta.model import Encoder
from roberta.tokenizer import TextTokenizer
from training.command_line import parse_options, run_command
from training.config import TrainConfig
from training.precision import Compute, choose_compute
from training.progress import say

Call = Callable[[], Any]
_FORWARD = Encoder.forward


@dataclass(frozen=True)
class Arguments:
    """Undo the changes for speed one by one."""

    only: str = ""
    """Only the rows whose name contains this."""
    model: Literal["minilm", "base"] = "minilm"
    """MiniLM's sizes and 32 texts of 64 tokens, or RoBERTa-base's and 32 of 128."""
    pairs: int = 12
    """Pairs of steps of each row."""
    text: Path = Path("../shared/ag_news_csv")
    """Folder of AG News' train.csv and test.csv; without it the rows of whole epochs are omitted."""


def random_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """As `bucketed_batches`, whatever the lengths."""
    rows = np.random.default_rng((seed, epoch)).permutation(len(lengths))
    return [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]


def main(arguments: Arguments) -> int:
    """Print one row per change. Returns the exit code."""
    torch.manual_seed(0)
    fp32, bf16 = choose_compute(TrainConfig(device="cpu")), Compute(torch.device("cpu"), "bf16")
    config, length = measure.MODELS[arguments.model], 64 if arguments.model == "minilm" else 128
    batch = measure.random_batch(config, 32, length, fp32.device)

    def step(dropout: float = 0.0, compute: Compute = fp32, compiled: str = "off") -> Call:
        train = measure.our_step(compute.compiled(measure.our_model(config, dropout, compute), compiled), compute)
        return lambda: train(batch)

    def epoch(padding: Literal["longest", "max_length"] = "longest") -> Call:
        tokenizer = TextTokenizer.from_directory(minilm_directory(), 128)
        split = encode_split(measure.ag_news(arguments.text, 320), tokenizer)
        train = measure.our_step(measure.our_model(config, 0.0, fp32), fp32)
        return lambda: [train(batch) for batch in training_batches(split, 32, tokenizer.pad_token_id, 0, 1, padding)]

    def undone(call: Call, undo: Callable[[Call], Call]) -> tuple[Call, Call]:
        return call, undo(call)

    with ExitStack() as processes:

        def in_own_process(**environment: str) -> Call:
            step = step_in_own_process("ours", arguments.model, 32, length, 0.0, **environment)
            return processes.enter_context(step)

        rows: dict[str, Callable[[], tuple[Call, Call]]] = {
            "last layer on <s> alone": lambda: undone(
                step(), patch.object(Encoder, "forward", lambda self, x, key_mask, _: _FORWARD(self, x, key_mask))
            ),
            "dropout masks from bulk random bits (dropout 0.1)": lambda: undone(
                step(dropout=0.1), patch.object(FastDropout, "forward", nn.Dropout.forward)
            ),
            "float32 matmuls by oneDNN": lambda: undone(step(), measure.default_matmul()),
            # Any setting of malloc in the environment, also an empty one, takes the place of the program's.
            "freed memory kept": lambda: (in_own_process(), in_own_process(GLIBC_TUNABLES="")),
            "torch.compile (a setting)": lambda: (step(compiled="on"), step()),
        }
        if (arguments.text / "train.csv").is_file():
            rows["batches of similar length (320 AG News texts)"] = lambda: undone(
                epoch(), patch.object(data.batching, "bucketed_batches", random_batches)
            )
            rows["padding to the longest of a batch (320 AG News texts)"] = lambda: (epoch(), epoch("max_length"))
        if arguments.model == "minilm":  # may take 20 times as long as float32
            rows["bfloat16 (a setting)"] = lambda: (step(compute=bf16), step())

        say(f"{measure.processor()}, {fp32.describe()}, torch {torch.__version__}; {arguments.model}, 32 x {length}")
        for name, pair in rows.items():
            if arguments.only in name:
                slow = "AG News" in name or "bfloat16" in name
                pairs = max(1, arguments.pairs // 4) if slow else arguments.pairs
                say(measure.interleaved(name, *pair(), fp32, pairs).line())
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(parse_options(Arguments, sys.argv[1:], prog="benchmarks.ablations"))))
