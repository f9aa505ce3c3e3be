"""What transformers would do in silence must raise or be right (RUNTIME §1, every row of its table)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    BertModel,
    LlamaForCausalLM,
)

import slimwright
from slimwright.errors import InputError
from slimwright.model.inputs import dummy_inputs
from slimwright.runtime.modules import PackedEmbedding, PackedLinear, TiedEmbedding, TiedHead
from tests.runtime.packing import edit_config, pack, packed_family

UP = "model.layers.0.mlp.up_proj.weight"


def spoil(name: str, out: Path, edit: Callable[[dict[str, Tensor]], Any]) -> Path:
    """A copy of a packed family whose tensors were changed."""
    shutil.copytree(packed_family(name).directory, out)
    tensors = load_file(out / "model.safetensors")
    edit(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a fresh process."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300, check=False
    )


# -- the import ----------------------------------------------------------------------------------------------------


def test_forgotten_import_stops() -> None:
    """Without slimwright every packed payload has another shape than the dense weight: transformers raises."""
    code = """
import sys, transformers
transformers.utils.logging.set_verbosity_error()
for directory in sys.argv[1:]:
    try:
        transformers.AutoModel.from_pretrained(directory)
    except Exception as error:
        print(type(error).__name__, "mismatch" in str(error) or "shape" in str(error) or "size" in str(error))
    else:
        print("loaded")
assert "slimwright" not in sys.modules
"""
    names = ("llama", "llama_tied", "gpt2", "bert", "t5", "mixtral", "gpt_oss")
    done = run(code, *(str(packed_family(name).directory) for name in names))
    assert done.stdout.splitlines() == ["RuntimeError True"] * len(names), done.stdout + done.stderr[-2000:]


def test_import_is_cheap_and_registers_when_transformers_comes() -> None:
    code = """
import sys
import slimwright
assert "transformers" not in sys.modules and "torch" not in sys.modules
import transformers
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model.model.layers[0].mlp.up_proj).__name__)
import transformers.quantizers.auto as table
assert table.__spec__.loader is table.__loader__ and table.AUTO_QUANTIZER_MAPPING["slimwright"]
"""
    done = run(code, str(packed_family("llama").directory))
    assert done.stdout.strip() == "PackedLinear", done.stderr[-2000:]


def test_import_after_transformers_registers_too() -> None:
    code = """
import sys
from transformers import AutoModelForCausalLM, AutoConfig
import transformers.modeling_utils
import slimwright
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1]).lm_head).__name__)
"""
    done = run(code, str(packed_family("llama_tied").directory))
    assert done.stdout.strip() == "TiedHead", done.stderr[-2000:]


# -- the files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "lost"),
    [
        ("llama", UP),
        ("llama", UP + "_scale"),
        ("llama", "model.norm.weight"),
        ("llama", "lm_head.weight"),
        ("llama_tied", "model.embed_tokens.weight"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.2.w3.weight"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.0.w2.weight"),
        ("mixtral", "model.layers.0.block_sparse_moe.gate.weight"),
        ("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj"),
        ("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj_bias"),
        ("bert", "bert.encoder.layer.0.output.dense.bias"),
        ("t5", "shared.weight"),
    ],
)
def test_missing_tensor(family: str, lost: str, tmp_path: Path) -> None:
    directory = spoil(family, tmp_path / "m", lambda tensors: tensors.pop(lost))
    name = lost.removesuffix("_scale").rpartition(".")[0].split(".")[-1]
    with pytest.raises(InputError, match=name):
        AutoModelForCausalLM.from_pretrained(directory) if family not in ("bert", "t5") else slimwright.load(directory)


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (UP, lambda t: t[:-1]),
        (UP, lambda t: t.squeeze(-1)),
        (UP, lambda t: t.to(torch.int8)),
        (UP + "_scale", lambda t: t.float()),
        (UP + "_scale", lambda t: t.repeat(1, 2)),
        (NORM, lambda t: t[:32]),
        (NORM, lambda t: t.int()),
    ],
    ids=["rows", "dimensions", "dtype", "scale dtype", "scale shape", "dense shape", "dense dtype"],
)
def test_misshapen_tensor(name: str, change: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    directory = spoil("llama", tmp_path / "m", lambda t: t.update({name: change(t[name]).contiguous()}))
    with pytest.raises(InputError, match=f"'{name}'"):
        AutoModelForCausalLM.from_pretrained(directory, ignore_mismatched_sizes=True)


def test_unknown_tensor(tmp_path: Path) -> None:
    directory = spoil("llama", tmp_path / "m", lambda t: t.update({"model.layers.0.extra.weight": torch.ones(2)}))
    with pytest.raises(InputError, match=r"model\.layers\.0\.extra\.weight"):
        AutoModelForCausalLM.from_pretrained(directory)
    with pytest.raises(InputError, match=r"model\.layers\.0\.extra\.weight"):
        AutoModel.from_pretrained(directory)


def test_packed_tensor_that_the_plan_does_not_name(tmp_path: Path) -> None:
    directory = tmp_path / "m"
    shutil.copytree(packed_family("llama").directory, directory)

    def forget(config: dict[str, Any]) -> None:
        for names in config["quantization_config"]["grids"].values():
            if UP in names:
                names.remove(UP)

    edit_config(directory, forget)
    with pytest.raises(InputError, match="up_proj"):
        AutoModelForCausalLM.from_pretrained(directory)


def test_planned_weight_that_lies_dense(tmp_path: Path) -> None:
    dense = load_file(packed_family("llama").dense / "model.safetensors")[UP]
    directory = spoil("llama", tmp_path / "m", lambda t: t.update({UP: dense}))
    with pytest.raises(InputError, match="up_proj"):
        AutoModelForCausalLM.from_pretrained(directory)


def test_truncated_file(tmp_path: Path) -> None:
    directory = spoil("llama", tmp_path / "m", lambda t: None)
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    for load in (AutoModelForCausalLM.from_pretrained, slimwright.load):
        with pytest.raises(InputError):
            load(directory)


def test_newer_format_and_damaged_config(tmp_path: Path) -> None:
    directory = tmp_path / "m"
    shutil.copytree(packed_family("llama").directory, directory)
    edit_config(directory, lambda config: config["quantization_config"].update(format_version=99))
    with pytest.raises(InputError, match="99"):
        AutoModelForCausalLM.from_pretrained(directory)
    edit_config(directory, lambda config: config["quantization_config"].update(format_version=1, grids={"int99": [UP]}))
    with pytest.raises(InputError):
        AutoModelForCausalLM.from_pretrained(directory)


def test_state_dict_instead_of_files() -> None:
    packed = packed_family("llama")
    config = LlamaForCausalLM.config_class.from_pretrained(packed.directory)
    with pytest.raises(InputError, match="directory"):
        LlamaForCausalLM.from_pretrained(
            None, config=config, state_dict=load_file(packed.directory / "model.safetensors")
        )


def test_llama4_like_experts_are_refused(tmp_path: Path) -> None:
    """A plan that names something which is no linear, embedding or experts cannot be packed."""
    directory = tmp_path / "m"
    shutil.copytree(packed_family("llama").directory, directory)

    def name_a_norm(config: dict[str, Any]) -> None:
        config["quantization_config"]["grids"]["int8:row"] = ["model.norm.weight"]
        config["quantization_config"]["dense"]["bfloat16:1x64"] = ["model.norm.weight"]

    edit_config(directory, name_a_norm)
    with pytest.raises(InputError, match=r"model\.norm\.weight"):
        AutoModelForCausalLM.from_pretrained(directory)


# -- heads ---------------------------------------------------------------------------------------------------------


def test_new_head_is_transformers_own_business() -> None:
    """Another task's head is not in the checkpoint: transformers makes it and says so; the trunk is whole."""
    packed = packed_family("llama")
    model, info = AutoModelForSequenceClassification.from_pretrained(
        packed.directory, num_labels=3, output_loading_info=True
    )
    assert info["missing_keys"] == {"score.weight"}
    assert isinstance(model.model.layers[0].mlp.up_proj, PackedLinear)


def test_trunk_of_another_class_must_be_whole(tmp_path: Path) -> None:
    directory = spoil("llama", tmp_path / "m", lambda t: t.pop("model.layers.1.input_layernorm.weight"))
    with pytest.raises(InputError, match="input_layernorm"):
        AutoModelForSequenceClassification.from_pretrained(directory)
    bert = spoil("bert", tmp_path / "b", lambda t: t.pop("bert.embeddings.LayerNorm.weight"))
    with pytest.raises(InputError, match=r"embeddings\.LayerNorm\.weight"):
        BertModel.from_pretrained(bert)


# -- dtypes, ties, names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_model_dtype_is_not_that_of_the_scales(dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(packed_family("llama").directory, dtype=dtype)
    assert model.dtype == dtype and model.config.dtype == dtype
    assert model.model.layers[0].mlp.up_proj.weight_scale.dtype == torch.float16
    assert all(p.is_floating_point() == p.requires_grad for p in model.parameters())
    assert model(torch.arange(9)[None]).logits.dtype == dtype


def test_casting_leaves_parts_as_they_are() -> None:
    model = AutoModelForCausalLM.from_pretrained(packed_family("llama_tied").directory, dtype=torch.float32)
    before = {n: t.clone() for m, x in model.named_modules() if hasattr(x, "packed") for n, t in x.state_dict().items()}
    parts = {
        f"{prefix}.{name}": getattr(module, name)
        for prefix, module in model.named_modules()
        if hasattr(module, "packed")
        for name in module.part_names()
        if name != "weight"
    }
    dtypes = {name: tensor.dtype for name, tensor in parts.items()}
    assert before and torch.float16 in dtypes.values()
    model.to(torch.bfloat16)
    for name, tensor in parts.items():
        now = model.get_buffer(name)
        assert now.dtype == dtypes[name] and torch.equal(now, tensor), name
    assert model.dtype == torch.bfloat16
    logits = model(torch.arange(9)[None]).logits
    assert logits.dtype == torch.bfloat16 and torch.isfinite(logits).all()
    with pytest.raises(ValueError, match="half"):
        model.half()


def test_keep_in_fp32_reaches_packed_modules() -> None:
    """T5 keeps `wo` in float32 when it runs in float16: the packed one then says float32, its scales stay."""
    packed = packed_family("flan_t5")
    model = slimwright.load(packed.directory, dtype=torch.float16)
    wo = model.encoder.block[0].layer[1].DenseReluDense.wo
    assert wo.weight.dtype == torch.float32 and isinstance(wo, PackedLinear)
    assert all(part.dtype != torch.float32 or name.endswith("absmax_scale") or name.endswith("absmax_mean")
               for name, part in wo.named_buffers())  # fmt: skip
    plain = type(model).from_pretrained(packed.dense, dtype=torch.float16)
    inputs = dummy_inputs(plain)
    with torch.no_grad():
        a, b = model(**inputs).logits.float(), plain(**inputs).logits.float()
    assert float((a - b).norm() / b.norm()) < 1e-2


def test_ties() -> None:
    model = AutoModelForCausalLM.from_pretrained(packed_family("llama_tied").directory)
    assert isinstance(model.lm_head, TiedHead) and isinstance(model.model.embed_tokens, PackedEmbedding)
    assert not list(model.lm_head.parameters()) and "lm_head.weight" not in model.state_dict()
    assert model.all_tied_weights_keys == {}
    model.tie_weights()  # recomputes the mapping from the instance's declaration
    assert "lm_head.weight" not in model.state_dict() and isinstance(model.lm_head, TiedHead)

    t5 = slimwright.load(packed_family("t5").directory)
    assert isinstance(t5.encoder.embed_tokens, TiedEmbedding) and isinstance(t5.lm_head, TiedHead)
    t5.tie_weights()
    bert = BertForMaskedLM.from_pretrained(packed_family("bert").directory)
    head = bert.cls.predictions.decoder
    assert isinstance(head, TiedHead) and head.bias is bert.cls.predictions.bias
    bert.tie_weights()
    assert head.bias is bert.cls.predictions.bias


def test_head_stored_and_embedding_tied_to_it(tmp_path: Path) -> None:
    """The name on disk owns the tensors, also where the family declares the tie the other way round."""

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.startswith("model.embed_tokens.weight")]:
            tensors[name.replace("model.embed_tokens", "lm_head")] = tensors.pop(name)

    directory = spoil("llama_tied", tmp_path / "m", rename)
    edit_config(
        directory,
        lambda config: config.update(
            quantization_config=json.loads(
                json.dumps(config["quantization_config"]).replace("model.embed_tokens.weight", "lm_head.weight")
            )
        ),
    )
    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    assert isinstance(model.lm_head, PackedLinear) and isinstance(model.model.embed_tokens, TiedEmbedding)
    wanted = AutoModelForCausalLM.from_pretrained(packed_family("llama_tied").directory, dtype=torch.float32)
    ids = torch.arange(9)[None]
    assert torch.equal(model(ids).logits, wanted(ids).logits)
    model.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again/model.safetensors").keys() == load_file(directory / "model.safetensors").keys()


def test_dense_embedding_and_dense_head_stay_tied(tmp_path: Path) -> None:
    from tests.families import cached

    packed = pack(cached("llama_tied", torch.bfloat16), tmp_path, only=lambda site: site.role not in ("embed", "head"))
    model = AutoModelForCausalLM.from_pretrained(packed.directory)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("what", ["layer", "projection", "expert"])
def test_partly_dense_experts(what: str, tmp_path: Path) -> None:
    """Where some experts stay dense and the converter is gone, the dense ones lie under their own names too."""
    from tests.families import cached

    kept: Callable[[Any], bool] = {
        "layer": lambda site: "layers.0" in site.name,
        "projection": lambda site: ".w2." in site.name,
        "expert": lambda site: "experts.3." in site.name,
    }[what]
    packed = pack(cached("mixtral", torch.bfloat16), tmp_path, only=lambda s: s.kind == "experts" and not kept(s))
    model, info = AutoModelForCausalLM.from_pretrained(packed.directory, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    dense = AutoModelForCausalLM.from_pretrained(packed.dense, dtype=torch.float32)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        a, b = model(ids).logits, dense(ids).logits
    assert float((a - b).norm() / b.norm()) < 1e-5
    AutoModelForCausalLM.from_pretrained(packed.directory).save_pretrained(tmp_path / "again")
    before, after = (load_file(d / "model.safetensors") for d in (packed.directory, tmp_path / "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_plain_grid_keeps_its_dtype_in_a_wider_model(tmp_path: Path) -> None:
    """A float32 model with weights stored as bfloat16: they stay so in memory and on disk."""
    from tests.families import cached

    for family in ("llama_tied", "gpt2", "mixtral", "gpt_oss"):
        packed = pack(cached(family, torch.float32), tmp_path / family, ("bf16", "int4:g32"))
        model = AutoModelForCausalLM.from_pretrained(packed.directory)
        dense = AutoModelForCausalLM.from_pretrained(packed.dense)
        assert model.dtype == torch.float32
        ids = torch.arange(20)[None]
        with torch.no_grad():
            a, b = model(ids).logits, dense(ids).logits
        assert float((a - b).norm() / b.norm()) < 1e-5, family
        model.save_pretrained(tmp_path / family / "again")
        before, after = (load_file(d / "model.safetensors") for d in (packed.directory, tmp_path / family / "again"))
        assert before.keys() == after.keys()
        assert all(before[k].dtype == after[k].dtype and torch.equal(before[k], after[k]) for k in before), family


# -- load ----------------------------------------------------------------------------------------------------------


def test_load_refuses_what_is_not_ours(tmp_path: Path) -> None:
    from tests.families import cached

    with pytest.raises(InputError, match="not written by slimwright"):
        slimwright.load(cached("llama"))
    with pytest.raises(InputError):
        slimwright.load(tmp_path)
    with pytest.raises(InputError):
        slimwright.load(tmp_path / "nowhere")
