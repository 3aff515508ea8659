"""Curves of one or several runs, drawn from `metrics.jsonl` and `report.json` alone.

The same drawing becomes an image (PNG, on white) or part of a page (SVG in the page's light or dark colours).
Names of classes and runs are drawn as they are, never read as formulas.
"""

from __future__ import annotations

import contextlib
import io
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora.targets import layer_index, within_layer
from training.errors import ConfigError
from training.run_folder import RunFolder, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Draw = Callable[["Axes"], None]

# Okabe & Ito's palette for colour-blind readers; the markers distinguish curves without colour.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8C6D1F", "#6E6E6E")
MARKERS = "os^Dv<>p"
_LINES = ("-", "--", ":", "-.")  # the ninth run has the first colour again, dashed
_INK = "#010203"  # placeholder for the text colour of the page
_MOST_NAMED = 60  # with more classes, names and numbers in a confusion matrix are too small to read


@dataclass(frozen=True)
class Curves:
    """The metrics and the report of a run."""

    name: str
    steps: list[dict[str, Any]]
    """Lines of metrics.jsonl with optimizer steps."""
    validations: list[dict[str, Any]]
    """Lines with evaluations of the validation split."""
    report: dict[str, Any] | None
    """report.json, or None while there is none."""


def read_curves(folder: RunFolder) -> Curves:
    """The curves of a run, complete or not. Raises ConfigError if it is not a run folder or a file is damaged."""
    if not folder.config.is_file():
        raise ConfigError(f"{folder.path}: not a run folder (no config.toml); name one")
    try:
        lines = read_metrics(folder.metrics) if folder.metrics.is_file() else []
        report = folder.read_report() if folder.report.is_file() else None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{folder.path}: a file is damaged ({error}); run again") from None
    steps = [line for line in lines if "split" not in line]
    validations = [line for line in lines if line.get("split") == "validation"]
    return Curves(folder.path.name, steps, validations, report)


def draw_plots(folder: RunFolder) -> None:
    """Write plots/NAME.png for each of `panels_of`, as far as the run has data."""
    folder.plots.mkdir(exist_ok=True)
    for name, (draw, size) in panels_of(read_curves(folder)).items():
        save_png(draw, folder.plots / f"{name}.png", size)


def panels_of(run: Curves) -> dict[str, tuple[Draw, tuple[float, float]]]:
    """The drawings of one run by name, with width and height in inches."""
    wide, report = (5.6, 3.6), run.report
    panels: dict[str, tuple[Draw, tuple[float, float]]] = {}
    if run.steps:
        panels["loss"] = lambda axes: _losses(axes, run), wide
        panels["learning_rate"] = lambda axes: draw_metric(axes, [run], "learning_rate"), wide
    if run.validations:
        panels["scores"] = lambda axes: _scores(axes, run), wide
    if report and report["test"] and report["test"]["confusion"]:  # multi-label has none
        classes = len(report["label_names"])
        side = min(12 if classes <= _MOST_NAMED else 9, max(4.2, 2.3 + 0.32 * classes))  # the memory is side^2
        panels["confusion"] = lambda axes: _confusion(axes, report), (side + 0.7, side)
    if report and (calibration := report.get("calibration")):  # multi-label has none
        panels["reliability"] = lambda axes: _reliability(axes, calibration), (4.4, 4.0)
        panels["coverage"] = lambda axes: _coverage(axes, calibration), (4.8, 3.6)
    if report and (ranks := report.get("ranks")):
        grid = rank_grid(ranks)
        panels["ranks"] = lambda axes: _ranks(axes, *grid), (2.6 + 0.32 * len(grid[1]), 1.6 + 0.32 * len(grid[0]))
    return panels


# Metric -> title, axis label with unit, and unit of the x axis.
METRICS = {
    "loss": ("Training loss", "cross-entropy (nats)", "step"),
    "validation_loss": ("Validation loss", "cross-entropy (nats)", "epoch"),
    "accuracy": ("Validation accuracy", "accuracy (%)", "epoch"),
    "precision": ("Validation precision, macro average", "precision (%)", "epoch"),
    "recall": ("Validation recall, macro average", "recall (%)", "epoch"),
    "f1": ("Validation F1, macro average", "F1 (%)", "epoch"),
    "learning_rate": ("Learning rate", "learning rate", "step"),
}


def draw_metric(axes: Axes, runs: Sequence[Curves], metric: str) -> None:
    """Draw one metric of one or several runs."""
    title, label, unit = METRICS[metric]
    key = metric.removeprefix("validation_")
    scale = 100 if label.endswith("(%)") else 1
    curves = []
    for i, run in enumerate(runs):
        lines = run.steps if unit == "step" else run.validations
        x, y = [line[unit] for line in lines], scale * np.array([line[key] for line in lines])
        colour, style = PALETTE[i % len(PALETTE)], _LINES[i // len(PALETTE) % len(_LINES)]
        if metric == "loss":
            axes.plot(x, y, color=colour, alpha=0.2, linewidth=1)
            y = smoothed(y)
        marker = MARKERS[i % len(MARKERS)] if unit == "epoch" else None
        curves += axes.plot(x, y, color=colour, linestyle=style, marker=marker, markersize=4)
    axes.set(ylabel=label, title=title)
    _finish(axes, unit)
    if len(runs) > 1:
        names = [run.name for run in runs]  # given here: the label of a curve is hidden if it starts with "_"
        axes.legend(curves, names, frameon=False, prop={"size": 7, "family": _font_families(names)})


def draw_noise(
    axes: Axes, severities: Sequence[float], accuracies: Mapping[str, Sequence[float]], measure: str
) -> None:
    """Draw the accuracy of a run, called `measure`, over the severity of each corruption of the test texts."""
    for i, (name, values) in enumerate(accuracies.items()):
        shares, percent = 100 * np.array(severities), 100 * np.array(values)
        axes.plot(shares, percent, color=PALETTE[i], marker=MARKERS[i], markersize=5, label=name)
    axes.set(
        xlabel="severity: words or marks corrupted (%)", ylabel=f"test {measure} (%)", title="Corrupted test texts"
    )
    axes.grid(alpha=0.2)
    lines = sorted(axes.get_lines(), key=lambda line: -line.get_ydata()[-1])  # as they end, from top to bottom
    axes.legend(handles=lines, frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def label_rows(axes: Axes, names: Sequence[str], title: str) -> None:
    """One row per name, the first on top, over the test accuracy in percent."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set(xlabel="test accuracy (%)", title=title)
    axes.grid(alpha=0.2)


def _finish(axes: Axes, unit: str) -> None:
    """Label the x axis, which counts steps or epochs, and draw the grid."""
    axes.set_xlabel("optimizer step" if unit == "step" else "epoch")
    if unit == "epoch":
        axes.xaxis.get_major_locator().set_params(integer=True)
    else:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.2)


def smoothed(values: np.ndarray, weight: float = 0.6) -> np.ndarray:
    """Exponential moving average with bias correction (Kingma & Ba 2014, section 3)."""
    smooth, mean = np.empty(len(values)), 0.0
    for i, value in enumerate(values):
        mean = weight * mean + (1 - weight) * value
        smooth[i] = mean / (1 - weight ** (i + 1))
    return smooth


def _losses(axes: Axes, run: Curves) -> None:
    x, raw = [line["step"] for line in run.steps], np.array([line["loss"] for line in run.steps])
    axes.plot(x, raw, color=PALETTE[0], alpha=0.25, linewidth=1)
    axes.plot(x, smoothed(raw), color=PALETTE[0], label="training (smoothed; raw behind)")
    if run.validations:
        at, losses = zip(*((line["step"], line["loss"]) for line in run.validations), strict=True)
        axes.plot(at, losses, color=PALETTE[1], marker="o", label="validation")
    axes.set(ylabel="cross-entropy (nats)", title="Loss")
    _finish(axes, "step")
    axes.legend(frameon=False)


def _scores(axes: Axes, run: Curves) -> None:
    epochs = [line["epoch"] for line in run.validations]
    labels = {"accuracy": "accuracy", "precision": "macro precision", "recall": "macro recall", "f1": "macro F1"}
    labels |= {"micro_f1": "micro F1"} if "micro_f1" in run.validations[0] else {}  # of multi-label alone
    for i, (name, label) in enumerate(labels.items()):
        values = [100 * line[name] for line in run.validations]
        axes.plot(epochs, values, color=PALETTE[i], marker=MARKERS[i], markersize=5, label=label)
    axes.set_ylabel("validation score (%)")
    axes.set_title("Validation scores", pad=24)
    _finish(axes, "epoch")
    legend_above(axes)


def legend_above(*sides: Axes) -> None:
    """Put one legend for all curves of `sides`, axes that share a plot, above it; its title needs `pad=24` points."""
    lines = [line for side in sides for line in side.get_lines()]
    place = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": len(lines)}
    sides[0].legend(lines, [str(line.get_label()) for line in lines], fontsize=8, frameon=False, **place)


def _confusion(axes: Axes, report: dict[str, Any]) -> None:
    counts, names = np.array(report["test"]["confusion"]), [_tick_label(name) for name in report["label_names"]]
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares.astype(np.float32), cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
    axes.figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    axes.set(xlabel="predicted", ylabel="true", title="Test split: texts by class")
    if len(names) > _MOST_NAMED:
        axes.set(xticks=[], yticks=[], title=f"Test split: texts by class, {len(names)} classes")
        return
    size = 9 if len(names) <= 20 else 6
    font = {"fontsize": size, "fontfamily": _font_families(names)}
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor", **font)
    axes.set_yticks(range(len(names)), names, **font)
    for i, j in np.argwhere(counts > 0):
        colour = "black" if shares[i, j] > 0.5 else "white"
        axes.text(j, i, str(counts[i, j]), ha="center", va="center", color=colour, fontsize=size - 2)


def _tick_label(name: str) -> str:
    """`name` on one line, without its middle if it is longer than 24 characters, or 12 of those as wide as two."""
    name = " ".join(name.split())
    width = len(name) + sum(unicodedata.east_asian_width(character) in "WF" for character in name)
    half = 12 * len(name) // max(width, 1)
    return name if width <= 24 else f"{name[:half]}…{name[1 - half :]}"


def _font_families(texts: Sequence[str]) -> list[str]:
    """The current fonts, and installed ones with the characters that matplotlib's own font lacks (CJK, emoji)."""
    from matplotlib import font_manager, rcParams
    from matplotlib.ft2font import FT2Font

    def lacking(path: str, characters: set[int]) -> set[int]:
        font = FT2Font(path)
        return {character for character in characters if not font.get_char_index(character)}

    families = list(rcParams["font.family"])
    missing = lacking(font_manager.findfont("DejaVu Sans"), set(map(ord, "".join(texts))))
    for entry in font_manager.fontManager.ttflist:
        with contextlib.suppress(OSError, RuntimeError):  # a font that was removed or can't be read
            # "Last Resort" and the like have a box for every character.
            if missing and "Last" not in entry.name and (left := lacking(entry.fname, missing)) < missing:
                families, missing = [*families, entry.name], left
    return families


def _reliability(axes: Axes, calibration: dict[str, Any]) -> None:
    """Accuracy over confidence, by bins of the confidence (Guo et al. 2017, figure 1)."""
    axes.plot([0, 100], [0, 100], color=PALETTE[7], linestyle="--", linewidth=1, label="calibrated")
    temperature = calibration["temperature"]
    curves = [("bins", "error", f"temperature {temperature:.3f}", 0)]
    if temperature != 1:
        curves.insert(0, ("bins_before", "error_before", "without temperature", 1))
    for key, error, name, i in curves:
        x, y, texts = _columns(calibration[key], "confidence", "accuracy", "texts")
        style = {"color": PALETTE[i], "marker": MARKERS[i]}
        label = f"{name}: error {calibration[error]:.3f}"
        axes.plot(100 * x, 100 * y, markersize=2, linewidth=1, label=label, **style)
        axes.scatter(100 * x, 100 * y, 200 * texts / texts.sum(), alpha=0.6, clip_on=False, **style)
    axes.set(xlabel="confidence (%); area of a marker: texts", ylabel="accuracy (%)", xlim=(0, 102))
    axes.set_title("Reliability, test split")
    axes.grid(alpha=0.2)
    axes.legend(frameon=False, fontsize=8)


def _coverage(axes: Axes, calibration: dict[str, Any]) -> None:
    """Accuracy of the most confident texts over their share."""
    coverage, accuracy = (100 * column for column in _columns(calibration["coverage"], "coverage", "accuracy"))
    axes.plot(coverage, accuracy, color=PALETTE[0], marker="o", markersize=4)
    margin = max(0.5, 0.05 * (100 - accuracy.min()))
    axes.set(xlabel="coverage (%): the most confident texts", ylabel="accuracy (%)")
    axes.set(title="Accuracy over coverage, test split", xlim=(0, 102), ylim=(accuracy.min() - margin, 100 + margin))
    axes.grid(alpha=0.2)


def _columns(rows: Sequence[Mapping[str, float]], *names: str) -> list[np.ndarray]:
    """The values of each name over the rows."""
    return [np.array([row[name] for row in rows]) for name in names]


def rank_grid(ranks: dict[str, int]) -> tuple[list[str], list[str], np.ndarray]:
    """Names of matrices, numbers of layers, and ranks as (matrices, layers); nan where a layer has no such matrix."""
    places = {name: (within_layer(name), layer_index(name)) for name in ranks}
    matrices = list(dict.fromkeys(matrix for matrix, _ in places.values()))
    layers = sorted({layer for _, layer in places.values()}, key=lambda layer: (layer is None, layer))
    grid = np.full((len(matrices), len(layers)), np.nan)
    for name, (matrix, layer) in places.items():
        grid[matrices.index(matrix), layers.index(layer)] = ranks[name]
    return matrices, ["" if layer is None else str(layer) for layer in layers], grid


def _ranks(axes: Axes, matrices: list[str], layers: list[str], grid: np.ndarray) -> None:
    highest = np.nanmax(grid)
    axes.imshow(grid, cmap="cividis", vmin=0, vmax=max(1, highest))
    axes.set(xlabel="layer", title="Rank of each update")
    axes.set_xticks(range(len(layers)), layers, fontsize=9)
    axes.set_yticks(range(len(matrices)), matrices, fontsize=9)
    for i, j in np.argwhere(~np.isnan(grid)):
        colour = "black" if grid[i, j] > highest / 2 else "white"
        axes.text(j, i, f"{grid[i, j]:.0f}", ha="center", va="center", color=colour, fontsize=8)


def save_png(draw: Draw, path: Path, size: tuple[float, float]) -> None:
    """Draw into a PNG file."""
    with _matplotlib({}):
        _figure(draw, size).savefig(path, dpi=160)


def to_svg(draw: Draw, size: tuple[float, float], name: str) -> str:
    """Draw as SVG for a page that sets `color` and --series-0 to --series-7; `name` prefixes every id."""
    ink = "text.color axes.labelcolor axes.edgecolor axes.titlecolor xtick.color ytick.color grid.color".split()
    settings = {**dict.fromkeys(ink, _INK), "figure.facecolor": "none", "axes.facecolor": "none"}
    settings |= {"font.family": "sans-serif", "svg.fonttype": "none", "svg.hashsalt": name}
    file = io.StringIO()
    with _matplotlib(settings):
        _figure(draw, size).savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    for i, colour in enumerate(PALETTE):
        svg = svg.replace(colour.lower(), f"var(--series-{i})")
    svg = re.sub(r' width="[\d.]+pt" height="[\d.]+pt"', "", svg, count=1)  # the page sets the width; viewBox remains
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)


def _figure(draw: Draw, size: tuple[float, float]) -> Figure:
    from matplotlib.figure import Figure  # without pyplot's global state

    figure = Figure(figsize=size, layout="constrained")
    draw(figure.subplots())
    return figure


@contextlib.contextmanager
def _matplotlib(settings: dict[str, Any]) -> Iterator[None]:
    """A context with matplotlib settings."""
    import matplotlib  # slow to import, and needed only at the end of a run

    settings = {"axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False, **settings}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # no installed font has it: drawn as a box
        yield
