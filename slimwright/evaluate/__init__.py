"""Metrics: how far a candidate is from its reference, with intervals."""

from slimwright.evaluate.accuracy import ACCURACY
from slimwright.evaluate.bits_per_byte import BITS_PER_BYTE, token_bytes
from slimwright.evaluate.bootstrap import Estimate, interval, paired_interval
from slimwright.evaluate.cosine import COSINE_MEAN, cosine_similarity, mean_pool
from slimwright.evaluate.divergence import KL, TOP1_AGREEMENT, compare_logits
from slimwright.evaluate.perplexity import PERPLEXITY, token_nats
from slimwright.evaluate.quality import ClassifierQuality, EncoderQuality, LanguageQuality
from slimwright.evaluate.ranking import MAP, MRR, NDCG_AT_10, RECALL_AT_100, score_rankings
from slimwright.evaluate.table import Metric, Table

__all__ = [
    "ACCURACY",
    "BITS_PER_BYTE",
    "COSINE_MEAN",
    "KL",
    "MAP",
    "MRR",
    "NDCG_AT_10",
    "PERPLEXITY",
    "RECALL_AT_100",
    "TOP1_AGREEMENT",
    "ClassifierQuality",
    "EncoderQuality",
    "Estimate",
    "LanguageQuality",
    "Metric",
    "Table",
    "compare_logits",
    "cosine_similarity",
    "interval",
    "mean_pool",
    "paired_interval",
    "score_rankings",
    "token_bytes",
    "token_nats",
]
