"""Floors on quality: ``--keep kl:0.02``, ``top1:99%``, ``ppl:1%``, ``ndcg@10:1%``, ``./eval.sh:0.5``.

A floor is judged at the worse end of the quality's 95 % interval; a user's command has none and is taken as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slimwright.errors import InputError, did_you_mean
from slimwright.job.command import measured, words

LIMIT_SECONDS = 3600.0
"""How long a user's command may take where the job has no limit of its own."""


@dataclass(frozen=True)
class Kind:
    """A quality that can have a floor.

    Attributes:
        quality: its name in the report.
        form: ``least`` (a similarity that must not be lower), ``most`` (a distance that must not be higher), ``rise``
            and ``fall`` (the change, as a share of the original's value, that must not be exceeded).
        exponent: how it grows with the loss in nats, roughly: 1 for what is a difference of log probabilities, 0.5 for
            what counts decisions that flip.
        on: what it is measured on, as the report names it: the first of these that it has.
    """

    quality: str
    form: str
    exponent: float
    on: tuple[str, ...] = ("tokens", "documents")


KINDS = {
    "kl": Kind("kl", "most", 1.0),
    "top1": Kind("top1_agreement", "least", 0.5),
    "ppl": Kind("perplexity", "rise", 1.0),
    "bits_per_byte": Kind("bits_per_byte", "rise", 1.0),
    "cosine": Kind("cosine_mean", "least", 1.0),
    "ndcg@10": Kind("ndcg_at_10", "fall", 0.5, ("queries",)),
    "accuracy": Kind("accuracy", "fall", 0.5),
}


@dataclass(frozen=True)
class Floor:
    """One floor.

    Attributes:
        text: as the user wrote it.
        name: a key of :data:`KINDS`, or the user's command.
        limit: what the quality must keep to, percent as a share.
    """

    text: str
    name: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> Floor:
        """Read ``NAME:LIMIT`` or ``COMMAND:LIMIT``; a command is what has a slash in it.

        Raises:
            InputError: not of that form, an unknown quality (with the nearest name), or a limit that nothing can miss
                or nothing can keep.
        """
        name, colon, written = text.rpartition(":")
        name, written = name.strip(), written.strip()
        percent = written.endswith("%")
        try:
            limit = float(written.removesuffix("%")) / (100 if percent else 1)
        except ValueError:
            limit = math.nan
        if not colon or not name or not math.isfinite(limit):
            raise InputError(
                f"--keep '{text}' is not of the form kl:0.02, top1:99%, ppl:1%, ndcg@10:1% or ./eval.sh:0.5."
            )
        if "/" in name:
            if not Path(words(name)[0]).expanduser().is_file():
                raise InputError(f"--keep '{text}': there is no file '{words(name)[0]}' to run.")
            return cls(text, name, limit)
        name = name.lower()
        if name not in KINDS:
            hint = did_you_mean(name, KINDS)
            raise InputError(
                f"--keep '{text}' names the unknown quality '{name}'{hint} Known: {', '.join(KINDS)}, or the path of a "
                "command with a slash in it."
            )
        if KINDS[name].form == "least" and not 0 < limit < 1:
            raise InputError(f"--keep '{text}': {name} lies between 0 and 1 (100%), and the original itself has 1.")
        if KINDS[name].form != "least" and not limit > 0:
            raise InputError(f"--keep '{text}': the limit must be more than 0.")
        return cls(text, name, limit)

    @property
    def command(self) -> bool:
        """Whether it is the user's own measure."""
        return self.name not in KINDS

    @property
    def exponent(self) -> float:
        """How the quality grows with the loss in nats; of a command nothing is known."""
        return 0.75 if self.command else KINDS[self.name].exponent

    def check_tokens(self, tokens: int) -> None:
        """Refuse before work a share of agreeing tokens that one flipped token would already miss.

        Args:
            tokens: that the quality will be measured on.

        Raises:
            InputError: naming the tokens needed: so many that the interval of a share right at the floor, were tokens
                independent, is as wide as what the floor allows.
        """
        if self.name != "top1":
            return
        needed = math.ceil(3.84 * self.limit / (1 - self.limit))
        if tokens < needed:
            raise _narrow(self.text, tokens, needed)

    def judge(
        self, quality: Mapping[str, Any], measured_on: Mapping[str, Any], model: Path, seconds: float | None
    ) -> Judged:
        """What a candidate's quality is against the floor.

        Args:
            quality: of its report.
            measured_on: how many tokens, documents or queries, by these names.
            model: its directory, for a command.
            seconds: that a command may take; None: :data:`LIMIT_SECONDS`.

        Raises:
            InputError: the model has no such quality (those it has are named), or the command cannot be run.
            MetricError: the command gives no number.
        """
        if self.command:
            value = measured(words(self.name), model, seconds or LIMIT_SECONDS)
            strain = 1 + (self.limit - value) / max(abs(self.limit), 1e-12)
            return Judged(self.text, value, value, value >= self.limit, max(strain, 0.0), 0.0, 0)
        kind = KINDS[self.name]
        if kind.quality not in quality:
            known = [name for name, own in KINDS.items() if own.quality in quality]
            raise InputError(
                f"--keep '{self.text}': this model and its data have no {self.name}; they have {', '.join(known)}."
            )
        found = quality[kind.quality]
        if kind.form in ("rise", "fall"):
            before, change = abs(found["before"]["value"]), found["difference"]
            sign = 1 if kind.form == "rise" else -1
            value, worst = sign * change["value"] / before, max(sign * change["low"], sign * change["high"]) / before
            allowed = self.limit
        elif kind.form == "most":
            value, worst, allowed = found["value"], found["high"], self.limit
        else:
            value, worst, allowed = 1 - found["value"], 1 - found["low"], 1 - self.limit
        width = (worst - value) / allowed
        if kind.form == "fall":  # of answers that most candidates share, so it is narrower for a better candidate
            width = 0.0
        elif kind.form == "most":  # the interval of a distance shrinks with it
            width *= allowed / value if value > 0 else 0.0
        elif value > allowed:
            width *= math.sqrt(allowed / value)
        shown = 1 - value if kind.form == "least" else value
        end = 1 - worst if kind.form == "least" else worst
        unit = next((unit for unit in kind.on if measured_on.get(unit)), "tokens")
        count = int(measured_on.get(unit) or 0)
        return Judged(
            self.text, shown, end, worst <= allowed, max(worst, 0.0) / allowed, width, count, unit, value <= allowed
        )


@dataclass(frozen=True)
class Judged:
    """A candidate against one floor.

    Attributes:
        floor: as the user wrote it.
        value: the quality, or its change as a share.
        worst: the worse end of its interval.
        met: whether that keeps the floor.
        strain: how much of what the floor allows is used at the worse end; above 1: missed.
        width: half the interval that a candidate right at the floor would have, as a share of what the floor allows.
        count: what it was measured on, so many tokens, documents or queries; 0: the user's command.
        unit: which of these.
        value_met: whether the value keeps the floor, its interval left aside.
    """

    floor: str
    value: float
    worst: float
    met: bool
    strain: float
    width: float
    count: int
    unit: str = "tokens"
    value_met: bool = False

    def refuse_narrow(self) -> None:
        """Refuse a floor that no candidate could be shown to keep on so little text.

        Raises:
            InputError: naming the tokens needed.
        """
        if not self.met and self.width > 1:
            raise _narrow(self.floor, self.count, math.ceil(self.count * self.width**2 * 1.2), self.unit)

    def to_json(self) -> dict[str, Any]:
        """For the report."""
        return asdict(self)

    @property
    def sentence(self) -> str:
        """What was found, in words."""
        return f"{self.floor}: {self.value:.4g} (at worst {self.worst:.4g}), {'kept' if self.met else 'missed'}"


def _narrow(floor: str, count: int, needed: int, unit: str = "tokens") -> InputError:
    more = f"--eval-tokens {max(100, math.ceil(needed / 100) * 100)} (or more --eval-data)"
    if unit != "tokens":
        more = f"--eval-tokens and --eval-data for about {math.ceil(needed / max(1, count))} times as many"
    return InputError(
        f"--keep {floor} is narrower than the 95 % interval of what it is measured on ({count} {unit}): give {more}, "
        "or a wider floor."
    )
