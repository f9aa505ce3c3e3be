"""Checkpoints on disk: read lazily, written atomically, resumed after a crash."""

from slimwright.checkpoint.header import DTYPE_NAMES, DTYPES, TensorInfo
from slimwright.checkpoint.layout import Layout, TensorEntry, entry_cost, overhead_bound, plan_layout
from slimwright.checkpoint.reader import Checkpoint, refuse_foreign_quantization
from slimwright.checkpoint.writer import CheckpointWriter

__all__ = [
    "DTYPES",
    "DTYPE_NAMES",
    "Checkpoint",
    "CheckpointWriter",
    "Layout",
    "TensorEntry",
    "TensorInfo",
    "entry_cost",
    "overhead_bound",
    "plan_layout",
    "refuse_foreign_quantization",
]
