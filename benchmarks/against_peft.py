"""Ours against peft + transformers, side by side: the same weights, batches, optimizer, precision and dropout.

    make bench
    python -m benchmarks.against_peft --only efficiency --json efficiency.json

Both sides run interleaved in this process, A B A B, after warm-up. The result is the ratio of each pair (theirs over
ours: more is better) as median and range; absolute times belong to one machine and one minute. Ours runs as train.py
does, with oneDNN allowed for float32 matmuls; for each call of theirs the setting goes back to torch's default
(`measure.default_matmul`). Freed memory is kept for both, as malloc belongs to the process; the rows "theirs in its own
process" show theirs without. Peak memory and the time to the first step are measured in one process per side and are
ours over theirs: less is better.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import theirs
from benchmarks.measure import (
    LABELS,
    LORA,
    MODELS,
    ROOT,
    Ratio,
    ag_news,
    default_matmul,
    has_avx512,
    interleaved,
    our_model,
    our_step,
    placed,
    processor,
    random_batch,
    seconds_of,
    useful_flops,
)
from benchmarks.own_process import step_in_own_process
from data.batching import encode_split, training_batches
from data.sources import Split
from lora.inject import inject_lora, merge_lora
from roberta.config import RobertaConfig
from roberta.tokenizer import TextTokenizer
from roberta.weights import load_checkpoint
from training.command_line import parse_options, run_command
from training.config import TrainConfig
from training.precision import Compute, choose_compute
from training.progress import say

Rows = dict[str, Callable[[], Ratio | list[Ratio]]]


@dataclass(frozen=True)
class Arguments:
    """Compare with peft + transformers."""

    json: Path | None = None
    """File for the results; by default benchmarks/results/PROCESSOR.json, or with --only none."""
    device: Literal["cpu", "cuda"] = "cpu"
    """The CPU's rows, or the GPU's."""
    only: str = ""
    """Only the rows whose name contains this: step, inference, full, efficiency, memory, epoch, start, minilm, base."""
    text: Path = Path("../shared/ag_news_csv")
    """Folder of AG News' train.csv and test.csv, for epoch and start; without it these are omitted."""
    pairs: int = 8
    """Pairs of each measurement; at most 2 to 4 for those that take long."""


def step_ratio(
    model: str, rows: int, length: int, dropout: float, compute: Compute, pairs: int, compiled: bool = False
) -> Ratio:
    """One training step on the same batch; with `compiled`, both sides by torch.compile."""
    config = MODELS[model]
    batch = random_batch(config, rows, length, compute.device)
    ours = our_model(config, dropout, compute)
    other = theirs.peft_model(ours, config, dropout, LORA).to(compute.device)
    if compiled:
        ours, other = compute.compiled(ours, "on"), torch.compile(other, dynamic=False)
    our, their = our_step(ours, compute), theirs.step(other, compute)
    name = f"training step, {model} {rows} x {length}, dropout {dropout:g}" + (", both compiled" if compiled else "")
    warm_up = 3 if compiled else None  # a side may be compiled a second time
    ratio = interleaved(name, lambda: our(batch), lambda: their(batch), compute, pairs, warm_up)
    return dataclasses.replace(ratio, note=f"   {rows * length / ratio.ours:,.0f} tokens/s")


def own_process_ratio(model: str, rows: int, length: int, dropout: float, compute: Compute, pairs: int) -> Ratio:
    """As `step_ratio`, theirs in its own process, whose malloc returns freed memory as it does for their users.

    While one side works, the other waits. Their weights are other random ones; time does not depend on them.
    """
    batch = random_batch(MODELS[model], rows, length, compute.device)
    our = our_step(our_model(MODELS[model], dropout, compute), compute)
    name = f"training step, {model} {rows} x {length}, dropout {dropout:g}, theirs in its own process"
    with step_in_own_process("theirs", model, rows, length, dropout) as their:
        return interleaved(name, lambda: our(batch), their, compute, pairs)


def inference_ratio(model: str, rows: int, length: int, compute: Compute, pairs: int) -> Ratio:
    """Logits of a batch with merged adapters."""
    config = MODELS[model]
    batch = random_batch(config, rows, length, compute.device)
    ours = our_model(config, 0.1, compute)
    other = theirs.peft_model(ours, config, 0.1, LORA).to(compute.device).merge_and_unload().eval()
    merge_lora(ours.eval())

    @torch.no_grad()
    def our() -> Tensor:
        with compute.autocast():
            return ours(batch.input_ids, batch.attention_mask)

    @torch.no_grad()
    def their() -> Tensor:
        with default_matmul(), compute.autocast():
            return other(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).logits

    return interleaved(f"inference, {model} {rows} x {length}", our, their, compute, pairs)


def full_against_lora(model: str, rows: int, length: int, compute: Compute, pairs: int) -> Ratio:
    """Our full fine-tuning step against our LoRA step."""
    config = MODELS[model]
    batch = random_batch(config, rows, length, compute.device)
    lora, full = (our_step(our_model(config, 0.1, compute, how), compute) for how in (LORA, None))
    name = f"full fine-tuning against LoRA (both ours), {model} {rows} x {length}"
    return interleaved(name, lambda: lora(batch), lambda: full(batch), compute, pairs)


def gemm_rate(config: RobertaConfig, tokens: int, compute: Compute) -> float:
    """Highest rate of a matmul alone at the model's own shapes, in operations per second."""
    best, h, m = 0.0, config.hidden_size, config.intermediate_size
    for inputs, outputs in ((h, h), (h, m), (m, h)):
        x = torch.randn(tokens, inputs, device=compute.device, dtype=compute.dtype)
        w = torch.randn(outputs, inputs, device=compute.device, dtype=compute.dtype)
        F.linear(x, w)
        # The median, as a step is timed: the fastest of many would be a moment that no step has throughout.
        seconds = statistics.median(seconds_of(lambda x=x, w=w: F.linear(x, w), compute) for _ in range(8))
        best = max(best, 2.0 * tokens * inputs * outputs / seconds)
    return best


def efficiency(model: str, rows: int, length: int, compute: Compute, pairs: int) -> list[Ratio]:
    """Useful operations per second of our step over the rate of a matmul alone, interleaved.

    A CPU has two rates: that of torch's default, which the users of both sides have, and that with oneDNN allowed,
    which a step here has. So there are three ratios: the step over either rate, and over the default rate what the step
    reaches with the default as well.
    """
    config = MODELS[model]
    batch = random_batch(config, rows, length, compute.device)
    step = our_step(our_model(config, 0.0, compute), compute)
    step(batch)

    def rates() -> tuple[float, float]:
        useful = useful_flops(config, rows, length) / seconds_of(lambda: step(batch), compute)
        return useful, gemm_rate(config, rows * length, compute)

    def row(what: str, useful: list[float], gemm: list[float]) -> Ratio:
        medians = (statistics.median(side) / 1e9 for side in (useful, gemm))
        name = f"useful GFLOP/s over {what}, {model} {rows} x {length}"
        return Ratio(name, *medians, "GFLOP/s", [a / b for a, b in zip(useful, gemm, strict=True)])

    allowed, default = [], []
    for _ in range(pairs):
        allowed.append(rates())
        with default_matmul():
            default.append(rates())
    (ours, onednn), (plain, torchs) = (tuple(zip(*side, strict=True)) for side in (allowed, default))
    if compute.device.type == "cuda":
        return [row("the GEMM rate", ours, onednn)]
    return [
        row("torch's default GEMM rate", ours, torchs),
        row("the same, step with the default too", plain, torchs),
        row("the GEMM rate with oneDNN allowed", ours, onednn),
    ]


def memory_ratio(model: str, rows: int, length: int, compute: Compute, threshold: float | None = None) -> Ratio:
    """Peak memory of a training step, one process per side: ours over theirs."""
    peaks = []
    for side in ("ours", "theirs"):
        with step_in_own_process(side, model, rows, length, 0.1, compute.device.type) as step:
            peaks.append(step() / 2**20)
    name = f"peak memory of a step, {model} {rows} x {length} (ours over theirs)"
    return Ratio(name, *peaks, "MiB", [peaks[0] / peaks[1]], threshold=threshold, less_is_better=True)


def epoch_ratios(text: Path, compute: Compute, rows: int = 600) -> list[Ratio]:
    """One epoch end to end on real text: loading, tokenizing, batches, steps; against Trainer, plain and by length."""
    checkpoint = theirs.minilm_directory()

    def our(split: Split) -> None:
        config = dataclasses.replace(RobertaConfig.from_file(checkpoint / "config.json"), label_names=LABELS)
        model = load_checkpoint(checkpoint, config, new_head=True)
        step = our_step(placed(inject_lora(model, dataclasses.replace(LORA, dropout=0.1)), compute).train(), compute)
        tokenizer = TextTokenizer.from_directory(checkpoint, 128)
        encoded = encode_split(split, tokenizer)
        for batch in training_batches(encoded, 32, tokenizer.pad_token_id, seed=0, epoch=1, device=compute.device):
            step(batch)

    split = ag_news(text, rows)
    one_batch = Split(split.texts[:32], split.labels[:32])
    ratios = []
    for grouped, threshold in zip((False, True), (3.5, 2.2) if has_avx512() else (3.0, 1.7), strict=True):
        warm_up, their = (
            theirs.trainer_epoch(checkpoint, part, LORA, grouped, compute.device) for part in (one_batch, split)
        )
        our(one_batch), warm_up()
        name = f"one epoch of {rows:,} AG News texts against Trainer, "
        name += "group_by_length" if grouped else "dynamic padding"
        ratio = interleaved(name, lambda: our(split), their, compute, pairs=2, warm_up=0)
        ratios.append(dataclasses.replace(ratio, threshold=threshold))
    return ratios


def start_ratio(text: Path) -> Ratio:
    """Seconds from the start of the process to the end of the first step, data cached: ours over theirs."""
    text = text.resolve()
    with tempfile.TemporaryDirectory() as folder:
        ours = [sys.executable, "train.py", "--model.checkpoint", "minilm", "--data.directory", str(text)]
        ours += ["--output", f"{folder}/run", "--overwrite", "--train.log-every", "1", "--train.device", "cpu"]
        other = [sys.executable, "-m", "benchmarks.theirs", str(text), folder]
        logs = Path(folder, "run", "metrics.jsonl"), Path(folder, "first_step")
        times = [(_first_step(ours, logs[0]), _first_step(other, logs[1])) for _ in range(4)]
    times = times[1:]  # the first filled the caches of both sides
    medians = (statistics.median(side) for side in zip(*times, strict=True))
    name = "start to first step, data cached (ours over theirs)"
    return Ratio(name, *medians, "s", [a / b for a, b in times], less_is_better=True)


def _first_step(command: list[str], log: Path) -> float:
    """Seconds until the command, which is then stopped, writes to `log`, as it does after its first step."""
    log.unlink(missing_ok=True)
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (log.is_file() and log.stat().st_size):
            if process.poll() is not None:
                raise RuntimeError(f"{' '.join(command)} ended before its first step")
            time.sleep(0.01)
        return time.perf_counter() - started
    finally:
        process.kill()
        process.wait()


def cpu_rows(arguments: Arguments, compute: Compute) -> Rows:
    """The measurements of a CPU, in order."""
    pairs, text = arguments.pairs, arguments.text
    few = min(pairs, 4)
    rows: Rows = {
        "step minilm 0.1": lambda: step_ratio("minilm", 32, 64, 0.1, compute, pairs),
        "step minilm 0": lambda: step_ratio("minilm", 32, 64, 0.0, compute, pairs),
        "step minilm 128 0.1": lambda: step_ratio("minilm", 32, 128, 0.1, compute, few),
        "step base 0.1": lambda: step_ratio("base", 32, 128, 0.1, compute, few),
        "step base 0": lambda: step_ratio("base", 32, 128, 0.0, compute, few),
        "step own process base 0.1": lambda: own_process_ratio("base", 32, 128, 0.1, compute, min(pairs, 3)),
        "step own process base 0": lambda: own_process_ratio("base", 32, 128, 0.0, compute, min(pairs, 3)),
        "inference minilm": lambda: inference_ratio("minilm", 32, 64, compute, pairs),
        "inference base": lambda: inference_ratio("base", 32, 128, compute, min(pairs, 2)),
        "full minilm": lambda: full_against_lora("minilm", 32, 64, compute, pairs),
        "efficiency minilm": lambda: efficiency("minilm", 32, 64, compute, pairs),
        "efficiency base": lambda: efficiency("base", 32, 128, compute, few),
        "memory base": lambda: memory_ratio("base", 32, 128, compute, threshold=0.65),
    }
    if (text / "train.csv").is_file():
        rows |= {"epoch": lambda: epoch_ratios(text, compute), "start": lambda: start_ratio(text)}
    return rows


def gpu_rows(arguments: Arguments, compute: Compute) -> Rows:
    """The measurements of a GPU: bf16 autocast."""
    pairs, rows = arguments.pairs, Rows()
    for model in ("base", "large"):
        rows |= {
            f"step {model} 0.1": lambda m=model: step_ratio(m, 32, 128, 0.1, compute, pairs),
            f"step {model} 0": lambda m=model: step_ratio(m, 32, 128, 0.0, compute, pairs),
            f"step compiled {model}": lambda m=model: step_ratio(m, 32, 128, 0.1, compute, pairs, compiled=True),
            f"inference {model}": lambda m=model: inference_ratio(m, 32, 128, compute, pairs),
            f"efficiency {model}": lambda m=model: efficiency(m, 256, 128, compute, pairs),
            f"memory {model}": lambda m=model: memory_ratio(m, 32, 128, compute),
        }
    return rows


def main(arguments: Arguments) -> int:
    """Measure, print, write. Returns the exit code."""
    theirs.quiet()
    compute = choose_compute(TrainConfig(device=arguments.device))
    torch.manual_seed(0)
    started = time.perf_counter()
    on_gpu = compute.device.type == "cuda"
    name = torch.cuda.get_device_name(compute.device) if on_gpu else processor()
    kind = "" if on_gpu else f"{name}, {torch.backends.cpu.get_cpu_capability()}, "
    machine = f"{kind}{compute.describe()}, {date.today().isoformat()}, {theirs.versions()}"
    say(f"{machine}\n\n{'':<72}  ratio, median and range of the pairs   ours against theirs")
    found: list[Ratio] = []
    for row, measure in (gpu_rows if on_gpu else cpu_rows)(arguments, compute).items():
        if arguments.only in row:
            result = measure()
            ratios = result if isinstance(result, list) else [result]
            for ratio in ratios:
                say(ratio.line())
            found += ratios
            gc.collect()
    say(f"\n{time.perf_counter() - started:.0f} s in total")
    path = arguments.json
    if path is None and not arguments.only:  # some rows must not replace all of them
        path = Path(__file__).parent / "results" / (re.sub(r"\W+", "-", name.lower()).strip("-") + ".json")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{**dataclasses.asdict(ratio), "median": statistics.median(ratio.ratios)} for ratio in found]
        path.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n", encoding="utf-8")
        say(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(parse_options(Arguments, sys.argv[1:], prog="benchmarks.against_peft"))))
