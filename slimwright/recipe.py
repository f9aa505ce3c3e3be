"""``slimwright run``: a recipe of named steps, each a verb on models or on the results of other steps.

::

    recipe: 1
    steps:
      merged:  {merge: merge.yaml}          # or the merge itself, instead of a file's name
      small:   {fit: merged, size: 4.25bit, rules: ["lm_head: keep"]}
      dense:   {export: small, to: safetensors}
      figures: {measure: [small], reference: merged, data: {chat: chat.jsonl}}

A model that is called as a step is that step's result. Every result lies in OUT under its step's name, and a step that
is finished is not done again, so that an interrupted recipe goes on where it was.
"""

from __future__ import annotations

import difflib
import importlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import yaml

from slimwright.checkpoint import Checkpoint, job_key, write_bytes_atomic, write_json_atomic
from slimwright.errors import InputError, did_you_mean

RECIPE_VERSION = 1
VERBS = ("fit", "merge", "export", "measure")
STATE = ".recipe.json"


@dataclass(frozen=True)
class Step:
    """One step: a verb, what it is done to, and its options.

    Attributes:
        subject: a model, several (``measure``), or what is merged.
        needs: names of the steps whose results it takes.
    """

    name: str
    verb: str
    subject: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class RecipeReport:
    """What was done: ``data`` is recipe.json in ``out`` (None after a dry run)."""

    data: dict[str, Any]
    out: Path | None

    def __getitem__(self, key: str) -> Any:
        return self.data[key]


def run(
    recipe: str | Path | Mapping[str, Any], out: str | Path | None = None, *, dry_run: bool = False, quiet: bool = False
) -> RecipeReport:
    """Do a recipe's steps in the order that they need.

    Args:
        recipe: a YAML file, or the mapping that it would hold.
        out: directory for the results, one directory a step, and ``recipe.json`` and ``recipe.html`` over all of them.
        dry_run: only say what would be done, with the forecast of the steps whose inputs are there already.
        quiet: without progress bars.

    Raises:
        InputError: no recipe, an unknown verb, option or step, steps that need each other; nothing was done.
        SlimwrightError: a step failed; what was finished is kept for the next run.
    """
    steps = read_recipe(recipe)
    if out is None and not dry_run:
        raise InputError("Give --out, the directory for the results of the steps.")
    folder = Path(out) if out is not None else Path(".")
    started, done = time.monotonic(), list[dict[str, Any]]()
    state = _state(folder)
    for step in steps:
        there = all((folder / need).is_dir() for need in step.needs)
        if dry_run and not (there and step.verb in ("fit", "merge")):
            waits = f"after {', '.join(step.needs)}" if not there else "no forecast"
            done.append({"step": step.name, "verb": step.verb, "forecast": waits})
            continue
        found = _VERBS[step.verb](step, folder, dry_run, quiet, state)
        done.append({"step": step.name, "verb": step.verb, **found})
    data = {
        "format_version": RECIPE_VERSION, "dry_run": dry_run, "steps": done, "seconds": time.monotonic() - started,
    }  # fmt: skip
    if dry_run:
        return RecipeReport(data, None)
    from slimwright.report.recipe import render_recipe

    write_json_atomic(folder / "recipe.json", data)
    write_bytes_atomic(folder / "recipe.html", render_recipe(data, folder.absolute().name).encode())
    return RecipeReport(data, folder)


def read_recipe(recipe: str | Path | Mapping[str, Any]) -> list[Step]:
    """The steps in an order in which each comes after those it needs.

    Raises:
        InputError: it is no recipe, or its steps need each other.
    """
    data, where, base = recipe, "The recipe", Path(".")
    if not isinstance(recipe, Mapping):
        path = Path(recipe)
        where, base = f"The recipe {path}", path.parent
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            raise InputError(f"{where} cannot be read: {first}.") from None
    if not isinstance(data, Mapping) or not isinstance(data.get("steps"), Mapping) or not data["steps"]:
        raise InputError(f"{where} has no 'steps', a mapping of names to what is done.")
    if data.get("recipe", RECIPE_VERSION) != RECIPE_VERSION:
        raise InputError(f"{where} is of version {data['recipe']!r}; this slimwright reads {RECIPE_VERSION}.")
    unknown = sorted(set(map(str, data)) - {"recipe", "steps"})
    if unknown:
        raise InputError(f"{where} has the key '{unknown[0]}', which is not known; it has 'recipe' and 'steps'.")
    names = [str(name) for name in data["steps"]]
    steps = {name: _step(name, given, names, where, base) for name, given in zip(names, data["steps"].values())}
    try:
        order = list(TopologicalSorter({name: step.needs for name, step in steps.items()}).static_order())
    except CycleError as error:
        raise InputError(f"{where}: the steps {' → '.join(reversed(error.args[1]))} need each other.") from None
    # as written, where nothing says otherwise
    ready: list[str] = []
    while len(ready) < len(order):
        ready.append(next(n for n in names if n not in ready and all(need in ready for need in steps[n].needs)))
    return [steps[name] for name in ready]


def _step(name: str, given: Any, names: Sequence[str], where: str, base: Path) -> Step:
    if not name or "/" in name or name.startswith("."):
        raise InputError(f"{where}: '{name}' cannot be a step's name: a directory is called after it.")
    verbs = [verb for verb in VERBS if isinstance(given, Mapping) and verb in given]
    if len(verbs) != 1:
        near = [m for key in given for m in difflib.get_close_matches(str(key), VERBS, 1)] if _is_map(given) else []
        hint = f"; did you mean '{near[0]}'?" if near else "."
        raise InputError(f"{where}: the step '{name}' needs one of {', '.join(VERBS)}{hint}")
    verb = verbs[0]
    options = {str(key): value for key, value in given.items() if key != verb}
    known = _options_of(verb)
    for option in options:
        if option not in known:
            hint = did_you_mean(option, known, 0.4, otherwise=f"; it has: {', '.join(known)}.")
            raise InputError(f"{where}: the step '{name}' has the option '{option}', which {verb} has not{hint}")
    subject = given[verb]
    if verb == "merge" and isinstance(subject, str):
        from slimwright.job.merging.config import read_yaml

        subject = read_yaml(base / subject)
    if verb == "merge" and not _is_map(subject):
        raise InputError(f"{where}: the step '{name}' merges {subject!r}, which is neither a file nor a merge.")
    if verb == "measure":
        subject = [subject] if isinstance(subject, str) else subject
    wanted = list if verb == "measure" else Mapping if verb == "merge" else str
    if not isinstance(subject, wanted) or (verb == "measure" and not all(isinstance(m, str) for m in subject)):
        raise InputError(f"{where}: the step '{name}' is done to {subject!r}, which names no model.")
    models = _models(subject) + _models(options.get("reference"))
    for model in models:
        _check_misspelt(model, names, f"{where}: the step '{name}'")
    mentioned = set(models) & set(names)
    if name in mentioned:
        raise InputError(f"{where}: the step '{name}' needs itself.")
    return Step(name, verb, subject, options, tuple(n for n in names if n in mentioned))


def _check_misspelt(model: str, names: Sequence[str], where: str) -> None:
    """Refuse what is no model but nearly the name of a step: it would only fail when its turn has come.

    Raises:
        InputError: naming the step.
    """
    near = difflib.get_close_matches(model, names, 1, 0.8)
    if model in names or not near or "/" in model or Path(model).exists():
        return
    try:
        Checkpoint.open(model)
    except InputError:
        raise InputError(
            f"{where} is done to '{model}', which is no step and no model; did you mean the step '{near[0]}'?"
        ) from None


def _is_map(value: Any) -> bool:
    return isinstance(value, Mapping)


def _options_of(verb: str) -> list[str]:
    """Names of a verb's options; where it writes to is the recipe's matter."""
    if verb == "export":
        return ["to", "max_shard_bytes"]
    module, name = {
        "fit": ("slimwright.job.request", "FitOptions"),
        "merge": ("slimwright.job.merge", "MergeOptions"),
        "measure": ("slimwright.job.measure", "MeasureOptions"),
    }[verb]
    options = getattr(importlib.import_module(module), name)  # imported when it is used: each verb costs seconds
    return [f.name for f in fields(options) if f.name not in ("model", "out", "dry_run", "quiet", "data_digest")]


_MODEL_KEYS = ("model", "models", "base", "base_model", "reference", "path", "lora")
_TOKENIZER_KEYS = ("tokenizer", "tokenizer_source", "source")
"""Keys of a merge, or of options, under which a text names a model; of a tokenizer ``base`` and ``union`` are none."""


def _with_models(value: Any, change: Callable[[str], str], named: bool = True) -> Any:
    """A copy of a value with every text changed that names a model; in mappings, those under certain keys."""
    if isinstance(value, str):
        return change(value) if named else value
    if isinstance(value, Mapping):
        return {
            key: _with_models(
                item, change, key in _MODEL_KEYS or (key in _TOKENIZER_KEYS and item not in ("base", "union"))
            )
            for key, item in value.items()
        }
    return [_with_models(item, change, named) for item in value] if isinstance(value, list) else value


def _models(value: Any) -> list[str]:
    """Every model that a value names, adapters behind ``+`` apart."""
    found: list[str] = []

    def note(text: str) -> str:
        found.extend(text.split("+"))
        return text

    _with_models(value, note)
    return found


def _resolved(value: Any, step: Step, folder: Path) -> Any:
    """A value with the names of steps replaced by their directories."""

    def place(text: str) -> str:
        return "+".join(str(folder / part) if part in step.needs else part for part in text.split("+"))

    return _with_models(value, place)


# -- verbs ---------------------------------------------------------------------------------------------------------


def _fit(step: Step, folder: Path, dry_run: bool, quiet: bool, state: dict[str, str]) -> dict[str, Any]:
    from slimwright.job.fit import fit

    report = fit(
        _resolved(step.subject, step, folder), str(folder / step.name), dry_run=dry_run, quiet=quiet,
        **step.options,
    )  # fmt: skip
    if dry_run:
        return {"forecast": report["forecast"]}
    return {"bytes": report["size"]["after"], "quality": report["quality"], "seconds": report["job"]["seconds"]}


def _merge(step: Step, folder: Path, dry_run: bool, quiet: bool, state: dict[str, str]) -> dict[str, Any]:
    from slimwright.job.merge import merge

    report = merge(
        _resolved(step.subject, step, folder), folder / step.name, dry_run=dry_run, quiet=quiet, **step.options
    )  # fmt: skip
    if dry_run:
        return {"forecast": report["forecast"]}
    job = report.data.get("job") or {}
    return {"bytes": report["size"]["after"], "quality": {}, "seconds": job.get("seconds", 0.0)}


def _export(step: Step, folder: Path, dry_run: bool, quiet: bool, state: dict[str, str]) -> dict[str, Any]:
    from slimwright.job.export import export

    report = export(_resolved(step.subject, step, folder), out=str(folder / step.name), **step.options)
    return {"bytes": report["size"]["after"], "quality": {}, "seconds": report["job"]["seconds"]}


def _measure(step: Step, folder: Path, dry_run: bool, quiet: bool, state: dict[str, str]) -> dict[str, Any]:
    """Measure, unless the same was measured on the same results: this verb keeps no journal of its own."""
    from slimwright.job.measure import measure

    out = folder / step.name
    inputs = {need: _content(folder / need) for need in step.needs}
    key = job_key(subject=step.subject, options=dict(step.options), inputs=inputs)
    if state.get(step.name) != key or not (out / "measure.json").exists():
        if out.exists() and any(out.iterdir()):
            raise InputError(
                f"{out} holds another measurement than the step '{step.name}' asks for: remove it with `rm -r {out}`."
            )
        options = _resolved(dict(step.options), step, folder)
        measure(*_resolved(step.subject, step, folder), out=str(out), quiet=quiet, **options)
        state[step.name] = key
        write_json_atomic(folder / STATE, state)
    data = json.loads((out / "measure.json").read_text(encoding="utf-8"))
    figures = {model["name"]: model["quality"] for model in data["models"]}
    return {"bytes": None, "quality": {}, "measured": figures, "seconds": data.get("seconds", 0.0)}


def _content(directory: Path) -> str:
    """What tells one result from another: the hash of its weights, or a merge's fingerprint."""
    found = directory / "report.json"
    data = json.loads(found.read_text(encoding="utf-8")) if found.exists() else {}
    return str(data.get("hash") or (data.get("lineage") or {}).get("fingerprint", ""))


def _state(folder: Path) -> dict[str, str]:
    try:
        found = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}


_VERBS: dict[str, Callable[[Step, Path, bool, bool, dict[str, str]], dict[str, Any]]] = {
    "fit": _fit, "merge": _merge, "export": _export, "measure": _measure,
}  # fmt: skip
