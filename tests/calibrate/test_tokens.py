"""From documents to batches: what a seed draws."""

from __future__ import annotations

from collections import Counter

from transformers import AutoModelForCausalLM, AutoTokenizer

from slimwright.calibrate.data import Document
from slimwright.calibrate.tokens import samples
from slimwright.zoo import bundled_path


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
