"""What several processes gain: measured in those that torchrun started, or computed for more than there are.

    OMP_NUM_THREADS=1 python -m benchmarks.distributed
    OMP_NUM_THREADS=1 torchrun --nproc_per_node=2 -m benchmarks.distributed
    python -m benchmarks.distributed --step-ms 10 50 200

The model is RoBERTa-base with random weights, LoRA of rank 6 on query, key and value, and a head: 925,444 trainable
parameters. The first two commands time the program's own step on the same texts per step, whatever the number of
processes.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from benchmarks.measure import MODELS, our_model, our_step
from data.batching import EncodedSplit, collate
from lora.inject import count_parameters
from training.command_line import parse_options, run_command
from training.config import TrainConfig
from training.distributed import World, join
from training.precision import choose_compute

_TRAINABLE = 925_444
# Gbit/s, and microseconds per hop: assumptions about a network, not measurements.
_NETWORKS = {"1 Gbit/s Ethernet": (1, 50), "10 Gbit/s Ethernet": (10, 30), "200 Gbit/s InfiniBand": (200, 5)}


@dataclass(frozen=True)
class Arguments:
    """Time a step in the present processes, or compute the step of more of them."""

    batch_size: int = 16
    """Texts per step, over all processes."""
    length: int = 32
    """Tokens per text."""
    steps: int = 8
    """Timed steps, after one to warm up."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    step_ms: tuple[float, ...] = ()
    """Measure nothing: expected efficiency for steps that take one process so many milliseconds."""


def ring_seconds(size: int, numbers: int, gbit: float, hop_us: float) -> float:
    """Time in which a ring of processes sums `numbers` float32 values.

        2 (N - 1) hops, each of 1 / N of the message:  T = 2 (N - 1) (S / (N B) + L)

    S bytes, B bytes per second that a process can send, L seconds per hop. Source: Patarasuk & Yuan 2009, section 4.
    """
    return 2 * (size - 1) * (4 * numbers / size / (gbit * 1e9 / 8) + hop_us * 1e-6)


def print_expected(step_ms: tuple[float, ...]) -> None:
    """Efficiency t / (t + T): the speed-up over N if each process keeps the number of texts that it has alone."""
    print("| network | processes | all-reduce | " + " | ".join(f"step of {ms:g} ms" for ms in step_ms) + " |")
    print("|---|---|---|" + "---|" * len(step_ms))
    for name, (gbit, hop_us) in _NETWORKS.items():
        for size in (2, 8, 64):
            seconds = ring_seconds(size, _TRAINABLE + 1, gbit, hop_us)
            shares = " | ".join(f"{100 * ms / (ms + 1e3 * seconds):.1f} %" for ms in step_ms)
            print(f"| {name} | {size} | {1e3 * seconds:.2f} ms | {shares} |")


def measure(arguments: Arguments, world: World) -> None:
    """Print the median time of a step, and of its all-reduce alone."""
    world.take_gpu(arguments.device)
    compute = choose_compute(TrainConfig(device=arguments.device))
    torch.manual_seed(0)
    model = our_model(MODELS["base"], 0.1, compute)
    trainable = count_parameters(model).trainable
    assert trainable == _TRAINABLE
    train = our_step(model, compute, world)

    rows, length = arguments.batch_size, arguments.length
    ids = np.random.default_rng(0).integers(3, 50_000, rows * length).astype(np.int32)
    split = EncodedSplit(ids, np.arange(0, rows * length + 1, length), np.arange(rows) % 4, length, 0)
    batch = collate(split, np.arange(rows), 1, "longest", world.share)
    steps, messages = [], []
    for _ in range(arguments.steps + 1):
        world.wait()
        started = time.perf_counter()
        loss = train(batch)
        loss.item()  # waits for a GPU
        steps.append(time.perf_counter() - started)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        world.wait()
        started = time.perf_counter()
        world.sum_gradients(model.parameters(), loss).item()
        messages.append(time.perf_counter() - started)
        model.zero_grad(set_to_none=True)
    step, message = (1e3 * statistics.median(times[1:]) for times in (steps, messages))
    print(
        f"{world.size} process(es), {compute.describe()}: {rows} texts of {length} tokens in {step:,.0f} ms (median of "
        f"{arguments.steps}, {1e3 * min(steps[1:]):,.0f} to {1e3 * max(steps[1:]):,.0f}); "
        f"{4 * (trainable + 1) if world.size > 1 else 0:,} bytes in {message:.1f} ms"
    )


def main(arguments: Arguments, world: World) -> int:
    """Measure or compute. Returns the exit code."""
    if arguments.step_ms:
        print_expected(arguments.step_ms)
    else:
        measure(arguments, world)
    return 0


if __name__ == "__main__":
    with join() as world:
        code = run_command(
            lambda: main(parse_options(Arguments, sys.argv[1:], prog="benchmarks.distributed"), world), world
        )
    sys.exit(code)
