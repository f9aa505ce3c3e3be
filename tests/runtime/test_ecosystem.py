"""What people do with a loaded model: PEFT, compile, device maps, pipelines, sentence-transformers, training."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    pipeline,
)

import slimwright
from slimwright.errors import InputError
from slimwright.model.inputs import dummy_inputs
from slimwright.runtime.modules import PackedLinear, PackedModule
from tests.families import FAMILIES, cached
from tests.runtime.packing import pack, packed_family

IDS = torch.arange(5, 29)[None]


def tokenizer(words: int = 300) -> PreTrainedTokenizerFast:
    """Words w0..w299 and the special ones."""
    vocabulary = {name: index for index, name in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]"])}
    vocabulary |= {f"w{index}": index + 4 for index in range(words)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


# -- PEFT ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama_tied", ["q_proj", "up_proj", "down_proj"]),
        ("gpt2", ["c_attn", "c_fc"]),
        ("gemma3", ["v_proj", "embed_tokens"]),
        ("falcon", ["query_key_value"]),
    ],
)
def test_lora(family: str, targets: list[str], tmp_path: Path) -> None:
    """The adapter's forward and gradients are those on the dense model; merging never drops it in silence."""
    packed, cls = packed_family(family), FAMILIES[family].model_class
    results = []
    for directory in (packed.directory, packed.dense):
        base = cls.from_pretrained(directory, dtype=torch.float32)
        torch.manual_seed(0)
        model = get_peft_model(base, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
        logits = model(IDS).logits
        logits.square().mean().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert gradients and all(g is not None and g.abs().sum() > 0 for g in gradients.values())
        results.append((model, logits, gradients))
    (model, logits, gradients), (_, wanted, wanted_gradients) = results
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted_gradients[name], rtol=1e-3, atol=1e-5)
    with torch.no_grad(), model.disable_adapter():
        assert not torch.allclose(model(IDS).logits, logits)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(cls.from_pretrained(packed.directory, dtype=torch.float32), tmp_path)
    torch.testing.assert_close(again(IDS).logits, logits)
    for merge in (model.merge_and_unload, lambda: model.merge_and_unload(safe_merge=True)):
        with pytest.raises(InputError, match="packed"):
            merge()


def test_dora_needs_the_dense_weight() -> None:
    base = AutoModelForCausalLM.from_pretrained(packed_family("llama").directory, dtype=torch.float32)
    with pytest.raises((InputError, RuntimeError)):  # never a silently wrong norm
        get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))


def test_preparation_for_kbit_training_leaves_payloads() -> None:
    """PEFT casts every parameter that looks like bfloat16 to float32."""
    model = AutoModelForCausalLM.from_pretrained(packed_family("llama_tied").directory)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = model(IDS).logits
    prepared = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    for name, tensor in prepared.state_dict().items():
        if tensor.dtype != torch.float32:
            assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
    assert next(iter(prepared.parameters())).dtype == torch.bfloat16  # what the embedding gives
    assert (prepared(IDS).logits - wanted).norm() / wanted.norm() < 0.1


def test_state_dict_goes_in_again() -> None:
    directory = packed_family("llama_tied").directory
    model, other = (AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32) for _ in range(2))
    wanted = model(IDS).logits
    for module in other.modules():
        if isinstance(module, PackedModule) and module.packed:
            module.payload("weight").zero_()
    assert not torch.allclose(other(IDS).logits, wanted)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(IDS).logits, wanted)
    assert {parameter.dtype for parameter in other.parameters()} == {torch.float32}
    assert {tensor.dtype for name, tensor in other.state_dict().items() if name.endswith("proj.weight")} <= {
        torch.uint8,
        torch.bfloat16,
    }


def test_lora_training_with_gradient_checkpointing() -> None:
    model = AutoModelForCausalLM.from_pretrained(packed_family("mixtral").directory, dtype=torch.float32)
    payloads = [(m, m.payload("weight").clone()) for m in model.modules() if isinstance(m, PackedLinear)]
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    peft = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    peft.train()
    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = peft(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05, losses
    assert payloads and all(torch.equal(module.payload("weight"), payload) for module, payload in payloads)


# -- compile -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama_tied", "gemma3", "gpt2", "falcon", "bert", "clip", "t5"])
def test_compile_fullgraph(family: str) -> None:
    model = FAMILIES[family].model_class.from_pretrained(packed_family(family).directory, dtype=torch.float32)
    inputs = dummy_inputs(model)
    torch._dynamo.reset()
    with torch.no_grad():
        wanted = model(**inputs)
        got = torch.compile(model, fullgraph=True, backend="eager")(**inputs)
    key = "logits" if "logits" in wanted else "logits_per_text"
    torch.testing.assert_close(got[key], wanted[key], rtol=1e-4, atol=1e-4)


def test_compile_with_inductor() -> None:
    """One packed layer, compiled for good, forward and gradient."""
    model = AutoModelForCausalLM.from_pretrained(packed_family("llama").directory, dtype=torch.float32)
    torch._dynamo.reset()
    layer, x = model.model.layers[0].mlp, torch.randn(1, 6, 64)
    results = []
    for run in (layer, torch.compile(layer, fullgraph=True)):
        inputs = x.clone().requires_grad_()
        out = run(inputs)
        out.sum().backward()
        results.append((out.detach(), inputs.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


# -- devices -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama_tied", "gemma3", "gpt2", "t5", "mixtral", "gpt_oss"])
def test_device_maps(family: str, tmp_path: Path) -> None:
    """`auto`, and every child of the model on disk: same outputs, twice, and the same tensors saved again."""
    packed, cls = packed_family(family), FAMILIES[family].model_class
    plain = cls.from_pretrained(packed.directory)
    inputs = dummy_inputs(plain)
    with torch.no_grad():
        wanted = plain(**inputs).logits
        disk = {name: "disk" for name, child in plain.named_children() if any(True for _ in child.parameters())}
        disk |= {"lm_head": "disk"}
        for device_map in ("auto", disk):
            model = cls.from_pretrained(packed.directory, device_map=device_map, offload_folder=tmp_path / "offloaded")
            for _ in range(2):
                torch.testing.assert_close(model(**inputs).logits, wanted)
    assert any(p.device.type == "meta" for p in model.parameters())
    model.save_pretrained(tmp_path / "saved")
    before, after = (load_file(d / "model.safetensors") for d in (packed.directory, tmp_path / "saved"))
    for key in before.keys() & after.keys():
        assert before[key].dtype == after[key].dtype and torch.equal(before[key], after[key])
    if family not in ("mixtral", "gpt2"):  # transformers keeps its own names when it saves an offloaded model
        assert before.keys() == after.keys()


def test_sizes_for_device_maps_count_packed_bytes() -> None:
    from transformers.integrations.accelerate import compute_module_sizes

    packed = packed_family("llama")
    model = AutoModelForCausalLM.from_pretrained(packed.directory)
    sizes, _ = compute_module_sizes(model, model.hf_quantizer)
    stored = sum(t.numel() * t.element_size() for t in load_file(packed.directory / "model.safetensors").values())
    computed = sum(b.numel() * b.element_size() for b in model.buffers() if b is not None) - sum(
        module._buffers[name].numel() * module._buffers[name].element_size()
        for module in model.modules()
        if isinstance(module, PackedModule)
        for name in module.part_names()
        if name in module._buffers
    )
    assert sizes[""] == stored + computed
    assert (
        sum(model.hf_quantizer.param_element_size(model, n, p) * p.numel() for n, p in model.named_parameters())
        < stored
    )


# -- libraries on top ----------------------------------------------------------------------------------------------


def test_pipeline(tmp_path: Path) -> None:
    for name in ("directory", "dense"):
        shutil.copytree(getattr(packed_family("llama_tied"), name), tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
    texts = [
        pipeline("text-generation", model=str(tmp_path / name), dtype=torch.float32, device="cpu")(
            "w5 w9 w77", max_new_tokens=6, do_sample=False
        )[0]["generated_text"]
        for name in ("directory", "dense")
    ]
    assert texts[0] == texts[1] and len(texts[0]) > len("w5 w9 w77")


def test_sentence_transformer(tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    config = BertConfig(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    packed = pack(tmp_path / "bert", tmp_path)
    whole: dict[str, Any] = {}
    for name, directory in (("packed", packed.directory), ("dense", packed.dense)):
        made = sentence_transformers.SentenceTransformer(str(directory), device="cpu")  # with mean pooling
        made.save(str(tmp_path / f"st_{name}"))
        whole[name] = sentence_transformers.SentenceTransformer(str(tmp_path / f"st_{name}"), device="cpu")
    whole["load"] = slimwright.load(tmp_path / "st_packed")
    vectors = {name: model.encode(["w1 w2 w3", "w100 w7"]) for name, model in whole.items()}
    assert vectors["packed"].shape == (2, 64)
    for name in ("packed", "load"):
        assert abs(vectors[name] - vectors["dense"]).max() < 1e-4
    assert any(isinstance(m, PackedLinear) for m in whole["load"].modules())
    saved = json.loads(next((tmp_path / "st_packed").rglob("config.json")).read_text())
    assert saved["quantization_config"]["grids"]


# -- memory --------------------------------------------------------------------------------------------------------


def test_loading_maps_the_file_and_copies_nothing(tmp_path: Path) -> None:
    """About 60 MB of packed weights: loading them takes a few MB of anonymous memory, a forward no dense copy."""
    code = """
import json, sys
import torch
import slimwright
from transformers import AutoModelForCausalLM, LlamaConfig
import transformers.models.llama.modeling_llama, slimwright.runtime.transformers_private, slimwright.model.skeleton

def anonymous():
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

AutoModelForCausalLM.from_pretrained(sys.argv[2])(torch.arange(4)[None])  # what the libraries allocate once
before = anonymous()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
loaded = anonymous()
with torch.no_grad():
    model(torch.arange(4)[None])
print(json.dumps([loaded - before, anonymous() - before]))
"""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from slimwright.runtime.format import DenseForm, write_config
    from slimwright.weights import Int, disk_shapes

    config = LlamaConfig(
        vocab_size=16000,
        hidden_size=1536,
        intermediate_size=6144,
        num_hidden_layers=2,
        num_attention_heads=12,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        state = LlamaForCausalLM(config).bfloat16().state_dict()
    grid, tensors, shapes = Int(4, group=64), {}, {}
    for name, tensor in state.items():
        if tensor.ndim != 2:
            tensors[name] = torch.ones(tensor.shape, dtype=tensor.dtype)
            continue
        shapes[name] = tuple(tensor.shape)
        for suffix, part in disk_shapes(grid, shapes[name]).items():
            tensors[name + suffix] = torch.full(part.shape, 1e-3 if part.dtype.is_floating_point else 0x59).to(
                part.dtype
            )
    config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((tmp_path / "config.json").read_text())
    forms = {name: DenseForm("bfloat16", shape) for name, shape in shapes.items()}
    settings["quantization_config"] = write_config(dict.fromkeys(shapes, grid), "test", forms)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    size = (tmp_path / "model.safetensors").stat().st_size / 2**20
    assert size > 55

    small = packed_family("llama").directory
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(small)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    loading, running = json.loads(done.stdout.splitlines()[-1])
    assert loading < 8 and running < 60, (loading, running, size)


def test_families_are_cached_as_bfloat16() -> None:
    """The packed families above come from bfloat16 sources, the usual case."""
    state = load_file(cached("llama", torch.bfloat16) / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
