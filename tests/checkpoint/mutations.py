"""Damage to a checkpoint: one strategy for the quick test here and for the long run of benchmarks/.

`mutations()` draws a list of steps; `apply(directory, steps)` carries them out on a fresh sample; `probe(directory,
destination)` does everything a reader does. Whatever the steps, `probe` must return or raise InputError.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from slimwright.checkpoint import Checkpoint, copy_side_files, fingerprint, source_state

from .samples import save_checkpoint

FILES = (
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "modules.json",
    "tokenizer.json",
)
FIELDS = ("dtype", "shape", "data_offsets", "extra")
SUBSTITUTES = ("nothing", "outside", "loop", "folder", "pipe", "lfs")
Step = tuple[str, Any, Any, Any]

_numbers = st.one_of(
    st.integers(-2, 70),
    st.sampled_from([2**15, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63), 10**4000]),
    st.sampled_from([True, False, 1.5, 1e400, 0.0]),
)
_names = st.one_of(
    st.sampled_from(
        ["", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "a\0b", "\ud800", "__metadata__", "x" * 5000,
         "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "config.json", "w.0", "U8", "F4"]
    ),
    st.text(max_size=8),
)  # fmt: skip
_values = st.recursive(
    st.one_of(st.none(), _numbers, _names),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(_names, inner, max_size=3)),
    max_leaves=8,
)
_lists = st.lists(_numbers, max_size=4)
_texts = st.one_of(
    _values.map(json.dumps),
    st.sampled_from(
        ["", "{", "{}", "[]", "null", "{}{}", "[" * 100_000, '{"a":' * 50_000, '{"a":' + "[" * 3000,
         '{"a":1' + "0" * 9000 + "}",
         '{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
         '{"__metadata__":{"a":"b","a":"c"}}', '{"__metadata__":{"a":1}}', '{"a":{"dtype":"U8","dtype":"I8","shape":[],'
         '"data_offsets":[0,1]}}', "\ufeff{}", '{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}']
    ),
)  # fmt: skip
_fractions = st.floats(0, 1)


def mutations() -> st.SearchStrategy[list[Step]]:
    """One to three steps of damage."""
    weights = st.sampled_from(FILES[:2])
    anything = st.sampled_from(FILES)
    step = st.one_of(
        st.tuples(st.just("length"), weights, st.one_of(st.integers(0, 400), st.integers(0, 2**64 - 1)), st.none()),
        st.tuples(st.just("overwrite"), anything, _fractions, st.binary(min_size=1, max_size=6)),
        st.tuples(st.just("truncate"), anything, _fractions, st.none()),
        st.tuples(st.just("extend"), anything, st.binary(min_size=1, max_size=70), st.none()),
        st.tuples(st.just("field"), weights, st.sampled_from(FIELDS), _lists | _values),
        st.tuples(st.just("shift"), weights, st.integers(-64, 64), st.integers(-64, 64)),
        st.tuples(st.just("member"), weights, _names, _values),
        st.tuples(st.just("header"), weights, _texts, st.none()),
        st.tuples(st.just("text"), st.sampled_from(FILES[2:]), _texts, st.none()),
        st.tuples(st.just("index"), st.just(FILES[2]), _names, _names | _values),
        st.tuples(st.just("replace"), anything, st.sampled_from(SUBSTITUTES), st.none()),
    )  # fmt: skip
    return st.lists(step, min_size=1, max_size=3)


def make(directory: Path) -> None:
    """The undamaged checkpoint that `apply` starts from."""
    tensors = {f"w.{i}": torch.arange(8 * (i + 1), dtype=torch.float32).view(-1, 4) for i in range(3)}
    tensors |= {"b": torch.ones(5, dtype=torch.bfloat16), "s": torch.tensor(1.0), "z": torch.empty(0, 3)}
    save_checkpoint(directory, tensors, shards=2, config={"model_type": "test", "text_config": {"a": [1, 2]}})
    (directory / "modules.json").write_text('[{"idx": 0, "name": "0", "path": "", "type": "x.Transformer"}]')
    (directory / "tokenizer.json").write_text("{}")


def apply(directory: Path, steps: list[Step]) -> None:
    """Make a fresh sample in `directory`, which must not exist, and damage it."""
    make(directory)
    damage(directory, steps)


def damage(directory: Path, steps: list[Step]) -> None:
    """Carry the steps out on any checkpoint of two shards; steps on files that are not there change nothing."""
    for kind, name, first, second in steps:
        path = directory / name
        if kind == "replace":
            _replace(path, first)
        elif path.is_file() and not path.is_symlink():
            path.write_bytes(_damaged(path.read_bytes(), kind, first, second))


def probe(directory: Path, destination: Path) -> int:
    """Open, read every tile, and do all else that reads a checkpoint; the number of tensors. InputError if refused."""
    checkpoint = Checkpoint.open(directory)
    for name, info in checkpoint.tensors.items():
        for rows in checkpoint.tiles(name, max_bytes=64):
            checkpoint.read(name, rows).clone()
        assert checkpoint.read(name).shape == info.shape
    fingerprint(checkpoint)
    source_state(checkpoint)
    copy_side_files(checkpoint, destination)
    return len(checkpoint.tensors)


def _replace(path: Path, what: str) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
    if what == "outside":
        outside = path.parent.parent / f"outside-{path.name}"
        outside.write_bytes(b"{}")
        path.symlink_to(outside)
    elif what == "loop":
        path.symlink_to(path)
    elif what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "lfs":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def _damaged(content: bytes, kind: str, first: Any, second: Any) -> bytes:
    if kind == "length":
        return first.to_bytes(8, "little") + content[8:]
    if kind == "overwrite":
        position = int(first * len(content))
        return content[:position] + second + content[position + len(second) :]
    if kind == "truncate":
        return content[: int(first * len(content))]
    if kind == "extend":
        return content + first
    if kind == "text":
        return first.encode("utf-8", "surrogatepass")
    if kind == "header":
        header = first.encode("utf-8", "surrogatepass")
        return len(header).to_bytes(8, "little") + header + _data(content)
    return _edited(content, kind, first, second)


def _data(content: bytes) -> bytes:
    return content[8 + int.from_bytes(content[:8], "little") :]


def _edited(content: bytes, kind: str, first: Any, second: Any) -> bytes:
    """The content with its JSON edited; as it was, if an earlier step made it unreadable."""
    text = content if kind == "index" else content[8 : len(content) - len(_data(content))]
    try:
        value = json.loads(text)
        entries = [name for name in value if name != "__metadata__"]
        if kind == "index":
            value["weight_map"][first] = second
        elif kind == "field":
            value[entries[-1]][first] = second
        elif kind == "shift":
            offsets = value[entries[0]]["data_offsets"]
            value[entries[0]]["data_offsets"] = [offsets[0] + first, offsets[1] + second]
        else:
            value[first] = second
        edited = json.dumps(value).encode()
    except (ValueError, TypeError, KeyError, IndexError, RecursionError, AttributeError):
        return content
    return edited if kind == "index" else len(edited).to_bytes(8, "little") + edited + _data(content)
