"""Scores against numbers computed by hand, and logits in the order of the split."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.batching import Batch
from training.precision import Compute
from training.scoring import confident_mistakes, predict, score


def test_scores_of_a_confusion_matrix_computed_by_hand():
    # Truth 0,0,0,1,1,2; predicted 0,0,1,1,1,0.
    predicted = torch.tensor([0, 0, 1, 1, 1, 0])
    logits = torch.nn.functional.one_hot(predicted, 3).float() * 4
    scores = score(logits, np.array([0, 0, 0, 1, 1, 2]), ("a", "b", "c"))
    assert scores.confusion == [[2, 1, 0], [0, 2, 0], [1, 0, 0]]
    assert scores.accuracy == pytest.approx(4 / 6)
    assert scores.precision == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    assert scores.recall == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert scores.f1 == pytest.approx((2 / 3 + 4 / 5 + 0) / 3)
    assert scores.per_class["b"]["support"] == 2
    right, wrong = -np.log(np.exp(4) / (np.exp(4) + 2)), -np.log(1 / (np.exp(4) + 2))
    assert scores.loss == pytest.approx((4 * right + 2 * wrong) / 6)


def test_a_class_without_texts_does_not_lower_the_averages():
    logits = torch.tensor([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0]])
    assert score(logits, np.array([0, 1]), ("a", "b", "unseen")).f1 == 1.0


def test_table_has_one_line_per_class():
    table = score(torch.eye(3), np.array([1, 2, 0]), ("earn", "acq", "money\nfx")).table()
    assert [line.split()[0] for line in table.splitlines()] == ["class", "earn", "acq", "money", "macro"]
    assert [line.split()[-1] for line in table.splitlines()] == ["texts", "1", "1", "1", "3"]


def test_multi_label_scores_computed_by_hand():
    # Three texts, classes a, b, c (c has no text); right, one class too few, one too many.
    labels = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0]])
    logits = torch.tensor([[2.0, -2.0, -2.0], [0.0, 2.0, -2.0], [-2.0, 2.0, 4.0]])  # 0.5 is not above 0.5
    scores = score(logits, labels, ("a", "b", "c"))
    assert (scores.accuracy, scores.confusion) == (pytest.approx(1 / 3), [])
    assert scores.micro == pytest.approx({"precision": 3 / 4, "recall": 3 / 4, "f1": 3 / 4})
    assert scores.precision == 1.0 and scores.recall == pytest.approx((1 / 2 + 1) / 2)  # c does not count
    assert scores.f1 == pytest.approx((2 / 3 + 1) / 2) and scores.deciding == scores.micro["f1"]
    assert [row["support"] for row in scores.per_class.values()] == [2, 2, 0]
    losses = [np.log1p(np.exp(-2.0))] * 7 + [np.log(2.0), np.log1p(np.exp(4.0))]
    assert scores.loss == pytest.approx(np.mean(losses))
    assert scores.summary().startswith("test exact match 33.33 %  micro F1 0.750   macro precision 1.000")
    assert "micro average" in scores.table()

    first, second = confident_mistakes(logits, labels, ["x", "y", "z"], ("a", "b", "c"))
    assert (first["text"], first["true"], first["predicted"]) == ("z", "b", "b, c")
    assert (second["text"], second["true"], second["predicted"]) == ("y", "a, b", "b")
    assert (first["probability"], second["probability"]) == (pytest.approx(1 / (1 + np.exp(-4))), 0.5)


class _FirstTokenModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.modes, self.config = [], SimpleNamespace(num_labels=2)

    def forward(self, input_ids, attention_mask):
        self.modes.append(self.training)
        return torch.stack([input_ids[:, 0].float(), -input_ids[:, 0].float()], dim=1)


def test_predict_restores_row_order_and_mode():
    rows = np.array([2, 0, 1])
    batch = Batch(
        input_ids=torch.tensor([[12], [10], [11]]),
        attention_mask=torch.ones(3, 1, dtype=torch.bool),
        labels=torch.zeros(3, dtype=torch.long),
        weights=torch.ones(3),
        indices=torch.from_numpy(rows),
        tokens=3,
        total_weight=3.0,
    )
    model = _FirstTokenModel().train()
    logits = predict(model, [batch], 3, Compute(torch.device("cpu"), "fp32"))
    assert logits[:, 0].tolist() == [10.0, 11.0, 12.0]
    assert model.training and model.modes == [False]
