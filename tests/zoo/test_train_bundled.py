"""The training script's parts that decide what a resumed or repeated run sees."""

import pytest
import torch
from transformers import AutoTokenizer

from slimwright.zoo import bundled_path
from slimwright.zoo.text import Document, standard_library
from slimwright.zoo.train_bundled import PEAK_RATE, TOKENS_PER_STEP, batch, configuration, packed, rate


def test_a_step_sees_the_same_windows_whatever_came_before() -> None:
    tokens = torch.arange(100_000)
    once = batch(tokens, 512, 7)
    batch(tokens, 512, 8)
    assert torch.equal(once, batch(tokens, 512, 7)) and not torch.equal(once, batch(tokens, 512, 8))
    assert once.shape == (TOKENS_PER_STEP // 512, 513)
    assert torch.equal(once.diff(dim=1), torch.ones_like(once[:, 1:]))


def test_the_rate_rises_stays_and_falls_to_nearly_nothing() -> None:
    rates = [rate(step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(PEAK_RATE / 100) and rates[100:600] == [PEAK_RATE] * 500
    assert rates[600:] == sorted(rates[600:], reverse=True) and 0 < rates[-1] < PEAK_RATE / 100


def test_documents_are_packed_whole_and_apart() -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled_path())
    documents = [Document("a", "x = 1\n"), Document("b", "y = 2\n"), Document("c", "z")]
    text = tokenizer.decode(packed(tokenizer, documents).tolist())
    pieces = text.split(tokenizer.eos_token)
    assert pieces[0] == "" and sorted(pieces[1:]) == sorted(document.text for document in documents)


def test_the_configuration_is_that_of_the_bundled_model() -> None:
    shipped = configuration(0).from_pretrained(bundled_path()).to_dict()
    named = configuration(0).to_dict()
    changed = {key for key in named if named[key] != shipped.get(key)}
    assert changed <= {"architectures", "dtype", "transformers_version"}


def test_the_tokenizer_was_trained_on_code_of_this_kind() -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled_path())
    text = "".join(document.text for document in standard_library("heldout")[:10])
    assert len(text.encode()) / len(tokenizer.encode(text, verbose=False)) > 3
