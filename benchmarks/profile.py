"""Where the time of a training step goes, by a clock around each kind of work.

    python -m benchmarks.profile --model base

A profiler's own records would lie between the tensors and make each large one land on new pages, which costs more than
what is measured; a clock costs nothing. Each figure is the median of the steps, in ms and in per cent of a step.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import lora.packed
import ops.linear
import torch
import torch.nn.functional as F
from ops.memory import keep_freed_memory
from roberta.attention import _Attention
from torch import Tensor, nn

from benchmarks import against_peft as bench
from training.command_line import parse_options, run_command
from training.config import TrainConfig
from training.precision import choose_compute
from training.progress import say

_THIN = 64
"""A matmul with a dimension below this belongs to an adapter (or to the head, whose time is small)."""


@dataclass(frozen=True)
class Arguments:
    """Time the parts of a training step."""

    model: Literal["minilm", "base"] = "minilm"
    """MiniLM's sizes and 32 texts of 64 tokens, or RoBERTa-base's and 32 of 128."""
    dropout: float = 0.0
    """Of the encoder and the adapters."""
    steps: int = 15
    """Steps that are timed, after three that are not."""


class Clock:
    """Seconds by kind of work, added up until they are read."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def around(self, call: Callable[..., Any], kind: Callable[..., str]) -> Callable[..., Any]:
        """`call`, timed; `kind` says from its arguments what it is."""

        def timed(*given: Any, **named: Any) -> Any:
            started = time.perf_counter()
            result = call(*given, **named)
            self.seconds[kind(*given)] += time.perf_counter() - started
            return result

        return timed

    def there_and_back(self, call: Callable[..., Tensor], kind: str) -> Callable[..., Tensor]:
        """The same for a call whose gradient torch derives, with the time of its way back."""
        timed = self.around(call, lambda *_: kind)

        def both(*given: Any, **named: Any) -> Tensor:
            result, started = timed(*given, **named), []
            if (node := result.grad_fn) is not None:
                node.register_prehook(lambda _gradients: started.append(time.perf_counter()))
                node.register_hook(lambda _to, _from: self._stop(kind, started.pop()))
            return result

        return both

    def _stop(self, kind: str, started: float) -> None:
        self.seconds[kind] += time.perf_counter() - started


def _kind_of_product(x: Tensor, weight: Tensor, *_: Any) -> str:
    thin = min(*x.shape, *weight.shape) < _THIN
    return "thin matmuls (adapters, head, <s> alone)" if thin else "frozen matmuls"


def main(arguments: Arguments) -> int:
    """Time and print. Returns the exit code."""
    keep_freed_memory()
    compute = choose_compute(TrainConfig(device="cpu"))
    config, length = bench.MODELS[arguments.model], 64 if arguments.model == "minilm" else 128
    torch.manual_seed(0)
    batch = bench.random_batch(config, 32, length, compute.device)
    step = bench.our_step(bench.our_model(config, arguments.dropout), compute)
    clock = Clock()
    ops.linear.product = lora.packed.product = clock.around(ops.linear.product, _kind_of_product)
    _Attention.forward = staticmethod(clock.around(_Attention.forward, lambda *_: "attention"))
    _Attention.backward = staticmethod(clock.around(_Attention.backward, lambda *_: "attention"))
    F.gelu = clock.there_and_back(F.gelu, "GELU")
    nn.LayerNorm.forward = clock.there_and_back(nn.LayerNorm.forward, "LayerNorm")
    torch.nn.utils.clip_grad_norm_ = clock.around(torch.nn.utils.clip_grad_norm_, lambda *_: "optimizer, clipping")
    torch.optim.AdamW.step = clock.around(torch.optim.AdamW.step, lambda *_: "optimizer, clipping")

    parts: dict[str, list[float]] = defaultdict(list)
    whole: list[float] = []
    for number in range(3 + arguments.steps):
        clock.seconds.clear()
        seconds = bench.seconds_of(lambda: step(batch), compute)
        if number >= 3:
            whole.append(seconds)
            for kind, part in clock.seconds.items():
                parts[kind].append(part)
    total = statistics.median(whole)
    medians = {kind: statistics.median(found) for kind, found in parts.items()}
    medians["the rest: sums, stacking, dropout, Python"] = total - sum(medians.values())
    say(f"{bench.processor()}, {arguments.model}, 32 x {length}, dropout {arguments.dropout:g}: {1000 * total:.0f} ms")
    for kind, seconds in sorted(medians.items(), key=lambda item: -item[1]):
        say(f"{kind:<44} {1000 * seconds:8.1f} ms  {100 * seconds / total:5.1f} %")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(parse_options(Arguments, sys.argv[1:], prog="benchmarks.profile"))))
