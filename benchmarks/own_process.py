"""Training steps in a process of their own, which has its own malloc and its own peak memory.

python -m benchmarks.own_process SIDE MODEL ROWS LENGTH DROPOUT DEVICE     one step for each line on stdin
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from benchmarks import theirs
from benchmarks.measure import LORA, MODELS, ROOT, our_model, our_step, random_batch
from training.config import TrainConfig
from training.precision import choose_compute
from training.report import peak_memory_bytes


@contextmanager
def step_in_own_process(
    side: Literal["ours", "theirs"],
    model: str,
    rows: int,
    length: int,
    dropout: float,
    device: str = "cpu",
    **environment: str,
) -> Iterator[Callable[[], int]]:
    """A call makes one step in that process and returns its peak memory so far in bytes.

    Raises RuntimeError if the process has ended.
    """
    arguments = [side, model, str(rows), str(length), str(dropout), device]
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.own_process", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        requests, answers = process.stdin, process.stdout
        assert requests is not None and answers is not None

        def step() -> int:
            print(file=requests, flush=True)
            if not (answer := answers.readline()):
                raise RuntimeError(f"benchmarks.own_process {' '.join(arguments)} ended before its step")
            return int(answer)

        yield step


def main(side: str, model: str, rows: str, length: str, dropout: str, device: str) -> None:
    """Serve steps until stdin ends."""
    compute = choose_compute(TrainConfig(device=device))
    config = MODELS[model]
    batch = random_batch(config, int(rows), int(length), compute.device)
    if side == "ours":
        step = our_step(our_model(config, float(dropout), compute), compute)
    else:
        theirs.quiet()
        step = theirs.step(theirs.fresh_peft_model(config, float(dropout), LORA).to(compute.device), compute)
    for _ in sys.stdin:
        step(batch)
        print(peak_memory_bytes(compute), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
