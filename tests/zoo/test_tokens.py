"""Streams of tokens and the windows cut from them."""

import torch
from transformers import AutoTokenizer

from slimwright.zoo import bundled_path
from slimwright.zoo.text import Document
from slimwright.zoo.tokens import consecutive_windows, packed, train_tokenizer, windows


def test_a_step_sees_the_same_windows_whatever_came_before() -> None:
    tokens = torch.arange(100_000)
    once = windows(tokens, 8, 513, 7)
    windows(tokens, 8, 513, 8)
    assert torch.equal(once, windows(tokens, 8, 513, 7)) and not torch.equal(once, windows(tokens, 8, 513, 8))
    assert once.shape == (8, 513)
    assert torch.equal(once.diff(dim=1), torch.ones_like(once[:, 1:]))


def test_windows_reach_both_ends_and_no_further() -> None:
    cut = windows(torch.arange(5), 100, 3, 0)
    assert set(cut[:, 0].tolist()) == {0, 1, 2}
    assert torch.equal(windows(torch.arange(5), 2, 5, 0), torch.arange(5).expand(2, 5))


def test_consecutive_windows_drop_the_rest() -> None:
    assert consecutive_windows(torch.arange(7), 3).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert consecutive_windows(torch.arange(2), 3).shape == (0, 3)


def test_documents_are_packed_whole_and_apart() -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled_path())
    documents = [Document("a", "x = 1\n"), Document("b", "y = 2\n"), Document("c", "z")]
    text = tokenizer.decode(packed(tokenizer, documents, tokenizer.eos_token_id).tolist())
    pieces = text.split(tokenizer.eos_token)
    assert pieces[0] == "" and sorted(pieces[1:]) == sorted(document.text for document in documents)


def test_special_tokens_have_the_first_ids_and_every_byte_is_a_token() -> None:
    tokenizer = train_tokenizer([Document("a", "def f():\n    return f\n" * 4)], ["<one>", "<two>"])
    assert [tokenizer.token_to_id(token) for token in ("<one>", "<two>")] == [0, 1]
    text = "".join(map(chr, range(0x300))) + "你"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
