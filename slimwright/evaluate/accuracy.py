"""Accuracy of classifiers, of text and of images."""

from __future__ import annotations

import torch
from torch import Tensor

from slimwright.errors import InputError
from slimwright.evaluate.table import Metric

ACCURACY = Metric("accuracy", "correct")


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the largest logit is the label's (of equal maxima the first counts).

    Args:
        logits: (samples, classes), any float dtype.
        labels: (samples,) integers.

    Returns:
        (samples,) bool.

    Raises:
        InputError: the shapes do not fit, a label is no class, or a logit is NaN or Inf.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise InputError(
            f"Logits (samples, classes) and labels (samples,) have shapes {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}."
        )
    classes = logits.shape[1]
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        raise InputError(
            f"The labels run from {int(labels.min())} to {int(labels.max())}, but the model has {classes} classes."
        )
    if not torch.isfinite(logits).all():
        raise InputError("The logits hold NaN or Inf: the model is broken or was built wrong.")
    return logits.argmax(1) == labels.to(logits.device)
