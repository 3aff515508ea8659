"""After `pytest tests/parity`: how far each proof's two sides were apart, beside what it allows."""

import pytest

from tests.parity.oracle import measured
from tests.parity.proofs import TITLE, table, worst_of


@pytest.fixture(autouse=True)
def _record_deviations(record_property):
    measured.clear()
    yield
    grouped: dict[tuple[str, float], list[float]] = {}
    for unit, found, tolerance in measured:
        grouped.setdefault((unit, tolerance), []).append(found)
    for (unit, tolerance), found in grouped.items():  # travels with the report from a worker
        record_property("compared", (unit, tolerance, len(found), worst_of(found)))


def pytest_terminal_summary(terminalreporter):
    reports = [report for group in terminalreporter.stats.values() for report in group if hasattr(report, "when")]
    parity = [report for report in reports if report.nodeid.startswith("tests/parity/")]
    if any(name == "compared" for report in parity for name, _ in report.user_properties):
        terminalreporter.section("proofs")
        for line in (TITLE, *table(parity)[0]):
            terminalreporter.write_line(line)
