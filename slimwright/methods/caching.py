"""The contract of cache policies: what becomes of the keys and values that a model keeps of the tokens it has seen."""

from __future__ import annotations

from abc import abstractmethod

from slimwright.methods.registry import Method
from slimwright.runtime.kv_format import KvFormat


class CachePolicy(Method):
    """Says how one attention layer keeps its keys and values. The plan holds its spec (``cache/kivi,bits=2``); the
    runtime builds a transformers ``Cache`` from the formats."""

    family = "cache"

    @abstractmethod
    def format(self) -> KvFormat:
        """The number format of the layer's cache.

        Raises:
            InputError: knobs that contradict each other.
        """


__all__ = ["CachePolicy"]
