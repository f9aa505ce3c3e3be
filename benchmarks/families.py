"""Every family of tests/families.py fit to 40 % and proven: ``python -m benchmarks.families [NAME ...]``.

Each is made as a tiny random bf16 checkpoint, fit through the public API with the whole verification in a fresh
process, loaded again with plain ``from_pretrained``, made to generate with and without a cache, and saved again. The
table of docs/families.md is written between its markers when all families run.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

import slimwright
from benchmarks.common import Row, exit_code, publish, scratch
from slimwright.model.inputs import dummy_inputs
from tests.families import FAMILIES, build

SIZE = "40%"
LARGER = {"jetmoe": "90%", "llama4": "60%"}
"""Families of which more than 40 % is kept as it is, because their experts do not follow transformers' interface."""
WORKERS = 3
NEW_TOKENS = 16
DOCUMENT = Path("docs/families.md")
BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"
LISTED_ROLES = {"embed", "q", "k", "v", "kv", "qkv", "o", "gate", "up", "gate_up", "down", "experts", "router", "head"}
"""Roles of DESIGN §5 that a weight can have; norms are vectors."""


def check(name: str) -> Row:
    """Fit one family and make every check; what failed is said in ``problems``."""
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    with scratch(name) as directory:
        source, out = build(name, directory / "source", torch.bfloat16), directory / "out"
        row: Row = {"family": name, "architecture": FAMILIES[name].model_class.__name__}
        problems: list[str] = []
        try:
            report = slimwright.fit(str(source), str(out), size=LARGER.get(name, SIZE), quiet=True).data
            row |= _facts(report, problems)
            row["generates"] = _generation(name, out, problems) if FAMILIES[name].generates else None
            row |= _saved_again(name, source, out, directory, problems)
        except Exception as error:
            problems.append(f"{type(error).__name__}: {error}")
        return row | {"problems": problems, "ok": not problems}


def _facts(report: dict[str, Any], problems: list[str]) -> Row:
    """What the report says, and whether it says enough."""
    used = report["size"]["after"] / report["budget"]["bytes"]
    if not report["verified"]["ok"]:
        problems.append("not verified")
    if not 0.99 <= used <= 1:
        problems.append(f"{100 * used:.2f} % of the size used")
    ledger = report["ledger"]
    kept = [line for line in ledger if line["state"] == "kept" and line["bytes"]]
    total = sum(line["bytes"] for line in ledger)
    by_reason: Counter[str] = Counter()
    for line in kept:
        by_reason[line["reason"].split(":")[0]] += line["bytes"]
    unpacked: dict[str, list[str]] = {}
    for line in kept:
        if line["role"] in LISTED_ROLES and line["reason"] not in ("bias", "norm", "vector"):
            unpacked.setdefault(line["reason"], []).append(line["site"])
    quality = next((key for key in ("kl", "cosine_mean") if key in report["quality"]), None)
    return {
        "parameters": report["model"]["parameters"],
        "bytes": report["size"]["after"],
        "used": used,
        "bits": report["size"]["bits_per_weight"],
        "how": report["verified"]["how"],
        "logits_error": report["verified"]["logits_error"],
        "inputs": report["verified"]["inputs"],
        "quality": quality,
        "quality_value": report["quality"][quality]["value"] if quality else None,
        "packed_weights": sum(1 for line in ledger if line["grid"]),
        "dense_share": sum(line["bytes"] for line in kept) / total,
        "dense_reasons": {reason: size / total for reason, size in by_reason.most_common()},
        "not_packed": unpacked,
        "seconds": report["job"]["seconds"],
    }


def _generation(name: str, out: Path, problems: list[str]) -> str:
    """Greedy generation in float32, cached against uncached."""
    model = FAMILIES[name].model_class.from_pretrained(out, dtype=torch.float32)
    inputs = {key: value for key, value in dummy_inputs(model).items() if key != "decoder_input_ids"}
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    uncached = model.generate(**inputs, **settings, use_cache=False)
    if name == "home_made":
        return "has no cache"
    cached = model.generate(**inputs, **settings, use_cache=True)
    if not torch.equal(cached, uncached):
        problems.append(f"{int((cached != uncached).sum())} of {uncached.numel()} tokens differ with a cache")
    return "equal"


def _tensors(directory: Path) -> dict[str, tuple[torch.dtype, torch.Tensor]]:
    """Dtype and bytes of every stored tensor."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                tensor = opened.get_tensor(name)
                found[name] = (tensor.dtype, tensor.contiguous().reshape(-1).view(torch.uint8))
    return found


def _changed(before: Path, after: Path) -> tuple[list[str], list[str]]:
    """Tensors and keys of config.json that differ between two directories."""
    old, new = _tensors(before), _tensors(after)
    tensors = [
        name
        for name in sorted(old.keys() | new.keys())
        if name not in old or name not in new or old[name][0] != new[name][0]
        or not torch.equal(old[name][1], new[name][1])
    ]  # fmt: skip
    first, second = (json.loads((d / "config.json").read_text()) for d in (before, after))
    keys = [key for key in sorted(first.keys() | second.keys()) if first.get(key, ...) != second.get(key, ...)]
    return tensors, keys


def _saved_again(name: str, source: Path, out: Path, directory: Path, problems: list[str]) -> Row:
    """Saving the loaded result changes nothing but what transformers changes in the plain source too."""
    cls = FAMILIES[name].model_class
    for start, end in ((out, "saved-packed"), (source, "saved-plain")):
        cls.from_pretrained(start).save_pretrained(directory / end)
    tensors, keys = _changed(out, directory / "saved-packed")
    plain_tensors, plain_keys = _changed(source, directory / "saved-plain")
    if wrong := sorted(set(tensors) - set(plain_tensors)):
        problems.append(f"saving again changes {len(wrong)} tensors, first {wrong[0]}")
    if wrong := sorted(set(keys) - set(plain_keys)):
        problems.append(f"saving again changes config.json at {', '.join(wrong)}")
    return {"resaved": "unchanged" if not tensors and not keys else "as plain", "resaved_plain_changes": tensors + keys}


def _collapsed(names: list[str]) -> str:
    """Names with their indices starred, each once, with how many there are."""
    counts = Counter(re.sub(r"\.\d+\.", ".*.", re.sub(r"\.\d+\.", ".*.", name)) for name in names)
    return ", ".join(f"`{name}`" + (f" ({count})" if count > 1 else "") for name, count in counts.items())


def document(rows: list[Row]) -> str:
    """The Markdown between the markers."""
    larger = ", ".join(f"{name} {size}" for name, size in LARGER.items())
    lines = [
        f"`python -m benchmarks.families` (torch {torch.__version__}, transformers {transformers.__version__}); tiny "
        f"random bf16 checkpoints, `--size {SIZE}` ({larger}). *Error* is the largest difference of an output, "
        "relative to the largest output, between the model that plain `from_pretrained` loads in float32 and the "
        "reference recomputed from the source. *Cache* compares greedy generation with and without one. *Dense* is "
        "the share of the result's bytes that stay as they were, and why.",
        "",
        "| family | class | used | bits | error | cache | saved again | dense |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        shares = row.get("dense_reasons", {})
        reasons = ", ".join(f"{reason} {100 * share:.1f}" for reason, share in shares.items())
        generates = row.get("generates") or "does not generate"
        lines.append(
            f"| {row['family']} | `{row['architecture']}` | {100 * row.get('used', 0):.2f} % "
            f"| {row.get('bits', 0):.2f} | {row.get('logits_error', 1):.1e} | {generates} | "
            f"{row.get('resaved', '')} | {100 * row.get('dense_share', 1):.1f} % ({reasons}) |"
            + ("" if row["ok"] else f" **{'; '.join(row['problems'])}**")
        )
    lines += ["", "Weights with a role that are not packed, by name:", ""]
    for row in rows:
        for reason, names in row.get("not_packed", {}).items():
            lines.append(f"- {row['family']}: {_collapsed(names)}: {reason}")
    changes = {row["family"]: row["resaved_plain_changes"] for row in rows if row.get("resaved_plain_changes")}
    lines += ["", "What transformers itself changes when it saves the plain source again (and so in the result):", ""]
    lines += [f"- {family}: {_collapsed(names)}" for family, names in changes.items()] or ["- nothing in any family"]
    return "\n".join(lines)


def write_document(rows: list[Row]) -> None:
    """Put the table between the markers."""
    text = DOCUMENT.read_text()
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    DOCUMENT.write_text(f"{head}{BEGIN}\n{document(rows)}\n{END}{tail}")


def main() -> list[Row]:
    started = time.time()
    names = [name for name in sys.argv[1:] if name in FAMILIES] or list(FAMILIES)
    os.environ["OMP_NUM_THREADS"] = "1"  # for the workers: small matrices, three processes
    with ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context("spawn")) as pool:
        rows = list(pool.map(check, names))
    if len(names) == len(FAMILIES):
        write_document(rows)
    columns = {
        "family": "family", "ok": "ok", "used": "used", "bits": "bits", "logits_error": "error",
        "generates": "cache", "resaved": "saved again", "dense_share": "dense", "seconds": "s", "problems": "problems",
    }  # fmt: skip
    shown = [{**row, "problems": "; ".join(row["problems"])} for row in rows]
    return publish("families", shown, columns, started, size=SIZE)


if __name__ == "__main__":
    sys.exit(exit_code(main()))
