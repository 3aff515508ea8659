"""Which of several runs lose least on corrupted test texts: one table and one picture.

    python evaluate.py RUN --noise                                   # first, for each run: writes RUN/noise.json
    python -m experiments.robustness runs/table/runs/* --output runs/robustness

Run folders NAME-s0, NAME-s1, ... are the seeds of one configuration. For each, the accuracy on the test texts, that by
corruption as a mean over its severities, the mean of all corruptions, and its difference from that of the first
configuration's run with the same seed: with the same rows in [data], equal seeds have equal training texts.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tyro
from matplotlib.axes import Axes

from data.noise import CORRUPTIONS, SEVERITIES
from experiments.grid import configuration_and_seed
from training.command_line import parse_options, run_command
from training.errors import ConfigError
from training.pages import escape_markdown, write_text_atomic
from training.plots import MARKERS, PALETTE, label_rows, save_png
from training.progress import say


@dataclass(frozen=True)
class Arguments:
    """Compare runs on corrupted test texts."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders with a noise.json, as evaluate.py RUN --noise writes it; the first is compared with."""
    output: Path = Path("robustness")
    """Folder for robustness.md and robustness.png."""


@dataclass(frozen=True)
class Result:
    """A configuration over its seeds, accuracies in percent."""

    name: str
    clean: dict[str, float]
    """Seed -> accuracy on the test texts as they are."""
    corrupted: dict[str, dict[str, float]]
    """Corruption -> seed -> accuracy, a mean over the severities."""

    @property
    def mean(self) -> dict[str, float]:
        """Seed -> mean accuracy over all corruptions."""
        return {seed: statistics.mean(of[seed] for of in self.corrupted.values()) for seed in self.clean}


def compare(arguments: Arguments) -> int:
    """Write the table and the picture. Returns the exit code.

    Raises ConfigError if no run is given, or if one has not been measured.
    """
    if not arguments.runs:
        raise ConfigError("name at least one run folder")
    results: dict[str, Result] = {}
    for run in arguments.runs:
        name, seed = configuration_and_seed(run.name)
        result = results.setdefault(name, Result(name, {}, {}))
        if seed in result.clean:
            raise ConfigError(f"{run}: a second run folder named {run.name}; rename one")
        for corruption, accuracies in _measured(run).items():
            result.clean[seed] = 100 * accuracies[0]
            result.corrupted.setdefault(corruption, {})[seed] = 100 * statistics.mean(accuracies[1:])
    table = summary([*results.values()])
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_text_atomic(arguments.output / "robustness.md", table)
    size = 5.5 + 0.08 * max(map(len, results)), 1.4 + 0.32 * len(results)
    save_png(partial(draw, results=[*results.values()]), arguments.output / "robustness.png", size)
    say(f"{table}\nwritten to {arguments.output}/robustness.md and .png")
    return 0


def _measured(run: Path) -> dict[str, list[float]]:
    path = run / "noise.json"
    try:
        measured = json.loads(path.read_text(encoding="utf-8"))
        complete = [*measured] == [*CORRUPTIONS] and all(
            [type(value) for value in values] == [float] * (1 + len(SEVERITIES)) for values in measured.values()
        )
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        complete = False
    if not complete:
        raise ConfigError(f"{path}: missing or incomplete; run first: python evaluate.py {run} --noise")
    return measured


def summary(results: Sequence[Result]) -> str:
    """A Markdown table: means over the seeds; the last column with the standard error of the paired differences."""
    first = results[0]
    heads = ["configuration", "seeds", "clean", *first.corrupted, "mean", f"mean minus {escape_markdown(first.name)}"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in results:
        means = [row.clean, *row.corrupted.values(), row.mean]
        cells = [str(len(row.clean)), *(f"{statistics.mean(each.values()):.2f}" for each in means)]
        paired = [row.mean[seed] - first.mean[seed] for seed in row.mean if seed in first.mean]
        difference = f"{statistics.mean(paired):+.2f}" if paired and row is not first else ""
        if difference and len(paired) > 1:
            difference += f" ± {statistics.stdev(paired) / len(paired) ** 0.5:.2f}"
        lines.append(f"| {escape_markdown(row.name)} | {' | '.join(cells)} | {difference} |")
    return "\n".join(lines) + "\n"


def draw(axes: Axes, results: Sequence[Result]) -> None:
    """A row per configuration: its accuracy as the texts are, and the mean of each corruption."""
    for y, row in enumerate(results):
        marks = [("clean", row.clean, "black", "|")]
        marks += [(name, of, PALETTE[i], MARKERS[i]) for i, (name, of) in enumerate(row.corrupted.items())]
        for label, seeds, color, marker in marks:
            x = statistics.mean(seeds.values())
            size = 16 if label == "clean" else 6
            axes.plot(x, y, marker, color=color, markersize=size, label=label if y == 0 else None)
    label_rows(axes, [row.name for row in results], "Corrupted test texts, mean over the severities")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


if __name__ == "__main__":
    sys.exit(run_command(lambda: compare(parse_options(Arguments, sys.argv[1:], prog="experiments.robustness"))))
