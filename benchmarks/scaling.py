"""How cost grows: seconds and memory of a step over batch, length, rank and layers; the data pipeline over rows.

    make bench-scaling
    python -m benchmarks.scaling --output docs/results/scaling

Each point of a step is a process of its own (its peak memory is that of this size alone): a MiniLM-sized encoder with
random weights, r = 6 on query, key and value unless the sweep says otherwise. Beside each curve stands what the
arithmetic predicts, through the first point: a curve above it grows faster than its arithmetic.
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
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from ops.memory import keep_freed_memory

from benchmarks import against_peft as bench
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


@dataclass(frozen=True)
class Arguments:
    """Measure how cost grows."""

    output: Path = Path("docs/results/scaling")
    """Folder for scaling.json and the plots."""
    only: Literal["", "batch", "length", "rank", "layers", "rows"] = ""
    """Only this sweep; scaling.json then holds it alone."""


def step_cost(batch: int, length: int, rank: int, layers: int) -> dict[str, float]:
    """Seconds of a training step (median of three to nine after one) and the process's peak memory in MiB."""
    compute = choose_compute(TrainConfig(device="cpu"))
    keep_freed_memory()
    torch.manual_seed(0)
    config = dataclasses.replace(bench.MINILM, num_hidden_layers=layers)
    lora = dataclasses.replace(bench.LORA, rank=rank)
    step = bench.our_step(bench.our_model(config, 0.1, lora), compute)
    tokens = bench.random_batch(config, batch, length, compute.device)
    step(tokens)
    repeats = 3 if batch * length >= 8192 else 9
    seconds = statistics.median(bench.seconds_of(lambda: step(tokens), compute) for _ in range(repeats))
    return {"seconds": seconds, "peak_mib": peak_memory_bytes(compute) / 2**20}


def predicted(sweep: str, value: int) -> float:
    """Multiply-adds of a step, up to a factor: every frozen weight twice, every trained one three times."""
    at = FIXED | {sweep: value}
    config = dataclasses.replace(bench.MINILM, num_hidden_layers=at["layers"])
    tokens, h = at["batch"] * at["length"], config.hidden_size
    adapters = 3 * 3 * 2 * at["rank"] * h * tokens * at["layers"]
    return bench.useful_flops(config, at["batch"], at["length"]) + 2.0 * adapters


def pipeline_cost(rows: int, length: int = 30) -> dict[str, float]:
    """Texts a second of the data pipeline alone: tokenizing, then batches of 32 in buckets.

    Batches are made in this process as for a CPU, and by the two worker processes that a GPU is given.
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
    return {
        **rates,
        "peak_mib": peak_memory_bytes(choose_compute(TrainConfig(device="cpu"))) / 2**20,
    }


def _in_a_process(call: str) -> dict[str, float]:
    code = f"import json; from benchmarks.scaling import *; print(json.dumps({call}))"
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _memory_panel(axes: Axes, points: list[dict[str, Any]], x: list[Any], style: str) -> None:
    """Peak memory from zero on a scale of its own, and the legend of both."""
    memory = axes.twinx()
    peaks = [point["peak_mib"] for point in points]
    memory.plot(x, peaks, style, color=PALETTE[1], label="peak memory")
    memory.set(ylabel="peak memory of the process (MiB)", ylim=(0, 1.1 * max(peaks)))
    legend_above(axes, memory)


def _panel(sweep: str, points: list[dict[str, Any]]) -> Callable[[Axes], None]:
    """Seconds (left) and memory (right) over the sweep, with what the arithmetic predicts."""

    def draw(axes: Axes) -> None:
        x = [point[sweep] for point in points]
        axes.plot(x, [point["seconds"] for point in points], "o-", color=PALETTE[0], label="seconds a step")
        base = points[0]["seconds"] / predicted(sweep, x[0])
        axes.plot(x, [base * predicted(sweep, v) for v in x], ":", color=PALETTE[0], label="seconds by the arithmetic")
        axes.set(xscale="log", yscale="log", xlabel=_LABELS[sweep], ylabel="seconds a step")
        axes.set_xticks(x, [f"{v:,}" for v in x], minor=False)
        axes.minorticks_off()
        low, high = axes.get_ylim()
        ticks = [t for t in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low / 1.5 <= t <= high * 1.5]
        axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
        _memory_panel(axes, points, x, "s--")

    return draw


_LABELS = {
    "batch": "texts in a batch, 64 tokens each",
    "length": "tokens of a text, batches of 8",
    "rank": "rank of the adapters, batches of 8 x 64",
    "layers": "layers, batches of 8 x 64",
}


def _rows_panel(points: list[dict[str, Any]]) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        x = [point["rows"] for point in points]
        axes.plot(x, [point["tokenize_per_second"] for point in points], "o-", color=PALETTE[0], label="tokenizing")
        axes.plot(x, [point["batch_per_second"] for point in points], "s-", color=PALETTE[2], label="making batches")
        workers = [point["batch_per_second_by_workers"] for point in points]
        axes.plot(x, workers, "D-", color=PALETTE[3], label="... by 2 workers")
        axes.set(xscale="log", yscale="log", xlabel="rows of the training split", ylabel="texts a second")
        axes.set_xticks(x, [f"{v:,}" for v in x], minor=False)
        axes.minorticks_off()
        low, high = axes.get_ylim()
        ticks = [t for t in (3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000) if low <= t <= high]
        axes.set_yticks(ticks, [f"{t:,}" for t in ticks])
        _memory_panel(axes, points, x, "^--")

    return draw


def main(arguments: Arguments) -> int:
    """Run the sweeps, print each point, write the figures and a plot for each. Returns the exit code."""
    arguments.output.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, Any]]] = {}
    for sweep, values in SWEEPS.items():
        if arguments.only not in ("", sweep):
            continue
        found[sweep] = []
        for value in values:
            at = FIXED | {sweep: value}
            cost = _in_a_process(f"step_cost(**{at})")
            found[sweep].append({sweep: value, **cost})
            say(f"{sweep} {value:>4}   {cost['seconds']:8.3f} s a step   {cost['peak_mib']:8,.0f} MiB")
        save_png(_panel(sweep, found[sweep]), arguments.output / f"{sweep}.png", (5.6, 3.6))
    if arguments.only in ("", "rows"):
        found["rows"] = []
        for rows in ROWS:
            cost = _in_a_process(f"pipeline_cost({rows})")
            found["rows"].append({"rows": rows, **cost})
            say(
                f"rows {rows:>7,}   {cost['tokenize_per_second']:9,.0f} texts/s tokenized   "
                f"{cost['batch_per_second']:9,.0f} into batches   "
                f"{cost['batch_per_second_by_workers']:9,.0f} by workers   {cost['peak_mib']:8,.0f} MiB"
            )
        save_png(_rows_panel(found["rows"]), arguments.output / "rows.png", (5.6, 3.6))
    machine = f"{bench.processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python "
    machine += f"{platform.python_version()}, {date.today().isoformat()}"
    with tempfile.NamedTemporaryFile("w", dir=arguments.output, delete=False, encoding="utf-8") as file:
        json.dump({"machine": machine, "fixed": FIXED, **found}, file, indent=1)
    Path(file.name).replace(arguments.output / "scaling.json")
    say(f"written to {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(parse_options(Arguments, sys.argv[1:], prog="benchmarks.scaling"))))
