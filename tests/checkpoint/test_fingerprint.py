"""Fingerprints: equal for equal weights however they are stored, different for different ones."""

import hashlib
import os
from pathlib import Path

import pytest
import torch

from slimwright.checkpoint import Checkpoint, Lineage, fingerprint, source_state, weights_hash
from slimwright.errors import InputError

from .samples import sample_tensors, save_checkpoint


def test_a_fingerprint_is_of_the_weights(tmp_path: Path) -> None:
    tensors = sample_tensors() | {"large": torch.randn(700, 1000)}
    original = fingerprint(Checkpoint.open(save_checkpoint(tmp_path / "a", tensors)))
    backwards = dict(reversed(tensors.items()))
    again = save_checkpoint(tmp_path / "b", backwards, shards=3, config={"other": 1})
    assert fingerprint(Checkpoint.open(again)) == original
    changes = {
        "a value of a small tensor": {"odd": torch.zeros(7, dtype=torch.uint8)},
        "all values of a large one": {"large": tensors["large"] * 1.001},
        "its first": {"large": torch.cat([torch.zeros(1, 1000), tensors["large"][1:]])},
        "its last": {"large": torch.cat([tensors["large"][:-1], torch.zeros(1, 1000)])},
        "a shape": {"odd": tensors["odd"].view(7, 1)},
        "a dtype": {"odd": tensors["odd"].view(torch.int8)},
        "one more": {"more": torch.ones(1)},
    }
    for number, (what, change) in enumerate(changes.items()):
        other = Checkpoint.open(save_checkpoint(tmp_path / str(number), tensors | change))
        assert fingerprint(other) != original, what


def test_the_hash_of_the_files(tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path, sample_tensors(), shards=3)
    content = b"".join((model / f"model-{i:05d}-of-00003.safetensors").read_bytes() for i in (1, 2, 3))
    assert weights_hash(model) == hashlib.sha256(content).hexdigest()


def test_the_state_changes_with_the_files(tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path, sample_tensors())
    state = source_state(Checkpoint.open(model))
    assert source_state(Checkpoint.open(model)) == state
    os.utime(model / "model.safetensors", ns=(1, 1))
    touched = source_state(Checkpoint.open(model))
    (model / "config.json").write_text('{"model_type": "other"}')
    assert len({state, touched, source_state(Checkpoint.open(model))}) == 3


def test_lineage_says_what_was_done_since_an_ancestor() -> None:
    base = Lineage("base")
    dropped = Lineage("dropped", (base,), ({"drop": "layers.3"},))
    merged = Lineage("merged", (Lineage("stranger"), dropped), ({"merge": "linear"}, {"quantize": "int4"}))
    assert Lineage.from_json(merged.to_json()) == merged
    assert merged.edits_since("base") == ({"drop": "layers.3"}, {"merge": "linear"}, {"quantize": "int4"})
    assert merged.edits_since("merged") == () and merged.edits_since("nobody") is None
    deep: object = base.to_json()
    for _ in range(5000):
        deep = {"fingerprint": "x", "parents": [deep]}
    for wrong in (None, [], {}, {"fingerprint": 1}, {"fingerprint": "a", "edits": [1]}, deep):
        with pytest.raises(InputError):
            Lineage.from_json(wrong)
