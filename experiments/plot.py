"""Plot the curves of several runs in the same axes, and their test scores.

    python -m experiments.plot runs/table/runs/* --output comparison

In test_accuracy.png run folders NAME-s0, NAME-s1, ... are the seeds of one configuration: a row.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tyro
from matplotlib.axes import Axes

from experiments.grid import configuration_and_seed
from training.command_line import parse_options, run_command
from training.errors import ConfigError
from training.plots import METRICS, PALETTE, draw_metric, label_rows, read_curves, save_png
from training.progress import say
from training.run_folder import RunFolder


@dataclass(frozen=True)
class Arguments:
    """Plot the curves of several runs in the same axes, one image per metric, and the test accuracy of each."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders."""
    output: Path = Path("plots")
    """Folder for the images."""


def plot(arguments: Arguments) -> int:
    """Draw each metric for the runs that have logged it, and the scores of those finished. Returns the exit code.

    Raises ConfigError if no run is given, or if a path is not a run folder.
    """
    if not arguments.runs:
        raise ConfigError("name at least one run folder")
    runs = [read_curves(RunFolder(path)) for path in arguments.runs]
    names = [run.name for run in runs]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"two run folders are named {repeated[0]}; rename one")
    arguments.output.mkdir(parents=True, exist_ok=True)
    for metric, (_, _, unit) in METRICS.items():
        logged = [run for run in runs if (run.steps if unit == "step" else run.validations)]
        if logged:
            save_png(partial(draw_metric, runs=logged, metric=metric), arguments.output / f"{metric}.png", (7, 4.4))
    scores: dict[str, list[float]] = {}
    for run in runs:
        if run.report and run.report["test"]:
            scores.setdefault(configuration_and_seed(run.name)[0], []).append(100 * run.report["test"]["accuracy"])
    if scores:
        size = 4 + 0.08 * max(map(len, scores)), 1.2 + 0.32 * len(scores)
        save_png(partial(draw_scores, scores=scores), arguments.output / "test_accuracy.png", size)
    for run in runs:
        if not run.steps:
            say(f"{run.name}: no training steps yet; left out")
        elif not run.validations:
            say(f"{run.name}: no validation scores yet; only its training curves are drawn")
    say(f"written to {arguments.output}")
    return 0


def draw_scores(axes: Axes, scores: Mapping[str, Sequence[float]]) -> None:
    """A row per configuration: the test accuracy of each seed as a dot, their mean as a bar with its value."""
    for y, accuracies in enumerate(scores.values()):
        mean = statistics.mean(accuracies)
        axes.plot(accuracies, [y] * len(accuracies), "o", color=PALETTE[0], alpha=0.4, markersize=6)
        axes.plot(mean, y, "|", color=PALETTE[1], markersize=16, markeredgewidth=2)
        axes.annotate(f"{mean:.2f}", (1.01, y), xycoords=axes.get_yaxis_transform(), va="center", fontsize=8)
    label_rows(axes, list(scores), "Each seed, and their mean")


if __name__ == "__main__":
    sys.exit(run_command(lambda: plot(parse_options(Arguments, sys.argv[1:], prog="experiments.plot"))))
