"""``inspect``: the structure of a model."""

from __future__ import annotations

from slimwright.job.open import open_source
from slimwright.model.discover import discover
from slimwright.model.structure import Structure


def inspect(model: str, trust_remote_code: bool = False) -> Structure:
    """Discover what a model is made of, from its config and the headers of its files.

    Raises:
        InputError: not a model, damaged, or of an unknown family.
    """
    return discover(open_source(str(model)), trust_remote_code=trust_remote_code)
