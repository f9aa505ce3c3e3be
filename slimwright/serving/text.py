"""Text from tokens as they come, and the strings that end it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_CONTEXT = 6
"""Tokens of the prompt that are decoded with the first of the answer: some tokenizers write a token differently at the
beginning of a text."""
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """Decodes tokens one by one; the pieces together are the text of all.

    Characters of several tokens come when their last token does.

    Args:
        tokenizer: of transformers.
        prompt: tokens before the first.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-_CONTEXT:])
        self._start = 0  # from here tokens are decoded together
        self._read = len(self._ids)  # before here their text has been given

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def add(self, token: int) -> str:
        """The text that is certain now and was not before."""
        self._ids.append(token)
        known = self._decode(self._ids[self._start : self._read])
        text = self._decode(self._ids[self._start :])
        if text.endswith(_INCOMPLETE) or len(text) <= len(known):
            return ""
        self._forget()
        return text[len(known) :]

    def rest(self) -> str:
        """What is left at the end, incomplete characters included."""
        known = self._decode(self._ids[self._start : self._read])
        text = self._decode(self._ids[self._start :])
        self._forget()
        return text[len(known) :]

    def _forget(self) -> None:
        self._ids = self._ids[self._read :]
        self._start, self._read = 0, len(self._ids)


class Stops:
    """Cuts a text that comes in pieces at the first of some strings.

    Args:
        strings: none is empty.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """What may be shown now, and whether a string has come. The end of a text that may be the beginning of one is
        held back."""
        if not self._strings:
            return text, False
        text = self._held + text
        found = [place for string in self._strings if (place := text.find(string)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        hold = max((_overlap(text, string) for string in self._strings), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold], False

    def rest(self) -> str:
        """What was held back."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, string: str) -> int:
    """The longest end of ``text`` that begins ``string`` without being all of it."""
    for size in range(min(len(text), len(string) - 1), 0, -1):
        if text.endswith(string[:size]):
            return size
    return 0
