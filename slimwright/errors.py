"""The errors that a user sees: one sentence, an exit code, no traceback (DESIGN §7)."""

import difflib
from collections.abc import Iterable


class SlimwrightError(Exception):
    """The job failed for a reason that one sentence can tell (exit code 1)."""

    exit_code = 1


class InputError(SlimwrightError, ValueError):
    """What the user gave cannot work: the sentence says what is wrong, where, and what to do (exit code 2)."""

    exit_code = 2


class BudgetError(InputError):
    """A size that no choice of options meets.

    Attributes:
        smallest: bytes of the smallest result there could be.
    """

    def __init__(self, sentence: str, smallest: int) -> None:
        super().__init__(sentence)
        self.smallest = smallest


class NotBuiltError(InputError):
    """An option, target or method that is designed but not built in this version: refused by name (exit code 2)."""


class MetricError(SlimwrightError):
    """A user's own metric gave no number: what was finished is kept for the next run (exit code 2)."""

    exit_code = 2


class QualityError(SlimwrightError):
    """A quality floor was missed (exit code 3)."""

    exit_code = 3


def did_you_mean(given: str, known: Iterable[str], cutoff: float = 0.3, otherwise: str = ".") -> str:
    """How a sentence about an unknown name ends: ``; did you mean 'x'?``, or ``otherwise`` where nothing is like it."""
    near = difflib.get_close_matches(given, list(known), n=1, cutoff=cutoff)
    return f"; did you mean '{near[0]}'?" if near else otherwise
