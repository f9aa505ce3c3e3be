"""From documents to batches: what a seed draws."""

from __future__ import annotations

from collections import Counter

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimwright.calibrate.data import Document
from slimwright.calibrate.tokens import samples
from slimwright.errors import InputError
from slimwright.zoo import bundled_path
from tests.families import make


def test_one_long_document_does_not_make_all_of_the_data() -> None:
    """Half of the characters are one document's; so are about half of the rows, whatever the seed."""
    long = Document("long", "\n".join(f"def long_{i}(a, b):\n    return a * {i} + b" for i in range(7000)))
    short = [
        Document(f"short-{n}", "\n".join(f"class Short{n}_{i}:\n    value = {i}" for i in range(1200)))
        for n in range(8)
    ]
    model = AutoModelForCausalLM.from_pretrained(bundled_path())
    tokenizer = AutoTokenizer.from_pretrained(bundled_path())
    digests = set()
    for seed in range(3):
        made = samples(model, tokenizer, [long, *short], tokens=8192, length=64, seed=seed)
        rows = Counter(name for batch in made.batches for name in batch.documents)
        assert sum(rows.values()) == 128 and made.tokens == 8192
        assert len(rows) >= 6 and 32 < rows["long"] < 96
        digests.add(made.digest)
    assert len(digests) == 3
    again = samples(model, tokenizer, [long, *short], tokens=8192, length=64, seed=2)
    assert again.digest in digests


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_a_tokenizer_that_does_not_match_the_vocabulary(name: str) -> None:
    """Its ids have no embedding in a model of 320: one sentence, before anything runs."""
    tokenizer = AutoTokenizer.from_pretrained(bundled_path())
    text = [Document(f"document {n}", f"def function_{n}(x):\n    return x\n" * 20) for n in range(4)]
    with pytest.raises(InputError, match=r"the id \d+, but the model has 320 embeddings.*own tokenizer") as error:
        samples(make(name), tokenizer, text, tokens=512, length=16, seed=0)
    assert len(str(error.value).splitlines()) == 1


def test_fewer_tokens_than_one_sequence() -> None:
    model, tokenizer = make("llama"), AutoTokenizer.from_pretrained(bundled_path())
    model.config.vocab_size = len(tokenizer)
    with pytest.raises(InputError, match=r"\(1 document\) does not make one sequence of 64 tokens: give more, or a"):
        samples(model, tokenizer, [Document("short", "x = 1")], tokens=512, length=64, seed=0)
