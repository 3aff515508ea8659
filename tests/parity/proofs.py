"""All equalities in one table: what was compared with peft and transformers, how far apart it was, what is allowed.

    python -m tests.parity.proofs            (or: make proofs)

Runs `pytest tests/parity` and prints the table alone if every proof holds, else also what pytest said. The exit code is
1 if a deviation is over its tolerance, an exact equality fails, or a test of the folder fails for another reason.
"""

from __future__ import annotations

import contextlib
import io
import math
import sys
from collections.abc import Iterable
from pathlib import Path

import peft
import pytest
import torch
import transformers

TITLE = (
    f"against peft {peft.__version__} and transformers {transformers.__version__}, torch {torch.__version__}; "
    "deviation = max |ours - theirs| / max |theirs|"
)


def table(reports: Iterable[pytest.TestReport]) -> tuple[list[str], bool]:
    """The lines of the table and whether all is well, from the reports of a run of tests/parity.

    A row is one test and one tolerance: `cases` are its parametrized cases, `compared` the tensors or values that
    were compared. Tests that compare nothing with another library (errors of broken files, say) have no row; one that
    fails is named all the same.
    """
    rows: dict[tuple[str, str, float], list[tuple[int, float]]] = {}
    failed: set[str] = set()
    skipped: dict[str, str] = {}
    for report in reports:
        test = report.nodeid.removeprefix("tests/parity/").partition("[")[0].replace("::", "  ")
        if report.failed:
            failed.add(test)
        elif report.skipped:
            skipped[test] = report.longrepr[2].removeprefix("Skipped: ")
        if report.when == "teardown":
            for unit, tolerance, count, found in (
                value for name, value in report.user_properties if name == "compared"
            ):
                rows.setdefault((test, unit, tolerance), []).append((count, found))
    lines = [f"{'largest':>9}  {'allowed':>9}  {'cases':>6}  {'compared':>8}  verdict  proof"]
    well, over = not failed, set()
    for (test, unit, tolerance), cases in sorted(rows.items()):
        worst = worst_of(found for _, found in cases)
        holds = worst <= tolerance  # false for nan
        well = well and holds
        over.update([] if holds else [test])
        shown = {
            "deviation": (f"{worst:.1e}", f"{tolerance:.0e}"),
            "exact": ("equal" if holds else "differs", "exact"),
            "of theirs": (f"x {worst:.2f}", f"x {tolerance:.2f}"),  # our error over theirs
        }[unit]
        compared = sum(count for count, _ in cases)
        verdict = "holds" if holds else "FAILS"
        lines.append(f"{shown[0]:>9}  {shown[1]:>9}  {len(cases):>6}  {compared:>8,}  {verdict:<7}  {test}")
    lines += [f"{'-':>9}  {'-':>9}  {'-':>6}  {'-':>8}  FAILS    {test}" for test in sorted(failed - over)]
    lines += [f"skipped: {test}: {reason}" for test, reason in sorted(skipped.items())]
    return lines, well


def worst_of(found: Iterable[float]) -> float:
    """The largest number; nan, if there is one, is larger than any."""
    return max(found, key=lambda number: (math.isnan(number), number))


class _Reports:
    """Collects the reports of all tests, also those that come from worker processes."""

    def __init__(self) -> None:
        self.all: list[pytest.TestReport] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.all.append(report)


def main(arguments: list[str]) -> int:
    """Run the proofs with these arguments for pytest, print the table, return the exit code."""
    reports, output = _Reports(), io.StringIO()
    folder = str(Path(__file__).parent)
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = pytest.main(["-q", "--no-header", folder, *arguments], plugins=[reports])
    lines, well = table(reports.all)
    if code != 0 or not well:
        print(output.getvalue())
    print(TITLE, *lines, sep="\n")
    held = sum(" holds " in line for line in lines)
    print(f"{held} of {sum(' holds ' in line or ' FAILS ' in line for line in lines)} rows hold")
    return 0 if well and code == 0 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
