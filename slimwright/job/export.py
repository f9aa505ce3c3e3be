"""``export``: a result of ours as files that others load. Dense safetensors; other targets come later."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import slimwright
from slimwright.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    TensorEntry,
    claim,
    copy_side_files,
    job_key,
    model_card,
    plan_layout,
    read_card_metadata,
    source_state,
    weights_hash,
    write_bytes_atomic,
    write_config_atomic,
)
from slimwright.errors import InputError, NotBuiltError
from slimwright.job.open import open_source
from slimwright.job.request import MAX_SHARD_BYTES, FitReport
from slimwright.job.result import how_to_load
from slimwright.job.weights import TILE_ELEMENTS

TARGETS = ("compressed-tensors", "gguf", "onnx")


def export(
    directory: str, to: str = "safetensors", out: str | None = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> FitReport:
    """Write the dense model that a result stands for: plain weights in the source's names, shapes and dtypes.

    Args:
        directory: a result of ``fit``.
        to: ``safetensors``.
        out: directory to write to; exists only when it is whole.

    Raises:
        InputError: not a result of ours, or an unknown target; NotBuiltError: a target that comes later.
    """
    if to in TARGETS:
        raise NotBuiltError(f"--to {to} is designed but not built in this version; safetensors is.")
    if to != "safetensors":
        raise InputError(f"Unknown target '{to}'; known: safetensors.")
    if out is None:
        raise InputError("Give an output directory.")
    started = time.monotonic()
    source = open_source(directory)
    if source.config == Checkpoint.open(directory).config:
        raise InputError(f"{directory} holds plain weights already: there is nothing to export.")
    entries = [TensorEntry(name, info.dtype, info.shape) for name, info in source.tensors.items()]
    layout = plan_layout(entries, max_shard_bytes, total_parameters=sum(i.numel for i in source.tensors.values()))
    key = job_key(source=source_state(Checkpoint.open(directory)), to=to, shard=max_shard_bytes)
    with claim(out, key) as held:
        if held.status != "finished":
            inner = held.partial / source.model_path.relative_to(source.path)
            for file in inner.glob("*.safetensors"):
                file.unlink()
            with CheckpointWriter(inner, layout) as writer:
                for entry in entries:
                    _copy(source, entry, writer)
            write_config_atomic(inner / "config.json", source.config)
            copied = copy_side_files(source, held.partial)
            card = model_card(
                held.out.name,
                facts=[("Made from", directory), ("Weights", "dense, decoded from the compressed result")],
                load=how_to_load(held.out, inner.relative_to(held.partial), source, packed=False),
                source_metadata=read_card_metadata(source.path),
                licence_files=[name for name in copied.copied if "licen" in name.lower()],
            )
            write_bytes_atomic(held.partial / "README.md", card.encode())
            held.publish()
        written = Checkpoint.open(held.out)
        data: dict[str, Any] = {
            "format_version": 1,
            "model": {"path": directory},
            "size": {"before": Checkpoint.open(directory).total_bytes, "after": written.total_bytes},
            "job": {"seconds": time.monotonic() - started},
            "hash": weights_hash(held.out),
            "versions": {"slimwright": slimwright.__version__},
            "how_to_load": how_to_load(
                held.out, source.model_path.relative_to(source.path), source, packed=False
            ),
        }  # fmt: skip
        return FitReport(data, Path(held.out))


def _copy(source: Checkpoint, entry: TensorEntry, writer: CheckpointWriter) -> None:
    per_row = entry.nbytes // entry.shape[0] if entry.shape and entry.shape[0] else 0
    for rows in source.tiles(entry.name, max_bytes=TILE_ELEMENTS * 4):
        tile = source.read(entry.name, rows)
        writer.write(entry.name, tile.contiguous(), rows.start * per_row if entry.shape else 0)
