"""Rewrite the plots and report.html of runs from the files in their folders, also of interrupted runs.

python -m experiments.report runs/quickstart
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from training.command_line import parse_options, run_command
from training.errors import ConfigError
from training.html_report import write_html_report
from training.plots import draw_plots
from training.progress import say
from training.run_folder import RunFolder


@dataclass(frozen=True)
class Arguments:
    """Rewrite the plots and report.html of run folders."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders."""


def main(arguments: Arguments) -> int:
    """Write both into each run folder. Returns the exit code. Raises ConfigError for what is not a run folder."""
    if not arguments.runs:
        raise ConfigError("name at least one run folder")
    for path in arguments.runs:
        folder = RunFolder(path)
        write_html_report(folder)
        draw_plots(folder)
        say(f"written     {folder.html}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(parse_options(Arguments, sys.argv[1:], prog="experiments.report"))))
