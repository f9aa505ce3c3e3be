"""Text as it comes is the text as a whole, cut where a stop string begins."""

import random

import pytest
from transformers import AutoTokenizer

from slimwright.serving.text import Detokenizer, Stops
from slimwright.zoo import bundled_path


@pytest.fixture(scope="module")
def tokenizer():  # type: ignore[no-untyped-def]
    return AutoTokenizer.from_pretrained(bundled_path())


@pytest.mark.parametrize("text", ["def f(x):\n    return 'naïve 🦜 – 日本語'\n", "   leading", "é", "a🦜\n\n🦜b"])
def test_pieces_make_the_text(tokenizer, text: str) -> None:  # type: ignore[no-untyped-def]
    """Characters of several tokens come whole, and nothing is lost or said twice."""
    ids = tokenizer(text).input_ids
    for cut in range(1, len(ids)):
        pieces = Detokenizer(tokenizer, ids[:cut])
        made = [pieces.add(token) for token in ids[cut:]]
        before = tokenizer.decode(ids[:cut])
        if not before.endswith("\N{REPLACEMENT CHARACTER}"):
            assert before + "".join(made) + pieces.rest() == tokenizer.decode(ids)
            assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in made)


def test_what_is_incomplete_comes_at_the_end(tokenizer) -> None:  # type: ignore[no-untyped-def]
    ids = tokenizer("x🦜").input_ids
    pieces = Detokenizer(tokenizer, ids[:1])
    assert [pieces.add(token) for token in ids[1:-1]] == [""] * (len(ids) - 2)
    assert pieces.rest().endswith("\N{REPLACEMENT CHARACTER}")


def test_stops_against_brute_force() -> None:
    """However the text is cut into pieces: all before the first stop string, and never a part of one."""
    numbers = random.Random(0)

    def word(longest: int) -> str:
        return "".join(numbers.choice("ab") for _ in range(numbers.randint(1, longest)))

    for _ in range(3000):
        text = "".join(numbers.choice("ab") for _ in range(numbers.randint(1, 14)))
        strings = [
            "".join(numbers.choice("ab") for _ in range(numbers.randint(1, 4))) for _ in range(numbers.randint(1, 3))
        ]
        stops, shown, stopped = Stops(strings), "", False
        rest = text
        while rest and not stopped:
            size = numbers.randint(1, 3)
            piece, stopped = stops.add(rest[:size])
            shown, rest = shown + piece, rest[size:]
        # A stop string is seen as soon as it is complete, so that the first to end counts, where it begins earliest.
        ends = [(place + len(s), place) for s in strings if (place := text.find(s)) >= 0]
        if not ends:
            assert not stopped and shown + stops.rest() == text
        else:
            assert stopped and not any(s in shown for s in strings)
            assert text.startswith(shown) and len(shown) <= max(place for _, place in ends)
            assert any(text[len(shown) :].startswith(s) for s in strings)
