"""What each change for speed is worth: a training step with it, against one without it, by turns.

    python -m benchmarks.ablations

Every change is undone by putting the plain form back in its place; the figure is the ratio of the two times (without
over with, so that more is better), as median and range of the pairs. What was predicted of each, and why it was kept
or dropped, is in docs/performance.md.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import ops.linear
import roberta.attention
import torch
import torch.nn.functional as F
from lora.packed import PackedLoRALinear, _Adapted
from ops.dropout import Dropout, dropout_mask, rounded
from ops.linear import linear
from ops.memory import keep_freed_memory
from roberta.attention import _split_heads
from torch import Tensor

import roberta.model
from benchmarks import against_peft as bench
from roberta.model import Roberta
from training.command_line import parse_options, run_command
from training.config import TrainConfig
from training.precision import Compute, choose_compute
from training.progress import say


@dataclass(frozen=True)
class Arguments:
    """Undo the changes for speed one by one."""

    only: str = ""
    """Only the rows whose name contains this."""
    model: Literal["minilm", "base"] = "minilm"
    """MiniLM's sizes and 32 texts of 64 tokens, or RoBERTa-base's and 32 of 128."""
    pairs: int = 12
    """Pairs of steps for each."""


def torchs_dropout(self: Dropout, x: Tensor) -> Tensor:
    """Masks drawn by torch, one number at a time."""
    return F.dropout(x, self.p, self.training)


def float_masks(self: Dropout, x: Tensor) -> Tensor:
    """The same masks, kept for the backward pass as floats."""
    if not self.training or self.p == 0:
        return x
    return x * dropout_mask(x.shape, self.p).to(x.dtype).mul_(1 / (1 - rounded(self.p)))


def all_tokens(self: Roberta, input_ids: Tensor, attention_mask: Tensor, first_token_only: bool = False) -> Tensor:
    """The last layer for every token."""
    key_mask = attention_mask.bool()[:, None, None, :]
    return self.encoder(self.embeddings(input_ids, attention_mask), key_mask)


def three_projections(self: PackedLoRALinear, x: Tensor, blocks: tuple[str, ...] | None = None) -> Tensor:
    """Query, key and value one after the other, each with its own update."""
    return torch.cat([self.get_submodule(name)(x) for name in blocks or self.packed_blocks], dim=-1)


def update_by_autograd(x: Tensor, dropped: Tensor | None, weight: Tensor, bias: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Packed, but the update is a product of its own, there and back, whose gradients torch derives."""
    return linear(x, weight, bias) + linear(linear(x if dropped is None else dropped, A), B)


def torchs_products(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """Attention's products by torch's own matmul."""
    return torch.baddbmm(a.new_empty(1), a, b, beta=0, alpha=scale)


def fused_attention(
    projections: tuple[Tensor, ...], num_heads: int, key_mask: Tensor, dropout_prob: float = 0.0
) -> Tensor:
    """torch's attention: a fused kernel without dropout; with dropout a CPU has none, and draws torch's masks."""
    query, key, value = _split_heads(projections, num_heads)
    context = F.scaled_dot_product_attention(query, key, value, attn_mask=key_mask, dropout_p=dropout_prob)
    return context.transpose(1, 2).flatten(2)


@contextmanager
def put(owner: Any, name: str, plain: Any) -> Iterator[None]:
    """`plain` in the place of a method or a name of a module, for a while."""
    kept = getattr(owner, name)
    setattr(owner, name, plain)
    try:
        yield
    finally:
        setattr(owner, name, kept)


CHANGES: list[tuple[str, float, Any, str, Any]] = [
    ("matmuls by oneDNN", 0.0, ops.linear, "_ONEDNN", None),
    ("attention written out", 0.0, roberta.model, "attention", fused_attention),
    ("attention written out, with dropout", 0.1, roberta.model, "attention", fused_attention),
    ("attention's products by oneDNN", 0.0, roberta.attention, "batched_product", torchs_products),
    ("dropout masks from bulk random bits", 0.1, Dropout, "forward", torchs_dropout),
    ("masks kept as bytes", 0.1, Dropout, "forward", float_masks),
    ("last layer on <s> alone", 0.0, Roberta, "forward", all_tokens),
    ("query, key, value and their updates packed", 0.0, PackedLoRALinear, "forward", three_projections),
    ("update within the stacked weights, its way back written out", 0.0, _Adapted, "apply", update_by_autograd),
    ("the same with dropout", 0.1, _Adapted, "apply", update_by_autograd),
    ("columns that crowd a cache copied", 0.0, ops.linear, "_transposed", torch.t),
]


def worth(name: str, with_it: Callable[[], Any], without: Callable[[], Any], compute: Compute, pairs: int) -> None:
    """Measure by turns and print a row."""
    ratio = bench.by_turns(name, with_it, without, compute, pairs, warm_up=2)
    show(name, ratio.ratios, ratio.ours, ratio.theirs)


def show(name: str, ratios: list[float], with_it: float, without: float) -> None:
    """Print a row: ratio of the pairs, and the median times in seconds."""
    say(
        f"{name:<60} {statistics.median(ratios):5.2f}x  ({min(ratios):.2f} to {max(ratios):.2f})   "
        f"{1000 * with_it:6.0f} ms with, {1000 * without:6.0f} ms without"
    )


_STEP = """
import statistics, sys
from benchmarks import against_peft as bench
from ops.memory import keep_freed_memory
from training.config import TrainConfig
from training.precision import choose_compute
kept, model, rows, length = sys.argv[1] == "kept", sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
compute = choose_compute(TrainConfig(device="cpu"))
if kept:
    keep_freed_memory()
batch = bench.random_batch(bench.MODELS[model], rows, length, compute.device)
step = bench.our_step(bench.our_model(bench.MODELS[model], 0.0), compute)
step(batch)
print(statistics.median(bench.seconds_of(lambda: step(batch), compute) for _ in range(5)))
"""


def kept_memory(name: str, model: str, rows: int, length: int, pairs: int) -> None:
    """Measure processes by turns, as malloc is told once for all, and print a row."""
    seconds: dict[str, list[float]] = {"kept": [], "given back": []}
    for _ in range(pairs):
        for how, found in seconds.items():
            command = [sys.executable, "-c", _STEP, how, model, str(rows), str(length)]
            found.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    kept, given_back = seconds.values()
    ratios = [b / a for a, b in zip(kept, given_back, strict=True)]
    show(name, ratios, statistics.median(kept), statistics.median(given_back))


def main(arguments: Arguments) -> int:
    """Print a row for each change. Returns the exit code."""
    compute = choose_compute(TrainConfig(device="cpu"))
    keep_freed_memory()
    torch.manual_seed(0)
    config, length = bench.MODELS[arguments.model], 64 if arguments.model == "minilm" else 128
    batch = bench.random_batch(config, 32, length, compute.device)
    say(
        f"{bench.processor()}, {compute.describe()}, torch {torch.__version__}; {arguments.model}, 32 x {length}, "
        "r = 6 on q, k, v"
    )
    for name, dropout, owner, method, plain in CHANGES:
        if arguments.only not in name:
            continue
        step = bench.our_step(bench.our_model(config, dropout), compute)

        def without(step: Any = step, owner: Any = owner, method: str = method, plain: Any = plain) -> None:
            with put(owner, method, plain):
                step(batch)

        worth(name, lambda step=step: step(batch), without, compute, arguments.pairs)

    name = f"memory kept, {arguments.model} 32 x {length}"
    if arguments.only in name:
        kept_memory(name, arguments.model, 32, length, max(1, arguments.pairs // 4))
    if arguments.only in "bfloat16 on this CPU":
        half = Compute(torch.device("cpu"), "bf16")
        model = bench.our_model(config, 0.0)
        half.cast_frozen(model.roberta)
        plain, cast = bench.our_step(bench.our_model(config, 0.0), compute), bench.our_step(model, half)
        worth("bfloat16 on this CPU", lambda: cast(batch), lambda: plain(batch), compute, arguments.pairs)
    if arguments.only in "torch.compile on this CPU":
        model = bench.our_model(config, 0.0)
        eager, compiled = bench.our_step(model, compute), bench.our_step(compute.compiled(model, "on"), compute)
        worth("torch.compile on this CPU", lambda: compiled(batch), lambda: eager(batch), compute, arguments.pairs)
    if arguments.only in "inference in pieces of 16 texts":
        model = bench.our_model(config, 0.0).eval()

        @torch.no_grad()
        def infer(rows: int) -> list[Tensor]:
            pairs = zip(batch.input_ids.split(rows), batch.attention_mask.split(rows), strict=True)
            return [model(ids, mask) for ids, mask in pairs]

        name = "inference in pieces of 16 texts"
        worth(name, lambda: infer(16), lambda: infer(32), compute, arguments.pairs)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(parse_options(Arguments, sys.argv[1:], prog="benchmarks.ablations"))))
