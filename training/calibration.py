"""Calibration: how far probabilities are from shares of right answers, and a temperature that brings them closer.

A model is calibrated if, of the texts whose highest probability is 0.8, 80 % are classified correctly. Dividing the
logits by a temperature T changes no prediction (Guo et al. 2017, "On Calibration of Modern Neural Networks"). For one
class per text; multi-label data has no temperature.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from training.errors import ConfigError
from training.pages import write_text_atomic

_NAME = "temperature.json"  # beside the adapter's weights: it belongs to them
_LOWEST, _HIGHEST = 0.01, 100.0


def probabilities(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """softmax(logits / T) in float64, (texts, classes)."""
    return torch.softmax(logits.double() / temperature, dim=1)


def fit_temperature(logits: torch.Tensor, labels: np.ndarray) -> float:
    """The T that minimises the mean of -log softmax(z / T)[label], from logits z (texts, classes) and labels (texts,).

    This loss is convex in 1 / T; its derivative, the mean over the texts of sum_k softmax(z / T)_k (z_k - z_label),
    is 0 at the minimum. Returns 1 if T would leave 0.01 to 100: the texts determine none if all are classified
    correctly (T -> 0) or no better than by chance (T -> infinity). Source: Guo et al. 2017, section 4.2.
    """
    from scipy.optimize import brentq  # slow to import; scikit-learn depends on it

    gaps = logits.double() - logits.double().gather(1, torch.as_tensor(labels)[:, None])  # (texts, classes)

    def slope(temperature: float) -> float:
        return float((probabilities(gaps, temperature) * gaps).sum(dim=1).mean())

    return float(brentq(slope, _LOWEST, _HIGHEST)) if slope(_LOWEST) > 0 > slope(_HIGHEST) else 1.0


def write_temperature(folder: Path, logits: torch.Tensor, labels: np.ndarray) -> None:
    """Write the temperature of these logits into an adapter folder, atomically; nothing for multi-label data."""
    if labels.ndim == 1:
        write_text_atomic(folder / _NAME, f"{fit_temperature(logits, labels)}\n")


def read_temperature(folder: Path) -> float:
    """The temperature in an adapter folder, 1 if it has none. Raises ConfigError for a damaged file."""
    path = folder / _NAME
    try:
        if not path.exists():
            return 1.0
        if not path.is_file():  # a pipe would block
            raise ValueError("not a regular file")
        with path.open("rb") as file:
            temperature = float(file.read(100))
        if not _LOWEST <= temperature <= _HIGHEST:  # also nan
            raise ValueError(f"{temperature} is outside {_LOWEST} to {_HIGHEST:g}")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a temperature ({error}); remove it for a temperature of 1") from None
    return temperature


def reliability_bins(confidence: np.ndarray, right: np.ndarray, bins: int = 15) -> list[dict[str, float]]:
    """Mean confidence, accuracy and number of the texts in each of the bins ((m-1)/M, m/M] that has texts.

    `confidence` (texts,) is the highest probability of each text, `right` (texts,) whether its class is the text's.
    """
    number = np.digitize(confidence, np.linspace(0, 1, bins + 1)[1:-1], right=True)
    chosen = [number == m for m in np.unique(number)]
    return [
        {"confidence": float(confidence[of].mean()), "accuracy": float(right[of].mean()), "texts": int(of.sum())}
        for of in chosen
    ]


def calibration_error(bins: list[dict[str, float]]) -> float:
    """Expected calibration error: sum over the bins of texts / all texts * |accuracy - confidence|.

    Source: Naeini et al. 2015, "Obtaining Well Calibrated Probabilities Using Bayesian Binning", section 3.
    """
    texts = sum(one["texts"] for one in bins)
    return sum(one["texts"] / texts * abs(one["accuracy"] - one["confidence"]) for one in bins)


def accuracy_over_coverage(confidence: np.ndarray, right: np.ndarray, points: int = 20) -> list[dict[str, float]]:
    """Coverage and accuracy at about `points` thresholds t of the confidence c, for n texts:

        coverage(t) = 1/n sum_i [c_i >= t]        accuracy(t) = sum_i [c_i >= t] right_i / sum_i [c_i >= t]

    The thresholds are quantiles of the confidence, so that the coverage rises in equal steps, except over ties. Source:
    El-Yaniv & Wiener 2010, "On the Foundations of Noise-free Selective Classification", whose selective risk is
    1 - accuracy(t).
    """
    ranked = -np.sort(-confidence)
    thresholds = [float(ranked[math.ceil(i * len(ranked) / points) - 1]) for i in range(1, points + 1)]
    kept = [(t, confidence >= t) for t in dict.fromkeys(thresholds)]
    return [{"threshold": t, "coverage": float(k.mean()), "accuracy": float(right[k].mean())} for t, k in kept]


def abstention_summary(logits: torch.Tensor, labels: np.ndarray, temperature: float, threshold: float) -> str:
    """Coverage and accuracy of the texts whose highest probability is not below `threshold`, on one line."""
    decided = (probabilities(logits, temperature).amax(dim=1) >= threshold).numpy()
    line = f"decided {100 * decided.mean():.2f} % ({decided.sum():,} of {len(labels):,} texts) at {threshold:g}"
    right = (logits.argmax(dim=1).numpy() == labels)[decided]
    return f"{line}   accuracy on these {100 * right.mean():.2f} %" if len(right) else line


@dataclass(frozen=True)
class Calibration:
    """The calibration of a split's probabilities; "before" means at T = 1."""

    temperature: float
    error: float
    error_before: float
    bins: list[dict[str, float]]
    bins_before: list[dict[str, float]]
    coverage: list[dict[str, float]]

    def summary(self) -> str:
        """The errors on one line."""
        fitted = f"{self.error_before:.3f} before temperature {self.temperature:.3f}"
        fitted = fitted if self.temperature != 1 else "no temperature was fitted"
        return f"calibration error {self.error:.3f} ({fitted})"


def calibrate(logits: torch.Tensor, labels: np.ndarray, temperature: float) -> Calibration:
    """The calibration of softmax(logits / T) against the true labels; logits (texts, classes), labels (texts,)."""
    right = logits.argmax(dim=1).numpy() == labels
    confidence, before = (probabilities(logits, t).amax(dim=1).numpy() for t in (temperature, 1.0))
    bins, bins_before = reliability_bins(confidence, right), reliability_bins(before, right)
    errors = calibration_error(bins), calibration_error(bins_before)
    return Calibration(temperature, *errors, bins, bins_before, accuracy_over_coverage(confidence, right))
