"""Accuracy and macro precision, recall, F1 from a confusion matrix, which adds up over batches and ranks."""

from __future__ import annotations

import torch
from torch import Tensor


def confusion(labels: Tensor, predicted: Tensor, num_labels: int) -> Tensor:
    """Return float64 [C, C], rows true, columns predicted; labels of -1 do not count.

    Args:
        labels, predicted: int64 [B].
    """
    real = labels >= 0
    cells = labels[real] * num_labels + predicted[real]
    return torch.bincount(cells, minlength=num_labels**2).reshape(num_labels, num_labels).double()


def classification_report(matrix: Tensor) -> dict[str, float]:
    """Figures of a confusion matrix.

    Macro means are over the classes that occur, truly or predicted, and a class with no prediction has precision 0:
    scikit-learn's definition with `zero_division=0`.
    """
    hits = matrix.diagonal()
    true, predicted = matrix.sum(dim=1), matrix.sum(dim=0)
    present = (true + predicted) > 0
    precision = torch.where(predicted > 0, hits / predicted.clamp(min=1), 0.0)[present]
    recall = torch.where(true > 0, hits / true.clamp(min=1), 0.0)[present]
    total = precision + recall
    f1 = torch.where(total > 0, 2 * precision * recall / total.clamp(min=1e-300), 0.0)
    return {
        "accuracy": float(hits.sum() / matrix.sum()),
        "macro_precision": float(precision.mean()),
        "macro_recall": float(recall.mean()),
        "macro_f1": float(f1.mean()),
    }
