"""Compare configurations fairly: each at its best learning rate, chosen on the validation split, over several seeds.

    python -m experiments.compare experiments/methods --set data.source=reuters-r8 --output runs/methods-r8

Every configuration is tried with the same multiples of its own learning rate, one run each, and the rate with the
highest validation accuracy (ties: the lower loss) is kept; test scores are not looked at. Then it is run with more
seeds. The folder is a table as of `experiments.table`, with methods.md, the summary, and methods.png, accuracy over
trained parameters. An interrupted comparison resumes with the same command.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tyro
from matplotlib.axes import Axes

from experiments.grid import Planned, parse_override, plan
from experiments.table import Arguments as TableArguments
from experiments.table import run_table
from training.command_line import parse_options, run_command
from training.errors import ConfigError
from training.pages import escape_markdown, write_text_atomic
from training.plots import PALETTE, save_png
from training.progress import say
from training.run_folder import RunFolder


@dataclass(frozen=True)
class Arguments:
    """Choose the learning rate of each configuration on the validation split, then run it with several seeds."""

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """TOML files, or folders of TOML files."""
    output: Path = Path("runs/methods")
    """Folder of the comparison."""
    factors: tuple[float, ...] = (0.3, 1.0, 3.0)
    """Each configuration is tried with its own train.learning_rate times each of these."""
    seeds: int = 3
    """Runs of each configuration with its best rate."""
    jobs: int | None = None
    """Concurrent runs; by default one per GPU, or one on a CPU."""
    set: tuple[str, ...] = ()
    """Fields to set in every configuration: field=value."""


@dataclass(frozen=True)
class Result:
    """A configuration at its best learning rate, over the seeds."""

    name: str
    rate: float
    trained: int
    accuracies: list[float]
    """Test accuracy of each seed, in percent."""
    seconds_per_epoch: float
    peak_mib: float
    adapter_kib: float
    """Size of the adapter's files."""

    @property
    def mean(self) -> float:
        """Mean accuracy in percent."""
        return statistics.mean(self.accuracies)

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds (n - 1), in points; 0 for one seed."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0


def compare(arguments: Arguments) -> int:
    """Run trials and finals, and write the summary. Returns the exit code: 1 if a run failed."""
    if not arguments.paths or not arguments.factors or arguments.seeds < 1:
        raise ConfigError("name TOML files or folders, at least one of --factors, and 1 or more --seeds")
    overrides = dict(map(parse_override, arguments.set))
    table = TableArguments((), arguments.output, jobs=arguments.jobs, set=arguments.set)

    planned = plan(list(arguments.paths), overrides, seeds=1)
    trials = [[_scaled(run, factor) for factor in arguments.factors] for run in planned]
    if code := run_table(list(itertools.chain(*trials)), table):
        return code
    best = [max(group, key=partial(_validation, arguments.output)) for group in trials]
    finals = [run.seeded(i) for run in best for i in range(arguments.seeds)]
    if code := run_table(finals, table):  # the trial is the run with the first seed
        return code
    results = [_result(arguments.output, run, arguments.seeds) for run in best]
    write_text_atomic(arguments.output / "methods.md", summary(results))
    save_png(partial(draw, results=results), arguments.output / "methods.png", (8, 4.6))
    say(f"\n{summary(results)}\nwritten to {arguments.output}/methods.md and .png")
    return 0


def _scaled(run: Planned, factor: float) -> Planned:
    """The run with its learning rate times `factor`, which its name tells."""
    rate = float(f"{run.config.train.learning_rate * factor:.3g}")
    train = dataclasses.replace(run.config.train, learning_rate=rate)
    return Planned(f"{run.name}+learning_rate={rate:g}", dataclasses.replace(run.config, train=train))


def _report(folder: Path, run: Planned) -> dict:
    return RunFolder(folder / "runs" / run.folder).read_report()


def _validation(folder: Path, run: Planned) -> tuple[float, float]:
    """Validation accuracy of the best epoch, and its negative loss."""
    scores = _report(folder, run)["validation"]
    return scores["accuracy"], -scores["loss"]


def _result(folder: Path, run: Planned, seeds: int) -> Result:
    runs = [run.seeded(i) for i in range(seeds)]
    reports = [_report(folder, each) for each in runs]
    files = RunFolder(folder / "runs" / runs[0].folder).adapter.rglob("*.safetensors")
    return Result(
        name=run.name.rpartition("+")[0],
        rate=run.config.train.learning_rate,
        trained=reports[0]["trainable_parameters"],
        accuracies=[100 * report["test"]["accuracy"] for report in reports],
        seconds_per_epoch=statistics.median(report["train_seconds"] / report["epochs_run"] for report in reports),
        peak_mib=statistics.median(report["peak_memory_bytes"] for report in reports) / 2**20,
        adapter_kib=sum(file.stat().st_size for file in files) / 2**10,
    )


def summary(results: Sequence[Result]) -> str:
    """A Markdown table, best first, and how large a difference must be to count."""
    lines = [
        "| configuration | trained | learning rate | accuracy (%) | s per epoch | peak MiB | adapter KiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(results, key=lambda row: -row.mean):
        lines.append(
            f"| {escape_markdown(row.name)} | {row.trained:,} | {row.rate:g} | {row.mean:.2f} ± {row.spread:.2f} | "
            f"{row.seconds_per_epoch:.1f} | {row.peak_mib:,.0f} | {row.adapter_kib:,.0f} |"
        )
    pooled = statistics.mean(row.spread**2 for row in results) ** 0.5
    lines += ["", f"accuracy: mean ± standard deviation over the seeds; pooled over all rows: {pooled:.2f} points."]
    return "\n".join(lines) + "\n"


def draw(axes: Axes, results: Sequence[Result]) -> None:
    """Accuracy over trained parameters, with its spread; the sizes of one file are joined.

    A configuration that trains ten times as many parameters as the smallest is a line across.
    """
    files: dict[str, list[Result]] = {}
    for row in sorted(results, key=lambda row: row.trained):
        files.setdefault(row.name.partition("+")[0], []).append(row)
    limit = 10 * min(row.trained for row in results)
    for number, (name, rows) in enumerate(sorted(files.items())):
        colour, marker = PALETTE[number % len(PALETTE)], "os^DvP"[number // len(PALETTE) % 6]
        for row in rows:
            if row.trained > limit:
                axes.axhline(row.mean, color=colour, linestyle="--", linewidth=1, label=f"{name}: {row.trained:,}")
        points = [(row.trained / 1000, row.mean, row.spread) for row in rows if row.trained <= limit]
        if points:
            trained, means, spreads = zip(*points, strict=True)
            axes.plot(trained, means, color=colour, marker=marker, linewidth=1, label=name)
            axes.errorbar(trained, means, spreads, fmt="none", color=colour, alpha=0.4, linewidth=1)
    axes.set(xlabel="trained parameters (thousands)", ylabel="test accuracy (%)")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


if __name__ == "__main__":
    sys.exit(run_command(lambda: compare(parse_options(Arguments, sys.argv[1:], prog="experiments.compare"))))
