"""Scores against numbers computed by hand, and logits in the order of the split."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.batching import Batch
from training.precision import Compute
from training.scoring import predict, score


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
    logits = torch.eye(3)
    table = score(logits, np.array([0, 1, 2]), ("earn", "acq", "money-fx")).table()
    assert [line.split()[0] for line in table.splitlines()] == ["class", "earn", "acq", "money-fx", "macro"]


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
        indices=torch.from_numpy(rows),
        tokens=3,
    )
    model = _FirstTokenModel().train()
    logits = predict(model, [batch], 3, Compute(torch.device("cpu"), "fp32"))
    assert logits[:, 0].tolist() == [10.0, 11.0, 12.0]
    assert model.training and model.modes == [False]
