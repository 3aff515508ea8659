"""A run's curves as images, drawn from `metrics.jsonl` and `report.json` alone."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from training.run_folder import RunFolder, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe & Ito's palette, told apart also by colour-blind readers.
_BLUE, _ORANGE, _GREEN, _PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"


def draw_plots(folder: RunFolder) -> None:
    """Write plots/loss.png, scores.png, learning_rate.png and, for a complete run, confusion.png."""
    import matplotlib  # slow to import, and only wanted at the very end of a run

    matplotlib.use("Agg")  # no window, also where there is a screen
    import matplotlib.pyplot as plt

    if not folder.metrics.is_file():
        return
    lines = read_metrics(folder.metrics)
    steps = [line for line in lines if "split" not in line]
    validations = [line for line in lines if line.get("split") == "validation"]
    report = json.loads(folder.report.read_text(encoding="utf-8"))
    folder.plots.mkdir(exist_ok=True)

    def save(name: str, draw: Any, size: tuple[float, float] = (7, 4.2)) -> None:
        figure, axes = plt.subplots(figsize=size, layout="constrained")
        draw(axes)
        figure.savefig(folder.plots / name, dpi=144)
        plt.close(figure)

    save("loss.png", lambda axes: _loss(axes, steps, validations))
    save("learning_rate.png", lambda axes: _learning_rate(axes, steps))
    if validations:
        save("scores.png", lambda axes: _scores(axes, validations))
    if report["test"]:
        side = max(4.5, 2.5 + 0.34 * len(report["label_names"]))
        save("confusion.png", lambda axes: _confusion(axes, report), size=(side + 0.8, side))


def _loss(axes: Axes, steps: list[dict[str, Any]], validations: list[dict[str, Any]]) -> None:
    x, raw = [line["step"] for line in steps], np.array([line["loss"] for line in steps])
    axes.plot(x, raw, color=_BLUE, alpha=0.25, linewidth=1)
    axes.plot(x, _smoothed(raw), color=_BLUE, label="training (smoothed; raw behind)")
    if validations:
        axes.plot(
            [line["step"] for line in validations],
            [line["loss"] for line in validations],
            color=_ORANGE,
            marker="o",
            label="validation",
        )
    axes.set(xlabel="optimizer step", ylabel="cross-entropy (nats)", title="Loss")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    axes.grid(alpha=0.2)


def _smoothed(values: np.ndarray, weight: float = 0.6) -> np.ndarray:
    """Exponential moving average, corrected for its start (Kingma & Ba 2014, section 3)."""
    smooth, mean = np.empty(len(values)), 0.0
    for i, value in enumerate(values):
        mean = weight * mean + (1 - weight) * value
        smooth[i] = mean / (1 - weight ** (i + 1))
    return smooth


def _learning_rate(axes: Axes, steps: list[dict[str, Any]]) -> None:
    axes.plot([line["step"] for line in steps], [line["learning_rate"] for line in steps], color=_BLUE)
    axes.set(xlabel="optimizer step", ylabel="learning rate", title="Learning rate")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.2)


def _scores(axes: Axes, validations: list[dict[str, Any]]) -> None:
    epochs = [line["epoch"] for line in validations]
    curves = [("accuracy", _BLUE, "o"), ("precision", _ORANGE, "s"), ("recall", _GREEN, "^"), ("f1", _PINK, "D")]
    for name, colour, marker in curves:
        label = name if name == "accuracy" else f"macro {'F1' if name == 'f1' else name}"
        axes.plot(epochs, [100 * line[name] for line in validations], color=colour, marker=marker, label=label)
    axes.set(xlabel="epoch", ylabel="validation score (%)", title="Validation scores", xticks=epochs)
    axes.legend(frameon=False)
    axes.grid(alpha=0.2)


def _confusion(axes: Axes, report: dict[str, Any]) -> None:
    counts, names = np.array(report["test"]["confusion"]), report["label_names"]
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="cividis", vmin=0, vmax=1)
    axes.figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    axes.set(xlabel="predicted", ylabel="true", title="Test split: texts by class")
    size = 9 if len(names) <= 20 else 6
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor", fontsize=size)
    axes.set_yticks(range(len(names)), names, fontsize=size)
    for i, j in np.argwhere(counts > 0):
        colour = "black" if shares[i, j] > 0.5 else "white"
        axes.text(j, i, str(counts[i, j]), ha="center", va="center", color=colour, fontsize=size - 2)
