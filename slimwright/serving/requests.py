"""What is asked of the engine, and what it answers with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from slimwright.errors import SlimwrightError

if TYPE_CHECKING:
    from slimwright.serving.adapters import ServedAdapter

Finish = Literal["stop", "length", "timeout", "cancelled", "error"]


class BusyError(SlimwrightError):
    """The queue is full, or the server is stopping."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: what logits are divided by; 0 is greedy.
        top_p: the smallest set of tokens with at least this probability is drawn from.
        seed: of this request's own random numbers; None: any.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(frozen=True)
class Request:
    """One text to continue.

    Attributes:
        prompt: token ids, at least one.
        most: tokens to make at most, at least one.
        stop: strings that end the text and are no part of it.
        logprobs: how many of the likeliest tokens to tell at every place, beside the one taken; None: none at all.
        adapter: what changes the model for this request.
        stream: whether pieces are delivered as they come; otherwise there is one at the end.
        seconds: after which it is given up, waiting included.
    """

    prompt: tuple[int, ...]
    most: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    adapter: ServedAdapter | None = None
    stream: bool = False
    seconds: float = 600.0

    @property
    def tokens(self) -> int:
        """Of the prompt and the longest answer."""
        return len(self.prompt) + self.most


@dataclass(frozen=True)
class TokenScore:
    """A token that was taken, and the likeliest at its place with their log probabilities (natural, of the model's own
    distribution: temperature and ``top_p`` do not count)."""

    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Piece:
    """A part of an answer.

    Attributes:
        text: that follows what was delivered before.
        tokens: that were made for it.
        scores: of these tokens, where asked for.
        finish: why this is the last piece; None: more will come.
        error: a sentence, where ``finish`` is ``error``.
    """

    text: str
    tokens: int
    scores: tuple[TokenScore, ...] = ()
    finish: Finish | None = None
    error: str = ""


Deliver = Callable[[Piece], None]
"""Called by the engine's thread; must not block."""
