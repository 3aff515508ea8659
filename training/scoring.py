"""Logits of a model for every text of a split, and the scores computed from them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data.batching import Batch
from training.errors import ConfigError
from training.precision import Compute


@torch.no_grad()
def predict(model: nn.Module, batches: Iterable[Batch], rows: int, compute: Compute) -> torch.Tensor:
    """Logits of every text, (rows, labels), float32 on the CPU, in the order of the split.

    Batches are sorted by length, so rows are put back in order; a row in none of them stays 0, so that the results of
    several processes can be summed. Dropout is off; the model's mode is restored. Raises ConfigError if a logit is not
    finite.
    """
    was_training = model.training
    model.eval()
    logits = torch.zeros(rows, model.config.num_labels)
    for batch in batches:
        with compute.autocast():
            batch_logits = model(
                batch.input_ids.to(compute.device, non_blocking=True),
                batch.attention_mask.to(compute.device, non_blocking=True),
            )
        logits[batch.indices] = batch_logits.float().cpu()
    model.train(was_training)
    if not logits.isfinite().all():
        raise ConfigError(
            "the logits are not finite: training diverged, or the weights are too large for this number format; "
            "lower train.learning_rate, or choose train.precision fp32"
        )
    return logits


@dataclass(frozen=True)
class Scores:
    """Scores of a split; precision, recall and F1 are macro averages: every class has the same weight."""

    loss: float
    """Mean cross-entropy in nats."""
    accuracy: float
    precision: float
    recall: float
    f1: float
    per_class: dict[str, dict[str, float]]
    """precision, recall, f1 and support (number of texts) of each class by name."""
    confusion: list[list[int]]
    """Texts of class i (row) predicted as class j (column)."""

    def summary(self) -> str:
        """The averages on one line."""
        return (
            f"test accuracy {100 * self.accuracy:.2f} %   macro precision {self.precision:.3f}   "
            f"recall {self.recall:.3f}   F1 {self.f1:.3f}   loss {self.loss:.4f}"
        )

    def table(self) -> str:
        """Per-class table for a terminal."""
        width = max(map(len, [*self.per_class, "macro average"]))
        lines = [f"{'class':<{width}}  precision  recall     f1   texts"]
        rows: list[tuple[str, dict[str, Any]]] = list(self.per_class.items())
        support = sum(row["support"] for _, row in rows)
        total = {"precision": self.precision, "recall": self.recall, "f1": self.f1, "support": support}
        for name, row in [*rows, ("macro average", total)]:
            numbers = f"{row['precision']:>9.3f}  {row['recall']:>6.3f}  {row['f1']:>5.3f}  {row['support']:>6,}"
            lines.append(f"{name:<{width}}  {numbers}")
        return "\n".join(lines)


def score(logits: torch.Tensor, labels: np.ndarray, label_names: tuple[str, ...]) -> Scores:
    """Scores of logits (rows, labels) against the true labels (rows,). A class never predicted has precision 0."""
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support  # slow to import

    predicted = logits.argmax(dim=1).numpy()
    classes = list(range(len(label_names)))
    by_class = precision_recall_fscore_support(labels, predicted, labels=classes, zero_division=0.0)
    precision, recall, f1, support = by_class
    # Classes without texts in the split would count as zeros in the averages.
    present = support > 0
    return Scores(
        loss=F.cross_entropy(logits.double(), torch.as_tensor(labels)).item(),
        accuracy=float((predicted == labels).mean()),
        precision=float(precision[present].mean()),
        recall=float(recall[present].mean()),
        f1=float(f1[present].mean()),
        per_class={
            name: {"precision": p, "recall": r, "f1": f, "support": s}
            for name, p, r, f, s in zip(label_names, *(scores.tolist() for scores in by_class), strict=True)
        },
        confusion=confusion_matrix(labels, predicted, labels=classes).tolist(),
    )


def confident_mistakes(
    logits: torch.Tensor, labels: np.ndarray, texts: list[str], label_names: tuple[str, ...], number: int = 20
) -> list[dict[str, Any]]:
    """The `number` misclassified texts with the highest predicted probability, in descending order."""
    probability, predicted = torch.softmax(logits, dim=1).max(dim=1)
    wrong = np.flatnonzero(predicted.numpy() != labels)
    worst = wrong[np.argsort(-probability.numpy()[wrong], kind="stable")][:number]
    return [
        {
            "text": texts[row],
            "true": label_names[labels[row]],
            "predicted": label_names[int(predicted[row])],
            "probability": float(probability[row]),
        }
        for row in worst
    ]
