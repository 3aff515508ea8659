"""Lay the curves of several runs over each other.

python -m experiments.plot runs/table/runs/* --output comparison
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from training.command_line import parse_options, run_command
from training.errors import ConfigError
from training.plots import METRICS, Curves, draw_metric, read_curves, save_png
from training.progress import say
from training.run_folder import RunFolder


@dataclass(frozen=True)
class Arguments:
    """Lay the curves of several runs over each other: one image a metric."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders."""
    output: Path = Path("plots")
    """Folder for the images."""


def plot(arguments: Arguments) -> int:
    """Draw every metric that the runs have; says what a run lacks. Returns the exit code.

    Raises ConfigError for no run, or what is no run folder.
    """
    if not arguments.runs:
        raise ConfigError("name at least one run folder")
    runs = [read_curves(RunFolder(path)) for path in arguments.runs]
    arguments.output.mkdir(parents=True, exist_ok=True)
    for metric, (_, _, unit) in METRICS.items():
        with_it = [run for run in runs if (run.steps if unit == "step" else run.validations)]
        if with_it:
            save_png(_drawing(with_it, metric), arguments.output / f"{metric}.png", (7, 4.4))
    for run in runs:
        if not run.steps:
            say(f"{run.name}: has logged nothing yet, and is left out")
        elif not run.validations:
            say(f"{run.name}: has no validation scores yet, only its training loss is drawn")
    say(f"written to {arguments.output}")
    return 0


def _drawing(runs: list[Curves], metric: str) -> Any:
    return lambda axes: draw_metric(axes, runs, metric)


if __name__ == "__main__":
    sys.exit(run_command(lambda: plot(parse_options(Arguments, sys.argv[1:], prog="experiments.plot"))))
