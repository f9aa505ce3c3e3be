"""What a job leaves behind beside the weights: report.json, report.html, the model card, the lines that load it."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
import transformers

import slimwright
from slimwright.checkpoint import (
    Checkpoint,
    Claim,
    model_card,
    read_card_metadata,
    write_bytes_atomic,
    write_json_atomic,
)
from slimwright.job.forecast import Forecast
from slimwright.job.ledger import Entry
from slimwright.job.verify import Outcome
from slimwright.model.structure import Structure
from slimwright.report import render_report
from slimwright.runtime.compute import kernel_name
from slimwright.weights import parse_form

REPORT_VERSION = 1


def quality_parts(outcome: Outcome) -> dict[str, Any]:
    """The report's part on quality, verification and samples."""
    streamed = "reloaded from disk by transformers in a fresh process; reference recomputed from the source, streamed"
    return {
        "quality": outcome.quality,
        "verified": {
            "how": streamed if outcome.how == "fresh process" else f"reloaded from disk in {outcome.how}",
            "ok": outcome.ok,
            "logits_error": outcome.logits_error,
            **({} if outcome.edits_error is None else {"edits_error": outcome.edits_error}),
            "tensors_compared": outcome.tensors_compared,
            "inputs": outcome.inputs,
        },
        "measured_on": {"inputs": outcome.inputs, **outcome.measured_on},
        "samples": outcome.samples,
    }


def size_parts(source: Checkpoint, written: Checkpoint, structure: Structure, entries: list[Entry]) -> dict[str, Any]:
    """The report's part on sizes, and the ledger."""
    return {
        "size": {
            "before": source.total_bytes,
            "after": written.total_bytes,
            "bits_per_weight": 8 * written.total_bytes / structure.parameters,
        },
        "ledger": [entry.to_json() for entry in entries],
    }


def kernel_parts(structure: Structure, entries: list[Entry]) -> dict[str, Any]:
    """Which code multiplies with the weights on this machine, and why: a line for each grid and reason."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for entry in entries:
        if entry.grid is None or entry.site not in structure.sites:
            continue
        grid, shape = parse_form(entry.grid), structure.sites[entry.site].weight_shape
        kernels = {str(dtype)[6:]: kernel_name(grid, shape, dtype) for dtype in (torch.float32, torch.bfloat16)}
        line = found.setdefault(
            (entry.grid, *kernels.values()), {"grid": entry.grid, **kernels, "weights": 0, "bytes": 0}
        )
        line["weights"] += 1
        line["bytes"] += entry.bytes
    return {"kernels": list(found.values())}


def predicted_parts(predicted: Forecast) -> dict[str, Any]:
    """What was forecast, for the report."""
    return {
        "seconds": predicted.seconds,
        "peak_memory_bytes": predicted.peak_memory_bytes,
        "bytes": predicted.bytes,
    }


def versions() -> dict[str, str]:
    """The versions that made the result."""
    return {
        "slimwright": slimwright.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def model_facts(path: str, structure: Structure) -> dict[str, Any]:
    """What the source is."""
    return {
        "path": path,
        "family": structure.family,
        "architecture": structure.architecture,
        "parameters": structure.parameters,
        "blocks": sum(len(stack.blocks) for stack in structure.stacks),
    }


def _in_words(quality: dict[str, Any]) -> str:
    """A quality with its interval; of one with a before and an after, both."""
    if "after" in quality:
        return f"{quality['before']['value']:.4g} → {_in_words(quality['after'])}"
    return f"{quality['value']:.4g} ({quality['low']:.4g} to {quality['high']:.4g})"


def write_papers(held: Claim, data: dict[str, Any], source: Checkpoint, side_files: tuple[str, ...], name: str) -> None:
    """Write README.md, report.json and report.html into the partial directory of the result ``name``."""
    path = str(data["model"]["path"])
    facts = [
        ("Base model", path),
        ("Size", f"{data['size']['before'] / 1e6:.1f} MB → {data['size']['after'] / 1e6:.1f} MB"),
        ("Bits per weight", f"{data['size']['bits_per_weight']:.2f}"),
        *((name, _in_words(quality)) for name, quality in data["quality"].items()),
        ("Weights hash", data["hash"]),
    ]
    card = model_card(
        name,
        facts=facts,
        load=data["how_to_load"],
        base_models=[path] if not Path(path).exists() else [],
        source_metadata=read_card_metadata(source.path),
        licence_files=[name for name in side_files if "licen" in name.lower()],
        library_name="sentence-transformers" if (held.partial / "modules.json").exists() else "transformers",
        warnings=data["notes"],
    )
    write_bytes_atomic(held.partial / "README.md", card.encode())
    write_json_atomic(held.partial / "report.json", data)
    write_bytes_atomic(held.partial / "report.html", render_report(data).encode())


def how_to_load(out: Path, inner: Path, source: Checkpoint, packed: bool) -> str:
    """The lines that load the result."""
    first = "import slimwright  # registers the packed format\n" if packed else ""
    if (source.path / "modules.json").exists():
        return (
            f"{first}from sentence_transformers import SentenceTransformer\nmodel = SentenceTransformer({str(out)!r})"
        )
    cls = (source.config.get("architectures") or ["AutoModel"])[0]
    auto = next(
        (
            a
            for a in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM")
            if cls.endswith(_TAILS[a])
        ),
        cls if hasattr(transformers, cls) else "AutoModel",
    )
    return f"{first}from transformers import {auto}\nmodel = {auto}.from_pretrained({str(out / inner)!r})"


_TAILS: dict[str, tuple[str, ...]] = {
    "AutoModelForCausalLM": ("ForCausalLM", "LMHeadModel"),
    "AutoModelForSeq2SeqLM": ("ForConditionalGeneration",),
    "AutoModelForMaskedLM": ("ForMaskedLM",),
}
