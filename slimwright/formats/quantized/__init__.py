"""Checkpoints that other tools have quantized, read tile by tile: one file per format."""

from slimwright.formats.quantized.reading import KNOWN_METHODS, foreign_weights
from slimwright.formats.quantized.weight import ForeignWeight

__all__ = ["KNOWN_METHODS", "ForeignWeight", "foreign_weights"]
