"""Plots of a run: their text is readable for any shape of the curves."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from training.plots import Curves, _font_families, draw_metric, panels_of, rank_grid, save_png, to_svg

SCORES = ("accuracy", "precision", "recall", "f1")


@pytest.mark.parametrize(
    "values",
    [(0.9, 0.5, 0.9, 0.5), (0.1, 0.3, 0.5, 0.99), (0.99, 0.5, 0.3, 0.1), (0.5, 0.5, 0.5, 0.5)],
    ids=["zigzag", "up", "down", "flat"],
)
def test_legend_of_scores_covers_no_curve_and_is_below_the_title(values):
    validations = [
        {"epoch": i + 1, "loss": 0.1, **{name: value - 0.01 * k for k, name in enumerate(SCORES)}}
        for i, value in enumerate(values)
    ]
    draw, size = panels_of(Curves("a-run", [], validations, None))["scores"]
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    draw(axes)
    figure.canvas.draw()
    legend, title = axes.get_legend().get_window_extent(), axes.title.get_window_extent()
    assert axes.bbox.y1 <= legend.y0 and legend.y1 <= title.y0
    assert figure.bbox.x0 <= legend.x0 and legend.x1 <= figure.bbox.x1
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "accuracy",
        "macro precision",
        "macro recall",
        "macro F1",
    ]


def drawn(draw, size=(5, 4)):
    """The axes after `draw`."""
    axes = Figure(figsize=size, layout="constrained").subplots()
    draw(axes)
    return axes


def confusion(names):
    """The drawing of a confusion matrix without mistakes, and its size."""
    counts = np.eye(len(names), dtype=int).tolist()
    return panels_of(Curves("a-run", [], [], {"label_names": names, "test": {"confusion": counts}}))["confusion"]


def test_names_of_classes_are_drawn_as_they_are_and_without_a_warning(tmp_path, recwarn):
    names = ["$100_$200", "a $x^2$ $", "体育 \N{DNA DOUBLE HELIX}", "two\nlines", "_x\\frac{"]
    names += [f"{'a' * 99}{'b' * 99}", "体" * 13]
    draw, size = confusion(names)
    save_png(draw, tmp_path / "confusion.png", size)
    svg = to_svg(draw, size, "confusion")
    for shown in [*names[:3], "two lines", names[4], f"{'a' * 12}…{'b' * 11}", f"{'体' * 6}…{'体' * 5}"]:
        assert svg.count(f">{shown}</text>") == 2, shown
    assert not recwarn.list


def test_names_of_runs_are_drawn_as_they_are(tmp_path):
    names = ["_hidden", "$lr$_体育"]
    runs = [Curves(name, [], [{"epoch": 1, "accuracy": 0.5}], None) for name in names]
    svg = to_svg(lambda axes: draw_metric(axes, runs, "accuracy"), (5, 4), "accuracy")
    assert all(f">{name}</text>" in svg for name in names)


def test_characters_that_the_usual_font_lacks_are_taken_from_an_installed_one():
    assert _font_families(["plain"]) == ["sans-serif"]
    assert _font_families(["\u2a5e"])[1:]  # in a font of matplotlib's own


@pytest.mark.parametrize(("classes", "named"), [(2, True), (60, True), (61, False), (1000, False)])
def test_a_confusion_matrix_has_a_bounded_size_and_no_text_that_is_too_small(classes, named):
    draw, size = confusion([f"class {i}" for i in range(classes)])
    axes = drawn(draw)
    assert max(size) <= 13
    assert [len(axes.texts), len(axes.get_xticklabels()), len(axes.get_yticklabels())] == (
        [classes] * 3 if named else [0, 0, 0]
    )


_PEAK = """
import re, sys
from pathlib import Path
from tests.training.test_plots import confusion
from training.plots import save_png, to_svg
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024
draw, size = confusion([f"class {i}" for i in range(1000)])
before = peak()
save_png(draw, Path(sys.argv[1]), size), to_svg(draw, size, "confusion")
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process's memory is read from /proc")
def test_a_thousand_classes_are_drawn_in_less_than_300_mib(tmp_path):
    root = Path(__file__).resolve().parents[2]
    words = [sys.executable, "-c", _PEAK, str(tmp_path / "confusion.png")]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 300


def test_ranks_are_drawn_by_matrix_and_layer_where_a_method_chose_them():
    names = ("layer.0.attention.self.query", "layer.10.attention.self.query", "layer.2.output.dense")
    ranks = {f"roberta.encoder.{name}": rank for name, rank in zip(names, (3, 0, 5), strict=True)}
    matrices, layers, grid = rank_grid(ranks)
    assert (matrices, layers) == (["attention.self.query", "output.dense"], ["0", "2", "10"])
    np.testing.assert_array_equal(grid, [[3, np.nan, 0], [np.nan, 5, np.nan]])
    draw, size = panels_of(Curves("a-run", [], [], {"test": None, "ranks": ranks}))["ranks"]
    drawing = to_svg(draw, size, "ranks")
    assert all(f">{text}<" in drawing for text in (*matrices, *layers, "5", "Rank of each update"))
    assert "ranks" not in panels_of(Curves("a-run", [], [], {"test": None, "ranks": {}}))
