"""Inference speed: texts per second and time per call, several models side by side in one run."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import nn

from data.batching import Batch
from training.precision import Compute
from training.scoring import batch_logits

_WARM_UP_CALLS = 2


@dataclass(frozen=True)
class Speed:
    """Speed of one model at one batch size; a call goes from token ids to logits on the CPU."""

    batch_size: int
    texts_per_second: float
    median: float
    """Seconds per call."""
    p95: float
    """95th percentile of the seconds per call."""


@torch.no_grad()
def measure_speed(models: Mapping[str, nn.Module], batches: Sequence[Batch], compute: Compute) -> dict[str, Speed]:
    """Time every model on every batch, interleaved, so that other load on the machine affects all models alike.

    All batches have the same number of texts. Each model has two warm-up calls on the first batch.
    """
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        model.eval()
        for _ in range(_WARM_UP_CALLS):
            _call(model, batches[0], compute)
    for batch in batches:
        for name, model in models.items():
            started = time.perf_counter()
            _call(model, batch, compute)
            seconds[name].append(time.perf_counter() - started)
    size = len(batches[0].labels)
    return {
        name: Speed(size, size * len(batches) / sum(times), median(times), sorted(times)[int(0.95 * len(times))])
        for name, times in seconds.items()
    }


def _call(model: nn.Module, batch: Batch, compute: Compute) -> None:
    batch_logits(model, batch, compute).float().cpu()  # synchronizes with a GPU


def speed_table(rows: Sequence[tuple[str, Speed]]) -> str:
    """A table for a terminal."""
    width = max(len(name) for name, _ in rows)
    lines = [f"{'':<{width}}  batch   texts/s   median (ms)   95 % below (ms)"]
    lines += [
        f"{name:<{width}}  {speed.batch_size:>5}  {speed.texts_per_second:>8,.1f}  {1000 * speed.median:>12,.1f}  "
        f"{1000 * speed.p95:>16,.1f}"
        for name, speed in rows
    ]
    return "\n".join(lines)
