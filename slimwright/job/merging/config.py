"""The configuration of a merge: our own recipe form, and mergekit's YAML, read into one shape."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from slimwright.errors import InputError
from slimwright.job.merging.dialect import MERGEKIT, NO_OPS, MergekitMethod, mergekit_method
from slimwright.job.merging.parameters import Settings, check_setting, nearest
from slimwright.job.merging.sources import ModelReference
from slimwright.job.merging.values import (
    TokenizerChoice,
    read_dtype,
    read_list,
    read_reference,
    read_size,
    read_text,
    read_tokenizer,
)
from slimwright.methods.merging import MergeMethod
from slimwright.methods.registry import knob_name, method_class, methods

MAX_CONFIG_BYTES = 4 << 20
_SHARED = (
    "models", "slices", "modules", "parameters", "dtype", "out_dtype", "tokenizer", "tokenizer_source", "chat_template",
    "out_shard_size",
)  # fmt: skip
_KEYS = {
    "mergekit": ("merge_method", "base_model", *_SHARED),
    "slimwright": ("method", "base", "seed", "metric", *_SHARED),
}
GREEDY_SOUP = "greedy_soup"
_SLICE_KEYS = ("sources", "parameters", "base_model")


@dataclass(frozen=True)
class SliceSource:
    """Layers ``start`` to ``stop`` of one model; both None for the whole model."""

    model: ModelReference
    start: int | None = None
    stop: int | None = None
    parameters: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Slice:
    """A range of layers of the result: of each source the same number of layers, merged one by one.

    Attributes:
        sources: of each model.
        base: or None.
        parameters: that hold for this slice.
        module: the part of the model that it belongs to (:mod:`slimwright.job.merging.modules`); None: all of it.
        module_parameters: that hold for all slices of that module.
    """

    sources: tuple[SliceSource, ...]
    base: ModelReference | None
    parameters: Settings = field(default_factory=dict)
    module: str | None = None
    module_parameters: Settings = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Whether no layers are chosen."""
        return self.sources[0].start is None


@dataclass(frozen=True)
class MergeConfig:
    """A merge as it was asked for.

    Attributes:
        form: ``mergekit`` or ``slimwright``: whose definitions and defaults hold.
        method: our name of the method.
        dialect: how mergekit's parameters become knobs; None in our form.
        base: the base model, or None.
        slices: in the order of the result, module by module; one slice of whole models where no layers are chosen.
        parameters: those that hold everywhere.
        dtype: of the arithmetic's result, by torch's name, or None (the base's, per tensor).
        tokenizer: or None.
        chat_template: a name, a template, ``auto`` or None.
        out_shard_size: largest weight file in bytes, or None.
        seed: or None.
        metric: of a greedy soup: a command that gets a model's directory and prints a number last; else None.
        notes: what the user should know.
        source: the configuration as given, in JSON values.
    """

    form: str
    method: str
    dialect: MergekitMethod | None
    base: ModelReference | None
    slices: tuple[Slice, ...]
    parameters: Settings
    dtype: str | None
    tokenizer: TokenizerChoice | None
    chat_template: str | None
    out_shard_size: int | None
    seed: int | None
    metric: str | None
    notes: tuple[str, ...]
    source: dict[str, Any]

    def references(self) -> list[ModelReference]:
        """Every model named, the base first, each once."""
        found = [self.base] if self.base else []
        for part in self.slices:
            found += [part.base] if part.base else []
            found += [source.model for source in part.sources]
        if self.tokenizer and isinstance(self.tokenizer.source, ModelReference):
            found.append(self.tokenizer.source)
        return list(dict.fromkeys(found))

    def method_type(self) -> type[MergeMethod]:
        """The class of the method."""
        found = method_class(self.method)
        assert issubclass(found, MergeMethod)
        return found


def read_config(given: str | Path | Mapping[str, Any]) -> MergeConfig:
    """Read a YAML file, or the mapping that it would hold.

    Raises:
        InputError: missing, no YAML, an unknown key or parameter (with the nearest), a value that cannot be.
    """
    if isinstance(given, Mapping):
        return _config(dict(given), "the configuration")
    return _config(read_yaml(given), str(Path(given).expanduser()))


def read_yaml(file: str | Path) -> dict[str, Any]:
    """The mapping that a configuration's file holds.

    Raises:
        InputError: missing, no YAML, or something else than a mapping.
    """
    path = Path(file).expanduser()
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise InputError(f"{path} is too large for a configuration: name the YAML file of a merge.")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): name the YAML file of a merge.") from error
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text: name the YAML file of a merge.") from None
    try:
        value = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark is not None else ""
        raise InputError(f"{path} is not valid YAML{where}: repair it.") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} does not hold a configuration: it needs 'method' (or 'merge_method') and 'models'.")
    return value


def _config(value: dict[str, Any], where: str) -> MergeConfig:
    try:
        json.dumps(value, default=str, skipkeys=True)
    except (ValueError, RecursionError):
        raise InputError(f"{where}: a part of it contains itself (a YAML anchor): write that part out.") from None
    form = "mergekit" if "merge_method" in value else "slimwright"
    notes: list[str] = []
    for key in list(value):
        if key in _KEYS[form]:
            continue
        if form == "mergekit" and key in NO_OPS:
            notes.append(f"'{key}' has no effect here: {NO_OPS[key]}.")
            del value[key]
            continue
        raise InputError(f"{where}: unknown key '{key}'{nearest(key, _KEYS[form])} Known: {', '.join(_KEYS[form])}.")
    asked = value.get("merge_method" if form == "mergekit" else "method")
    if not isinstance(asked, str):
        raise InputError(f"{where}: give 'method' (ours: {', '.join(_own_names())}) or mergekit's 'merge_method'.")
    dialect = mergekit_method(asked, where) if form == "mergekit" else None
    metric = read_text(value.get("metric"), "metric", where)
    soup = form == "slimwright" and asked.removeprefix("merge/") == GREEDY_SOUP
    if soup != (metric is not None) or (soup and "models" not in value):
        raise InputError(
            f"{where}: method {GREEDY_SOUP} needs 'models' and a 'metric', a command that gets a directory and prints "
            "a number; no other method takes one."
        )
    method, knobs = (dialect.method, {}) if dialect else _own_method("linear" if soup else asked, where)
    base = read_reference(value.get("base_model" if form == "mergekit" else "base"), "the base model", where)
    parameters = _parameters(value.get("parameters"), method, dialect, f"{where}: parameters", notes)
    if sum(key in value for key in ("models", "slices", "modules")) != 1:
        raise InputError(f"{where}: give either 'models' or 'slices', or 'modules' that have one of the two.")
    slices = _slices(value, base, method, dialect, where, notes)
    shard = value.get("out_shard_size")
    seed = value.get("seed")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise InputError(f"{where}: 'seed' is a whole number, not {seed!r}.")
    return MergeConfig(
        form=form, method=method, dialect=dialect, base=base, slices=slices,
        parameters={**parameters, **knobs}, dtype=read_dtype(value, where), tokenizer=read_tokenizer(value, where),
        chat_template=read_text(value.get("chat_template"), "chat_template", where),
        out_shard_size=None if shard is None else read_size(shard, where), seed=seed, metric=metric,
        notes=tuple(dict.fromkeys(notes)), source=value,
    )  # fmt: skip


def _slices(
    value: Mapping[str, Any], base: ModelReference | None, method: str, dialect: MergekitMethod | None, where: str,
    notes: list[str],
) -> tuple[Slice, ...]:  # fmt: skip
    """The slices of ``models``, ``slices`` or ``modules``."""
    if "models" in value:
        listed = read_list(value["models"], "models", where)
        return (Slice(tuple(_model(item, method, dialect, where, notes) for item in listed), base),)
    if "slices" in value:
        return tuple(
            _slice(item, base, method, dialect, f"{where}: slices[{number}]", notes)
            for number, item in enumerate(read_list(value["slices"], "slices", where))
        )
    modules = value["modules"]
    if not isinstance(modules, Mapping) or not modules:
        raise InputError(f"{where}: 'modules' is a mapping of names to 'models' or 'slices'.")
    found: list[Slice] = []
    for name, module in modules.items():
        here = f"{where}: modules.{name}"
        if not isinstance(name, str) or not isinstance(module, Mapping) or ("models" in module) == ("slices" in module):
            raise InputError(f"{here}: a module has either 'models' or 'slices'.")
        unknown = sorted(set(module) - {"models", "slices", "parameters"})
        if unknown:
            raise InputError(
                f"{here}: unknown key '{unknown[0]}'{nearest(unknown[0], ('models', 'slices', 'parameters'))}"
            )
        own = _parameters(module.get("parameters"), method, dialect, here, notes)
        parts = _slices({k: v for k, v in module.items() if k != "parameters"}, base, method, dialect, here, notes)
        found += [replace(part, module=name, module_parameters=own) for part in parts]
    return tuple(found)


def _is_merge_method(name: str) -> bool:
    try:
        return issubclass(method_class(name), MergeMethod)
    except InputError:
        return False


def _own_names() -> list[str]:
    own = [name.removeprefix("merge/") for name, cls in methods().items() if issubclass(cls, MergeMethod)]
    return [*own, GREEDY_SOUP]


def _own_method(asked: str, where: str) -> tuple[str, dict[str, Any]]:
    """Our name and the knobs written behind it (``ties,density=0.3``)."""
    name, *words = asked.split(",")
    name = name.strip().removeprefix("merge/")
    if name == GREEDY_SOUP or not _is_merge_method(f"merge/{name}"):
        known = _own_names()
        raise InputError(f"{where}: unknown method '{asked}'{nearest(name, known)} Known: {', '.join(known)}.")
    knobs: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise InputError(f"{where}: '{word}' is not of the form knob=value.")
        knobs[key.strip()] = value.strip()
    _parameters(knobs, f"merge/{name}", None, where, [])
    return f"merge/{name}", knobs


def _parameters(
    given: Any, method: str, dialect: MergekitMethod | None, where: str, notes: list[str]
) -> dict[str, Any]:
    """Parameters that the method has; those that only other methods have are noted and left out."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise InputError(f"{where} must be a mapping of names to values.")
    if dialect is not None:
        known = list(dialect.parameters)
        elsewhere = {name for other in MERGEKIT.values() for name in other.parameters} | set(NO_OPS)
    else:
        known = [knob_name(f) for f in method_class(method).__dataclass_fields__.values()]  # type: ignore[attr-defined]
        elsewhere = set()
    found = {}
    for name, setting in given.items():
        if name in known:
            check_setting(name, setting, where)
            found[name] = setting
        elif name in elsewhere:
            reason = NO_OPS.get(name, f"{dialect.name if dialect else method} does not use it")
            notes.append(f"The parameter '{name}' has no effect here: {reason}.")
        else:
            shown = dialect.name if dialect else method
            raise InputError(
                f"{where}: {shown} has no parameter '{name}'{nearest(name, known)} "
                f"It has: {', '.join(known) or 'none'}."
            )
    return found


def _model(item: Any, method: str, dialect: MergekitMethod | None, where: str, notes: list[str]) -> SliceSource:
    if isinstance(item, str):
        item = {"model": item}
    if not isinstance(item, Mapping) or "model" not in item:
        raise InputError(f"{where}: each of 'models' is a path or hub id, or has 'model' and 'parameters'.")
    unknown = sorted(set(item) - {"model", "parameters"})
    if unknown:
        raise InputError(
            f"{where}: unknown key '{unknown[0]}' of a model{nearest(unknown[0], ('model', 'parameters'))} "
            "Parameters of a model stand under 'parameters'."
        )
    reference = read_reference(item["model"], "a model", where)
    if reference is None:
        raise InputError(f"{where}: 'model' of one of 'models' is empty: give a path or a hub id.")
    return SliceSource(
        reference, parameters=_parameters(item.get("parameters"), method, dialect, f"{where}: {reference}", notes)
    )


def _slice(
    item: Any, base: ModelReference | None, method: str, dialect: MergekitMethod | None, where: str, notes: list[str]
) -> Slice:
    if not isinstance(item, Mapping) or not isinstance(item.get("sources"), list) or not item["sources"]:
        raise InputError(f"{where} needs 'sources', each with 'model' and 'layer_range'.")
    for key in set(item) - set(_SLICE_KEYS):
        if key == "residual_weight":
            notes.append("'residual_weight' has no effect here: mergekit ignores it too.")
        else:
            raise InputError(f"{where}: unknown key '{key}'{nearest(key, _SLICE_KEYS)}")
    sources = []
    for source in item["sources"]:
        if not isinstance(source, Mapping):
            raise InputError(f"{where}: each of 'sources' has 'model' and 'layer_range'.")
        unknown = sorted(set(source) - {"model", "layer_range", "parameters"})
        if unknown:
            raise InputError(
                f"{where}: unknown key '{unknown[0]}'{nearest(unknown[0], ('model', 'layer_range', 'parameters'))}"
            )
        layers = source.get("layer_range")
        if (
            not isinstance(layers, list) or len(layers) != 2
            or not all(isinstance(n, int) and not isinstance(n, bool) for n in layers) or not 0 <= layers[0] < layers[1]
        ):  # fmt: skip
            raise InputError(f"{where}: 'layer_range' is [first, behind the last], two numbers, the first smaller.")
        reference = read_reference(source.get("model"), "a model", where)
        if reference is None:
            raise InputError(f"{where}: each of 'sources' has 'model' and 'layer_range'.")
        parameters = _parameters(source.get("parameters"), method, dialect, f"{where}: {reference}", notes)
        sources.append(SliceSource(reference, layers[0], layers[1], parameters))
    counts = {source.stop - source.start for source in sources if source.start is not None and source.stop is not None}
    if len(counts) != 1:
        raise InputError(f"{where}: all sources of a slice must have the same number of layers.")
    own = read_reference(item.get("base_model"), "the base model", where)
    return Slice(tuple(sources), own or base, _parameters(item.get("parameters"), method, dialect, where, notes))
