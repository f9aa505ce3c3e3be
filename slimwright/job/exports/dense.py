"""A result as the dense model that it stands for: plain weights in the source's names, shapes and dtypes."""

from __future__ import annotations

from pathlib import Path

from slimwright.checkpoint import CheckpointWriter, TensorEntry, plan_layout, write_config_atomic
from slimwright.job.exports.written import TILE_BYTES, Result, Written
from slimwright.job.result import how_to_load


def write_dense(
    result: Result, directory: Path, out: Path, max_shard_bytes: int, trust_remote_code: bool = False
) -> Written:
    """Write the weights and config.json.

    Args:
        directory: where the model's files go; ``out``: what the whole will be called.
    """
    source = result.checkpoint
    entries = [TensorEntry(name, info.dtype, info.shape) for name, info in source.tensors.items()]
    layout = plan_layout(entries, max_shard_bytes, total_parameters=sum(i.numel for i in source.tensors.values()))
    for file in directory.glob("*.safetensors"):
        file.unlink()
    with CheckpointWriter(directory, layout) as writer:
        for entry in entries:
            per_row = entry.nbytes // entry.shape[0] if entry.shape and entry.shape[0] else 0
            for rows in source.tiles(entry.name, max_bytes=TILE_BYTES):
                tile = source.read(entry.name, rows)
                writer.write(entry.name, tile.contiguous(), rows.start * per_row if entry.shape else 0)
    write_config_atomic(directory / "config.json", source.config)
    return Written(
        tuple(directory / shard.file_name for shard in layout.shards),
        sum(entry.nbytes for entry in entries),
        how_to_load(out, source.model_path.relative_to(source.path), source, packed=False),
        "dense, decoded from the compressed result",
        {},
    )
