"""report.html: a run on one page, made from the files in its folder."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from training.pages import write_page
from training.plots import Curves, panels_of, read_curves, to_svg
from training.progress import minutes
from training.run_folder import RunFolder

_CALIBRATION = {"calibration error": "error", "at temperature 1": "error_before", "temperature": "temperature"}


def write_html_report(folder: RunFolder) -> None:
    """Write report.html into a run folder; an interrupted run gets a notice of what is missing.

    Raises ConfigError if the folder is not a run or a file in it is damaged.
    """
    run = read_curves(folder)
    report = run.report or {}
    test, origins = report.get("test"), report.get("origins")
    write_page(
        "report.html",
        folder.html,
        title=f"Run {run.name}",
        subtitle=f"{origins['checkpoint']} on {origins['data']}; {report['device']}" if origins else "",
        missing=_missing(run),
        facts=_facts(report) if report else {},
        plots=[
            Markup(to_svg(draw, size, name))  # noqa: S704, our own drawing; matplotlib escapes its text
            for name, (draw, size) in panels_of(run).items()
        ],
        per_class=test["per_class"] if test else None,
        mistakes=report.get("mistakes") if test else None,
        parts=report.get("parameters_by_part"),
        settings=folder.config.read_text(encoding="utf-8"),
    )


def _missing(run: Curves) -> str:
    """The notice about missing results; empty for a complete run."""
    if run.report:
        epoch = run.report["epochs_run"]
        return "" if run.report["complete"] else f"This run was interrupted in epoch {epoch}: there are no test scores."
    lacks = [
        name for name, lines in (("training steps", run.steps), ("validation scores", run.validations)) if not lines
    ]
    lacks.append("test scores")
    return f"This run was interrupted: there are no {', no '.join(lacks)}. Run it again."


def _facts(report: dict[str, Any]) -> dict[str, str]:
    """Names and values at the top of the page."""
    facts = {}
    if test := report["test"]:
        micro = test.get("micro")  # of multi-label alone
        facts["test exact match" if micro else "test accuracy"] = f"{100 * test['accuracy']:.2f} %"
        facts |= {"micro F1": f"{micro['f1']:.3f}"} if micro else {}
        facts |= {f"macro {name}": f"{test[name.lower()]:.3f}" for name in ("precision", "recall", "F1")}
    if calibration := report.get("calibration"):
        facts |= {name: f"{calibration[key]:.3f}" for name, key in _CALIBRATION.items()}
    trainable, total = report["trainable_parameters"], report["total_parameters"]
    return facts | {
        "trainable parameters": f"{trainable:,} ({100 * trainable / total:.2f} %)",
        "epochs": f"{report['epochs_run']} (kept: {report['best_epoch']})",
        "wall time (min:s)": minutes(report["seconds"]),
        "peak memory": f"{report['peak_memory_bytes'] / 2**20:,.0f} MiB",
    }
