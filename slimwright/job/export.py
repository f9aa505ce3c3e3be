"""``export``: a result of ours as files that others load."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import slimwright
from slimwright.checkpoint import (
    Checkpoint,
    claim,
    copy_side_files,
    job_key,
    model_card,
    read_card_metadata,
    source_state,
    write_bytes_atomic,
    write_json_atomic,
)
from slimwright.checkpoint.fingerprint import files_hash
from slimwright.errors import InputError
from slimwright.job.exports.compressed_tensors import write_compressed_tensors
from slimwright.job.exports.dense import write_dense
from slimwright.job.exports.gguf import write_gguf
from slimwright.job.exports.onnx import write_onnx
from slimwright.job.exports.written import Result, Written
from slimwright.job.open import open_source
from slimwright.job.request import MAX_SHARD_BYTES, FitReport
from slimwright.model.discover import discover

EXPORT_FILE = "export.json"
"""What was exported, beside the result."""

Writer = Callable[[Result, Path, Path, int, bool], Written]

WRITERS: dict[str, Writer] = {
    "safetensors": write_dense,
    "compressed-tensors": write_compressed_tensors,
    "gguf": write_gguf,
    "onnx": write_onnx,
}
"""Result, the model's directory, what it will be called, bytes of a file at most, remote code → what was written."""


def export(
    directory: str,
    to: str = "safetensors",
    out: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    trust_remote_code: bool = False,
) -> FitReport:
    """Write a result in the form of another program; its codes are rearranged, never rounded again.

    Args:
        directory: a result of ``fit``.
        to: ``safetensors`` (plain dense weights in the source's names, shapes and dtypes), ``compressed-tensors``,
            ``gguf`` or ``onnx``.
        out: directory to write to (of ``gguf`` and ``onnx`` it holds one file); exists only when it is whole.

    Raises:
        InputError: nothing to export, an unknown target, or one where the result's plan is not legal: says which
            weights, and what would be.
    """
    if to not in WRITERS:
        raise InputError(f"Unknown target '{to}'; known: {', '.join(WRITERS)}.")
    if out is None:
        raise InputError("Give an output directory.")
    started = time.monotonic()
    source = open_source(directory)
    plain = Checkpoint.open(directory)
    if to == "safetensors" and source.config == plain.config:
        raise InputError(f"{directory} holds plain weights already: there is nothing to export.")
    result = Result.of(source, discover(source, trust_remote_code=trust_remote_code))
    key = job_key(source=source_state(plain), to=to, shard=max_shard_bytes)
    with claim(out, key) as held:
        if held.status == "finished":
            data = json.loads((held.out / EXPORT_FILE).read_text(encoding="utf-8"))
            return FitReport(data, held.out)
        inner = held.partial / source.model_path.relative_to(source.path)
        inner.mkdir(parents=True, exist_ok=True)
        try:
            written = WRITERS[to](result, inner, held.out, max_shard_bytes, trust_remote_code)
        except InputError:  # what was given cannot be written, so nothing of it is worth keeping
            if held.status == "new":
                shutil.rmtree(held.partial)
            raise
        copied = copy_side_files(source, held.partial)
        card = model_card(
            held.out.name,
            facts=[("Made from", directory), ("Weights", written.what)],
            load=written.how_to_load,
            source_metadata=read_card_metadata(source.path),
            licence_files=[name for name in copied.copied if "licen" in name.lower()],
        )
        write_bytes_atomic(held.partial / "README.md", card.encode())
        data = {
            "format_version": 1,
            "model": {"path": directory},
            "target": to,
            "size": {
                "before": plain.total_bytes,
                "after": written.nbytes,
                "tensors": written.tensor_bytes,
            },
            "verified": dict(written.proof),
            "job": {"seconds": time.monotonic() - started},
            "hash": files_hash(written.files),
            "versions": {"slimwright": slimwright.__version__},
            "how_to_load": written.how_to_load,
            "notes": list(written.notes),
        }
        write_json_atomic(held.partial / EXPORT_FILE, data)
        held.publish()
        return FitReport(data, Path(held.out))
