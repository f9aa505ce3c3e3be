"""What a merge leaves behind beside the weights: model card, ledger, lineage, and the configuration that made it."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

import slimwright
from slimwright.checkpoint import Checkpoint, Lineage, fingerprint, model_card, read_card_metadata
from slimwright.checkpoint.files import read_json_object
from slimwright.errors import InputError
from slimwright.job.merging.config import MergeConfig
from slimwright.job.merging.engine import Done
from slimwright.job.merging.plan import MergePlan, Unit
from slimwright.job.merging.sources import ModelReference
from slimwright.job.merging.targets import Inputs

_MAX_REPORT_BYTES = 64 << 20


def ledger(plan: MergePlan, done: Mapping[str, Done]) -> list[dict[str, Any]]:
    """One line a tensor of the result: what it was made of, how, and its bytes; then what no tensor was made of."""
    lines: list[dict[str, Any]] = []
    for unit in plan.units:
        lines.append(
            {
                "tensor": unit.entry.name,
                "state": "merged" if unit.method is not None else "copied",
                "reason": unit.reason,
                "method": unit.method.spec if unit.method is not None else None,
                "from": [f"{model}: {name}" for model, name in zip(unit.models, unit.names)],
                "dtype": str(unit.entry.dtype).removeprefix("torch."),
                "shape": list(unit.entry.shape),
                "bytes": unit.entry.nbytes,
            }
        )
    lines += [{"tensor": name, "state": "not read", "reason": why, "bytes": 0} for name, why in plan.unread.items()]
    return lines


def equal_inputs(plan: MergePlan, done: Mapping[str, Done]) -> list[ModelReference]:
    """The inputs that the whole result equals."""
    alike: dict[ModelReference, bool] = {}
    merged = merged_units(plan)
    for unit in merged:
        for model, equal in zip(unit.models, done[unit.entry.name].equal):
            alike[model] = alike.get(model, True) and equal
    return [model for model, equal in alike.items() if equal and all(model in unit.models for unit in merged)]


def lineage_of(checkpoint: Checkpoint) -> Lineage:
    """A model's lineage, with its ancestors where its own report tells of them."""
    own = fingerprint(checkpoint)
    try:
        report = read_json_object(checkpoint.path, checkpoint.path / "report.json", _MAX_REPORT_BYTES)
        told = Lineage.from_json(report.get("lineage"))
    except InputError:
        return Lineage(own)
    return told if told.fingerprint == own else Lineage(own)


def licence_notes(inputs: Inputs) -> tuple[dict[str, Any], list[str]]:
    """The card's metadata that the inputs agree on, and warnings about their licences."""
    cards = {reference: read_card_metadata(given.checkpoint.path) for reference, given in inputs.items()}
    licences = {str(reference): card.get("license") for reference, card in cards.items()}
    known = {licence for licence in licences.values() if licence}
    metadata = dict(next(iter(cards.values()), {}))
    notes = []
    without = [name for name, licence in licences.items() if not licence]
    if len(known) > 1:
        told = ", ".join(f"{licence} ({name})" for name, licence in licences.items() if licence)
        notes.append(f"The inputs have different licences, all of which hold for the result: {told}.")
        metadata = {key: value for key, value in metadata.items() if key not in ("license_name", "license_link")}
        metadata |= {"license": "other", "license_name": "several"}
    elif known:
        metadata["license"] = next(iter(known))
    if known and without:
        notes.append(f"No licence was found with {', '.join(without)}: find out what it allows before you share this.")
    return metadata, notes


def card(
    name: str, config: MergeConfig, inputs: Inputs, metadata: Mapping[str, Any], licence_files: Sequence[str],
    notes: Sequence[str], load: str, lines: Sequence[Mapping[str, Any]], relation: str = "merge",
) -> str:  # fmt: skip
    """The text of README.md."""
    merged = [line for line in lines if line["state"] == "merged"]
    facts = [
        ("Method", config.dialect.name if config.dialect else config.method.removeprefix("merge/")),
        ("Definitions", "mergekit's" if config.dialect else "the paper's"),
        *((f"Model {number}", str(reference)) for number, reference in enumerate(inputs, 1)),
        ("Base", str(config.base) if config.base else "none"),
        ("Tensors", f"{len(merged)} merged, {sum(line['state'] == 'copied' for line in lines)} copied"),
    ]
    return model_card(
        name,
        facts=facts,
        load=load,
        base_models=[reference.path for reference in inputs if not Path(reference.path).exists()],
        relation=relation,
        source_metadata=metadata,
        licence_files=licence_files,
        tags=("merge",),
        warnings=notes,
    )


def recipe_text(config: MergeConfig, seed: int) -> str:
    """The configuration as it was given, with the seed, to be run again."""
    head = "# Made by `slimwright merge`; run it again with the same command.\n"
    value = dict(config.source) if config.form == "mergekit" else {**config.source, "seed": seed}
    return head + yaml.safe_dump(json.loads(json.dumps(value, default=str)), sort_keys=False, allow_unicode=True)


def versions() -> dict[str, str]:
    """The versions that made the result."""
    return {"slimwright": slimwright.__version__, "torch": torch.__version__, "python": platform.python_version()}


def merged_units(plan: MergePlan) -> list[Unit]:
    """The units that a method merges."""
    return [unit for unit in plan.units if unit.method is not None]


def prepare(inputs: Inputs) -> tuple[tuple[Lineage, ...], Callable[[Mapping[str, Any], str], str]]:
    """What publishing needs and no tile does, so that it can be made while tiles stream: the inputs' lineages, and what
    renders report.html (its import takes a while)."""
    from slimwright.report.merge import render_merge

    return tuple(lineage_of(given.checkpoint) for given in inputs.values()), render_merge


def how_to_load(path: Path, like: Checkpoint, variants: Mapping[str, Any] | None) -> str:
    """Lines of Python that load a result, or restore a model of a store of many.

    Args:
        path: where the model will be.
        like: the model whose class it has.
        variants: what the report says of a store.
    """
    architecture = (like.config.get("architectures") or ["AutoModel"])[0]
    auto = "AutoModelForCausalLM" if str(architecture).endswith(("ForCausalLM", "LMHeadModel")) else "AutoModel"
    load = f"from transformers import {auto}\nmodel = {auto}.from_pretrained({str(path)!r})"
    if not variants:
        return load
    one = {"method": "passthrough", "models": [f"{path}+{variants['names'][0]}"]}
    return f"import slimwright\nslimwright.merge({one}, 'restored')  # or {', '.join(variants['names'][1:])}"


def how_to_adapt(path: Path) -> str:
    """Lines of Python that put an extracted adapter on its base."""
    return f"from peft import PeftModel\nmodel = PeftModel.from_pretrained(base, {str(path)!r})"
