"""Opening what the user names as a source: plain checkpoints and our own results."""

from __future__ import annotations

from slimwright.checkpoint import Checkpoint, refuse_foreign_quantization


def open_source(path: str) -> Checkpoint:
    """Open a model directory or hub id.

    Raises:
        InputError: not a model, damaged, or quantized in a form that is not read.
    """
    checkpoint = Checkpoint.open(path)
    refuse_foreign_quantization(checkpoint)
    return checkpoint
