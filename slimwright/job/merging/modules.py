"""Modules of a model, as a configuration names them: which tensors belong to which."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from slimwright.checkpoint.files import shown
from slimwright.errors import InputError
from slimwright.job.merging.layers import resized_config

_VISION = ("vision_tower", "vision_model", "vision_encoder", "visual")
_PROJECTOR = ("multi_modal_projector", "mm_projector", "merger", "deepstack_merger_list", "connector")
WHOLE = "default"
"""mergekit's name of the only module of a model that has one."""


def belongs(name: str, module: str) -> bool:
    """Whether a tensor belongs to a module.

    ``default``: every tensor does. ``text_decoder``, ``vision_tower`` (or ``vision_model``) and
    ``multi_modal_projector`` are the parts of a model of images and text, ``encoder``, ``decoder`` and ``shared`` those
    of a translating one, as mergekit has them. Any other name begins its tensors' names, or is a word in them.
    """
    words = name.split(".")
    sees, joins = any(word in words for word in _VISION), any(word in words for word in _PROJECTOR)
    if module == WHOLE:
        return True
    if module == "text_decoder":
        return not sees and not joins
    if module in ("vision_tower", "vision_model"):
        return sees and not joins
    if module == "multi_modal_projector":
        return joins
    if module == "shared":
        return "encoder" not in words and "decoder" not in words
    return module in words or name.startswith(module)


def members(names: Iterable[str], modules: Sequence[str]) -> dict[str, list[str]]:
    """The tensors of each module; one that belongs to several is the first's.

    Raises:
        InputError: a module that has none.
    """
    found: dict[str, list[str]] = {module: [] for module in modules}
    for name in names:
        module = next((module for module in modules if belongs(name, module)), None)
        if module is not None:
            found[module].append(name)
    empty = next((module for module, own in found.items() if not own), None)
    if empty is not None:
        raise InputError(
            f"The model has no module '{shown(empty)}': name what its tensors' names begin with, or a word in them, "
            "such as encoder, decoder, text_decoder, vision_tower."
        )
    return found


def resized_module(config: Mapping[str, Any], module: str | None, chosen: list[int], old: int) -> dict[str, Any]:
    """config.json where one module has other layers; see :func:`resized_config`."""
    if module is None or module == WHOLE:
        return resized_config(config, chosen, old)
    if module in ("vision_tower", "vision_model"):
        seen = {key: value for key, value in config.items() if "vision" in key and isinstance(value, dict)}
        return {**config, **resized_config(seen, chosen, old)}
    if module in ("encoder", "decoder"):
        own = {key: value for key, value in config.items() if ("decoder" in key) == (module == "decoder")}
        return {**config, **resized_config(own, chosen, old)}
    others = {key: value for key, value in config.items() if "vision" in key}
    return {**resized_config(config, chosen, old), **others}
