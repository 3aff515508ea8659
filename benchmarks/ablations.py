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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lora.packed
import ops.linear
from benchmarks import against_peft as bench
from lora.linear import LoRALinear
from lora.packed import PackedLoRALinear
from ops.dropout import Dropout, dropout_mask, rounded
from ops.linear import linear
from ops.memory import keep_freed_memory
from roberta.model import Attention, Roberta
from training.command_line import parse_options, run_command
from training.config import TrainConfig
from training.precision import Compute, choose_compute
from training.progress import say


@dataclass(frozen=True)
class Arguments:
    """Undo the changes for speed one by one."""

    only: str = ""
    """Only the rows whose name contains this."""
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


def sum_of_two(self: PackedLoRALinear, x: Tensor, blocks: tuple[str, ...] | None = None) -> Tensor:
    """Packed, but the update is a tensor of its own that is added to the base's."""
    modules = [self.get_submodule(name) for name in blocks or self.packed_blocks]
    bases = [module.base if isinstance(module, LoRALinear) else module for module in modules]
    y = linear(x, torch.cat([base.weight for base in bases]), torch.cat([base.bias for base in bases]))
    low = linear(modules[0].dropout(x), torch.cat([module.lora_A for module in modules]))
    return y + linear(low, torch.block_diag(*(module.scaling * module.lora_B for module in modules)))


def torchs_product(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The way back through the update's second product by torch's own matmul, as forward."""
    return y.addmm_(x, weight.t())


def fused_attention(self: Attention, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor) -> Tensor:
    """torch's attention also with dropout, where a CPU has no fused kernel and draws torch's masks."""
    p = self.dropout.p if self.training else 0.0
    return F.scaled_dot_product_attention(query, key, value, attn_mask=key_mask, dropout_p=p)


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
    ("dropout masks from bulk random bits", 0.1, Dropout, "forward", torchs_dropout),
    ("attention written out where it has dropout", 0.1, Attention, "_attend", fused_attention),
    ("masks kept as bytes", 0.1, Dropout, "forward", float_masks),
    ("last layer on <s> alone", 0.0, Roberta, "forward", all_tokens),
    ("query, key, value and their updates packed", 0.0, PackedLoRALinear, "forward", three_projections),
    ("way back through the second thin product by oneDNN", 0.0, lora.packed, "add_product_", torchs_product),
    ("update added into the base product", 0.0, PackedLoRALinear, "forward", sum_of_two),
]


def worth(name: str, with_it: Callable[[], Any], without: Callable[[], Any], compute: Compute, pairs: int) -> None:
    """Measure by turns and print a row."""
    ratio = bench.by_turns(name, with_it, without, compute, pairs, warm_up=2)
    show(name, ratio.ratios, ratio.ours, ratio.theirs)


def show(name: str, ratios: list[float], with_it: float, without: float) -> None:
    """Print a row: ratio of the pairs, and the median times in seconds."""
    say(
        f"{name:<46} {statistics.median(ratios):5.2f}x  ({min(ratios):.2f} to {max(ratios):.2f})   "
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
    batch = bench.random_batch(bench.MINILM, 32, 64, compute.device)
    say(f"{bench.processor()}, {compute.describe()}, torch {torch.__version__}; MiniLM, 32 x 64, r = 6 on q, k, v")
    for name, dropout, owner, method, plain in CHANGES:
        if arguments.only not in name:
            continue
        step = bench.our_step(bench.our_model(bench.MINILM, dropout), compute)

        def without(step: Any = step, owner: Any = owner, method: str = method, plain: Any = plain) -> None:
            with put(owner, method, plain):
                step(batch)

        worth(name, lambda step=step: step(batch), without, compute, arguments.pairs)

    for model, rows, length in (("minilm", 32, 64), ("base", 32, 128)):
        name = f"memory kept, {model} {rows} x {length}"
        if arguments.only in name:
            kept_memory(name, model, rows, length, max(1, arguments.pairs // 4))

    if arguments.only in "bfloat16 on this CPU":
        half = Compute(torch.device("cpu"), "bf16")
        model = bench.our_model(bench.MINILM, 0.0)
        half.cast_frozen(model.roberta)
        plain, cast = bench.our_step(bench.our_model(bench.MINILM, 0.0), compute), bench.our_step(model, half)
        worth("bfloat16 on this CPU", lambda: cast(batch), lambda: plain(batch), compute, arguments.pairs)
    if arguments.only in "torch.compile on this CPU":
        model = bench.our_model(bench.MINILM, 0.0)
        eager, compiled = bench.our_step(model, compute), bench.our_step(compute.compiled(model, "on"), compute)
        worth("torch.compile on this CPU", lambda: compiled(batch), lambda: eager(batch), compute, arguments.pairs)
    if arguments.only in "inference in pieces of 16 texts":
        model = bench.our_model(bench.MINILM, 0.0).eval()

        @torch.no_grad()
        def infer(rows: int) -> list[Tensor]:
            pairs = zip(batch.input_ids.split(rows), batch.attention_mask.split(rows), strict=True)
            return [model(ids, mask) for ids, mask in pairs]

        name = "inference in pieces of 16 texts"
        worth(name, lambda: infer(16), lambda: infer(32), compute, arguments.pairs)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(parse_options(Arguments, sys.argv[1:], prog="benchmarks.ablations"))))
