"""Finished runs to one table: a row a configuration, averaged over its seeds; as CSV, Markdown and a page."""

from __future__ import annotations

import csv
import io
import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from experiments.grid import Planned
from training.pages import write_page, write_whole
from training.plots import draw_metric, read_curves, save_png, to_svg
from training.run_folder import RunFolder

_CURVES = ("loss", "validation_loss", "accuracy", "precision", "recall", "f1")


@dataclass(frozen=True)
class Row:
    """One configuration. Scores are in percent; None where no run has finished."""

    name: str
    model: str
    rank: int
    alpha: float
    targets: str
    seeds: str
    """Finished runs of all."""
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
    """Texts classified a second, on the test split."""
    speed: float | None = None
    """The same, relative to the slowest configuration of the table."""
    folder: Path | None = None
    """Run folder of the first finished seed."""


def collect(planned: Sequence[Planned], runs: Path, limit: int) -> list[Row]:
    """The rows of a table, in the order of the plan. A run without a complete report is left out of the averages."""
    by_name: dict[str, list[Planned]] = {}
    for run in planned:
        by_name.setdefault(run.name, []).append(run)
    rows = [_row(name, group, runs, limit) for name, group in by_name.items()]
    speeds = [row.texts_per_second for row in rows if row.texts_per_second]
    return [
        Row(**{**vars(row), "speed": row.texts_per_second / min(speeds)}) if row.texts_per_second else row
        for row in rows
    ]


def _row(name: str, group: list[Planned], runs: Path, limit: int) -> Row:
    config = group[0].config
    targets = config.lora.target_modules
    reports: list[tuple[Path, dict[str, Any]]] = []
    for run in group:
        folder = RunFolder(runs / run.folder)
        try:
            report = json.loads(folder.report.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if report["complete"]:
            reports.append((folder.path, report))
    row: dict[str, Any] = {
        "name": name,
        "model": config.model.checkpoint,
        "rank": config.lora.rank,
        "alpha": config.lora.alpha,
        "targets": targets if isinstance(targets, str) else " ".join(targets),
        "seeds": f"{len(reports)} of {len(group)}",
    }
    if reports:
        row["folder"] = reports[0][0]
        row["trainable"] = reports[0][1]["trainable_parameters"]
        row["within_budget"] = row["trainable"] <= limit
        for score in ("accuracy", "precision", "recall", "f1"):
            row[score] = 100 * statistics.mean(report["test"][score] for _, report in reports)
        if len(reports) > 1:
            row["accuracy_spread"] = 100 * statistics.stdev(report["test"]["accuracy"] for _, report in reports)
        row["epochs"] = statistics.mean(report["epochs_run"] for _, report in reports)
        row["seconds"] = statistics.mean(report["seconds"] for _, report in reports)
        row["texts_per_second"] = statistics.mean(report["test_texts_per_second"] for _, report in reports)
    return Row(**row)


def _cells(row: Row) -> dict[str, str]:
    """A row as it is shown, by heading."""

    def number(value: float | None, form: str = ".2f") -> str:
        return "" if value is None else format(value, form)

    spread = "" if row.accuracy_spread is None else f" ± {row.accuracy_spread:.2f}"
    return {
        "configuration": row.name,
        "model": row.model,
        "rank": str(row.rank),
        "alpha": f"{row.alpha:g}",
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
    """The table for a terminal."""
    cells = [_cells(row) for row in rows]
    # What is the same in every row, and what is long, is left to the files.
    shown = [name for name in cells[0] if name not in ("model", "targets", "precision (%)", "recall (%)", "seconds")]
    widths = {name: max(len(name), *(len(row[name]) for row in cells)) for name in shown}
    lines = ["  ".join(f"{name:<{widths[name]}}" for name in shown)]
    lines += ["  ".join(f"{row[name]:<{widths[name]}}" for name in shown) for row in cells]
    return "\n".join(line.rstrip() for line in lines)


def write_results(
    rows: Sequence[Row], folder: Path, overrides: Sequence[str], failed: Sequence[tuple[str, str]]
) -> None:
    """Write results.csv, results.md, results.html and plots/ into `folder`, each file whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    file = io.StringIO()
    fields = [name for name in vars(rows[0]) if name != "folder"]
    writer = csv.DictWriter(file, fields, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(vars(row) for row in rows)
    write_whole(folder / "results.csv", file.getvalue())

    cells = [_cells(row) for row in rows]
    lines = [f"| {' | '.join(cells[0])} |", f"|{'|'.join(' --- ' for _ in cells[0])}|"]
    lines += [f"| {' | '.join(value.replace('|', chr(92) + '|') for value in row.values())} |" for row in cells]
    if overrides:
        lines += ["", f"Set in every row: {', '.join(f'`{one}`' for one in overrides)}. Names are those of the files."]
    lines += ["", "accuracy: mean ± standard deviation over the seeds; speed: texts/s relative to the slowest row."]
    lines += [f"\n{name} failed: {why}" for name, why in failed]
    write_whole(folder / "results.md", "\n".join(lines) + "\n")

    runs = [read_curves(RunFolder(row.folder)) for row in rows if row.folder]
    runs = [run for run in runs if run.steps and run.validations]
    (folder / "plots").mkdir(exist_ok=True)
    plots = []
    for metric in _CURVES if runs else ():

        def draw(axes: Any, metric: str = metric) -> None:
            draw_metric(axes, runs, metric)

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
    """Where the report of a row's first seed lies, as seen from the table's folder."""
    return None if row.folder is None else f"{quote(os.path.relpath(row.folder, folder))}/report.html"
