"""Reading text: every form, every mistake in one sentence; the sample is the same in whatever order files come."""

import pytest

from slimwright.errors import InputError
from slimwright.evaluate.documents import Document, documents, fingerprint, sample
from slimwright.zoo.text import part_of
from tests.evaluate.samples import lines


def test_every_form(tmp_path):
    (tmp_path / "b.txt").write_bytes("\ufeffzwei\nZeilen".encode())
    (tmp_path / "in").mkdir()
    lines(
        tmp_path / "in" / "a.jsonl",
        [{"text": "one\u2028line", "label": "x"}, {"text": " "}, {"text": "two", "label": 3}],
    )
    (tmp_path / ".hidden").write_bytes(b"\xff\xfe")
    found = list(documents(str(tmp_path)))
    assert found == [
        Document("b.txt", "zwei\nZeilen"),
        Document("in/a.jsonl:1", "one\u2028line", "x"),
        Document("in/a.jsonl:3", "two", 3),
    ]
    assert [document.name for document in documents(str(tmp_path / "in" / "a.jsonl"))] == ["a.jsonl:1", "a.jsonl:3"]


def test_the_standard_library_is_the_held_out_part():
    found = list(documents("stdlib"))
    assert len(found) > 20 and all(part_of(document.name) == "heldout" for document in found)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\xfe\x00x", "a.txt is not text in UTF-8"),
        ("a.txt", b"a\x00b", "a.txt is not text in UTF-8"),
        ("a.txt", b" \n", "holds no text"),
        ("a.jsonl", b"", "holds no text"),
        ("a.jsonl", b'{"text": "x"}\n{', "line 2 is not JSON"),
        ("a.jsonl", b'{"content": "x"}', r"row 1 has no `text` that is a string \(its columns: content\)"),
        ("a.jsonl", b'["x"]', r"row 1 has no `text` that is a string \(its columns: none\)"),
        ("a.jsonl", b'{"text": 3}', "row 1 has no `text` that is a string"),
        ("a.jsonl", b'{"text": "x", "label": [1]}', "row 1 has a `label` that is neither a number nor a name"),
    ],
)
def test_bad_files(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    for source in (tmp_path / name, tmp_path):
        with pytest.raises(InputError, match=message):
            list(documents(str(source)))


def test_nothing_there(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        documents(str(tmp_path / "absent"))
    with pytest.raises(InputError, match="holds no text"):
        documents(str(tmp_path))


def test_the_sample():
    made = [Document(f"d{i}", f"{i:03}" + "é" * 500) for i in range(100)]
    found = sample(made, 6400)
    assert found == sample(made[::-1], 6400)
    sizes = [len(document.text.encode()) for document in found]
    assert 32 <= len(found) <= 33 and max(sizes) <= 200 and 6300 <= sum(sizes) <= 6400
    whole = {document.name: document.text for document in made}
    assert all(whole[document.name].startswith(document.text) for document in found)
    assert sample(made[:1], 10**6) == made[:1], "one document is not cut to a part"
    assert len(sample(made[:3], 300)) == 3
    assert fingerprint(found) == fingerprint(sample(made, 6400)) != fingerprint(found[1:])


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr("slimwright.evaluate.documents.find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs pyarrow: `pip install pyarrow`"):
        documents(str(tmp_path / "a.parquet"))
