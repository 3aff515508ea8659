"""How cost grows: seconds and memory of a step over batch, length, rank and layers; the data pipeline over rows.

    make bench-scaling
    python -m benchmarks.scaling --output docs/results/scaling

Each point is measured in its own process, whose peak memory belongs to this size alone: a MiniLM-sized encoder with
random weights, r = 6 on query, key and value unless the sweep varies it. The dotted line is the number of
multiply-adds, scaled to the first point.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from benchmarks.measure import (
    LORA,
    MODELS,
    ROOT,
    our_model,
    our_step,
    processor,
    random_batch,
    seconds_of,
    useful_flops,
)
from data.batching import encode_split, training_batches
from data.sources import Split
from roberta.tokenizer import TextTokenizer
from training.command_line import parse_options, run_command
from training.config import TrainConfig
from training.plots import PALETTE, legend_above, save_png
from training.precision import choose_compute
from training.progress import say
from training.report import peak_memory_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SWEEPS: dict[str, list[int]] = {
    "batch": [8, 16, 32, 64, 128, 256],
    "length": [16, 32, 64, 128, 256, 512],
    "rank": [1, 4, 16, 64, 256],
    "layers": [6, 12, 18, 24],
}
ROWS = [1_000, 10_000, 30_000, 120_000]
FIXED = {"batch": 8, "length": 64, "rank": 6, "layers": 6}
_LABELS = {
    "batch": "texts per batch, 64 tokens each",
    "length": "tokens per text, batches of 8",
    "rank": "rank of the adapters, batches of 8 x 64",
    "layers": "layers, batches of 8 x 64",
}

Curve = tuple[str, list[float], str, int]
"""Label, values, style, number of the color."""


@dataclass(frozen=True)
class Arguments:
    """Measure how cost grows."""

    output: Path = Path("docs/results/scaling")
    """Folder of scaling.json and the plots."""
    only: Literal["", "batch", "length", "rank", "layers", "rows"] = ""
    """Only this sweep; scaling.json then holds no other."""


def step_cost(batch: int, length: int, rank: int, layers: int) -> dict[str, float]:
    """Seconds of a training step (median of several, after one to warm up) and the process's peak memory in MiB."""
    compute = choose_compute(TrainConfig(device="cpu"))
    torch.manual_seed(0)
    config = dataclasses.replace(MODELS["minilm"], num_hidden_layers=layers)
    lora = dataclasses.replace(LORA, rank=rank)
    step = our_step(our_model(config, 0.1, compute, lora), compute)
    tokens = random_batch(config, batch, length, compute.device)
    step(tokens)
    repeats = 3 if batch * length >= 8192 else 9
    seconds = statistics.median(seconds_of(lambda: step(tokens), compute) for _ in range(repeats))
    return {"seconds": seconds, "peak_mib": peak_memory_bytes(compute) / 2**20}


def predicted(sweep: str, value: int) -> float:
    """Operations of a step: each frozen weight counts twice, each trained one three times."""
    at = FIXED | {sweep: value}
    config = dataclasses.replace(MODELS["minilm"], num_hidden_layers=at["layers"])
    tokens, h = at["batch"] * at["length"], config.hidden_size
    adapters = 3 * 3 * 2 * at["rank"] * h * tokens * at["layers"]
    return useful_flops(config, at["batch"], at["length"]) + 2.0 * adapters


def pipeline_cost(rows: int, length: int = 30) -> dict[str, float]:
    """Texts per second of the data pipeline alone: tokenizing, then batches of 32 texts of similar length.

    Batches are made in this process as for a CPU, and by two worker processes as for a GPU.
    """
    from benchmarks.theirs import minilm_directory

    draw = random.Random(0)
    words = ["market", "coach", "oil", "prices", "scores", "software", "election", "league", "shares", "minister"]
    texts = [" ".join(draw.choices(words, k=draw.randint(length // 2, length))) + f" {i}" for i in range(rows)]
    tokenizer = TextTokenizer.from_directory(minilm_directory(), 128)
    started = time.perf_counter()
    split = encode_split(Split(texts, [0] * rows), tokenizer)
    encoded = time.perf_counter()
    rates = {"tokenize_per_second": rows / (encoded - started)}
    for name, device in (("batch_per_second", "cpu"), ("batch_per_second_by_workers", "cuda")):
        begun = time.perf_counter()
        batches = training_batches(split, 32, tokenizer.pad_token_id, 0, 1, device=torch.device(device))
        assert sum(len(batch.labels) for batch in batches) == rows
        rates[name] = rows / (time.perf_counter() - begun)
    return {**rates, "peak_mib": peak_memory_bytes(choose_compute(TrainConfig(device="cpu"))) / 2**20}


def _in_own_process(call: str) -> dict[str, float]:
    code = f"import json; from benchmarks.scaling import *; print(json.dumps({call}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _plot(path: Path, x: list[int], axis_labels: tuple[str, str], curves: list[Curve], peaks: list[float]) -> None:
    """Curves (left) and peak memory (right, from zero) over a sweep, as an image."""

    def draw(axes: Axes) -> None:
        for label, values, style, color in curves:
            axes.plot(x, values, style, color=PALETTE[color], label=label)
        axes.set(xscale="log", yscale="log", xlabel=axis_labels[0], ylabel=axis_labels[1])
        axes.set_xticks(x, [f"{v:,}" for v in x], minor=False)
        axes.minorticks_off()
        low, high = axes.get_ylim()
        ticks = [digit * 10.0**power for power in range(-3, 7) for digit in (1, 2, 5)]
        ticks = [tick for tick in ticks if low / 1.5 <= tick <= high * 1.5]
        axes.set_yticks(ticks, [f"{tick:,.10g}" for tick in ticks])
        memory = axes.twinx()
        memory.plot(x, peaks, "^--", color=PALETTE[1], label="peak memory")
        memory.set(ylabel="peak memory of the process (MiB)", ylim=(0, 1.1 * max(peaks)))
        legend_above(axes, memory)

    save_png(draw, path, (5.6, 3.6))


def main(arguments: Arguments) -> int:
    """Run the sweeps, print each point, write the results and one plot per sweep. Returns the exit code."""
    arguments.output.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, Any]]] = {}
    for sweep, values in SWEEPS.items():
        if arguments.only not in ("", sweep):
            continue
        points = found[sweep] = []
        for value in values:
            cost = _in_own_process(f"step_cost(**{FIXED | {sweep: value}})")
            points.append({sweep: value, **cost})
            say(f"{sweep} {value:>4}   {cost['seconds']:8.3f} s per step   {cost['peak_mib']:8,.0f} MiB")
        seconds = [point["seconds"] for point in points]
        expected = [seconds[0] * predicted(sweep, value) / predicted(sweep, values[0]) for value in values]
        curves = [("seconds per step", seconds, "o-", 0), ("expected from multiply-adds", expected, ":", 0)]
        peaks = [point["peak_mib"] for point in points]
        _plot(arguments.output / f"{sweep}.png", values, (_LABELS[sweep], "seconds per step"), curves, peaks)
    if arguments.only in ("", "rows"):
        points = found["rows"] = []
        for rows in ROWS:
            cost = _in_own_process(f"pipeline_cost({rows})")
            points.append({"rows": rows, **cost})
            say(
                f"rows {rows:>7,}   {cost['tokenize_per_second']:9,.0f} texts/s tokenized   "
                f"{cost['batch_per_second']:9,.0f} into batches   "
                f"{cost['batch_per_second_by_workers']:9,.0f} by workers   {cost['peak_mib']:8,.0f} MiB"
            )
        looks = [
            ("tokenizing", "tokenize_per_second", "o-", 0),
            ("making batches", "batch_per_second", "s-", 2),
            ("... by 2 workers", "batch_per_second_by_workers", "D-", 3),
        ]
        curves = [(label, [point[key] for point in points], style, color) for label, key, style, color in looks]
        peaks = [point["peak_mib"] for point in points]
        _plot(arguments.output / "rows.png", ROWS, ("rows of the training split", "texts per second"), curves, peaks)
    machine = f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python "
    machine += f"{platform.python_version()}, {date.today().isoformat()}"
    with tempfile.NamedTemporaryFile("w", dir=arguments.output, delete=False, encoding="utf-8") as file:
        json.dump({"machine": machine, "fixed": FIXED, **found}, file, indent=1)
    Path(file.name).replace(arguments.output / "scaling.json")
    say(f"written to {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(parse_options(Arguments, sys.argv[1:], prog="benchmarks.scaling"))))
