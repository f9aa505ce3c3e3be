"""Configs that nobody vetted: refused in one sentence, quickly."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slimwright.checkpoint import Checkpoint
from slimwright.errors import InputError
from slimwright.model.discover import discover
from slimwright.model.skeleton import skeleton
from tests.families import FAMILIES, cached


def _config(name: str, **changes: Any) -> dict[str, Any]:
    return {**json.loads((cached(name) / "config.json").read_text()), **changes}


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_skeleton_has_the_class_and_no_data(name: str) -> None:
    model = skeleton(_config(name))
    assert type(model) is FAMILIES[name].model_class
    assert not model.training
    # Tables that some families compute when they are made have values, but no weight has.
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "no_such_type"}, "does not know the model type 'no_such_type'"),
        ({"model_type": None}, "no model_type"),
        ({"model_type": ["llama"]}, "no model_type"),
        ({"architectures": ["NoSuchForCausalLM"]}, "does not know the architecture 'NoSuchForCausalLM'"),
        ({"architectures": ["os.system"]}, "does not know the architecture 'os.system'"),
        ({"architectures": ["BertForMaskedLM"]}, "does not belong to the model type 'llama'"),
        ({"architectures": "LlamaForCausalLM"}, "must be a list"),
        ({"architectures": [1]}, "must be a list"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"num_hidden_layers": -(10**9)}, "num_hidden_layers"),
        ({"num_hidden_layers": "many"}, "cannot build"),
        ({"hidden_size": -64}, "cannot build"),
        ({"hidden_size": 10**18}, "cannot build"),
        ({"hidden_size": 10**30}, "hidden_size"),
        ({"num_attention_heads": 0}, "cannot build"),
        ({"num_attention_heads": 10**12}, "num_attention_heads"),
        ({"max_position_embeddings": 10**12}, "max_position_embeddings"),
        ({"rope_parameters": {"rope_type": "no_such_rope", "rope_theta": 1.0}}, "cannot build"),
        ({"hidden_act": "no_such_activation"}, "cannot build"),
        ({"dtype": "no_such_dtype"}, "cannot build"),
        ({"id2label": {str(i): "x" for i in range(3)}, "num_labels": 10**9}, "num_labels"),
    ],
)
def test_bad_configs_are_refused(changes: dict[str, Any], message: str) -> None:
    started = time.monotonic()
    with pytest.raises(InputError, match=message) as caught:
        skeleton(_config("llama", **changes))
    assert time.monotonic() - started < 20  # no loop over what the config claims
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_a_number_for_each_layer_is_no_number_of_layers() -> None:
    """Granite has ``layer_rope_theta``."""
    assert skeleton(_config("llama", layer_rope_theta=[10_000.0, 1e6])) is not None


def test_groups_of_convolutions_are_no_layers() -> None:
    """Moshi's codec has 512; ALBERT makes a module for each of its hidden groups."""
    assert skeleton(_config("llama", upsample_groups=512)) is not None
    checkpoint = Checkpoint.open(cached("albert"))
    checkpoint.config["num_hidden_groups"] = 512
    with pytest.raises(InputError, match="num_hidden_groups is 512, more than this checkpoint can hold"):
        discover(checkpoint)


def test_deep_nesting_is_refused() -> None:
    nested: dict[str, Any] = {}
    for _ in range(5000):
        nested = {"x": nested}
    with pytest.raises(InputError, match="nested too deeply"):
        skeleton(_config("llama", extra=nested))


def test_more_layers_than_tensors_are_refused() -> None:
    """Fewer than any bound, but the checkpoint has no tensors for them."""
    checkpoint = Checkpoint.open(cached("llama"))
    checkpoint.config["num_hidden_layers"] = 40
    with pytest.raises(InputError, match=r"lacks model\.layers\.2\."):
        discover(checkpoint)


def test_more_modules_than_tensors_can_be_for_are_refused() -> None:
    """Whatever the key is called: ALBERT makes this many whole layers."""
    checkpoint = Checkpoint.open(cached("albert"))
    checkpoint.config["inner_group_num"] = 10**6
    started = time.monotonic()
    with pytest.raises(InputError, match="more than 5888 modules for a checkpoint of 28 tensors"):
        discover(checkpoint)
    assert time.monotonic() - started < 20


def test_code_of_the_checkpoint_is_not_run_unasked(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    auto_map = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilForCausalLM"}
    unknown = _config("llama", model_type="evil", architectures=["EvilForCausalLM"], auto_map=auto_map)
    known = _config("llama", architectures=["EvilForCausalLM"], auto_map=auto_map)
    for config in (unknown, known):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match="--trust-remote-code"):
            skeleton(config, tmp_path)
    assert not (tmp_path / "ran").exists()


def test_code_of_the_checkpoint_runs_when_trusted(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    config = _config("llama", model_type="own_llama", architectures=["OwnForCausalLM"], auto_map=auto_map)
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = skeleton(config, tmp_path, trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM"
    assert all(parameter.is_meta for parameter in model.parameters())


def test_own_map_of_a_known_class_is_not_needed() -> None:
    """Many checkpoints carry code from before their class was in transformers: the library's class is used."""
    config = _config("llama", auto_map={"AutoModelForCausalLM": "modeling.LlamaForCausalLM"})
    assert type(skeleton(config)) is FAMILIES["llama"].model_class


@pytest.mark.parametrize(("name", "expected"), [("llama", "LlamaForCausalLM"), ("bert", "BertForMaskedLM")])
def test_without_architectures_the_default_class_is_taken(name: str, expected: str) -> None:
    config = _config(name)
    del config["architectures"]
    assert type(skeleton(config)).__name__ == expected


def test_without_architectures_the_class_fits_the_tensors() -> None:
    checkpoint = Checkpoint.open(cached("bert"))
    del checkpoint.config["architectures"]
    assert discover(checkpoint).architecture == "BertForMaskedLM"
    for name in [name for name in checkpoint.tensors if name.startswith("cls.")]:
        del checkpoint.tensors[name]
    with pytest.raises(InputError, match="add `architectures`"):  # nor is there a pooler for the base model
        discover(checkpoint)
    pooler = {"bert.pooler.dense.weight": "bert.encoder.layer.0.attention.self.query.weight"}
    pooler["bert.pooler.dense.bias"] = "bert.encoder.layer.0.attention.self.query.bias"
    checkpoint.tensors |= {name: checkpoint.tensors[like] for name, like in pooler.items()}
    assert discover(checkpoint).architecture == "BertModel"


def test_class_registered_in_this_process() -> None:
    model = skeleton(_config("home_made"))
    assert type(model) is FAMILIES["home_made"].model_class


_JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(-2, 10**9), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@pytest.mark.parametrize("name", ["llama", "mixtral", "bert", "t5", "swin"])
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_any_change_of_a_config_is_read_or_refused(name: str, data: st.DataObject) -> None:
    config = _config(name)
    key = data.draw(st.sampled_from(sorted(config)))
    config[key] = data.draw(_JUNK)
    checkpoint = Checkpoint.open(cached(name))
    checkpoint.config = config
    try:
        structure = discover(checkpoint)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert structure.sites


def test_building_uses_no_memory() -> None:
    """A 70B shape exists on the meta device only."""
    config = _config(
        "llama",
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
    )
    model = skeleton(config)
    assert sum(parameter.numel() for parameter in model.parameters()) > 70e9
    assert {parameter.device for parameter in model.parameters()} == {torch.device("meta")}
