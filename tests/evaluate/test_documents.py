"""The text that is measured: documents of every kind of row; the sample is the same in whatever order they come."""

import pytest

from slimwright.calibrate.data import Document, fingerprint
from slimwright.errors import InputError
from slimwright.evaluate.documents import read_texts, sample
from slimwright.zoo.text import part_of
from tests.evaluate.samples import byte_tokenizer, lines


def none():
    raise AssertionError("no conversation, no tokenizer")


def test_rows_with_labels_and_pairs(tmp_path):
    (tmp_path / "b.txt").write_text("zwei\nZeilen")
    (tmp_path / "in").mkdir()
    rows = [{"text": "one\u2028line", "label": "x"}, {"text": " "}, {"text": "two", "label": 3, "id": 9}]
    lines(
        tmp_path / "in" / "a.jsonl",
        [*rows, {"text": "odd", "label": [1]}, {"query": "q", "document": "d", "label": True}],
    )
    assert read_texts(str(tmp_path), none) == [
        Document("b.txt", "zwei\nZeilen"),
        Document("in/a.jsonl:1", "one\u2028line", label="x"),
        Document("in/a.jsonl:3", "two", label=3),
        Document("in/a.jsonl:4", "odd"),
        Document("in/a.jsonl:5", "q", "d"),
    ]


def test_the_standard_library_is_the_held_out_part():
    found = read_texts("stdlib", none)
    assert len(found) > 20 and all(part_of(document.name) == "heldout" for document in found)


def test_conversations_go_through_the_template(tmp_path):
    file = lines(tmp_path / "chat.jsonl", [{"messages": [{"role": "user", "content": "hi"}]}])
    tokenizer = byte_tokenizer()
    with pytest.raises(
        InputError, match=r"chat.jsonl:1 holds messages, but the reference's tokenizer has no chat template"
    ):
        read_texts(str(file), lambda: tokenizer)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    assert read_texts(str(file), lambda: tokenizer) == [Document("chat.jsonl:1", "[user] hi")]


def test_what_is_not_text(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_texts(str(tmp_path / "absent.txt"), none)
    (tmp_path / "a.png").write_bytes(b"an image")
    file = lines(tmp_path / "images.jsonl", [{"image": "a.png"}])
    with pytest.raises(InputError, match=r"images.jsonl:1 holds no text"):
        read_texts(str(file), none)


def test_the_sample():
    made = [Document(f"d{i}", f"{i:03}" + "é" * 500, label=i) for i in range(100)]
    found = sample(made, 6400)
    assert found == sample(made[::-1], 6400)
    sizes = [len(document.text.encode()) for document in found]
    assert 32 <= len(found) <= 33 and max(sizes) <= 200 and 6300 <= sum(sizes) <= 6400
    whole = {document.name: document for document in made}
    assert all(whole[document.name].text.startswith(document.text) for document in found)
    assert all(whole[document.name].label == document.label for document in found)
    assert sample(made[:1], 10**6) == made[:1], "one document is not cut to a part"
    assert len(sample(made[:3], 300)) == 3
    assert sample([Document("p", "first", "second")], 99) == [Document("p", "first\nsecond")]
    assert fingerprint(found) == fingerprint(sample(made, 6400)) != fingerprint(found[1:])
