"""After `pytest tests/parity`: how far each proof's two sides were apart, beside what it allows."""

import pytest

from tests.parity.oracle import measured


@pytest.fixture(autouse=True)
def _record_deviations(record_property):
    measured.clear()
    yield
    if measured:
        found, tolerance = max(measured, key=lambda pair: pair[0] / pair[1])
        record_property("deviation", (len(measured), found, tolerance))  # travels with the report from a worker


def pytest_terminal_summary(terminalreporter):
    table: dict[str, list] = {}
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if getattr(report, "when", None) == "teardown":
            test = report.nodeid.removeprefix("tests/parity/").partition("[")[0]
            table.setdefault(test, []).extend(value for name, value in report.user_properties if name == "deviation")
    rows = {test: values for test, values in table.items() if values}
    if rows:
        terminalreporter.section("relative deviation from transformers and peft: max |ours - theirs| / max |theirs|")
        terminalreporter.write_line(f"{'largest':>8}  {'allowed':>8}  {'tensors':>8}  proof")
    for test, values in sorted(rows.items()):
        _, found, tolerance = max(values, key=lambda value: value[1] / value[2])  # the one nearest to its limit
        terminalreporter.write_line(f"{found:>8.0e}  {tolerance:>8.0e}  {sum(v[0] for v in values):>8}  {test}")
