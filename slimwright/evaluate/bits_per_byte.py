"""Bits per byte: the code length of text under a model, per byte of UTF-8; comparable whatever the tokenizer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from slimwright.errors import InputError
from slimwright.evaluate.table import Metric


def _bits(nats: np.ndarray) -> np.ndarray:
    return nats / math.log(2)


BITS_PER_BYTE = Metric("bits_per_byte", "nats", "bytes", _bits)


def token_bytes(text: str, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """How many bytes of UTF-8 each token stands for: what lies between the end of the tokens before and its own end.

    Spaces that a tokenizer skips thus count for the token after them, and the tokens of one character that is cut into
    several count for it once. The sum is the length of the text up to the last token's end; what follows it (skipped at
    the end) goes to the last token.

    Args:
        text: what was tokenized.
        offsets: (start, end) of each token in characters, as fast tokenizers give; (0, 0) for special tokens.

    Returns:
        (tokens,) int64.

    Raises:
        InputError: an offset outside the text.
    """
    if any(not 0 <= start <= end <= len(text) for start, end in offsets):
        raise InputError("The tokenizer's offsets lie outside the text: it cannot say which bytes a token stands for.")
    size = np.zeros(len(offsets), np.int64)
    reached, last = 0, None
    for index, (start, end) in enumerate(offsets):
        if end > start:
            last = index
        if end > reached:
            size[index] = len(text[reached:end].encode(errors="surrogatepass"))
            reached = end
    if last is not None:
        size[last] += len(text[reached:].encode(errors="surrogatepass"))
    return size
