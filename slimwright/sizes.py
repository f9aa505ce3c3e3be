"""Sizes in writing."""

from __future__ import annotations

import math
import re

from slimwright.errors import InputError


def parse_bytes(text: str, what: str) -> int:
    """``1.5GB``, ``800MB``, ``2GiB``, ``123456`` → bytes (GB is 10^9, GiB is 2^30).

    Raises:
        InputError: not a size.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]?i?b?)\s*", text.lower())
    units = {"": 1, "b": 1, **{f"{u}b": 1000 ** (i + 1) for i, u in enumerate("kmgt")}}
    units |= {f"{u}ib": 1024 ** (i + 1) for i, u in enumerate("kmgt")} | {
        u: 1000 ** (i + 1) for i, u in enumerate("kmgt")
    }
    if not match or match[2] not in units:
        raise InputError(f"{what} '{text}' is not a size such as 1.5GB or 800MB.")
    value = float(match[1]) * units[match[2]]
    if not math.isfinite(value) or value <= 0:
        raise InputError(f"{what} '{text}' must be more than 0.")
    return int(value)
