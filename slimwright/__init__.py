"""Slimwright: fit a pretrained model to a budget."""

__version__ = "0.1.0"

from slimwright.runtime.registration import install as _install

_install()
