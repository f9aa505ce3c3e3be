"""Figures in words, alike on the page and in the terminal. What is missing is a dash."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

DASH = "–"
QUALITY_NAMES = {
    "kl": "KL from the source",
    "top1_agreement": "Same first choice",
    "cosine_mean": "Cosine to the source, mean",
    "cosine_min": "Cosine to the source, least",
    "image_cosine_mean": "Cosine to the source of images, mean",
    "image_cosine_min": "Cosine to the source of images, least",
    "text_cosine_mean": "Cosine to the source of texts, mean",
    "text_cosine_min": "Cosine to the source of texts, least",
    "bits_per_byte": "Bits per byte of text",
    "perplexity": "Perplexity",
    "accuracy": "Accuracy",
    "ndcg_at_10": "nDCG@10",
    "recall_at_100": "Recall@100",
    "mrr": "Mean reciprocal rank",
    "map": "Mean average precision",
    "mixed_ndcg_at_10": "nDCG@10, its queries on the reference's documents",
    "mixed_recall_at_100": "Recall@100, its queries on the reference's documents",
}
PERCENT = frozenset({"top1_agreement", "accuracy", "recall_at_100", "mixed_recall_at_100"})
"""Qualities that are shares."""


def is_number(value: Any) -> TypeGuard[float]:
    """Whether the value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def mapping(value: Any) -> Mapping[str, Any]:
    """The value where it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def count(value: Any) -> str:
    """``22,713,216``"""
    return f"{int(value):,}" if is_number(value) else DASH


def size(value: Any) -> str:
    """Bytes in decimal units with three digits: ``88.5 MB``"""
    if not is_number(value):
        return DASH
    scaled, unit = float(value), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(scaled) < 999.5 or unit == "TB":
            break
        scaled /= 1000
    digits = 0 if unit == "B" or abs(scaled) >= 99.95 else 1 if abs(scaled) >= 9.995 else 2
    return f"{scaled:.{digits}f} {unit}"


def share(part: Any, whole: Any) -> str:
    """``24.9 %``"""
    return f"{100 * part / whole:.1f} %" if is_number(part) and is_number(whole) and whole else DASH


def decimal(value: Any, digits: int = 2) -> str:
    return f"{value:.{digits}f}" if is_number(value) else DASH


def significant(value: Any) -> str:
    """Three significant digits: ``0.0817``, ``1.2e-05``"""
    return f"{value:.3g}" if is_number(value) else DASH


def duration(value: Any) -> str:
    """Seconds in words: ``48 s``, ``3 min 20 s``, ``2 h 5 min``"""
    if not is_number(value):
        return DASH
    if value < 9.95:
        return f"{value:.1f} s"
    seconds = round(value)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


def estimate(name: str, leaf: Any) -> str:
    """A quality with its interval: ``0.0123 nats per token (0.0117 to 0.0131)``"""
    if not isinstance(leaf, Mapping) or not is_number(leaf.get("value")):
        return DASH
    if name in PERCENT:
        write, unit = (lambda value: decimal(100 * value, 1) if is_number(value) else DASH), " %"
    elif "cosine" in name:
        write, unit = (lambda value: decimal(value, 4)), ""
    elif name in ("perplexity", "bits_per_byte"):
        write, unit = (lambda value: f"{value:.4g}" if is_number(value) else DASH), ""
    else:
        write, unit = significant, " nats per token" if name == "kl" else ""
    value, low, high = (leaf.get(key) for key in ("value", "low", "high"))
    text = write(value) + unit
    return text if low == value == high else f"{text} ({write(low)} to {write(high)})"


def printable(text: Any, limit: int = 400) -> str:
    """The text on one line, without characters that steer a terminal, cut at ``limit``."""
    line = "".join(
        char if char.isprintable() else " " if char in "\n\t\r" else "\N{REPLACEMENT CHARACTER}" for char in str(text)
    )
    return line if len(line) <= limit else line[: limit - 1] + "…"
