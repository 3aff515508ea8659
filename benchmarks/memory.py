"""Cost of loading a checkpoint: seconds, and memory beyond the weights.

    python -m benchmarks.loading

A checkpoint of RoBERTa-large's size with random weights is written to a temporary folder and loaded in a process of its
own. Only anonymous memory counts (`RssAnon` in Linux' /proc/self/status, read every two milliseconds): the file itself
is mapped, and the kernel can drop its pages.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from benchmarks.measure import MODELS
from roberta.model import RobertaForSequenceClassification
from roberta.weights import WEIGHTS_NAME, load_checkpoint, save_checkpoint
from training.command_line import parse_options, run_command
from training.progress import say


@dataclass(frozen=True)
class Arguments:
    """Load a checkpoint and print what it costs."""

    model: Literal["minilm", "base", "large"] = "large"
    """Model whose sizes it has."""


def anonymous_bytes() -> int:
    """Memory of this process without mapped files."""
    found = re.search(r"^RssAnon:\s+(\d+) kB$", Path("/proc/self/status").read_text(encoding="ascii"), re.M)
    assert found is not None, "needs Linux"
    return 1024 * int(found[1])


def load(folder: str) -> None:
    """Load, and print seconds, bytes of weights, and the growth of anonymous memory at its peak and at the end."""
    torch.zeros(1)  # torch's own initial memory
    before, readings, done = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            readings.append(anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    model = load_checkpoint(folder)
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    print(seconds, weights, max(readings) - before, anonymous_bytes() - before)


def main(arguments: Arguments) -> int:
    """Write, load, print. Returns the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(RobertaForSequenceClassification(MODELS[arguments.model]), folder)
        size = (Path(folder) / WEIGHTS_NAME).stat().st_size
        command = [sys.executable, "-c", f"from benchmarks.loading import load; load({folder!r})"]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    seconds, *counted = (float(text) for text in out.split())
    weights, peak, after = (number / 2**20 for number in counted)
    say(
        f"{arguments.model}, {size / 2**20:,.0f} MiB of safetensors: {seconds:.2f} s, weights {weights:,.0f} MiB, "
        f"memory grew by {peak:,.0f} MiB at its peak and by {after:,.0f} MiB at the end"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(parse_options(Arguments, sys.argv[1:], prog="benchmarks.loading"))))
