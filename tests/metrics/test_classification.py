"""Accuracy and macro figures against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support
from tritune.trainer.metrics.classification import classification_report, confusion


def judge(true, predicted):
    """scikit-learn's default: the classes that occur in either, zero_division=0."""
    precision, recall, f1, _ = precision_recall_fscore_support(true, predicted, average="macro", zero_division=0)
    return {
        "accuracy": accuracy_score(true, predicted),
        "macro_precision": precision,
        "macro_recall": recall,
        "macro_f1": f1,
    }


def ours(true, predicted, num_labels):
    return classification_report(confusion(torch.tensor(true), torch.tensor(predicted), num_labels))


# Counts are exact; ratios and a mean of up to 77 of them in float64 differ by some ten roundings at most.
CLOSE = 1e-13


@pytest.mark.parametrize("num_labels", [2, 3, 5, 77])
@pytest.mark.parametrize("skill", [0.0, 0.5, 0.95, 1.0])
def test_random_predictions(num_labels, skill):
    rng = np.random.default_rng(num_labels)
    for rows in (1, 2, 7, 50, 1000):
        for _ in range(8):
            present = rng.choice(num_labels, rng.integers(1, num_labels + 1), replace=False)  # some classes never occur
            said = rng.choice(num_labels, rng.integers(1, num_labels + 1), replace=False)  # others are never predicted
            true = rng.choice(present, rows)
            predicted = np.where(rng.random(rows) < skill, true, rng.choice(said, rows))
            assert ours(true.tolist(), predicted.tolist(), num_labels) == pytest.approx(
                judge(true, predicted), rel=CLOSE, abs=CLOSE
            )


@pytest.mark.parametrize(
    ("true", "predicted"),
    [
        ([0, 0, 0], [0, 0, 0]),  # one class only
        ([0, 0, 0], [1, 1, 1]),  # all wrong, one class each
        ([0, 1, 2], [0, 0, 0]),  # two classes never predicted
        ([0, 0, 0], [0, 1, 2]),  # two predicted that never occur
        ([2, 2, 1], [1, 1, 2]),  # nothing right, class 0 absent
        ([3], [3]),
    ],
)
def test_absent_classes(true, predicted):
    assert ours(true, predicted, 4) == pytest.approx(judge(true, predicted), rel=CLOSE, abs=CLOSE)


def test_the_matrix_is_scikit_learns_and_rows_that_fill_do_not_count():
    rng = np.random.default_rng(0)
    true, predicted = rng.integers(-1, 5, 500), rng.integers(0, 5, 500)
    matrix = confusion(torch.tensor(true), torch.tensor(predicted), 5)
    real = true >= 0
    assert 0 < real.sum() < 500
    assert matrix.dtype == torch.float64
    assert np.array_equal(matrix.numpy(), confusion_matrix(true[real], predicted[real], labels=range(5)))


def test_matrices_add_up_over_batches():
    rng = np.random.default_rng(1)
    true, predicted = torch.tensor(rng.integers(-1, 4, 103)), torch.tensor(rng.integers(0, 4, 103))
    parts = [confusion(t, p, 4) for t, p in zip(true.split(10), predicted.split(10), strict=True)]
    assert torch.equal(sum(parts), confusion(true, predicted, 4))


def test_no_rows():
    matrix = confusion(torch.tensor([-1]), torch.tensor([2]), 3)
    assert matrix.shape == (3, 3)
    assert not matrix.any()
