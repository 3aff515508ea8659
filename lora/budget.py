"""Parameter arithmetic, without building a model.

    python -m lora.budget roberta-base --rank 6 --targets query key value --labels 4
    python -m lora.budget --budget 1000000

A LoRA of rank r on a matrix with `in` columns and `out` rows trains r (in + out) parameters. The head trains
h (h + 1) in its dense layer and L (h + 1) in out_proj, h being the hidden size and L the number of labels.
Source: Hu et al. 2021, section 4.2; the shapes of RoBERTa are those of Liu et al. 2019.

Pure arithmetic on names and shapes, without torch, so that the answer is instant; tests/lora/test_budget.py holds it
against models that are built and counted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from lora.targets import matches


@dataclass(frozen=True)
class Shape:
    """What decides how many parameters a RoBERTa encoder has."""

    hidden: int
    intermediate: int
    layers: int
    vocab: int = 50265
    positions: int = 514


SHAPES = {
    "roberta-base": Shape(hidden=768, intermediate=3072, layers=12),
    "roberta-large": Shape(hidden=1024, intermediate=4096, layers=24),
    # A BERT vocabulary, and BERT's 512 positions with the padding row above them.
    "minilm": Shape(hidden=384, intermediate=1536, layers=6, vocab=30522, positions=513),
}

HEADS = ("full", "out_proj", "none")

TARGET_SETS: tuple[tuple[str, ...], ...] = (
    ("query", "value"),
    ("query", "key", "value"),
    ("query", "key", "value", "attention.output.dense"),
    ("query", "key", "value", "intermediate.dense"),
    ("query", "key", "value", "output.dense"),
    ("query", "key", "value", "intermediate.dense", "output.dense"),
)


def encoder_matrices(shape: Shape) -> dict[str, tuple[int, int]]:
    """Every linear layer of the encoder: name -> (in, out)."""
    h, m = shape.hidden, shape.intermediate
    of_layer = {
        "attention.self.query": (h, h),
        "attention.self.key": (h, h),
        "attention.self.value": (h, h),
        "attention.output.dense": (h, h),
        "intermediate.dense": (h, m),
        "output.dense": (m, h),
    }
    return {
        f"roberta.encoder.layer.{layer}.{name}": size
        for layer in range(shape.layers)
        for name, size in of_layer.items()
    }


def adapter_parameters(
    shape: Shape, targets: Sequence[str], rank: int, layers: Sequence[int] | None = None, bias: str = "none"
) -> int:
    """Parameters trained in the encoder: sum of rank * (in + out) over the targeted matrices, and the chosen biases.

    `bias` is none, lora_only (the targeted layers' own) or all (every linear layer's and LayerNorm's).
    Raises ValueError for a rank below 1, no target, one that matches nothing, or a layer that does not exist.
    """
    if not targets:
        raise ValueError("no target; name at least one linear layer, for example query")
    if rank < 1:
        raise ValueError(f"rank is {rank}; it must be 1 or more")
    absent = sorted(set(layers or ()) - set(range(shape.layers)))
    if absent:
        raise ValueError(f"no layer {absent[0]}; there are layers 0 to {shape.layers - 1}")
    matrices = encoder_matrices(shape)
    for target in targets:
        if not any(matches([target], name) for name in matrices):
            endings = ", ".join(name.split(".", 4)[4].removeprefix("attention.self.") for name in list(matrices)[:6])
            raise ValueError(f"target {target!r} matches no linear layer; there are {endings}")
    targeted = {name: size for name, size in matrices.items() if matches(targets, name, layers)}
    total = sum(rank * (inputs + outputs) for inputs, outputs in targeted.values())
    if bias == "lora_only":
        total += sum(outputs for _, outputs in targeted.values())
    elif bias == "all":
        # One LayerNorm after the embeddings, two in each layer.
        total += sum(outputs for _, outputs in matrices.values()) + shape.hidden * (2 * shape.layers + 1)
    return total


def head_parameters(shape: Shape, labels: int, head: str = "full", bias: str = "none") -> int:
    """Parameters trained in the head, one of HEADS: all of it, its out_proj, or none; with bias = all, its biases in
    any case.
    """
    dense_bias, dense = shape.hidden, shape.hidden * shape.hidden
    out_bias, out = labels, labels * shape.hidden
    trained = {"full": dense + dense_bias + out + out_bias, "out_proj": out + out_bias, "none": 0}[head]
    if bias == "all":
        trained += {"full": 0, "out_proj": dense_bias, "none": dense_bias + out_bias}[head]
    return trained


def total_parameters(shape: Shape, labels: int) -> int:
    """Parameters of the pretrained encoder and the head, adapters not included."""
    h = shape.hidden
    embeddings = (shape.vocab + shape.positions + 1) * h + 2 * h
    linear = sum((inputs + 1) * outputs for inputs, outputs in encoder_matrices(shape).values())
    return embeddings + linear + 4 * h * shape.layers + head_parameters(shape, labels)


def largest_rank(
    shape: Shape,
    targets: Sequence[str],
    labels: int,
    budget: int,
    head: str = "full",
    layers: Sequence[int] | None = None,
    bias: str = "none",
) -> int:
    """The largest rank whose adapters and head together train at most `budget` parameters; 0 if not even rank 1.

    Raises ValueError as `adapter_parameters` does.
    """
    one, two = (adapter_parameters(shape, targets, rank, layers, bias) for rank in (1, 2))
    left = budget - head_parameters(shape, labels, head, bias) - one
    return 0 if left < 0 else 1 + left // (two - one)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m lora.budget", description="Count LoRA's trainable parameters.")
    parser.error = _one_line_error  # type: ignore[method-assign]
    parser.add_argument("model", nargs="?", choices=SHAPES, help="base and large, if none is given with --budget")
    question = parser.add_mutually_exclusive_group()
    question.add_argument("--rank", type=int, default=8, help="count the parameters at this rank (default 8)")
    question.add_argument("--budget", type=int, default=None, help="list the largest ranks that train at most this")
    parser.add_argument("--targets", nargs="+", metavar="NAME", help="default query key value; with --budget many sets")
    parser.add_argument("--labels", type=int, default=4, help="number of classes (default 4, as in AG News)")
    parser.add_argument("--head", choices=HEADS, help="how much of the head is trained (default full)")
    parser.add_argument(
        "--layers", type=int, nargs="+", default=None, metavar="N", help="layers to adapt (default all)"
    )
    parser.add_argument("--bias", choices=("none", "lora_only", "all"), default="none")
    options = parser.parse_args(arguments)
    if options.labels < 1:
        parser.error(f"--labels is {options.labels}; it must be 1 or more")
    if options.budget is not None and options.budget < 1:
        parser.error(f"--budget is {options.budget}; it must be 1 or more")
    if options.model is None and options.budget is None:
        parser.error(f"name a model ({', '.join(SHAPES)}), or give --budget")
    try:
        if options.budget is None:
            _print_count(options)
        else:
            _print_ranks(options)
    except ValueError as error:
        parser.error(str(error))
    return 0


def _print_count(options: argparse.Namespace) -> None:
    shape = SHAPES[options.model]
    targets = options.targets or ("query", "key", "value")
    adapters = adapter_parameters(shape, targets, options.rank, options.layers, options.bias)
    head = head_parameters(shape, options.labels, options.head or "full", options.bias)
    lora = adapter_parameters(shape, targets, options.rank, options.layers)
    total = total_parameters(shape, options.labels) + lora
    where = "the adapters" if options.bias == "none" else "the adapters and biases"
    print(f"{adapters + head:,} trainable ({adapters:,} in {where} + {head:,} in the head)", end="")
    print(f" of {total:,}: {100 * (adapters + head) / total:.2f} %")


def _print_ranks(options: argparse.Namespace) -> None:
    names = [options.model] if options.model else ["roberta-base", "roberta-large"]
    target_sets = (options.targets,) if options.targets else TARGET_SETS
    heads = (options.head,) if options.head else HEADS
    width = max(len(", ".join(targets)) for targets in target_sets)
    width = max(width, *(len(name) for name in names))
    print(f"largest rank that trains at most {options.budget:,} parameters, {options.labels} labels\n")
    for name in names:
        shape = SHAPES[name]
        print(f"{name:<{width}}  head: " + "  ".join(f"{head:>9}" for head in heads))
        for targets in target_sets:
            ranks = [
                largest_rank(shape, targets, options.labels, options.budget, head, options.layers, options.bias)
                for head in heads
            ]
            print(f"{', '.join(targets):<{width}}        " + "  ".join(f"{rank or 'over':>9}" for rank in ranks))
        print()


def _one_line_error(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    sys.exit(main())
