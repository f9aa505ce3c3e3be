"""A result as the dense model that it stands for: plain weights in the source's names, shapes and dtypes."""

from __future__ import annotations

from pathlib import Path

from slimwright.checkpoint import TensorEntry, plan_layout, write_config_atomic
from slimwright.job.exports.written import Result, Written, copy_tensor, fresh_writer
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
    with fresh_writer(directory, layout) as writer:
        for name in source.tensors:
            copy_tensor(source, name, writer)
    write_config_atomic(directory / "config.json", source.config)
    return Written(
        tuple(directory / shard.file_name for shard in layout.shards),
        sum(entry.nbytes for entry in entries),
        how_to_load(out, source.model_path.relative_to(source.path), source, packed=False),
        "dense, decoded from the compressed result",
        {},
    )
