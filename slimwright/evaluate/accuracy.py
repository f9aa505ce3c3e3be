"""Accuracy of classifiers, of text and of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from slimwright.calibrate.data import Document
from slimwright.errors import InputError
from slimwright.evaluate.table import Metric

ACCURACY = Metric("accuracy", "correct")

_CLASSIFIERS = ("ForSequenceClassification", "ForImageClassification", "ForAudioClassification")


def class_indices(model: Any) -> dict[str, int]:
    """Indices of a classifier's classes by name, as its config's ``label2id`` and ``id2label`` say; empty if the model
    is none, or does not choose one of several classes."""
    config = model.config
    chooses = config.problem_type not in ("regression", "multi_label_classification") and len(config.id2label or {}) > 1
    if not chooses or not any(kind in type(model).__name__ for kind in _CLASSIFIERS):
        return {}
    known = set(config.id2label)
    named = {str(name): int(index) for name, index in (config.label2id or {}).items() if int(index) in known}
    return named | {str(name): int(index) for index, name in config.id2label.items()}


def labels_of(source: str, found: Sequence[Document], classes: Mapping[str, int]) -> Tensor | None:
    """Indices of the documents' classes, given as such or by name, (documents,) int64; None if no document has one.

    Args:
        source: name of the data, for the error.
        classes: indices by name.

    Raises:
        InputError: only some documents have a label, or one is no class.
    """
    labels = [document.label for document in found]
    if all(label is None for label in labels):
        return None
    if any(label is None for label in labels):
        given = sum(label is not None for label in labels)
        raise InputError(f"Only {given} of the {len(found)} samples of '{source}' that are measured have a label.")
    known = set(classes.values())
    indices = [classes.get(label, label) if isinstance(label, str) else label for label in labels]
    for document, index in zip(found, indices):
        if index not in known:
            raise InputError(
                f"The label '{str(document.label)[:60]}' of {document.name} in '{source}' is no class of the model "
                f"({', '.join(classes)[:200]})."
            )
    return torch.tensor(indices)


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
