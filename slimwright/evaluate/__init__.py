"""Metrics: how far a candidate is from its reference, with intervals."""

from slimwright.evaluate.bootstrap import Estimate, interval
from slimwright.evaluate.cosine import cosine_similarity, mean_pool
from slimwright.evaluate.divergence import compare_logits
from slimwright.evaluate.quality import EncoderQuality, LanguageQuality

__all__ = [
    "EncoderQuality",
    "Estimate",
    "LanguageQuality",
    "compare_logits",
    "cosine_similarity",
    "interval",
    "mean_pool",
]
