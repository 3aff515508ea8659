"""Shared by the lessons: a small real task, a short training run and a figure.

The task is MiniLM on 1,000 texts of Reuters R8, at most 48 tokens each, without dropout: two runs differ only by what
the lesson varies.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from data.assets import fetch_checkpoint
from data.batching import Batch, EncodedSplit, encode_split, evaluation_batches, training_batches
from data.sources import DataConfig, load_source
from lora.config import MethodConfig
from lora.inject import inject_lora
from roberta.config import RobertaConfig
from roberta.model import RobertaForSequenceClassification
from roberta.tokenizer import TextTokenizer
from roberta.weights import load_checkpoint
from train import make_optimizer, make_schedule, train_step
from training.command_line import parse_options, run_command
from training.config import TrainConfig
from training.plots import PALETTE, smoothed
from training.precision import Compute
from training.progress import say
from training.scoring import predict
from training.setup import seed_everything

CPU = Compute(torch.device("cpu"), "fp32")
LEARNING_RATE = 1e-3
WARMUP_STEPS = 5


@dataclass(frozen=True)
class Task:
    """A pretrained model with a new head, and encoded texts."""

    model: RobertaForSequenceClassification
    train: EncodedSplit
    validation: EncodedSplit
    pad_token_id: int
    seed: int = 0
    batch_size: int = 8

    def adapted(self, config: MethodConfig) -> nn.Module:
        """A copy of the model with a method. The same settings always give the same initial values."""
        torch.manual_seed(self.seed)
        return inject_lora(copy.deepcopy(self.model), config)

    def batches(self, number: int) -> list[Batch]:
        """The first `number` training batches over as many epochs as needed, the same ones in every run."""
        epochs = (
            training_batches(self.train, self.batch_size, self.pad_token_id, self.seed, epoch)
            for epoch in itertools.count(1)
        )
        return list(itertools.islice(itertools.chain.from_iterable(epochs), number))

    def accuracy(self, model: nn.Module) -> float:
        """Accuracy on the validation texts, 0 to 1."""
        batches = evaluation_batches(self.validation, 64, self.pad_token_id)
        logits = predict(model, batches, len(self.validation.labels), CPU)
        return float((logits.argmax(dim=1).numpy() == self.validation.labels).mean())


def reuters_task(seed: int) -> Task:
    """MiniLM and 1,000 texts of Reuters R8, downloaded unless cached. Raises DataError if that fails."""
    data = DataConfig(source="reuters-r8", max_length=48, train_rows=1000, validation_fraction=0.08)
    text = load_source(data, seed)
    directory = fetch_checkpoint("minilm").directory
    config = dataclasses.replace(
        RobertaConfig.from_file(directory / "config.json"),
        label_names=text.label_names,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        classifier_dropout=0.0,
    )
    tokenizer = TextTokenizer.from_directory(directory, data.max_length)
    train, validation = (encode_split(split, tokenizer) for split in (text.train, text.validation))
    seed_everything(seed)
    model = load_checkpoint(directory, config, new_head=True)
    return Task(model, train, validation, tokenizer.pad_token_id, seed)


def fit(
    model: nn.Module,
    batches: Sequence[Batch],
    learning_rate: float = LEARNING_RATE,
    compute: Compute = CPU,
    scaler: torch.amp.GradScaler | None = None,
    after_step: Callable[[], None] = lambda: None,
) -> list[float]:
    """Train on each batch once with `train.train_step`. Returns the loss of each step in nats."""
    optimizer = make_optimizer(model, TrainConfig(learning_rate=learning_rate))
    schedule = make_schedule(optimizer, len(batches), min(WARMUP_STEPS, len(batches) // 2))
    scaler = scaler or compute.grad_scaler()
    model.train()
    losses = []
    for batch in batches:
        losses.append(train_step(model, [batch], optimizer, schedule, scaler, compute, max_grad_norm=1.0).item())
        after_step()
    model.eval()
    return losses


def relative_error(values: Tensor, reference: Tensor) -> float:
    """|values - reference| / |reference|, Euclidean norms over all entries."""
    return ((values - reference).norm() / reference.norm()).item()


@dataclass(frozen=True)
class Lesson:
    """Results of a lesson: lines for the terminal, panels of the plot, and the numbers."""

    lines: list[str]
    panels: list[Callable[[Axes], None]]
    found: dict[Any, Any]
    columns: int | None = None
    """Panels side by side in the plot; all unless set."""


def draw_losses(axes: Axes, losses: dict[str, list[float]]) -> None:
    """One smoothed loss curve per name, with the raw curve faint behind it."""
    for (name, values), colour in zip(losses.items(), PALETTE, strict=False):
        steps = range(1, len(values) + 1)
        axes.plot(steps, values, color=colour, alpha=0.2, linewidth=1)
        axes.plot(steps, smoothed(np.array(values)), color=colour, label=name)
    axes.set(xlabel="optimizer step", ylabel="training loss (nats)")
    axes.set_ylim(bottom=0)


def save_figure(lesson: Lesson, path: Path) -> None:
    """Draw the panels into a PNG file. Creates the folder."""
    columns = lesson.columns or len(lesson.panels)
    rows = len(lesson.panels) // columns
    width, height = (4.8, 3.8) if rows == 1 else (3.2, 2.1)
    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.2}
    with matplotlib.rc_context({**style, "legend.frameon": False, "legend.fontsize": 8}):
        figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
        for panel, axes in zip(lesson.panels, figure.subplots(rows, columns, squeeze=False).flat, strict=True):
            panel(axes)
            if axes.get_legend_handles_labels()[1]:
                axes.legend()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)


@dataclass(frozen=True)
class Arguments:
    """Run one lesson: print its numbers and write its plot."""

    seed: int = 0
    """Seed of the new head, A, and the order of the texts."""
    output: Path = Path("runs/lessons")
    """Folder for the plot."""


def run_lesson(name: str, lesson: Callable[[Task], Lesson]) -> int:
    """The command of a lesson: load the task, print the lines, write NAME.png. Returns the exit code."""

    def command() -> int:
        arguments = parse_options(Arguments, sys.argv[1:], prog=f"experiments.lessons.{name}")
        started = time.perf_counter()
        result = lesson(reuters_task(arguments.seed))
        for line in result.lines:
            say(line)
        path = arguments.output / f"{name}.png"
        save_figure(result, path)
        say(f"\n{path}   ({time.perf_counter() - started:.0f} s, seed {arguments.seed})")
        return 0

    return run_command(command)
