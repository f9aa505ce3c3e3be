"""Writing: files that safetensors and transformers load, tile by tile, continued after a crash."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from slimwright.checkpoint import Checkpoint, CheckpointWriter, Layout, TensorEntry, plan_layout
from slimwright.errors import InputError, SlimwrightError

from .samples import anonymous_bytes, same_bits, sample_tensors


def entries_of(tensors: Mapping[str, torch.Tensor]) -> list[TensorEntry]:
    return [TensorEntry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def write(directory: Path, tensors: Mapping[str, torch.Tensor], max_shard_bytes: int = 5 * 10**9) -> Layout:
    layout = plan_layout(entries_of(tensors), max_shard_bytes)
    with CheckpointWriter(directory, layout) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    (directory / "config.json").write_text("{}")
    return layout


@pytest.mark.parametrize(("max_shard_bytes", "shards"), [(5 * 10**9, 1), (8000, 2)])
def test_safetensors_reads_what_we_write(tmp_path: Path, max_shard_bytes: int, shards: int) -> None:
    tensors = sample_tensors()
    layout = write(tmp_path, tensors, max_shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == len(layout.shards) >= shards
    assert layout.total_bytes == sum(file.stat().st_size for file in files)
    loaded: dict[str, torch.Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        loaded |= load_file(file)
    assert loaded.keys() == tensors.keys()
    assert all(same_bits(loaded[name], tensor) for name, tensor in tensors.items())
    checkpoint = Checkpoint.open(tmp_path)
    for name, tensor in tensors.items():
        assert same_bits(checkpoint.read(name), tensor)
        assert tensor.nbytes % 64 or checkpoint.read(name).data_ptr() % 64 == 0
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == (shards > 1)
    if shards > 1:
        weight_map = json.loads(index.read_text())["weight_map"]
        assert weight_map == {name: info.file.name for name, info in checkpoint.tensors.items()}


def test_transformers_loads_what_we_write(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "theirs")
    source = Checkpoint.open(tmp_path / "theirs")
    tensors = {name: source.read(name) for name in source.tensors}
    for number, max_shard_bytes in enumerate([10**9, 30_000]):
        ours = tmp_path / f"ours{number}"
        layout = write(ours, tensors, max_shard_bytes)
        assert (len(layout.shards) > 1) == bool(number)
        (ours / "config.json").write_bytes((tmp_path / "theirs" / "config.json").read_bytes())
        loaded, about = LlamaForCausalLM.from_pretrained(ours, output_loading_info=True)
        assert not any(about[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), about
        assert all(same_bits(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_tiles_land_where_they_belong(tmp_path: Path) -> None:
    tensor = torch.randn(100, 3)
    with CheckpointWriter(tmp_path, plan_layout(entries_of({"w": tensor}))) as writer:
        for begin in (60, 0, 30, 90):
            tile = tensor[begin : begin + 30]
            writer.write("w", tile, offset_bytes=begin * 3 * 4)
        writer.write("w", tensor[::2][:1], 0)  # not contiguous
        for wrong, offset in [
            (tensor, 4),
            (tensor[:1], -4),
            (tensor[:1], 2),
            (tensor.double()[:1], 0),
            (tensor[:1], 1200),
        ]:
            with pytest.raises(ValueError):
                writer.write("w", wrong, offset)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["w"], tensor)


def test_a_second_writer_keeps_what_is_written(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(2000), "b": torch.randn(2000)}
    layout = plan_layout(entries_of(tensors), max_shard_bytes=10_000)
    first = CheckpointWriter(tmp_path, layout)
    assert first.fresh == ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    first.write("a", tensors["a"])
    first.close()
    first.close()
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with CheckpointWriter(tmp_path, layout) as second:
        assert second.fresh == ("model-00002-of-00002.safetensors",)
        second.write("b", tensors["b"])
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(tmp_path)
    assert all(same_bits(checkpoint.read(name), tensor) for name, tensor in tensors.items())


def test_files_of_another_plan_are_not_overwritten(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.ones(4)})
    for other in ({"a": torch.ones(5)}, {"b": torch.ones(4)}):
        with pytest.raises(InputError, match="not of this job's plan"):
            CheckpointWriter(tmp_path, plan_layout(entries_of(other)))
    with pytest.raises(InputError, match="not of this job's plan"):
        CheckpointWriter(
            tmp_path, plan_layout(entries_of({"a": torch.ones(99), "b": torch.ones(99)}), max_shard_bytes=500)
        )
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], torch.ones(4))


def test_a_full_disk_is_seen_before_work(tmp_path: Path) -> None:
    layout = plan_layout([TensorEntry("w", torch.uint8, (1 << 50,))], max_shard_bytes=1 << 60)
    with pytest.raises(InputError, match="no room"):
        CheckpointWriter(tmp_path, layout)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_during_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = CheckpointWriter(tmp_path, plan_layout(entries_of({"w": torch.ones(9)})))

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(SlimwrightError, match="No space left"):
        writer.write("w", torch.ones(9))
    monkeypatch.undo()
    writer.write("w", torch.ones(9))
    writer.close()
    assert torch.equal(load_file(tmp_path / "model.safetensors")["w"], torch.ones(9))


def test_copying_a_tensor_takes_no_private_memory(tmp_path: Path) -> None:
    write(tmp_path / "a", {"w": torch.ones(64, 1 << 20, dtype=torch.uint8)})
    source = Checkpoint.open(tmp_path / "a")
    with CheckpointWriter(tmp_path / "b", plan_layout(entries_of({"w": source.read("w")}))) as writer:
        before = anonymous_bytes()
        writer.write("w", source.read("w"))
        assert anonymous_bytes() - before < 8 << 20
