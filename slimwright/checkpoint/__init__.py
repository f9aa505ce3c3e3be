"""Checkpoints on disk: read lazily, written atomically, resumed after a crash."""

from slimwright.checkpoint.card import model_card, read_card_metadata
from slimwright.checkpoint.files import write_bytes_atomic, write_config_atomic, write_json_atomic
from slimwright.checkpoint.fingerprint import Lineage, fingerprint, source_state, weights_hash
from slimwright.checkpoint.header import DTYPE_NAMES, DTYPES, TensorInfo
from slimwright.checkpoint.journal import Journal, environment_key, job_key
from slimwright.checkpoint.layout import Layout, TensorEntry, entry_cost, overhead_bound, plan_layout
from slimwright.checkpoint.publish import Claim, claim, partial_directory
from slimwright.checkpoint.reader import Checkpoint
from slimwright.checkpoint.side_files import SideFiles, copy_side_files
from slimwright.checkpoint.writer import CheckpointWriter

__all__ = [
    "DTYPES",
    "DTYPE_NAMES",
    "Checkpoint",
    "CheckpointWriter",
    "Claim",
    "Journal",
    "Layout",
    "Lineage",
    "SideFiles",
    "TensorEntry",
    "TensorInfo",
    "claim",
    "copy_side_files",
    "entry_cost",
    "environment_key",
    "fingerprint",
    "job_key",
    "model_card",
    "overhead_bound",
    "partial_directory",
    "plan_layout",
    "read_card_metadata",
    "source_state",
    "weights_hash",
    "write_bytes_atomic",
    "write_config_atomic",
    "write_json_atomic",
]
