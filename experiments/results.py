"""Finished runs as one table with one row per configuration, averaged over seeds; as CSV, Markdown and HTML."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import quote

from markupsafe import Markup

from experiments.grid import Planned
from training.pages import escape_markdown, write_page, write_text_atomic
from training.plots import draw_metric, read_curves, save_png, to_svg
from training.run_folder import RunFolder

_CURVES = ("loss", "validation_loss", "accuracy", "precision", "recall", "f1")


@dataclass(frozen=True)
class Row:
    """One configuration. Scores are in percent; None where no run has finished."""

    name: str
    model: str
    rank: int | None
    alpha: float | None
    targets: str
    seeds: str
    """Finished runs of all runs."""
    trainable: int | None = None
    within_budget: bool | None = None
    accuracy: float | None = None
    accuracy_spread: float | None = None
    """Standard deviation over the seeds (n - 1)."""
    precision: float | None = None
    recall: float | None = None
    f1: float | None = None
    epochs: float | None = None
    seconds: float | None = None
    texts_per_second: float | None = None
    """Texts of the test split classified per second."""
    speed: float | None = None
    """texts_per_second relative to the slowest configuration of the table."""
    folder: Path | None = None
    """Run folder of the first finished seed."""


def collect(planned: Sequence[Planned], runs: Path, limit: int) -> list[Row]:
    """The rows of the table, in the order of the plan. Averages are over the finished runs."""
    by_name: dict[str, list[Planned]] = {}
    for run in planned:
        by_name.setdefault(run.name, []).append(run)
    rows = [_row(group, runs, limit) for group in by_name.values()]
    slowest = min((row.texts_per_second for row in rows if row.texts_per_second), default=None)
    return [
        dataclasses.replace(row, speed=row.texts_per_second / slowest) if row.texts_per_second else row for row in rows
    ]


def _row(group: list[Planned], runs: Path, limit: int) -> Row:
    config = group[0].config
    lora = config.lora
    targets = lora.target_modules if lora else ""
    folders = [RunFolder(runs / run.folder) for run in group]
    finished = [folder for folder in folders if folder.is_complete()]
    row = Row(
        name=group[0].name,
        model=config.model.checkpoint,
        rank=lora.rank if lora else None,
        alpha=lora.alpha if lora else None,
        targets=targets if isinstance(targets, str) else " ".join(targets),
        seeds=f"{len(finished)} of {len(group)}",
    )
    if not finished:
        return row
    reports = [folder.read_report() for folder in finished]

    def mean(key: str) -> float:
        return statistics.mean(report[key] for report in reports)

    def score(name: str) -> float:
        return 100 * statistics.mean(report["test"][name] for report in reports)

    accuracies = [report["test"]["accuracy"] for report in reports]
    return dataclasses.replace(
        row,
        trainable=reports[0]["trainable_parameters"],
        within_budget=reports[0]["trainable_parameters"] <= limit,
        accuracy=score("accuracy"),
        accuracy_spread=100 * statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        precision=score("precision"),
        recall=score("recall"),
        f1=score("f1"),
        epochs=mean("epochs_run"),
        seconds=mean("seconds"),
        texts_per_second=mean("test_texts_per_second"),
        folder=finished[0].path,
    )


def _cells(row: Row) -> dict[str, str]:
    """A row as shown, by column heading."""

    def number(value: float | None, form: str = ".2f") -> str:
        return "" if value is None else format(value, form)

    spread = "" if row.accuracy_spread is None else f" ± {row.accuracy_spread:.2f}"
    return {
        "configuration": row.name,
        "model": row.model,
        "rank": "" if row.rank is None else str(row.rank),
        "alpha": "" if row.alpha is None else f"{row.alpha:g}",
        "targets": row.targets,
        "trainable": number(row.trainable, ","),
        "within budget": "" if row.within_budget is None else "yes" if row.within_budget else "no",
        "accuracy (%)": number(row.accuracy) + spread,
        "precision (%)": number(row.precision),
        "recall (%)": number(row.recall),
        "F1 (%)": number(row.f1),
        "epochs": number(row.epochs, ".3g"),
        "seconds": number(row.seconds, ".0f"),
        "texts/s": number(row.texts_per_second, ".0f"),
        "speed": "" if row.speed is None else f"{row.speed:.2f}x",
        "seeds": row.seeds,
    }


def format_table(rows: Sequence[Row]) -> str:
    """The table for a terminal, without its widest columns."""
    cells = [_cells(row) for row in rows]
    shown = [name for name in cells[0] if name not in ("model", "targets", "precision (%)", "recall (%)", "seconds")]
    table = [shown, *([row[name] for name in shown] for row in cells)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ("  ".join(map(str.ljust, line, widths)) for line in table)
    return "\n".join(line.rstrip() for line in lines)


def write_results(
    rows: Sequence[Row], folder: Path, overrides: Sequence[str], failed: Sequence[tuple[str, str]]
) -> None:
    """Write results.csv, results.md, results.html and plots/ into `folder`; tables and page atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    file = io.StringIO()
    fields = [name for name in vars(rows[0]) if name != "folder"]
    writer = csv.DictWriter(file, fields, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(vars(row) for row in rows)
    write_text_atomic(folder / "results.csv", file.getvalue())

    cells = [_cells(row) for row in rows]
    lines = [f"| {' | '.join(cells[0])} |", f"|{'|'.join(' --- ' for _ in cells[0])}|"]
    lines += ["| " + " | ".join(map(escape_markdown, row.values())) + " |" for row in cells]
    if overrides:
        lines += ["", f"Set in every row: {', '.join(f'`{one}`' for one in overrides)}. Names are those of the files."]
    lines += ["", "accuracy: mean ± standard deviation over the seeds; speed: texts/s relative to the slowest row."]
    lines += [f"\n{escape_markdown(f'{name} failed: {why}')}" for name, why in failed]
    write_text_atomic(folder / "results.md", "\n".join(lines) + "\n")

    curves = [read_curves(RunFolder(row.folder)) for row in rows if row.folder]
    curves = [run for run in curves if run.steps and run.validations]
    (folder / "plots").mkdir(exist_ok=True)
    plots = []
    for metric in _CURVES if curves else ():
        draw = partial(draw_metric, runs=curves, metric=metric)
        save_png(draw, folder / "plots" / f"{metric}.png", (7, 4.4))
        plots.append(Markup(to_svg(draw, (5.6, 3.6), metric)))
    write_page(
        "table.html",
        folder / "results.html",
        title=f"{len(rows)} configurations",
        overrides=overrides,
        header=list(cells[0]),
        rows=[
            {"cells": list(shown.values()), "report": _link(row, folder)}
            for row, shown in zip(rows, cells, strict=True)
        ],
        failed=failed,
        plots=plots,
    )


def _link(row: Row, folder: Path) -> str | None:
    """Path of the report of the first finished seed, relative to the table's folder."""
    return None if row.folder is None else f"{quote(os.path.relpath(row.folder, folder))}/report.html"
