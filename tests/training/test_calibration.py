"""Calibration against numbers computed by hand, a plain loop and a grid search; the temperature's file."""

import dataclasses
import math
import os

import numpy as np
import pytest
import torch

from training.calibration import (
    abstention_summary,
    accuracy_over_coverage,
    calibrate,
    calibration_error,
    fit_temperature,
    probabilities,
    read_temperature,
    reliability_bins,
    write_temperature,
)
from training.errors import ConfigError
from training.plots import Curves, panels_of, to_svg


def overconfident(texts=400, classes=5, scale=3.0):
    """Logits `scale` times as large as those from whose softmax the labels are drawn."""
    z = 2 * torch.randn(texts, classes)
    return scale * z, torch.distributions.Categorical(logits=z).sample().numpy()


def test_the_calibration_error_computed_by_hand():
    # Bins of 1/15: (0.6, 0.667] has 0.61 and 0.65, (0.867, 0.933] has 0.9; a value at an edge is in the bin below it.
    confidence, right = np.array([0.61, 0.9, 0.65, 1.0]), np.array([True, True, False, True])
    bins = reliability_bins(confidence, right)
    assert [(round(one["confidence"], 9), one["accuracy"], one["texts"]) for one in bins] == [
        (0.63, 0.5, 2),
        (0.9, 1.0, 1),
        (1.0, 1.0, 1),
    ]
    assert calibration_error(bins) == pytest.approx(2 / 4 * 0.13 + 1 / 4 * 0.1, abs=1e-12)
    edges = reliability_bins(np.array([0.25, 0.26, 0.5, 0.51]), np.ones(4, bool), bins=4)
    assert [one["texts"] for one in edges] == [1, 2, 1]


def test_the_calibration_error_equals_a_plain_loop():
    logits, labels = overconfident()
    found = calibrate(logits, labels, 1.7)
    error = 0.0
    for m in range(1, 16):
        hits, sure = [], []
        for row, label in zip(logits.double().numpy() / 1.7, labels, strict=True):
            p = np.exp(row) / np.exp(row).sum()
            if (m - 1) / 15 < p.max() <= m / 15:
                hits.append(p.argmax() == label)
                sure.append(p.max())
        error += abs(sum(hits) - sum(sure)) / len(labels)
    assert found.error == pytest.approx(error, abs=1e-10) and found.error != pytest.approx(found.error_before)


def test_the_temperature_is_that_of_a_grid_search():
    logits, labels = overconfident()
    temperature = fit_temperature(logits, labels)
    grid = np.exp(np.linspace(math.log(0.01), math.log(100), 9001))
    targets = torch.from_numpy(labels)
    losses = [torch.nn.functional.cross_entropy(logits.double() / t, targets).item() for t in grid]
    assert temperature == pytest.approx(grid[np.argmin(losses)], rel=1.1e-3) and 2 < temperature < 4
    assert fit_temperature(2 * logits, labels) == pytest.approx(2 * temperature, rel=1e-9)
    assert torch.equal(probabilities(logits, temperature).argmax(dim=1), logits.argmax(dim=1))
    assert calibrate(logits, labels, temperature).error < calibrate(logits, labels, temperature).error_before / 2


def test_texts_that_determine_no_temperature_leave_it_at_1():
    logits, labels = overconfident()
    assert fit_temperature(logits, logits.argmax(dim=1).numpy()) == 1  # T -> 0
    assert fit_temperature(logits, logits.argmin(dim=1).numpy()) == 1  # T -> infinity
    assert fit_temperature(torch.zeros(3, 2), np.array([0, 1, 1])) == 1
    assert "no temperature was fitted" in calibrate(logits, labels, 1.0).summary()
    assert "before temperature 2.500)" in calibrate(logits, labels, 2.5).summary()


def test_accuracy_over_coverage_computed_by_hand():
    confidence, right = np.array([0.6, 0.9, 0.8, 0.8]), np.array([False, True, True, False])
    points = accuracy_over_coverage(confidence, right, points=4)
    assert [tuple(point.values()) for point in points] == [(0.9, 0.25, 1.0), (0.8, 0.75, 2 / 3), (0.6, 1.0, 0.5)]
    assert len(accuracy_over_coverage(np.linspace(0.5, 1, 1000), np.ones(1000, bool))) == 20
    logits = torch.tensor([[0.9, 0.1], [0.6, 0.4]]).log()
    assert abstention_summary(logits, np.array([0, 1]), 1.0, 0.7) == (
        "decided 50.00 % (1 of 2 texts) at 0.7   accuracy on these 100.00 %"
    )
    assert abstention_summary(logits, np.array([0, 1]), 1.0, 0.95) == "decided 0.00 % (0 of 2 texts) at 0.95"


def test_the_file_of_a_temperature(tmp_path):
    path = tmp_path / "temperature.json"
    logits, labels = overconfident()
    assert read_temperature(tmp_path) == 1
    write_temperature(tmp_path, logits, np.eye(5, dtype=int)[labels])  # multi-label
    assert not path.exists()
    write_temperature(tmp_path, logits, labels)
    assert read_temperature(tmp_path) == fit_temperature(logits, labels)
    for damaged in (b"", b"[1.5]", b"nan", b"inf", b"0", b"-1", b"1e-9", b"1e9", b"\xff", b"9" * 10**6):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"temperature.json: not a temperature \(.*; remove it") as error:
            read_temperature(tmp_path)
        assert "\n" not in str(error.value) and len(str(error.value)) < 400
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ConfigError, match="not a regular file"):
        read_temperature(tmp_path)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_drawings_show_both_diagrams(temperature):
    calibration = dataclasses.asdict(calibrate(*overconfident(), temperature))
    run = Curves("a-run", [], [], {"test": None, "calibration": calibration})
    panels = panels_of(run)
    assert [*panels] == ["reliability", "coverage"]
    drawing, coverage = (to_svg(*panel, name) for name, panel in panels.items())
    assert "Reliability, test split" in drawing and "Accuracy over coverage, test split" in coverage
    assert f"temperature {temperature:.3f}: error {calibration['error']:.3f}" in drawing
    assert ("without temperature" in drawing) == (temperature != 1)
