"""What can be dropped of every family of tests/families.py, and the proof: ``python -m benchmarks.drops [NAME ...]``.

Each family is written without some of its sublayers (the first attention and the last MLP of every stack), without all
of them, and without its last block; plain ``from_pretrained`` of each must equal the dense model whose output
projections are zero: uncached, cached, padded, with a static cache, and generating. The table of docs/families.md is
written between its markers when all families run.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
import transformers

from benchmarks.common import Row, exit_code, publish, scratch
from slimwright.checkpoint import Checkpoint
from slimwright.errors import InputError
from slimwright.model.discover import discover
from slimwright.model.shorten import shortened
from slimwright.model.surgery import Droppable
from tests.families import FAMILIES, cached
from tests.runtime import dropping

DOCUMENT = Path("docs/families.md")
BEGIN, END = "<!-- drops: begin -->", "<!-- drops: end -->"


def check(name: str) -> Row:
    """One family: what can be dropped, and what was wrong with it."""
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    found, problems = dropping.found(name), list[str]()
    sublayers = [drop for drop in found.drops.values() if not drop.whole_block]
    some = dropping.some(sublayers)
    for what, drops in {"some": some, "all": sublayers}.items():
        if not drops:
            continue
        with scratch(f"{name}-{what}") as folder:
            try:
                dropping.check(name, *dropping.write(cached(name, torch.float32), folder, drops))
            except Exception as error:
                problems.append(f"{what}: {type(error).__name__} {str(error).strip()[:200]}")
    return {
        "family": name,
        "attention": _ways(found, True),
        "mlp": _ways(found, False),
        "blocks": _blocks(name, found),
        "problems": "; ".join(problems),
        "ok": not problems,
    }


def _ways(found: Droppable, attention: bool) -> str:
    """The modules that can be dropped, without their blocks' names, or why none can."""
    names = {
        path.removeprefix(drop.block + ".")
        for drop in found.drops.values()
        if not drop.whole_block and drop.attention == attention
        for path in [next(iter(drop.forms))]
    }
    return ", ".join(f"`{name}`" for name in sorted(names)) or "no"


def _blocks(name: str, found: Droppable) -> str:
    checkpoint = Checkpoint.open(cached(name, torch.float32))
    structure = discover(checkpoint)
    good, reasons = 0, []
    blocks = [drop for drop in found.drops.values() if drop.whole_block]
    for drop in blocks:
        try:
            shortened(checkpoint, structure, {drop.block: drop.name}, drop.tensors)
            good += 1
        except InputError as error:
            reasons.append(str(error).partition(": ")[2].rstrip("."))
    total = sum(len(stack.blocks) for stack in structure.stacks)
    refused = [why for where, why in found.refused.items() if "block" in why or "runs it" in why]
    return f"{good} of {total}" + (f" ({(reasons + refused)[0]})" if good < total and reasons + refused else "")


def main() -> int:
    started, names = time.time(), sys.argv[1:] or list(FAMILIES)
    rows = [check(name) for name in names]
    if len(names) == len(FAMILIES):
        _write_document(rows)
    columns = {name: name for name in ("family", "attention", "mlp", "blocks", "problems", "ok")}
    publish("drops", rows, columns, started)
    return exit_code(rows)


def _write_document(rows: list[Row]) -> None:
    lines = ["| family | attention | MLP or other | whole blocks |", "|---|---|---|---|"]
    lines += [f"| {row['family']} | {row['attention']} | {row['mlp']} | {row['blocks']} |" for row in rows]
    text = DOCUMENT.read_text()
    head, tail = text.partition(BEGIN)[0], text.partition(END)[2]
    DOCUMENT.write_text(f"{head}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{tail}")


if __name__ == "__main__":
    sys.exit(main())
