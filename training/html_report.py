"""report.html: a run on one page, made from the files in its folder."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from training.pages import write_page
from training.plots import panels_of, read_curves, to_svg
from training.progress import minutes
from training.run_folder import RunFolder

_CALIBRATION = {"calibration error": "error", "at temperature 1": "error_before", "temperature": "temperature"}


def write_html_report(folder: RunFolder) -> None:
    """Write report.html into a run folder with a report; the page of an interrupted run says so.

    Raises ConfigError if the folder is not a run or a file in it is damaged, OSError if it has no report.
    """
    run, report = read_curves(folder), folder.read_report()
    test, origins = report["test"], report["origins"]
    write_page(
        "report.html",
        folder.html,
        title=f"Run {run.name}",
        subtitle=f"{origins['checkpoint']} on {origins['data']}; {report['device']}",
        interrupted_in=None if report["complete"] else report["epochs_run"],
        facts=_facts(report),
        plots=[
            Markup(to_svg(draw, size, name))  # noqa: S704, our own drawing; matplotlib escapes its text
            for name, (draw, size) in panels_of(run).items()
        ],
        per_class=test["per_class"] if test else None,
        mistakes=report["mistakes"] if test else None,
        parts=report["parameters_by_part"],
        settings=folder.config.read_text(encoding="utf-8"),
    )


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
