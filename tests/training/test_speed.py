"""Speed: what is timed, and the statistics."""

import pytest
import torch

from data.batching import Batch
from training import speed
from training.config import TrainConfig
from training.precision import choose_compute
from training.speed import measure_speed


class Slow(torch.nn.Module):
    """A model whose calls take given times on a simulated clock."""

    def __init__(self, clock, durations):
        super().__init__()
        self.clock, self.durations, self.calls = clock, iter(durations), 0

    def forward(self, input_ids, attention_mask):
        self.calls += 1
        self.clock[0] += next(self.durations)
        return torch.zeros(len(input_ids), 2)


def test_rate_median_and_p95_of_interleaved_models(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock[0])
    ids = torch.ones(4, 3, dtype=torch.long)
    batches = [Batch(ids, ids.bool(), ids[:, 0], torch.ones(len(ids)), ids[:, 0], 12, len(ids))] * 20
    # Two calls to warm up, which must not count.
    steady = Slow(clock, [100.0, 100.0] + [2.0] * 20)
    growing = Slow(clock, [100.0, 100.0] + [float(i) for i in range(1, 21)])
    compute = choose_compute(TrainConfig(device="cpu"))
    found = measure_speed({"steady": steady, "growing": growing}, batches, compute)
    assert (found["steady"].texts_per_second, found["steady"].median, found["steady"].p95) == (2.0, 2.0, 2.0)
    assert found["growing"].texts_per_second == pytest.approx(80 / 210)
    assert (found["growing"].median, found["growing"].p95) == (10.5, 20.0)
    assert steady.calls == growing.calls == 22 and found["steady"].batch_size == 4
