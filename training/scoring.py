"""The loss of each text; logits of a model for every text of a split, and the scores computed from them.

Labels are class numbers (texts,), of which each text has one; or, multi-label, a matrix (texts, classes) that holds 1
for each class of the text, else 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data.batching import Batch, EncodedSplit
from training.errors import ConfigError
from training.precision import Compute


def text_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Loss of each text in nats, (texts,), from logits (texts, classes).

    One class: -log softmax(logits)[label]. Multi-label: the mean over the classes of -log sigmoid(logit) for a class
    that the text has, of -log(1 - sigmoid(logit)) for one that it has not.
    """
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels, reduction="none")
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none").mean(dim=1)


def r_drop_losses(logits: torch.Tensor, again: torch.Tensor, labels: torch.Tensor, alpha: float) -> torch.Tensor:
    """R-Drop's loss of each text, (texts,), from logits p, q (texts, classes) of two passes with other dropout masks.

        (L(p) + L(q)) / 2 + alpha / 4 (KL(P || Q) + KL(Q || P)),   P = softmax(p), Q = softmax(q), L: `text_losses`

    That is half of the paper's equation 4, L(p) + L(q) + alpha / 2 (KL(P || Q) + KL(Q || P)), so that equal passes have
    the loss of one. The normalizers of the softmax cancel in the sum of both divergences:

        KL(P || Q) + KL(Q || P) = sum over c of (P_c - Q_c) (p_c - q_c)

    Multi-label: each class is a distribution of its own, yes or no, with P_c = sigmoid(p_c), and the same product is
    its divergence; the mean over the classes, as in `text_losses`. Source: Liang et al. 2021, section 2.2.
    """
    losses = (text_losses(logits, labels) + text_losses(again, labels)) / 2
    p, q = (each.to(torch.promote_types(each.dtype, torch.float32)) for each in (logits, again))  # not in 16 bits
    if labels.ndim == 1:
        return losses + alpha / 4 * ((p.softmax(dim=1) - q.softmax(dim=1)) * (p - q)).sum(dim=1)
    return losses + alpha / 4 * ((p.sigmoid() - q.sigmoid()) * (p - q)).mean(dim=1)


def predicted_labels(logits: torch.Tensor, multi_label: bool) -> np.ndarray:
    """The most likely class of each text; multi-label, 1 for each class with a probability above 0.5, else 0."""
    return (logits > 0).long().numpy() if multi_label else logits.argmax(dim=1).numpy()


def class_names(labels: np.ndarray, names: Sequence[str], separator: str) -> list[str]:
    """The name of each text's class; multi-label, the names of its classes, joined by `separator`."""
    if labels.ndim == 1:
        return [names[label] for label in labels]
    return [separator.join(names[i] for i in np.flatnonzero(row)) for row in labels]


@torch.no_grad()
def predict(model: nn.Module, batches: Iterable[Batch], rows: int, compute: Compute) -> torch.Tensor:
    """Logits of every row, (rows, labels), float32 on the CPU, in the order of the split.

    Batches are sorted by length, so rows are put back in order; a row in none of them stays 0, so that the results of
    several processes can be summed. Dropout is off; the model's mode is restored. Raises ConfigError if a logit is not
    finite.
    """
    was_training = model.training
    model.eval()
    logits = torch.zeros(rows, model.config.num_labels)
    for batch in batches:
        logits[batch.indices] = batch_logits(model, batch, compute).float().cpu()
    model.train(was_training)
    return check_finite(logits)


def batch_logits(model: nn.Module, batch: Batch, compute: Compute) -> torch.Tensor:
    """Logits of a batch, (batch, labels), on the device, in the mode of the model: with dropout while it trains."""
    with compute.autocast():
        return model(
            batch.input_ids.to(compute.device, non_blocking=True),
            batch.attention_mask.to(compute.device, non_blocking=True),
        )


def mean_of_windows(logits: torch.Tensor, split: EncodedSplit) -> torch.Tensor:
    """Logits of every text, (texts, labels), from those of every row of the split, (rows, labels).

    z = (1 / n) sum over i of z_i for a text in n windows with the logits z_i; without windows, rows are texts. Close to
    the mean of the windows' vectors of Sun et al. 2019, section 5.3.1, but behind the head, which sees single windows.
    """
    if split.texts is None:
        return logits
    texts = torch.from_numpy(split.texts)
    sums = logits.new_zeros(len(split.labels), logits.shape[1]).index_add(0, texts, logits)
    return sums / torch.bincount(texts)[:, None]


def check_finite(logits: torch.Tensor) -> torch.Tensor:
    """The logits. Raises ConfigError if one is not finite."""
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
    """Mean of `text_losses`, without class weights."""
    accuracy: float
    """Share of the texts that got exactly their class or, multi-label, all their classes and no other."""
    precision: float
    recall: float
    f1: float
    per_class: dict[str, dict[str, float]]
    """precision, recall, f1 and support (number of texts) of each class by name."""
    confusion: list[list[int]]
    """Texts of class i (row) predicted as class j (column); empty for multi-label, where a text has several."""
    micro: dict[str, float] | None = None
    """precision, recall and f1 of all decisions together; None for one class per text: all equal the accuracy."""

    @property
    def deciding(self) -> float:
        """The score that decides which epoch is best: the accuracy; multi-label, micro F1."""
        return self.accuracy if self.micro is None else self.micro["f1"]

    def headline(self) -> str:
        """Accuracy; multi-label, what it means, and micro F1."""
        share = f"{100 * self.accuracy:.2f} %"
        return f"accuracy {share}" if self.micro is None else f"exact match {share}  micro F1 {self.micro['f1']:.3f}"

    def summary(self) -> str:
        """The averages on one line."""
        return (
            f"test {self.headline()}   macro precision {self.precision:.3f}   "
            f"recall {self.recall:.3f}   F1 {self.f1:.3f}   loss {self.loss:.4f}"
        )

    def table(self) -> str:
        """Per-class table for a terminal."""
        rows: list[tuple[str, dict[str, Any]]] = [(" ".join(name.split()), row) for name, row in self.per_class.items()]
        width = max(len("macro average"), *(len(name) for name, _ in rows))
        lines = [f"{'class':<{width}}  precision  recall     f1   texts"]
        support = sum(row["support"] for _, row in rows)
        averages = {"macro": {"precision": self.precision, "recall": self.recall, "f1": self.f1}}
        averages |= {"micro": self.micro} if self.micro else {}
        rows += [(f"{name} average", row | {"support": support}) for name, row in averages.items()]
        for name, row in rows:
            numbers = f"{row['precision']:>9.3f}  {row['recall']:>6.3f}  {row['f1']:>5.3f}  {row['support']:>6,}"
            lines.append(f"{name:<{width}}  {numbers}")
        return "\n".join(lines)


def score(logits: torch.Tensor, labels: np.ndarray, label_names: tuple[str, ...]) -> Scores:
    """Scores of logits (rows, classes) against the true labels. A class never predicted has precision 0."""
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support  # slow to import

    multi_label = labels.ndim == 2
    predicted = predicted_labels(logits, multi_label)
    right = predicted == labels
    classes = list(range(len(label_names)))
    by_class = precision_recall_fscore_support(labels, predicted, labels=classes, zero_division=0.0)
    precision, recall, f1, support = by_class
    micro = precision_recall_fscore_support(labels, predicted, average="micro", zero_division=0.0)[:3]
    # Classes without texts in the split would count as zeros in the averages.
    present = support > 0 if support.any() else np.ones(len(classes), bool)  # multi-label: maybe no text has a class
    return Scores(
        loss=text_losses(logits.double(), torch.as_tensor(labels)).mean().item(),
        accuracy=float((right.all(axis=1) if multi_label else right).mean()),
        precision=float(precision[present].mean()),
        recall=float(recall[present].mean()),
        f1=float(f1[present].mean()),
        per_class={
            name: {"precision": p, "recall": r, "f1": f, "support": int(s)}  # a float if no text is right
            for name, p, r, f, s in zip(label_names, *(scores.tolist() for scores in by_class), strict=True)
        },
        confusion=[] if multi_label else confusion_matrix(labels, predicted, labels=classes).tolist(),
        micro=dict(zip(("precision", "recall", "f1"), map(float, micro), strict=True)) if multi_label else None,
    )


def confident_mistakes(
    logits: torch.Tensor, labels: np.ndarray, texts: list[str], label_names: tuple[str, ...]
) -> list[dict[str, Any]]:
    """The 20 misclassified texts with the highest predicted probability, in descending order.

    Multi-label: the probability of the most certain of a text's wrong decisions, for a class or against it.
    """
    multi_label = labels.ndim == 2
    predicted = predicted_labels(logits, multi_label)
    wrong = predicted != labels
    if multi_label:
        certainty = torch.sigmoid(logits.abs()).where(torch.from_numpy(wrong), 0.0).amax(dim=1).numpy()
        wrong = wrong.any(axis=1)
    else:
        certainty = torch.softmax(logits, dim=1).amax(dim=1).numpy()
    worst = np.flatnonzero(wrong)
    worst = worst[np.argsort(-certainty[worst], kind="stable")][:20]
    true, predicted = (class_names(each[worst], label_names, ", ") for each in (labels, predicted))
    return [
        {"text": texts[row], "true": name, "predicted": other, "probability": float(certainty[row])}
        for row, name, other in zip(worst, true, predicted, strict=True)
    ]
