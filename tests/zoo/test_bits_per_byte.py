"""Bits per byte against a token-by-token count, and xz's figure against the xz container's own arithmetic."""

import lzma
import math

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from slimwright.zoo import bundled_path
from slimwright.zoo.bits_per_byte import bits_per_byte, xz_bits_per_byte
from slimwright.zoo.text import Document

LENGTH = 16
TEXTS = {"empty": "", "one": "x", "short": "import os\n", "long": "def f(x):\n    return x + 1  # é 你\n" * 9}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(bundled_path())


def tiny_model(vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=LENGTH,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def token_by_token(model: LlamaForCausalLM, tokens: list[int]) -> float:
    """Nats of tokens[1:], each seen from the earliest window of LENGTH inputs, stepping by half, that reaches it."""
    nats = 0.0
    for index in range(1, len(tokens)):
        start = 0
        while start + LENGTH < index:
            start += LENGTH // 2
        logits = model(torch.tensor([tokens[start:index]])).logits[0, -1]
        nats -= torch.log_softmax(logits, -1)[tokens[index]].item()
    return nats


@pytest.mark.parametrize("names", [["one"], ["short"], ["long"], ["long", "empty", "one", "short", "long"]])
@torch.inference_mode()
def test_every_token_counts_once(names: list[str], tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny_model(len(tokenizer))
    end = tokenizer.eos_token_id
    documents = [Document(name, TEXTS[name]) for name in names]
    nats = sum(token_by_token(model, [end, *tokenizer.encode(document.text), end]) for document in documents)
    expected = nats / math.log(2) / sum(len(document.text.encode()) for document in documents)
    assert bits_per_byte(model, tokenizer, documents) == pytest.approx(expected, rel=1e-5)


def test_lengths_around_the_window(tokenizer: PreTrainedTokenizerBase) -> None:
    """A model without preference pays log2(vocabulary) a token, whatever the number of windows."""
    model = tiny_model(len(tokenizer))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    for count in range(1, 3 * LENGTH):
        text = "0 " * count
        tokens = len(tokenizer.encode(text)) + 1
        expected = tokens * math.log2(len(tokenizer)) / len(text)
        assert bits_per_byte(model, tokenizer, [Document("x", text)]) == pytest.approx(expected, rel=1e-5)


def test_xz_takes_all_documents_as_one_file() -> None:
    one, two = Document("a", "é" * 500), Document("b", "x" * 500)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
    whole = len(lzma.compress(b"\xc3\xa9" * 500 + b"x" * 500, format=lzma.FORMAT_XZ, filters=filters))
    assert xz_bits_per_byte([one, two]) == pytest.approx(8 * whole / 1500)
