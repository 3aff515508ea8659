"""Ours against peft + transformers, side by side: the same weights, batches, optimizer, precision and dropout.

    make bench
    python -m benchmarks.against_peft --only efficiency --json efficiency.json

Both sides run in this process by turns, A B A B, after warm-up; what counts is the ratio of each pair (theirs over
ours, so that more is better), as median and range. Freed memory is kept in it (`ops/memory.py`), for both sides, as
malloc belongs to the process; how theirs does without is shown by the rows "in a process of its own". Peak memory and
the time to the first step are taken in a process for each side, and there it is ours over theirs, so that less is
better. Absolute times belong to this machine and this minute.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

import ops.linear
import torch
import torch.nn.functional as F
from ops.linear import linear
from ops.memory import keep_freed_memory
from torch import Tensor, nn

from benchmarks import theirs
from data.batching import Batch
from lora.config import LoRAConfig
from lora.inject import inject_lora, merge_lora
from roberta.config import RobertaConfig
from roberta.model import RobertaForSequenceClassification
from train import make_optimizer, make_schedule, train_step
from training.command_line import parse_options, run_command
from training.config import TrainConfig
from training.precision import Compute, choose_compute

LORA = LoRAConfig(rank=6, alpha=14, target_modules=("query", "key", "value"))
LABELS = ("World", "Sports", "Business", "Sci/Tech")
MINILM = RobertaConfig(
    vocab_size=30522,
    hidden_size=384,
    num_hidden_layers=6,
    num_attention_heads=12,
    intermediate_size=1536,
    label_names=LABELS,
)
BASE = RobertaConfig(label_names=LABELS)
LARGE = RobertaConfig(
    hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, label_names=LABELS
)
MODELS = {"minilm": MINILM, "base": BASE, "large": LARGE}


@dataclass(frozen=True)
class Arguments:
    """Compare with peft + transformers."""

    json: Path | None = None
    """Where the figures are written: benchmarks/results/PROCESSOR.json, or with --only nowhere, unless told."""
    device: Literal["cpu", "cuda"] = "cpu"
    """The CPU set, or the GPU set."""
    only: str = ""
    """Only the rows whose name contains this."""
    text: Path = Path("../shared/ag_news_csv")
    """AG News' train.csv and test.csv, for the epoch; left out where they are absent."""
    pairs: int = 8
    """Pairs of each measurement; the long ones take fewer."""


@dataclass(frozen=True)
class Ratio:
    """One row: the ratio of each pair of measurements, and the medians behind it."""

    name: str
    ours: float
    theirs: float
    unit: str
    ratios: list[float]
    more: str = ""
    """What the printed line ends with."""

    def line(self) -> str:
        """For a terminal."""
        middle, low, high = statistics.median(self.ratios), min(self.ratios), max(self.ratios)
        return (
            f"{self.name:<60} {middle:>5.2f}x  ({low:.2f} to {high:.2f})   "
            f"{self.ours:>9,.3f} against {self.theirs:>9,.3f} {self.unit}{self.more}"
        )


def random_batch(config: RobertaConfig, rows: int, length: int, device: torch.device) -> Batch:
    """Full-length random texts: every token real, so that both sides do the same work."""
    ids = torch.randint(5, config.vocab_size, (rows, length), device=device)
    labels = torch.randint(0, config.num_labels, (rows,), device=device)
    return Batch(ids, torch.ones_like(ids, dtype=torch.bool), labels, torch.arange(rows), rows * length)


def our_model(
    config: RobertaConfig, dropout: float, lora: LoRAConfig | None = LORA
) -> RobertaForSequenceClassification:
    """Random weights; without `lora`, everything is trained."""
    config = dataclasses.replace(config, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    model = RobertaForSequenceClassification(config)
    if lora is not None:
        inject_lora(model, dataclasses.replace(lora, dropout=dropout))
    return model.train()


def our_step(model: nn.Module, compute: Compute) -> Callable[[Batch], Tensor]:
    """The program's own `train_step`."""
    optimizer = make_optimizer(model, 5e-4, 0.01, False)
    schedule = make_schedule(optimizer, 1000, 0)
    scaler = compute.grad_scaler()
    return lambda batch: train_step(model, [batch], optimizer, schedule, scaler, compute, max_grad_norm=1.0)


def seconds_of(call: Callable[[], Any], compute: Compute) -> float:
    """Wall time of a call, a GPU's work included."""
    _wait(compute)
    started = time.perf_counter()
    call()
    _wait(compute)
    return time.perf_counter() - started


def _wait(compute: Compute) -> None:
    if compute.device.type == "cuda":
        torch.cuda.synchronize()


def by_turns(
    name: str, ours: Callable[[], Any], others: Callable[[], Any], compute: Compute, pairs: int, warm_up: int = 1
) -> Ratio:
    """Alternate the two and take the ratio of each pair."""
    for _ in range(warm_up):
        ours(), others()
    times = [(seconds_of(ours, compute), seconds_of(others, compute)) for _ in range(pairs)]
    mine, their = (statistics.median(side) for side in zip(*times, strict=True))
    return Ratio(name, mine, their, "s", [b / a for a, b in times])


# --- the measurements -------------------------------------------------------------------------------------------------


def step_ratio(
    model: str, rows: int, length: int, dropout: float, compute: Compute, pairs: int, compiled: bool = False
) -> Ratio:
    """One training step on the same batch; with `compiled`, both sides by torch.compile."""
    config = MODELS[model]
    batch = random_batch(config, rows, length, compute.device)
    ours = our_model(config, dropout).to(compute.device)
    other = theirs.peft_model(ours, config, dropout, LORA).to(compute.device)
    compute.cast_frozen(ours.roberta)
    if compiled:
        ours, other = compute.compiled(ours, "on"), torch.compile(other, dynamic=False)
    mine, their = our_step(ours, compute), theirs.step(other, compute)
    # A small step first: allocators, threads and kernels are ready, at little cost where a step takes a minute.
    small = random_batch(config, 2, 8, compute.device)
    mine(small), their(small)
    ratio = by_turns(
        f"training step, {model} {rows} x {length}, dropout {dropout:g}" + (", both compiled" if compiled else ""),
        lambda: mine(batch),
        lambda: their(batch),
        compute,
        pairs,
        warm_up=2 if pairs > 4 else 1,
    )
    return dataclasses.replace(ratio, more=f"   {rows * length / ratio.ours:,.0f} tokens/s")


_THEIR_STEP = """
import sys
import torch
from benchmarks import against_peft as bench, theirs
from training.config import TrainConfig
from training.precision import choose_compute
model, rows, length, dropout = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
compute = choose_compute(TrainConfig(device="cpu"))
config = bench.MODELS[model]
batch = bench.random_batch(config, rows, length, compute.device)
step = theirs.step(theirs.fresh_peft_model(config, dropout, bench.LORA), compute)
for _ in sys.stdin:
    step(batch)
    print("done", flush=True)
"""


def step_ratio_apart(model: str, rows: int, length: int, dropout: float, compute: Compute, pairs: int) -> Ratio:
    """As `step_ratio`, theirs in a process of its own, whose malloc gives freed memory back as it does for their users.

    By turns too; while one side works, the other waits. Their weights are other random ones, as time does not depend
    on them.
    """
    batch = random_batch(MODELS[model], rows, length, compute.device)
    mine = our_step(our_model(MODELS[model], dropout), compute)
    command = [sys.executable, "-c", _THEIR_STEP, model, str(rows), str(length), str(dropout)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        turns, answers = process.stdin, process.stdout
        assert turns is not None and answers is not None

        def their() -> None:
            print("go", file=turns, flush=True)
            if not answers.readline():
                raise RuntimeError("the other side's process ended")

        name = f"training step, {model} {rows} x {length}, dropout {dropout:g}, theirs in a process of its own"
        return by_turns(name, lambda: mine(batch), their, compute, pairs)


def inference_ratio(model: str, rows: int, length: int, compute: Compute, pairs: int) -> Ratio:
    """Logits of a batch with merged adapters."""
    config = MODELS[model]
    batch = random_batch(config, rows, length, compute.device)
    ours = our_model(config, 0.1).to(compute.device)
    other = theirs.peft_model(ours, config, 0.1, LORA).to(compute.device)
    merge_lora(ours)
    other = other.merge_and_unload()
    ours.eval(), other.eval()

    @torch.no_grad()
    def mine() -> Tensor:
        with compute.autocast():
            return ours(batch.input_ids, batch.attention_mask)

    @torch.no_grad()
    def their() -> Tensor:
        with compute.autocast():
            return other(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).logits

    return by_turns(f"inference, {model} {rows} x {length}", mine, their, compute, pairs)


def full_against_lora(model: str, rows: int, length: int, compute: Compute, pairs: int) -> Ratio:
    """Our full fine-tuning step against our LoRA step."""
    config = MODELS[model]
    batch = random_batch(config, rows, length, compute.device)
    lora, full = (our_step(our_model(config, 0.1, how).to(compute.device), compute) for how in (LORA, None))
    name = f"full fine-tuning against LoRA (both ours), {model} {rows} x {length}"
    return by_turns(name, lambda: lora(batch), lambda: full(batch), compute, pairs)


def useful_flops(config: RobertaConfig, rows: int, length: int) -> float:
    """Floating-point operations that one LoRA training step can't do without: two a multiply-add.

    A frozen matrix takes part twice, in the forward pass and in the gradient of its input, where a trained one would
    three times. The lowest layer's query, key and value need no gradient of their input, and the last layer's query,
    output and feed-forward work on <s> alone. Attention's two products count three times (forward, and a gradient for
    each factor). Adapters, head, LayerNorm and the like are left out: they are small, and their cost is overhead.
    """
    h, m, n, tokens = config.hidden_size, config.intermediate_size, config.num_hidden_layers, rows * length
    per_token = 4 * h * h + 2 * h * m
    multiply_adds = 2.0 * per_token * tokens * (n - 1)
    multiply_adds += 2.0 * (2 * h * h * tokens + (2 * h * h + 2 * h * m) * rows)  # the last layer
    multiply_adds -= 3.0 * h * h * tokens  # no gradient below the first adapter
    attention = 2.0 * h * length * tokens
    multiply_adds += 3.0 * (attention * (n - 1) + 2.0 * h * tokens)
    return 2.0 * multiply_adds


def gemm_rate(
    matmul: Callable[[Tensor, Tensor], Tensor], config: RobertaConfig, tokens: int, compute: Compute
) -> float:
    """Rate of the best of the matmuls at the model's own shapes, in operations a second."""
    best = 0.0
    dtype = compute.dtype
    h, m = config.hidden_size, config.intermediate_size
    for inputs, outputs in ((h, 3 * h), (h, h), (h, m), (m, h)):
        x = torch.randn(tokens, inputs, device=compute.device, dtype=dtype)
        w = torch.randn(outputs, inputs, device=compute.device, dtype=dtype)
        matmul(x, w)
        # The median of some, as a step is timed: the fastest of many would be a moment that no step has throughout.
        seconds = statistics.median(seconds_of(lambda x=x, w=w: matmul(x, w), compute) for _ in range(8))
        best = max(best, 2.0 * tokens * inputs * outputs / seconds)
    return best


def efficiency(model: str, rows: int, length: int, compute: Compute, pairs: int) -> list[Ratio]:
    """Useful operations a second of our step over the rate of a matmul alone, measured by turns.

    A CPU has two matmuls: torch's own, which both sides' users have, and oneDNN's, which a step here uses. So there
    are three figures: the step over either rate, and what it reaches over torch's rate when it uses that one as well.
    """
    config = MODELS[model]
    batch = random_batch(config, rows, length, compute.device)
    ours = our_model(config, 0.0).to(compute.device)
    compute.cast_frozen(ours.roberta)
    step = our_step(ours, compute)
    step(batch)
    work = useful_flops(config, rows, length)

    def useful_rate() -> float:
        return work / seconds_of(lambda: step(batch), compute)

    measured = []
    for _ in range(pairs):
        torchs, used = (gemm_rate(matmul, config, rows * length, compute) for matmul in (F.linear, linear))
        mine = useful_rate()
        with torchs_matmuls():
            plain = useful_rate()
        measured.append((mine, plain, torchs, used))
    mine, plain, torchs, used = (statistics.median(side) / 1e9 for side in zip(*measured, strict=True))
    name = f"useful GFLOP/s over {{}}, {model} {rows} x {length}"
    found = [Ratio(name.format("torch's GEMM rate"), mine, torchs, "GFLOP/s", [a / c for a, _, c, _ in measured])]
    if compute.device.type == "cpu":
        by_torch = [b / c for _, b, c, _ in measured]
        by_used = [a / d for a, _, _, d in measured]
        found.append(Ratio(name.format("it, with its matmul"), plain, torchs, "GFLOP/s", by_torch))
        found.append(Ratio(name.format("oneDNN's GEMM rate"), mine, used, "GFLOP/s", by_used))
    return found


@contextmanager
def torchs_matmuls() -> Iterator[None]:
    """torch's own matmuls on a CPU, for a while, as if it were built without oneDNN."""
    kept, ops.linear._ONEDNN = ops.linear._ONEDNN, None
    try:
        yield
    finally:
        ops.linear._ONEDNN = kept


_MEMORY = """
import sys
from benchmarks import against_peft as bench, theirs
from ops.memory import keep_freed_memory
from training.config import TrainConfig
from training.precision import choose_compute
from training.report import peak_memory_bytes
side, model, rows, length, device = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
compute = choose_compute(TrainConfig(device=device))
config = bench.MODELS[model]
batch = bench.random_batch(config, rows, length, compute.device)
if side == "ours":
    keep_freed_memory()
    model = bench.our_model(config, 0.1).to(compute.device)
    compute.cast_frozen(model.roberta)
    step = bench.our_step(model, compute)
else:
    step = theirs.step(theirs.fresh_peft_model(config, 0.1, bench.LORA).to(compute.device), compute)
step(bench.random_batch(config, 2, 8, compute.device))
step(batch)
print(peak_memory_bytes(compute))
"""


def memory_ratio(model: str, rows: int, length: int, compute: Compute) -> Ratio:
    """Peak memory of a training step, each side in a process of its own: ours over theirs."""
    peaks = []
    for side in ("ours", "theirs"):
        command = [sys.executable, "-c", _MEMORY, side, model, str(rows), str(length), compute.device.type]
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    name = f"peak memory of a step, {model} {rows} x {length} (ours over theirs)"
    return Ratio(name, peaks[0] / 2**20, peaks[1] / 2**20, "MiB", [peaks[0] / peaks[1]])


def epoch_ratios(arguments: Arguments, compute: Compute, rows: int = 600) -> list[Ratio]:
    """One epoch end to end on real text: tokenizing, batches, steps; against Trainer, plain and grouped by length."""
    from data.batching import encode_split, training_batches
    from data.sources import DataConfig, Split, load_source
    from roberta.tokenizer import TextTokenizer

    checkpoint = theirs.minilm_directory()
    text = load_source(DataConfig(source="ag_news", directory=str(arguments.text)), seed=0)
    split = Split(text.train.texts[:rows], text.train.labels[:rows])

    def mine(split: Split) -> None:
        from roberta.weights import load_checkpoint

        config = dataclasses.replace(RobertaConfig.from_file(checkpoint / "config.json"), label_names=LABELS)
        model = load_checkpoint(checkpoint, config, new_head=True)
        inject_lora(model, dataclasses.replace(LORA, dropout=0.1)).to(compute.device).train()
        tokenizer = TextTokenizer.from_directory(checkpoint, 128)
        encoded = encode_split(split, tokenizer)
        step = our_step(model, compute)
        for batch in training_batches(encoded, 32, tokenizer.pad_token_id, seed=0, epoch=1, device=compute.device):
            step(batch)

    few = Split(split.texts[:32], split.labels[:32])  # a step to warm up
    ratios = []
    for grouped in (False, True):
        mine(few), theirs.trainer_epoch(checkpoint, few, LORA, grouped, compute.device)()
        other = theirs.trainer_epoch(checkpoint, split, LORA, grouped, compute.device)
        name = f"one epoch of {rows:,} AG News texts against Trainer" + (", group_by_length" if grouped else "")
        ratios.append(by_turns(name, lambda: mine(split), other, compute, pairs=2, warm_up=0))
    return ratios


def start_ratio(arguments: Arguments) -> Ratio:
    """Seconds from the start of the process to the end of the first step, data cached: ours over theirs."""
    root = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as folder:
        ours = [sys.executable, "train.py", "--model.checkpoint", "minilm", "--data.directory", str(arguments.text)]
        ours += ["--output", f"{folder}/run", "--overwrite", "--train.log-every", "1", "--train.device", "cpu"]
        script = [sys.executable, "-m", "benchmarks.theirs", str(arguments.text), folder]
        times = []
        for _ in range(4):
            times.append((_first_step(ours, "step ", root, folder), _first_step(script, "first step", root, folder)))
        times = times[1:]  # the first filled both sides' caches
    mine, their = (statistics.median(side) for side in zip(*times, strict=True))
    name = "start to first step, data cached (ours over theirs)"
    return Ratio(name, mine, their, "s", [a / b for a, b in times])


def _first_step(command: list[str], mark: str, root: Path, folder: str) -> float:
    """Seconds until the process has done its first step; ours is watched by its metrics, theirs says so."""
    metrics = Path(folder, "run", "metrics.jsonl")
    metrics.unlink(missing_ok=True)
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        if mark == "step ":
            while not (done := metrics.is_file() and metrics.stat().st_size > 0) and process.poll() is None:
                time.sleep(0.01)
        else:
            assert process.stdout is not None
            done = any(line.startswith(mark) for line in process.stdout)
        if not done:
            raise RuntimeError(f"{' '.join(command)} ended before its first step")
        return time.perf_counter() - started
    finally:
        process.kill()
        process.wait()


def cpu_set(arguments: Arguments, compute: Compute) -> list[Callable[[], Ratio | list[Ratio]]]:
    """The measurements of a CPU run, in order."""
    pairs = arguments.pairs
    rows: list[tuple[str, Callable[[], Ratio | list[Ratio]]]] = [
        ("step minilm 0.1", lambda: step_ratio("minilm", 32, 64, 0.1, compute, pairs)),
        ("step minilm 0", lambda: step_ratio("minilm", 32, 64, 0.0, compute, pairs)),
        ("step minilm 128 0.1", lambda: step_ratio("minilm", 32, 128, 0.1, compute, 4)),
        ("step base 0.1", lambda: step_ratio("base", 32, 128, 0.1, compute, 4)),
        ("step base 0", lambda: step_ratio("base", 32, 128, 0.0, compute, 4)),
        ("step apart base 0.1", lambda: step_ratio_apart("base", 32, 128, 0.1, compute, 3)),
        ("step apart base 0", lambda: step_ratio_apart("base", 32, 128, 0.0, compute, 3)),
        ("inference minilm", lambda: inference_ratio("minilm", 32, 64, compute, pairs)),
        ("inference base", lambda: inference_ratio("base", 32, 128, compute, 2)),
        ("full minilm", lambda: full_against_lora("minilm", 32, 64, compute, pairs)),
        ("efficiency minilm", lambda: efficiency("minilm", 32, 64, compute, pairs)),
        ("efficiency base", lambda: efficiency("base", 32, 128, compute, 4)),
        ("memory base", lambda: memory_ratio("base", 32, 128, compute)),
    ]
    if (arguments.text / "train.csv").is_file():
        rows += [("epoch", lambda: epoch_ratios(arguments, compute)), ("start", lambda: start_ratio(arguments))]
    return [measure for name, measure in rows if arguments.only in name]


def gpu_set(arguments: Arguments, compute: Compute) -> list[Callable[[], Ratio | list[Ratio]]]:
    """The measurements of a GPU run: bf16 autocast."""
    pairs = max(arguments.pairs, 10)
    rows: list[tuple[str, Callable[[], Ratio | list[Ratio]]]] = []
    for model in ("base", "large"):
        for dropout in (0.1, 0.0):
            rows.append(
                (f"step {model}", lambda m=model, d=dropout: step_ratio(m, 32, 128, d, compute, pairs)),
            )
        rows.append((f"compiled {model}", lambda m=model: step_ratio(m, 32, 128, 0.1, compute, pairs, compiled=True)))
        rows.append((f"inference {model}", lambda m=model: inference_ratio(m, 32, 128, compute, pairs)))
        rows.append((f"efficiency {model}", lambda m=model: efficiency(m, 256, 128, compute, pairs)))
        rows.append((f"memory {model}", lambda m=model: memory_ratio(m, 32, 128, compute)))
    return [measure for name, measure in rows if arguments.only in name]


def main(arguments: Arguments) -> int:
    """Measure, print, write. Returns the exit code."""
    theirs.quiet()
    compute = choose_compute(TrainConfig(device=arguments.device))
    keep_freed_memory()  # as train.py does; for the other side as well
    torch.manual_seed(0)
    started = time.perf_counter()
    name = torch.cuda.get_device_name(compute.device) if compute.device.type == "cuda" else processor()
    where = compute.describe() if compute.device.type == "cuda" else f"{name}, {compute.describe()}"
    machine = f"{where}, {date.today().isoformat()}, {theirs.versions()}"
    print(f"{machine}\n\n{'':<60}  ratio, median and range of the pairs   ours against theirs", flush=True)
    found: list[Ratio] = []
    for measure in (gpu_set if arguments.device == "cuda" else cpu_set)(arguments, compute):
        result = measure()
        for ratio in result if isinstance(result, list) else [result]:
            found.append(ratio)
            print(ratio.line(), flush=True)
        gc.collect()
    print(f"\n{time.perf_counter() - started:.0f} s in all")
    path = arguments.json
    if path is None and not arguments.only:  # a part would replace the whole
        path = Path(__file__).parent / "results" / (re.sub(r"\W+", "-", name.lower()).strip("-") + ".json")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{**dataclasses.asdict(ratio), "median": statistics.median(ratio.ratios)} for ratio in found]
        path.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n", encoding="utf-8")
        print(f"written to {path}")
    return 0


def processor() -> str:
    """What the machine calls its processor; with family and model, as one name may stand for several generations."""
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    fields = (re.search(rf"^{field}\s*:\s*(.+)$", told, re.M) for field in ("model name", "cpu family", "model"))
    name, family, model = (found[1] if found else "" for found in fields)
    return f"{name} (family {family}, model {model})" if name else platform.processor()


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(parse_options(Arguments, sys.argv[1:], prog="benchmarks.against_peft"))))
