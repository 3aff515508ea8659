"""Plots of a run: their text is readable for any shape of the curves."""

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from training.plots import Curves, panels_of

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
