"""How many parameters a configuration trains, and the largest rank (of a bottleneck, the width) that a budget allows.

    python -m lora.budget roberta-base --rank 6 --targets query key value --labels 4
    python -m lora.budget --budget 1000000

A LoRA of rank r on a matrix with `in` columns and `out` rows trains r (in + out) parameters (Hu et al. 2021, section
4.2). Nothing here relies on that: the model is built on the meta device, which has shapes and no memory, and counted by
the code that trains, so the answer is right for every method.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence

import torch
from torch import nn

from lora.adapter import adapters
from lora.config import BottleneckConfig, LoRAConfig, MethodConfig
from lora.errors import LoRAError
from lora.eva import EvaConfig
from lora.inject import ParameterCount, count_parameters, inject_lora

HEADS = {"full": ("classifier",), "out_proj": ("classifier.out_proj",), "none": ()}
TARGET_SETS = (
    ("query", "value"),
    ("query", "key", "value"),
    ("query", "key", "value", "attention.output.dense"),
    ("query", "key", "value", "intermediate.dense"),
    ("query", "key", "value", "output.dense"),
    ("query", "key", "value", "intermediate.dense", "output.dense"),
)


def count_on_meta(build: Callable[[], nn.Module], *configs: MethodConfig) -> ParameterCount:
    """The parameters of `build()` with these methods, without memory. Raises what `inject_lora` raises."""
    with torch.device("meta"):
        return count_parameters(inject_lora(build(), *configs))


def largest_rank(build: Callable[[], nn.Module], config: LoRAConfig, budget: int, *others: MethodConfig) -> int:
    """The largest rank with which `config`, beside `others`, trains at most `budget` parameters; 0 if there is none.

    The count is linear in the rank, so two counts determine it. Raises what `inject_lora` raises.
    """
    # Initialisations count no parameters, but some need an even or a small rank.
    config = dataclasses.replace(config, init="default", eva_config=EvaConfig())
    one, two = (count_on_meta(build, dataclasses.replace(config, rank=rank), *others).trainable for rank in (1, 2))
    return 0 if one > budget or one == two else 1 + (budget - one) // (two - one)


def smallest_reduction(
    build: Callable[[], nn.Module], config: BottleneckConfig, budget: int, *others: MethodConfig
) -> int:
    """The smallest integer reduction factor with which `config`, beside `others`, trains at most `budget` parameters.

    0 if none does. The count is linear in the width, hidden // factor, so those of width 1 and of the full width
    determine it. Raises what `inject_lora` raises.
    """
    with torch.device("meta"):
        widest = inject_lora(build(), dataclasses.replace(config, reduction_factor=1), *others)
    hidden = int(max(adapter.settings().get("width", 0) for adapter in adapters(widest).values()))
    full = count_parameters(widest).trainable
    one = count_on_meta(build, dataclasses.replace(config, reduction_factor=hidden), *others).trainable
    width = 1 + (budget - one) * (hidden - 1) // (full - one)
    return hidden // (width + 1) + 1 if one <= budget else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    from roberta.config import PUBLISHED  # the command knows RoBERTa, the library does not

    parser = argparse.ArgumentParser(prog="python -m lora.budget", description="Count trainable parameters.")
    parser.error = _one_line_error  # type: ignore[method-assign, assignment]
    parser.add_argument("model", nargs="?", choices=PUBLISHED, help="base and large, if none is given with --budget")
    question = parser.add_mutually_exclusive_group()
    question.add_argument("--rank", type=int, default=8, help="count the parameters at this rank (default 8)")
    question.add_argument("--budget", type=int, default=None, help="list the largest ranks that train at most this")
    parser.add_argument(
        "--targets",
        nargs="+",
        metavar="NAME",
        help="all-linear or names; default query key value; with --budget many sets",
    )
    parser.add_argument("--exclude", nargs="+", metavar="NAME", help="layers not to adapt")
    parser.add_argument("--labels", type=int, default=4, help="number of classes (default 4, as in AG News)")
    parser.add_argument("--head", choices=HEADS, help="how much of the head is trained (default full)")
    parser.add_argument("--layers", type=int, nargs="+", metavar="N", help="layers to adapt (default all)")
    parser.add_argument("--bias", choices=("none", "lora_only", "all"), default="none")
    options = parser.parse_args(arguments)
    for name in ("labels", "budget"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name} is {value}; it must be 1 or more")
    if options.model is None and options.budget is None:
        parser.error(f"name a model ({', '.join(PUBLISHED)}), or give --budget")
    try:
        _print_count(options) if options.budget is None else _print_ranks(options)
    except LoRAError as error:
        parser.error(str(error).removeprefix("lora: "))
    return 0


def _builder(name: str, labels: int) -> Callable[[], nn.Module]:
    from roberta.config import PUBLISHED
    from roberta.model import RobertaForSequenceClassification

    config = dataclasses.replace(PUBLISHED[name], label_names=tuple(map(str, range(labels))))
    return lambda: RobertaForSequenceClassification(config)


def _config(options: argparse.Namespace, targets: Sequence[str], head: str) -> LoRAConfig:
    return LoRAConfig(
        rank=options.rank,
        target_modules=tuple(targets),
        exclude_modules=tuple(options.exclude) if options.exclude else None,
        layers_to_transform=tuple(options.layers) if options.layers else None,
        bias=options.bias,
        modules_to_save=HEADS[head],
    )


def _print_count(options: argparse.Namespace) -> None:
    config = _config(options, options.targets or ("query", "key", "value"), options.head or "full")
    count = count_on_meta(_builder(options.model, options.labels), config)
    head = sum(trainable for name, (trainable, _) in count.parts.items() if name.startswith("classifier"))
    where = "the adapters" if options.bias == "none" else "the adapters and biases"
    print(f"{count.trainable:,} trainable ({count.trainable - head:,} in {where} + {head:,} in the head)", end="")
    print(f" of {count.total:,}: {count.percentage:.2f} %")


def _print_ranks(options: argparse.Namespace) -> None:
    names = [options.model] if options.model else ["roberta-base", "roberta-large"]
    target_sets = (options.targets,) if options.targets else TARGET_SETS
    heads = (options.head,) if options.head else tuple(HEADS)
    default = not (options.targets or options.exclude or options.layers or options.bias != "none")
    width = max(len(text) for text in [*names, *map(", ".join, target_sets)])
    print(f"largest rank that trains at most {options.budget:,} parameters, {options.labels} labels\n")
    for name in names:
        build = _builder(name, options.labels)
        print(f"{name:<{width}}  head: " + "  ".join(f"{head:>9}" for head in heads))
        for targets in target_sets:
            ranks = [largest_rank(build, _config(options, targets, head), options.budget) for head in heads]
            print(f"{', '.join(targets):<{width}}        " + "  ".join(f"{rank or 'over':>9}" for rank in ranks))
        for form in ("pfeiffer", "houlsby") if default else ():
            configs = [BottleneckConfig(modules_to_save=HEADS[head], form=form) for head in heads]
            factors = [smallest_reduction(build, config, options.budget) for config in configs]
            row = f"bottleneck, {form}: smallest reduction_factor"
            print(f"{row:<{width}}        " + "  ".join(f"{factor or 'over':>9}" for factor in factors))
        print()


def _one_line_error(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    sys.exit(main())
