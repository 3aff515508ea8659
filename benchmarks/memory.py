"""Memory and time of loading a checkpoint and of training steps, with what saves memory.

    python -m benchmarks.memory --model large --rows 4

A checkpoint with random weights is written to a temporary folder; each case loads it and makes training steps in a
process of its own. Only anonymous memory counts (`RssAnon` in Linux' /proc/self/status, read every two milliseconds):
the file itself is mapped, and the kernel can drop its pages.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.measure import LORA, MODELS, our_step, placed, processor, random_batch
from lora.config import FullConfig
from lora.inject import inject_lora
from roberta.config import RobertaConfig
from roberta.model import RobertaForSequenceClassification
from roberta.weights import save_checkpoint
from training.command_line import parse_options, run_command
from training.config import TrainConfig
from training.precision import choose_compute
from training.progress import say
from training.setup import load_base, recompute_activations

# name, whether everything is trained, and settings
CASES: dict[str, tuple[bool, dict[str, Any]]] = {
    "LoRA": (False, {}),
    "LoRA, base in 8 bits": (False, {"base_bits": 8}),
    "LoRA, base in 4 bits": (False, {"base_bits": 4}),
    "LoRA, recomputed activations": (False, {"gradient_checkpointing": True}),
    "LoRA, 4 bits, recomputed activations": (False, {"base_bits": 4, "gradient_checkpointing": True}),
    "full fine-tuning": (True, {}),
    "full fine-tuning, AdamW in 8 bits": (True, {"optimizer": "adamw8bit"}),
    "full fine-tuning, AdamW in 8 bits, recomputed": (True, {"optimizer": "adamw8bit", "gradient_checkpointing": True}),
}


@dataclass(frozen=True)
class Arguments:
    """Load a checkpoint, train a few steps, and print what that costs."""

    model: Literal["minilm", "base", "large"] = "base"
    """Model whose sizes the checkpoint has."""
    rows: int = 32
    """Texts in a batch."""
    length: int = 128
    """Tokens in a text."""
    steps: int = 5
    """Training steps."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Data type of the matmuls."""


def anonymous_bytes() -> int:
    """Memory of this process without mapped files."""
    found = re.search(r"^RssAnon:\s+(\d+) kB$", Path("/proc/self/status").read_text(encoding="ascii"), re.M)
    assert found is not None, "needs Linux"
    return 1024 * int(found[1])


@contextmanager
def peak(result: dict[str, float], name: str) -> Iterator[None]:
    """Store the highest memory within the block, in MiB, as `result[name]`."""
    readings, done = [anonymous_bytes()], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            readings.append(anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        result[name] = max(*readings, anonymous_bytes()) / 2**20


def measure(folder: str, case: str, arguments: Arguments) -> dict[str, float]:
    """Load and train in this process: MiB and seconds by name."""
    everything, chosen = CASES[case]
    options = dict(chosen)
    bits = options.pop("base_bits", 16)
    settings = TrainConfig(learning_rate=2e-5, precision=arguments.precision, **options)
    compute = choose_compute(settings)
    result: dict[str, float] = {}
    torch.zeros(1)  # torch's own initial memory
    with peak(result, "loading"):
        model = load_base(Path(folder), RobertaConfig.from_file(Path(folder) / "config.json"), False, bits)
    result["loaded"] = anonymous_bytes() / 2**20
    inject_lora(model, FullConfig() if everything else LORA)
    placed(model, compute).train()
    if settings.gradient_checkpointing:
        recompute_activations(model.roberta.encoder)
    step = our_step(model, compute, settings=settings)
    seconds = []
    with peak(result, "training"):
        for _ in range(arguments.steps):
            batch = random_batch(model.config, arguments.rows, arguments.length, compute.device)
            started = time.perf_counter()
            step(batch)
            seconds.append(time.perf_counter() - started)
    return result | {"seconds": statistics.median(seconds[1:] or seconds)}


def main(arguments: Arguments) -> int:
    """Write the checkpoint, run the cases, print a table. Returns the exit code."""
    say(f"{arguments.model}, {arguments.rows} x {arguments.length} tokens, {arguments.precision}, {processor()}\n")
    say("| | loading, peak MiB | loaded MiB | training, peak MiB | s per step |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(RobertaForSequenceClassification(MODELS[arguments.model]), folder)
        for case in CASES:
            code = (
                "import json; from benchmarks.memory import Arguments, measure; "
                f"print(json.dumps(measure({folder!r}, {case!r}, {arguments!r})))"
            )
            out = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout
            row = json.loads(out.splitlines()[-1])  # after what the program says
            memory = " | ".join(f"{row[name]:,.0f}" for name in ("loading", "loaded", "training"))
            say(f"| {case} | {memory} | {row['seconds']:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(parse_options(Arguments, sys.argv[1:], prog="benchmarks.memory"))))
