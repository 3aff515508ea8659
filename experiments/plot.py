"""Plot the curves of several runs in the same axes.

python -m experiments.plot runs/table/runs/* --output comparison
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tyro

from training.command_line import parse_options, run_command
from training.errors import ConfigError
from training.plots import METRICS, draw_metric, read_curves, save_png
from training.progress import say
from training.run_folder import RunFolder


@dataclass(frozen=True)
class Arguments:
    """Plot the curves of several runs in the same axes, one image per metric."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders."""
    output: Path = Path("plots")
    """Folder for the images."""


def plot(arguments: Arguments) -> int:
    """Draw each metric for the runs that have logged it. Returns the exit code.

    Raises ConfigError if no run is given, or if a path is not a run folder.
    """
    if not arguments.runs:
        raise ConfigError("name at least one run folder")
    runs = [read_curves(RunFolder(path)) for path in arguments.runs]
    arguments.output.mkdir(parents=True, exist_ok=True)
    for metric, (_, _, unit) in METRICS.items():
        logged = [run for run in runs if (run.steps if unit == "step" else run.validations)]
        if logged:
            save_png(partial(draw_metric, runs=logged, metric=metric), arguments.output / f"{metric}.png", (7, 4.4))
    for run in runs:
        if not run.steps:
            say(f"{run.name}: no training steps yet; left out")
        elif not run.validations:
            say(f"{run.name}: no validation scores yet; only its training curves are drawn")
    say(f"written to {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: plot(parse_options(Arguments, sys.argv[1:], prog="experiments.plot"))))
