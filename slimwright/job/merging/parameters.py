"""Parameters of a merge as a configuration writes them, and their value for one tensor.

A setting is a scalar, a list of scalars (a *gradient*: interpolated over the depth of a slice), or a list of
``{filter, value}`` (the first whose filter is part of the tensor's name; one without a filter, or ``*``, fits all).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from slimwright.errors import InputError, did_you_mean

Settings = Mapping[str, Any]


def check_setting(name: str, setting: Any, where: str) -> None:
    """Refuse a setting that is none.

    Raises:
        InputError: naming the parameter and the place.
    """
    if isinstance(setting, Mapping):
        setting = [setting]
    if _scalar(setting):
        return
    if isinstance(setting, list) and setting:
        if all(_scalar(item) for item in setting):
            return
        if all(isinstance(item, Mapping) for item in setting):
            for item in setting:
                unknown = sorted(set(item) - {"filter", "value"})
                if unknown or "value" not in item or not isinstance(item.get("filter", "*"), (str, type(None))):
                    raise InputError(f"{where}: each condition of '{name}' takes 'filter' and 'value'.")
                value = item["value"]
                if not _scalar(value) and not (isinstance(value, list) and value and all(map(_scalar, value))):
                    raise InputError(f"{where}: a value of '{name}' is neither a scalar nor a list of scalars.")
            return
    raise InputError(f"{where}: '{name}' takes a scalar, a list of scalars, or a list of filter and value.")


def value_of(setting: Any, tensor: str, depth: float) -> Any:
    """The value for a tensor, or None where no filter fits.

    Args:
        setting: a checked setting.
        tensor: its name.
        depth: 0 at the first layer of the slice to 1 at its last; 0 outside layers.
    """
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list):
        return setting
    if isinstance(setting[0], Mapping):
        for condition in setting:
            wanted = condition.get("filter")
            if wanted is None or wanted == "*" or wanted in tensor:
                return value_of(condition["value"], tensor, depth)
        return None
    values = [_number(item) for item in setting]
    if any(value is None for value in values):
        return setting[int(depth * (len(setting) - 1))]
    place = depth * (len(values) - 1)
    first = int(place)
    second = min(len(values) - 1, first + 1)
    return (1 - (place - first)) * values[first] + (place - first) * values[second]


def lookup(name: str, sources: Iterable[Settings], tensor: str, depth: float) -> Any:
    """The value of a parameter from the first source that has one for this tensor; None if none has."""
    for settings in sources:
        if name in settings:
            value = value_of(settings[name], tensor, depth)
            if value is not None:
                return value
    return None


def nearest(given: str, known: Sequence[str]) -> str:
    """``; did you mean 'x'?`` or a full stop."""
    return did_you_mean(str(given), known, 0.5)


def _scalar(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str))


def _number(value: Any) -> Any:
    """A number, also of text such as ``1e-4`` (which YAML 1.1 does not read as one); None for anything else."""
    if isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
