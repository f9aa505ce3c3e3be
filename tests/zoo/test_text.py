"""The split of the standard library's text: disjoint, complete, the same every time, no text in two parts."""

import hashlib
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from slimwright.zoo.text import Document, part_of, repeated_share, standard_library, telling_lines

PARTS = ("train", "calibrate", "heldout")


@pytest.fixture(scope="module")
def parts() -> dict[str, list[Document]]:
    return {part: standard_library(part) for part in PARTS}


def test_a_document_is_in_the_part_that_its_path_hashes_to(parts: dict[str, list[Document]]) -> None:
    for part, documents in parts.items():
        for document in documents:
            last_digit = int(hashlib.sha256(document.path.encode()).hexdigest()[:16], 16) % 10
            assert part == {0: "heldout", 1: "calibrate"}.get(last_digit, "train"), document.path


def test_known_paths_never_change_their_part() -> None:
    assert [part_of(path) for path in ("asyncio/queues.py", "wave.py", "argparse.py")] == [
        "heldout",
        "calibrate",
        "train",
    ]


def test_every_path_and_every_text_occurs_once(parts: dict[str, list[Document]]) -> None:
    documents = [document for part in PARTS for document in parts[part]]
    assert len({document.path for document in documents}) == len(documents)
    assert len({document.text for document in documents}) == len(documents)


def test_evaluated_documents_do_not_repeat_what_was_trained_on(parts: dict[str, list[Document]]) -> None:
    trained: set[str] = set()
    for document in parts["train"]:
        trained |= telling_lines(document.text)
    shares = {document.path: repeated_share(telling_lines(document.text), trained) for document in parts["heldout"]}
    assert max(shares.values()) < 0.6, max(shares, key=lambda path: shares[path])
    weights = {document.path: document.bytes for document in parts["heldout"]}
    assert sum(shares[path] * weights[path] for path in shares) / sum(weights.values()) < 0.15


def test_everything_else_in_the_library_is_there(parts: dict[str, list[Document]]) -> None:
    """Each module outside tests and installed packages is a document, unless its lines stand in the documents kept."""
    documents = [document for part in PARTS for document in parts[part]]
    paths = {document.path for document in documents}
    kept: set[str] = set()
    for document in documents:
        kept |= telling_lines(document.text)
    root = Path(sysconfig.get_path("stdlib"))
    left_out = []
    for file in [*root.glob("*.py"), *root.glob("asyncio/*.py"), *root.glob("encodings/*.py")]:
        path = file.relative_to(root).as_posix()
        text = file.read_text(encoding="utf-8")
        if path not in paths and text.strip() and not path.startswith("_sysconfigdata"):
            left_out.append(path)
            assert repeated_share(telling_lines(text), kept) > 0.5, path
    assert "encodings/cp1252.py" in left_out and "argparse.py" in paths


def test_tests_topics_and_installed_packages_are_left_out(parts: dict[str, list[Document]]) -> None:
    paths = [document.path for part in PARTS for document in parts[part]]
    assert not [path for path in paths if path.startswith(("test/", "site-packages/")) or "/tests/" in path]
    assert "pydoc_data/topics.py" not in paths
    assert sum(path.startswith("help:") for path in paths) > 20


def test_shares(parts: dict[str, list[Document]]) -> None:
    total = sum(len(documents) for documents in parts.values())
    assert 0.06 < len(parts["heldout"]) / total < 0.14
    assert 0.06 < len(parts["calibrate"]) / total < 0.14


def test_another_process_sees_the_same(parts: dict[str, list[Document]]) -> None:
    script = (
        "import hashlib; from slimwright.zoo.text import standard_library; "
        "print(hashlib.sha256(repr(standard_library('heldout')).encode()).hexdigest())"
    )
    printed = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "7"},
        cwd=Path(__file__).parents[2],
    ).stdout.strip()
    assert printed == hashlib.sha256(repr(parts["heldout"]).encode()).hexdigest()


def test_repeated_share_weighs_lines_by_their_length() -> None:
    assert repeated_share({"aaa", "b"}, {"aaa", "c"}) == 0.75
