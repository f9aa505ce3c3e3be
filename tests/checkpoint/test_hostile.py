"""Untrusted checkpoints: whatever is in the files, one sentence comes out, and nothing else happens."""

import json
import os
import shutil
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from slimwright.checkpoint import Checkpoint, copy_side_files
from slimwright.errors import InputError

from .mutations import Step, apply, make, mutations, probe
from .samples import anonymous_bytes, sample_tensors, save_checkpoint

EXAMPLES = int(os.environ.get("SLIMWRIGHT_MUTATIONS", "200"))


def test_the_undamaged_sample_is_read(tmp_path: Path) -> None:
    make(tmp_path / "model")
    assert probe(tmp_path / "model", tmp_path / "copy") == 6


@settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)
@given(steps=mutations())
def test_damage_is_refused_or_read(tmp_path: Path, steps: list[Step]) -> None:
    before = anonymous_bytes()
    work = tmp_path / "work"
    shutil.rmtree(work, ignore_errors=True)
    apply(work / "model", steps)
    try:
        probe(work / "model", work / "copy")
    except InputError as error:
        text = str(error)
        assert text.isprintable() and len(text) < 1500 and "Traceback" not in text
    outside = {path.name for path in tmp_path.rglob("*") if not path.is_relative_to(work)} - {"work"}
    assert not outside
    assert anonymous_bytes() - before < 200 << 20


def write_header(directory: Path, header: bytes, data: bytes = b"") -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    return directory


def entry(dtype: object = "U8", shape: object = (4,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BROKEN_HEADERS: dict[str, tuple[object, int]] = {
    "begins with an object": ([], 0),
    "overlap": ({"a": entry(), "b": entry(offsets=(2, 6))}, 6),
    "hole": ({"a": entry(), "b": entry(offsets=(5, 9))}, 9),
    "hole at the start": ({"a": entry(offsets=(1, 5))}, 5),
    "bytes after the last tensor": ({"a": entry()}, 5),
    "truncated": ({"a": entry()}, 3),
    "shape too small": ({"a": entry(shape=(3,))}, 4),
    "a boolean size": ({"a": entry(shape=(True,), offsets=(0, 1))}, 1),
    "a negative size": ({"a": entry(shape=(-2, -2))}, 4),
    "a float size": ({"a": entry(shape=(4.0,))}, 4),
    "overflow to the right size": ({"a": entry(shape=(2**62, 4, 4), offsets=(0, 0))}, 0),
    "overflow hidden by a zero": ({"a": entry(shape=(0, 2**62, 2**62), offsets=(0, 0))}, 0),
    "huge offsets": ({"a": entry(shape=(2**70,), offsets=(0, 2**70))}, 0),
    "reversed offsets": ({"a": entry(shape=(), offsets=(4, 0))}, 4),
    "three offsets": ({"a": entry(offsets=(0, 2, 4))}, 4),
    "an extra field": ({"a": entry() | {"x": 1}}, 4),
    "a missing field": ({"a": {"dtype": "U8", "shape": [4]}}, 4),
    "an unknown dtype": ({"a": entry(dtype="F6")}, 4),
    "a dtype that is no text": ({"a": entry(dtype=["U8"])}, 4),
    "an empty name": ({"": entry()}, 4),
    "a NUL in a name": ({"a\0": entry()}, 4),
    "half a surrogate pair": ({"\ud800": entry()}, 4),
    "metadata with a number": ({"__metadata__": {"a": 1}, "a": entry()}, 4),
    "an entry that is a list": ({"a": [1]}, 4),
    "no tensors": ({}, 0),
}


@pytest.mark.parametrize("case", BROKEN_HEADERS)
def test_broken_headers(tmp_path: Path, case: str) -> None:
    header, size = BROKEN_HEADERS[case]
    with pytest.raises(InputError):
        Checkpoint.open(write_header(tmp_path / "m", json.dumps(header).encode(), b"\1" * size))


def test_the_sound_twin_of_the_broken_headers(tmp_path: Path) -> None:
    sound = {"b": entry(offsets=(4, 8)), "a": entry(), "z": entry(shape=(0, 9), offsets=(8, 8))}
    text = json.dumps({"__metadata__": {"a": '}{"'}} | sound, indent=1).encode()
    checkpoint = Checkpoint.open(write_header(tmp_path / "m", text + b"   ", bytes(range(8))))
    assert checkpoint.read("b").tolist() == [4, 5, 6, 7]
    assert checkpoint.read("z").shape == (0, 9)


@pytest.mark.parametrize(
    "text", ['{"a":%s,"a":%s}', '{"a":%s,"b":{"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[4,4]}}']
)
def test_duplicate_keys(tmp_path: Path, text: str) -> None:
    one = json.dumps(entry())
    with pytest.raises(InputError, match="twice"):
        Checkpoint.open(write_header(tmp_path / "m", (text % ((one,) * text.count("%s"))).encode(), bytes(4)))


def test_a_header_of_brackets_costs_no_memory(tmp_path: Path) -> None:
    header = b'{"a":' + b"[[]," * 2_000_000
    write_header(tmp_path / "m", header)
    tracemalloc.start()
    with pytest.raises(InputError):
        Checkpoint.open(tmp_path / "m")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * len(header)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "x\0.safetensors", 3]
)
def test_shard_names_stay_inside(tmp_path: Path, name: object) -> None:
    model = save_checkpoint(tmp_path / "m", sample_tensors(), shards=2)
    save_checkpoint(tmp_path, {"odd": torch.ones(7)})
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "outside.safetensors")
    index = json.loads((model / "model.safetensors.index.json").read_text())
    index["weight_map"]["odd"] = name
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="plain file name"):
        Checkpoint.open(model)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "vocab.txt"])
def test_links_out_of_the_directory_are_refused(tmp_path: Path, file: str) -> None:
    model = save_checkpoint(tmp_path / "m", sample_tensors())
    (model / "vocab.txt").write_text("a")
    (model / file).rename(tmp_path / "elsewhere")
    (model / file).symlink_to("../elsewhere")
    with pytest.raises(InputError, match="outside"):
        copy_side_files(Checkpoint.open(model), tmp_path / "copy")
    (model / file).unlink()
    (tmp_path / "elsewhere").rename(model / "inside")
    (model / file).symlink_to("inside")
    assert Checkpoint.open(model).tensors


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    snapshot = save_checkpoint(tmp_path / "models--a--b" / "snapshots" / "main", sample_tensors())
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    for name in ("model.safetensors", "config.json"):
        (snapshot / name).rename(blobs / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert Checkpoint.open(snapshot).tensors
    (blobs / "config.json").rename(tmp_path / "config.json")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../../config.json")
    with pytest.raises(InputError, match="outside"):
        Checkpoint.open(snapshot)


@pytest.mark.parametrize("folder", ["..", "../m", "/", "a/../..", "a\0b", 5])
def test_module_folders_stay_inside(tmp_path: Path, folder: object) -> None:
    model = save_checkpoint(tmp_path / "m", sample_tensors())
    (model / "modules.json").write_text(json.dumps([{"path": folder, "type": "x.Transformer"}]))
    with pytest.raises(InputError, match=r"modules\.json"):
        Checkpoint.open(model)


def test_pointers_of_git_lfs_are_named(tmp_path: Path) -> None:
    for name in ("model.safetensors", "config.json"):
        model = save_checkpoint(tmp_path / name, sample_tensors())
        (model / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")
        with pytest.raises(InputError, match="git lfs pull"):
            Checkpoint.open(model)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["config.json", "pytorch_model.bin"], "pytorch_model.bin is a pickle"),
        (["config.json", "consolidated.00.pth"], "consolidated.00.pth is a pickle"),
        (["config.json", "model.ckpt"], "model.ckpt is a pickle"),
        (["model-q4.gguf"], "GGUF"),
        (["config.json", "model-q4.gguf"], "GGUF"),
        (["adapter_config.json", "adapter_model.safetensors"], "adapter"),
        (["config.json", "weights.safetensors"], "neither model.safetensors nor"),
        (["config.json"], "no weights"),
        (["notes.txt"], "no config.json"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, files: list[str], says: str) -> None:
    for file in files:
        (tmp_path / file).write_text("{}")
    with pytest.raises(InputError, match=says):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff\xfe", b'{"a":' * 100_000, b" " * (9 << 20), b"3"])
def test_config_must_be_an_object(tmp_path: Path, content: bytes) -> None:
    model = save_checkpoint(tmp_path / "m", sample_tensors())
    (model / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"config\.json"):
        Checkpoint.open(model)


def test_shards_must_be_there_and_agree(tmp_path: Path) -> None:
    tensors = sample_tensors()
    one = save_checkpoint(tmp_path / "one", tensors, shards=3)
    (one / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match=r"lacks 1 of its 3 shards, model-00002-of-00003"):
        Checkpoint.open(one)
    two = save_checkpoint(tmp_path / "two", tensors, shards=3)
    shutil.copy(two / "model-00001-of-00003.safetensors", two / "model-00002-of-00003.safetensors")
    with pytest.raises(InputError, match="both in"):
        Checkpoint.open(two)
    three = save_checkpoint(tmp_path / "three", tensors, shards=3)
    index = json.loads((three / "model.safetensors.index.json").read_text())
    index["weight_map"]["absent"] = "model-00001-of-00003.safetensors"
    (three / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="lacks tensor 'absent'"):
        Checkpoint.open(three)
    del index["weight_map"]["absent"], index["weight_map"]["odd"]
    (three / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "odd" in Checkpoint.open(three).tensors, "a tensor of a shard counts, named by the index or not"


def test_names_that_are_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    for name in ("./nowhere", "/nowhere/at/all", "a/b/c", "~nobody/x", "a\0b", "x" * 300 + "/"):
        with pytest.raises(InputError, match="does not exist"):
            Checkpoint.open(name)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        Checkpoint.open(tmp_path / "file")

    model = save_checkpoint(tmp_path / "m", sample_tensors())
    calls: list[tuple[str, str | None, bool]] = []

    def snapshot(repository: str, revision: str | None, local_files_only: bool, ignore_patterns: list[str]) -> str:
        calls.append((repository, revision, local_files_only))
        if repository == "not/cached" and local_files_only:
            raise errors.LocalEntryNotFoundError("no")
        if repository == "off/line":
            raise errors.LocalEntryNotFoundError("no")
        return str(model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert Checkpoint.open("gpt2").hub_id == "gpt2"
    assert Checkpoint.open("not/cached@v1.0").hub_id == "not/cached@v1.0"
    assert calls == [("gpt2", None, True), ("not/cached", "v1.0", True), ("not/cached", "v1.0", False)]
    with pytest.raises(InputError, match="cannot be reached"):
        Checkpoint.open("off/line")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("GatedRepoError", "is gated: accept its conditions"),
        ("RepositoryNotFoundError", "no model on the hub"),
        ("RevisionNotFoundError", "has no revision 'v9'"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(kind: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's own errors, as snapshot_download raises them: never in the cache, then refused by the server."""
    import huggingface_hub
    from huggingface_hub import errors

    def snapshot(repository: str, *, local_files_only: bool, **rest: object) -> str:
        if local_files_only:
            raise errors.LocalEntryNotFoundError("not cached")
        cls = getattr(errors, kind)
        raise cls.__new__(cls)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(InputError, match=said):
        Checkpoint.open("someone/secret@v9")
