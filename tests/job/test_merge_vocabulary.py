"""Vocabularies aligned by token string, against a merge computed token by token with dictionaries."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import slimwright
from slimwright.errors import InputError
from tests.checkpoint.samples import save_checkpoint

WIDTH = 8


def write(
    directory: Path, vocabulary: Mapping[str, int], added: Mapping[str, int], seed: int, rows: int
) -> dict[str, Any]:
    """A model with a tokenizer, an embedding and a head of ``rows`` rows, and one layer; returns its tensors."""
    generator = torch.Generator().manual_seed(seed)
    content = {
        "model.embed_tokens.weight": torch.randn(rows, WIDTH, generator=generator),
        "lm_head.weight": torch.randn(rows, WIDTH, generator=generator),
        "model.layers.0.w": torch.randn(4, WIDTH, generator=generator),
    }
    save_checkpoint(directory, content, config={"model_type": "test", "vocab_size": rows})
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": number, "content": token, "special": True} for token, number in added.items()],
        "model": {"type": "BPE", "vocab": dict(vocabulary), "merges": []},
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": f"{{{{ template {seed} }}}}"}))
    return content


@pytest.fixture
def models(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """A base; the same tokens in another order and one more; fewer tokens. All with rows behind the last token."""
    base = {"a": 0, "b": 1, "c": 2, "d": 3}
    return {
        "base": {"vocabulary": {**base, "<s>": 4}, **{"tensors": write(tmp_path / "base", base, {"<s>": 4}, 0, 6)}},
        "more": {
            "vocabulary": {"d": 0, "a": 1, "c": 2, "b": 3, "x": 4, "<s>": 5, "<t>": 6},
            "tensors": write(tmp_path / "more", {"d": 0, "a": 1, "c": 2, "b": 3, "x": 4}, {"<s>": 5, "<t>": 6}, 1, 8),
        },
        "less": {"vocabulary": {"a": 0, "c": 1}, "tensors": write(tmp_path / "less", {"a": 0, "c": 1}, {}, 2, 2)},
    }


def expected_row(
    models: Mapping[str, Any], names: list[str], tensor: str, token: str, base: str | None
) -> dict[str, Tensor]:
    """Each model's row for a token: its own, or what it is lent."""
    own = {
        name: models[name]["tensors"][tensor][models[name]["vocabulary"][token]]
        for name in names if token in models[name]["vocabulary"]
    }  # fmt: skip
    if base in own and len(own) > 1:
        lent = own[base]
    else:
        lent = torch.stack(list(own.values())).mean(0) if own else torch.zeros(WIDTH)
    return {name: own.get(name, lent) for name in names}


def run(tmp_path: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    slimwright.merge(config, tmp_path / "out", quiet=True)
    return load_file(tmp_path / "out" / "model.safetensors")


@pytest.mark.parametrize("tensor", ["model.embed_tokens.weight", "lm_head.weight"])
def test_rows_are_matched_by_token(models: dict[str, dict[str, Any]], tmp_path: Path, tensor: str) -> None:
    paths = {name: str(tmp_path / name) for name in models}
    config = {"method": "linear", "models": [paths["base"], paths["more"], paths["less"]]}
    found = run(tmp_path, config)
    assert found[tensor].shape == (6, WIDTH)  # the first model's table, its spare row included
    for token, number in models["base"]["vocabulary"].items():
        rows = expected_row(models, ["base", "more", "less"], tensor, token, None)
        assert torch.allclose(found[tensor][number], torch.stack(list(rows.values())).mean(0), atol=1e-6), token
    assert torch.allclose(found[tensor][5], models["base"]["tensors"][tensor][5], atol=1e-6)
    plain = torch.stack([models[name]["tensors"]["model.layers.0.w"] for name in models]).mean(0)
    assert torch.allclose(found["model.layers.0.w"], plain, atol=1e-6)


def test_task_vectors_of_missing_tokens_are_zero(models: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    config = {
        "method": "task_arithmetic,lambda=1", "base": str(tmp_path / "base"),
        "models": [str(tmp_path / "more"), str(tmp_path / "less")],
    }  # fmt: skip
    found = run(tmp_path, config)["model.embed_tokens.weight"]
    base = models["base"]["tensors"]["model.embed_tokens.weight"]
    more = models["more"]["tensors"]["model.embed_tokens.weight"]
    assert torch.allclose(found[1], more[3], atol=1e-6)  # "b": only the model with more tokens has a task vector
    assert torch.allclose(found[4], more[5], atol=1e-6)
    assert torch.allclose(found[5], base[5], atol=1e-6)


def test_a_union_in_mergekits_form(models: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    names = ["base", "more", "less"]
    config = {
        "merge_method": "linear", "parameters": {"weight": 1.0},
        "models": [{"model": str(tmp_path / name)} for name in names],
        "tokenizer": {"source": "union", "pad_to_multiple_of": 4, "tokens": {
            "x": {"source": {"kind": "zero"}, "force": True},
            "new": {"source": {"kind": "model_token", "model": str(tmp_path / "base"), "token": "a"}},
        }},
        "chat_template": "auto",
    }  # fmt: skip
    found = run(tmp_path, config)["model.embed_tokens.weight"]
    tokenizer = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    numbers = {**tokenizer["model"]["vocab"], **{t["content"]: t["id"] for t in tokenizer["added_tokens"]}}
    assert numbers == {"a": 0, "b": 1, "c": 2, "d": 3, "<s>": 4, "x": 5, "<t>": 6, "new": 7}
    assert found.shape == (8, WIDTH)
    for token in ("a", "b", "c", "d", "<s>", "<t>"):
        rows = expected_row(models, names, "model.embed_tokens.weight", token, None)
        assert torch.allclose(found[numbers[token]], torch.stack(list(rows.values())).mean(0), atol=1e-6), token
    assert not found[numbers["x"]].any()
    assert torch.allclose(found[7], models["base"]["tensors"]["model.embed_tokens.weight"][0], atol=1e-6)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 8
    assert "template" in (tmp_path / "out" / "chat_template.jinja").read_text()


def test_equal_vocabularies_are_left_alone(models: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """No alignment where there is nothing to align: the rows are those of the tables, spare ones too."""
    write(tmp_path / "same", {"a": 0, "b": 1, "c": 2, "d": 3}, {"<s>": 4}, 5, 6)
    content = load_file(tmp_path / "same" / "model.safetensors")
    found = run(tmp_path, {"method": "linear", "models": [str(tmp_path / "base"), str(tmp_path / "same")]})
    for name, tensor in found.items():
        assert torch.allclose(tensor, (models["base"]["tensors"][name] + content[name]) / 2, atol=1e-6)


def test_what_cannot_be_aligned_is_refused(models: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    config = {
        "merge_method": "linear",
        "parameters": {"weight": 1},
        "models": [str(tmp_path / "base"), str(tmp_path / "more")],
    }
    with pytest.raises(InputError, match="set tokenizer_source"):
        run(tmp_path, config)
    (tmp_path / "more" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"has no tokenizer\.json"):
        run(tmp_path, {**config, "tokenizer_source": "base"})
    with pytest.raises(InputError, match="chat template 'alpaca2' is not known"):
        run(tmp_path, {"method": "linear", "models": [str(tmp_path / "base")], "chat_template": "alpaca2"})
