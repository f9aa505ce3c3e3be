"""The two name spaces: a bijection, checked against what ``from_pretrained`` really loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from slimwright.checkpoint import Checkpoint
from slimwright.errors import InputError
from slimwright.model.discover import discover
from slimwright.model.names import name_map
from slimwright.model.skeleton import skeleton
from slimwright.model.structure import Structure
from tests.families import FAMILIES, build, cached
from tests.model.expected import EXPECTED

every_family = pytest.mark.parametrize("name", sorted(FAMILIES))


def _skeleton(checkpoint: Checkpoint) -> torch.nn.Module:
    return skeleton(checkpoint.config, checkpoint.model_path, checkpoint.tensors)


@every_family
def test_bijection(name: str) -> None:
    checkpoint = Checkpoint.open(cached(name))
    model = _skeleton(checkpoint)
    names = name_map(model, checkpoint.tensors)
    names.check()
    assert not names.unexpected and not names.stored_twice
    assert names.targets.keys() == checkpoint.tensors.keys()
    places = [(target.name, target.expert) for target in names.targets.values()]
    assert len(set(places)) == len(places)
    for parameter in {target.name for target in names.targets.values() if target.how == "expert"}:
        experts, _, counts = zip(*(place for owner, place in places if owner == parameter and place), strict=True)
        assert len(experts) == (max(experts) + 1) * counts[0] and set(counts) == {counts[0]}
    converted = {target.name for target in names.targets.values() if target.how == "converted"}
    filled = {target.name for target in names.targets.values()} | names.ties.keys()
    unfilled = model.state_dict().keys() - filled
    assert filled <= model.state_dict().keys()
    assert not unfilled or converted  # one tensor on disk can become several parameters
    assert names.ties == {tied: names.to_module.get(owner, owner) for tied, owner in EXPECTED[name].ties.items()}
    assert any(disk != module for disk, module in names.to_module.items()) == EXPECTED[name].renamed


@every_family
def test_names_lead_to_the_values_that_transformers_loads(name: str) -> None:
    checkpoint = Checkpoint.open(cached(name))
    names = name_map(_skeleton(checkpoint), checkpoint.tensors)
    loaded = FAMILIES[name].model_class.from_pretrained(cached(name)).state_dict()
    for disk, target in names.targets.items():
        if target.how == "converted":
            continue
        value = loaded[target.name]
        if target.expert is not None:
            expert, position, count = target.expert
            value = value[expert].chunk(count, dim=0)[position]
        assert torch.equal(value, checkpoint.read(disk)), disk
    for tied, owner in names.ties.items():
        assert torch.equal(loaded[tied], loaded[owner])


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2", "bert", "albert"])
def test_base_model_takes_the_checkpoint_of_a_model_with_a_head(name: str) -> None:
    """AutoModel drops the base model's prefix; the head's tensors are not used."""
    checkpoint = Checkpoint.open(cached(name))
    with torch.device("meta"):
        config = FAMILIES[name].config()
        options = {"add_pooling_layer": False} if name in ("bert", "albert") else {}
        base = AutoModel.from_config(config, **options)
    names = name_map(base, checkpoint.tensors)
    names.check()
    heads = {"lm_head", "cls", "predictions"}
    assert set(names.unexpected) == {disk for disk in checkpoint.tensors if disk.split(".")[0] in heads}
    full = name_map(_skeleton(checkpoint), checkpoint.tensors)
    prefix = FAMILIES[name].model_class.base_model_prefix + "."
    assert {d: prefix + t.name for d, t in names.targets.items()} == {
        d: t.name for d, t in full.targets.items() if d not in names.unexpected
    }


@pytest.mark.parametrize(("name", "head"), [("llama_tied", "LlamaForCausalLM"), ("bert", "BertForTokenClassification")])
def test_model_with_a_head_takes_the_names_of_a_base_model(name: str, head: str, tmp_path: Path) -> None:
    tensors = {
        disk.partition(".")[2]: value
        for disk, value in load_file(cached(name) / "model.safetensors").items()
        if not disk.startswith("cls.")
    }
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((cached(name) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": [head]}))
    checkpoint = Checkpoint.open(tmp_path)
    names = name_map(_skeleton(checkpoint), checkpoint.tensors)
    assert not names.unexpected
    prefix = "model." if name == "llama_tied" else "bert."
    assert names.to_module == {disk: prefix + disk for disk in tensors}
    assert set(names.missing) == (set() if name == "llama_tied" else {"classifier.weight", "classifier.bias"})


def _changed(name: str, directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Checkpoint:
    """A family's checkpoint with its tensors changed."""
    shutil.copytree(cached(name), directory, dirs_exist_ok=True)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    return Checkpoint.open(directory)


def test_missing_parameters_are_refused_by_name(tmp_path: Path) -> None:
    checkpoint = _changed("llama", tmp_path, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(InputError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        discover(checkpoint)


def test_missing_expert_is_refused(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.experts\.gate_up_proj"):
        discover(_changed("qwen3_moe", tmp_path, lambda tensors: tensors.pop(name)))


def test_missing_tie_partner_is_not_missing(structure_of: Callable[[str], Structure]) -> None:
    assert structure_of("qwen2").ties == {"lm_head.weight": "model.embed_tokens.weight"}


def test_wrong_shapes_are_refused_by_name(tmp_path: Path) -> None:
    def shrink(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = torch.ones(63)

    with pytest.raises(InputError, match=r"'model\.norm\.weight' has shape \[63\].*\[64\]"):
        discover(_changed("llama", tmp_path, shrink))


def test_unused_tensors_are_kept(tmp_path: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.7.mlp.up_proj.weight"] = torch.ones(128, 64)
        tensors["some.buffer"] = torch.ones(3, dtype=torch.int64)

    structure = discover(_changed("llama", tmp_path, add))
    assert structure.kept["model.layers.7.mlp.up_proj.weight"] == "not used by the architecture"
    assert structure.kept["some.buffer"] == "not used by the architecture"
    assert structure.parameters == discover(Checkpoint.open(cached("llama"))).parameters


def test_tie_whose_only_copy_is_the_head(tmp_path: Path) -> None:
    """transformers ties to whichever of the two is stored."""

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    structure = discover(_changed("qwen2", tmp_path, swap))
    assert structure.ties == {"model.embed_tokens.weight": "lm_head.weight"}
    assert "lm_head.weight" in structure.sites


def test_tie_stored_twice_with_equal_values(tmp_path: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    structure = discover(_changed("qwen2", tmp_path, add))
    assert structure.kept["lm_head.weight"] == "tied to model.embed_tokens.weight"
    assert structure.ties == {"lm_head.weight": "model.embed_tokens.weight"}
    assert structure.parameters == discover(Checkpoint.open(cached("qwen2"))).parameters


@pytest.mark.parametrize("name", ["qwen2", "flan_t5"])
def test_declared_tie_with_other_values_is_none(name: str, tmp_path: Path) -> None:
    """Flan-T5 stores a head of its own under a config that ties: transformers keeps both, and so do we."""

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = torch.randn(320, 64, generator=torch.Generator().manual_seed(1))

    checkpoint = _changed(name, tmp_path, add)
    structure = discover(checkpoint)
    assert structure.sites["lm_head.weight"].role == "head"
    assert "lm_head.weight" not in structure.ties
    model = FAMILIES[name].model_class.from_pretrained(tmp_path)
    assert torch.equal(model.lm_head.weight, checkpoint.read("lm_head.weight"))
    assert structure.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_sharded_checkpoint_maps_the_same(tmp_path: Path) -> None:
    from tests.families import make

    make("mixtral").save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert discover(Checkpoint.open(tmp_path)).sites == discover(Checkpoint.open(cached("mixtral"))).sites


def test_families_are_built_the_same_for_the_same_seed(tmp_path: Path) -> None:
    first = (build("qwen3", tmp_path / "a") / "model.safetensors").read_bytes()
    assert first == (build("qwen3", tmp_path / "b") / "model.safetensors").read_bytes()
    assert first != (build("qwen3", tmp_path / "c", seed=1) / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", sorted(name for name, expected in EXPECTED.items() if expected.renamed))
def test_checkpoint_stored_under_module_names(name: str, tmp_path: Path) -> None:
    """As written with ``save_original_format=False``: names that a renaming must not touch again."""
    from tests.families import make

    make(name).save_pretrained(tmp_path, save_original_format=False)
    checkpoint = Checkpoint.open(tmp_path)
    names = name_map(_skeleton(checkpoint), checkpoint.tensors)
    names.check()
    assert not names.unexpected
    loaded = FAMILIES[name].model_class.from_pretrained(tmp_path).state_dict()
    for disk, target in names.targets.items():
        assert target.how == "plain" and torch.equal(loaded[target.name], checkpoint.read(disk)), disk
