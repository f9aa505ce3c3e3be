"""KIVI: keys per channel, values per token, the newest tokens as they are."""

from __future__ import annotations

from dataclasses import dataclass

from slimwright.methods.caching import CachePolicy
from slimwright.methods.registry import knob, register
from slimwright.runtime.kv_format import BITS, GROUPS, KvFormat


@register("cache/kivi", paper="Liu et al. 2024, arXiv 2402.02750")
@dataclass(frozen=True)
class KIVI(CachePolicy):
    """Round keys per channel over groups of tokens and values per token over groups of channels; keep the newest.

    Keys have channels that are large in every token; a range of their own keeps them from coarsening the others. Keys
    are rounded as they are cached, after RoPE, as in the paper's code. ``slimwright.runtime.kv_format`` has the
    formulas and says when a token is packed, which the source leaves open.
    """

    bits: int = knob(4, choices=BITS, help="bits of a key's or value's code")
    group_size: int = knob(32, choices=GROUPS, help="tokens (keys) or channels (values) that share a range")
    residual_length: int = knob(128, low=32, high=65536, help="newest tokens kept exactly; a multiple of group_size")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.format()

    def format(self) -> KvFormat:
        return KvFormat(self.bits, self.group_size, self.residual_length)
