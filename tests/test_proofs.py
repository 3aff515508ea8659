"""The table of `make proofs` reports failures."""

import math
from types import SimpleNamespace

import pytest

from tests.parity.proofs import table


def reports(name, *compared, outcome="passed"):
    """The call report and the teardown report of one test."""
    node = f"tests/parity/test_a.py::{name}"
    properties = [("compared", list(values)) for values in compared]
    failed, skipped = outcome == "failed", outcome == "skipped"
    longrepr = ("file", 1, "Skipped: needs a GPU") if skipped else None
    call = SimpleNamespace(
        nodeid=node, when="call", failed=failed, skipped=skipped, longrepr=longrepr, user_properties=[]
    )
    after = SimpleNamespace(nodeid=node, when="teardown", failed=False, skipped=False, user_properties=properties)
    return [call, after]


def test_cases_of_one_test_and_tolerance_share_a_row():
    lines, well = table(
        reports("test_x[1]", ("deviation", 1e-10, 3, 2e-15), ("exact", 0.0, 5, 0.0))
        + reports("test_x[2]", ("deviation", 1e-10, 4, 7e-13))
        + reports("test_gpu", outcome="skipped")
    )
    assert well
    rows = [line.split() for line in lines[1:]]
    assert rows[0] == ["7.0e-13", "1e-10", "2", "7", "holds", "test_a.py", "test_x"]
    assert rows[1] == ["equal", "exact", "1", "5", "holds", "test_a.py", "test_x"]
    assert lines[-1] == "skipped: test_a.py  test_gpu: needs a GPU"


@pytest.mark.parametrize(
    "compared",
    [
        ("deviation", 1e-10, 3, 2e-10),
        ("deviation", 1e-10, 3, math.nan),
        ("exact", 0.0, 1, 1.0),
        ("of theirs", 1.25, 2, 1.3),
    ],
)
def test_a_comparison_over_its_tolerance_fails(compared):
    fine = reports("test_x[1]", (*compared[:3], 0.0))
    lines, well = table(fine + reports("test_x[2]", compared))
    assert not well and "FAILS" in lines[1]


def test_a_test_that_fails_before_it_compares_is_named():
    lines, well = table(reports("test_x", ("exact", 0.0, 1, 0.0)) + reports("test_y", outcome="failed"))
    assert not well and lines[-1].split()[-3:] == ["FAILS", "test_a.py", "test_y"]
