"""report.html: a run on one page, made of the files of its folder."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from training.pages import write_page
from training.plots import Curves, panels_of, read_curves, to_svg
from training.progress import minutes
from training.run_folder import RunFolder


def write_html_report(folder: RunFolder) -> None:
    """Write report.html into a run folder; of a run cut off, what there is, and what is missing.

    Raises ConfigError if the folder is no run or a file in it is damaged.
    """
    run = read_curves(folder)
    report = run.report or {}
    test = report.get("test")
    write_page(
        "report.html",
        folder.html,
        title=f"Run {run.name}",
        subtitle=_subtitle(report),
        missing=_missing(run),
        facts=_facts(report) if report else [],
        plots=[Markup(to_svg(draw, size, name)) for name, (draw, size) in panels_of(run).items()],
        per_class=test["per_class"] if test else None,
        mistakes=report.get("mistakes") if test else None,
        parts=report.get("parameters_by_part"),
        settings=folder.config.read_text(encoding="utf-8"),
    )


def _subtitle(report: dict[str, Any]) -> str:
    if not report:
        return ""
    origins = report["origins"]
    return f"{origins['checkpoint']} on {origins['data']}; {report['device']}"


def _missing(run: Curves) -> list[str]:
    """What a complete run has and this one lacks, in words."""
    if not run.report:
        what = "no training steps" if not run.steps else "no validation scores yet" if not run.validations else ""
        return [f"This run was cut off: there are no test scores{' and ' + what if what else ''}. Run it again."]
    if not run.report["complete"]:
        return [f"This run was interrupted in epoch {run.report['epochs_run']}: there are no test scores."]
    return []


def _facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values shown at the top."""
    facts = []
    if test := report["test"]:
        facts += [
            ("test accuracy", f"{100 * test['accuracy']:.2f} %"),
            ("macro precision", f"{test['precision']:.3f}"),
            ("macro recall", f"{test['recall']:.3f}"),
            ("macro F1", f"{test['f1']:.3f}"),
        ]
    trainable, total = report["trainable_parameters"], report["total_parameters"]
    return [
        *facts,
        ("trainable parameters", f"{trainable:,} ({100 * trainable / total:.2f} %)"),
        ("epochs", f"{report['epochs_run']} (best: {report['best_epoch']})"),
        ("wall time (min:s)", minutes(report["seconds"])),
        ("peak memory", f"{report['peak_memory_bytes'] / 2**20:,.0f} MiB"),
    ]
