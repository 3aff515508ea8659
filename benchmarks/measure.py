"""What the benchmarks share: models with random weights, a training step, and two calls timed interleaved."""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cpu import speed_up
from data.batching import Batch
from data.sources import DataConfig, Split, load_source
from lora.config import LoRAConfig
from lora.inject import inject_lora
from roberta.config import RobertaConfig
from roberta.model import RobertaForSequenceClassification
from train import make_optimizer, make_schedule, train_step
from training.config import TrainConfig
from training.distributed import ALONE, World
from training.precision import Compute

ROOT = Path(__file__).resolve().parents[1]
LORA = LoRAConfig(rank=6, alpha=14, target_modules=("query", "key", "value"))
LABELS = ("World", "Sports", "Business", "Sci/Tech")
_MINILM = {"vocab_size": 30522, "hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
MODELS = {
    "minilm": RobertaConfig(label_names=LABELS, **_MINILM),
    "base": RobertaConfig(label_names=LABELS),
    "large": RobertaConfig(label_names=LABELS, **_LARGE),
}

_DEFAULT_MATMUL = torch.backends.mkldnn.matmul.fp32_precision  # before `speed_up` changes it
_LIMITS = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")


@contextmanager
def default_matmul() -> Iterator[None]:
    """torch's default for float32 matmuls on a CPU, which `cpu.speed_up` has changed for the whole process."""
    matmul = torch.backends.mkldnn.matmul
    allowed, matmul.fp32_precision = matmul.fp32_precision, _DEFAULT_MATMUL
    try:
        yield
    finally:
        matmul.fp32_precision = allowed


# --- what is measured -------------------------------------------------------------------------------------------------


def random_batch(config: RobertaConfig, rows: int, length: int, device: torch.device) -> Batch:
    """Random ids without padding, so that both sides do the same work."""
    ids = torch.randint(5, config.vocab_size, (rows, length), device=device)
    labels = torch.randint(0, config.num_labels, (rows,), device=device)
    mask, weights = torch.ones_like(ids, dtype=torch.bool), torch.ones(rows, device=device)
    return Batch(ids, mask, labels, weights, torch.arange(rows), rows * length, rows)


def ag_news(directory: Path, rows: int) -> Split:
    """The first training texts of AG News."""
    train = load_source(DataConfig(source="ag_news", directory=str(directory)), seed=0).train
    return Split(train.texts[:rows], train.labels[:rows])


def our_model(
    config: RobertaConfig, dropout: float, compute: Compute, lora: LoRAConfig | None = LORA
) -> RobertaForSequenceClassification:
    """Random weights, in training mode; without `lora` every parameter is trained."""
    config = dataclasses.replace(config, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    model = RobertaForSequenceClassification(config)
    if lora is not None:
        inject_lora(model, dataclasses.replace(lora, dropout=dropout))
    return placed(model, compute).train()


def placed(model: nn.Module, compute: Compute) -> nn.Module:
    """`model` on its device, as train.py and evaluate.py place it."""
    if compute.device.type == "cpu":
        speed_up(model)
    return model.to(compute.device)


def our_step(
    model: nn.Module, compute: Compute, world: World = ALONE, settings: TrainConfig | None = None
) -> Callable[[Batch], Tensor]:
    """The program's own `train_step`, prepared as train.py prepares it."""
    compute.cast_frozen(model.roberta)
    optimizer = make_optimizer(model, settings or TrainConfig(learning_rate=5e-4))
    schedule, scaler = make_schedule(optimizer, 1000, 0), compute.grad_scaler()
    return lambda batch: train_step(model, [batch], optimizer, schedule, scaler, compute, 1.0, world)


def useful_flops(config: RobertaConfig, rows: int, length: int) -> float:
    """Floating-point operations that one LoRA training step can't avoid: two per multiply-add.

    A frozen matrix takes part twice, in the forward pass and in the gradient of its input, where a trained one would
    three times. The lowest layer's query, key and value need no gradient of their input, and the last layer's query,
    output and feed-forward work on <s> alone. Attention's two products count three times (forward, and a gradient for
    each factor). Adapters, head, LayerNorm and the like are small and not counted: their cost is overhead.
    """
    h, m, n, tokens = config.hidden_size, config.intermediate_size, config.num_hidden_layers, rows * length
    per_token = 4 * h * h + 2 * h * m
    multiply_adds = 2.0 * per_token * tokens * (n - 1)
    multiply_adds += 2.0 * (2 * h * h * tokens + (2 * h * h + 2 * h * m) * rows)  # the last layer
    multiply_adds -= 3.0 * h * h * tokens  # no gradient below the first adapter
    multiply_adds += 3.0 * (2.0 * h * length * tokens * (n - 1) + 2.0 * h * tokens)  # attention
    return 2.0 * multiply_adds


# --- how it is measured -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ratio:
    """One row: the ratio of each pair of measurements, and the medians behind it."""

    name: str
    ours: float
    theirs: float
    unit: str
    ratios: list[float]
    note: str = ""
    """End of the printed line."""
    threshold: float | None = None
    """What the median must reach; for ratios of ours over theirs, where less is better, must not exceed."""
    less_is_better: bool = False

    def line(self) -> str:
        """For a terminal."""
        median, low, high = statistics.median(self.ratios), min(self.ratios), max(self.ratios)
        line = (
            f"{self.name:<72} {median:>5.2f}x  ({low:.2f} to {high:.2f})   "
            f"{self.ours:>9,.3f} against {self.theirs:>9,.3f} {self.unit}{self.note}"
        )
        if self.threshold is None:
            return line
        met = median <= self.threshold if self.less_is_better else median >= self.threshold
        return f"{line}   threshold {self.threshold:g}: {'met' if met else 'missed'}"


def seconds_of(call: Callable[[], Any], compute: Compute) -> float:
    """Wall time of a call, including a GPU's work."""
    if compute.device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if compute.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def interleaved(
    name: str,
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    compute: Compute,
    pairs: int,
    warm_up: int | None = None,
) -> Ratio:
    """Time A B A B ... and take theirs over ours of each pair, after one or two (if there are many) to warm up."""
    for _ in range((2 if pairs > 4 else 1) if warm_up is None else warm_up):
        ours(), theirs()
    times = [(seconds_of(ours, compute), seconds_of(theirs, compute)) for _ in range(pairs)]
    a, b = (statistics.median(side) for side in zip(*times, strict=True))
    return Ratio(name, a, b, "s", [b / a for a, b in times])


def processor() -> str:
    """Name, family and model of the processor, as one name may stand for several generations; and limits set on it."""
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        told = ""
    fields = (re.search(rf"^{field}\s*:\s*(.+)$", told, re.M) for field in ("model name", "cpu family", "model"))
    name, family, model = (found[1] if found else "" for found in fields)
    limits = [f"{limit}={os.environ[limit]}" for limit in _LIMITS if limit in os.environ]
    return ", ".join([f"{name} (family {family}, model {model})" if name else platform.processor(), *limits])


def has_avx512() -> bool:
    """Whether both torch's own kernels and oneDNN may use AVX-512 here."""
    by_torch = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return by_torch and "512" in os.environ.get("ONEDNN_MAX_CPU_ISA", "AVX512")
