"""What can be dropped of every family of tests/families.py, and the proof: ``python -m benchmarks.drops [NAME ...]``.

NAME is a family, or ``bundled``: of the bundled language model plans of drops, low rank and mixed grids together, given
and searched for (under a size, a floor, a memory, and with a packed cache), each generating alike cached and uncached,
compiled as one graph, and saved again unchanged.

Each family is written without some of its sublayers (the first attention and the last MLP of every stack), without all
of them, and without its last block; plain ``from_pretrained`` of each must equal the dense model whose output
projections are zero: uncached, cached, padded, with a static cache, and generating. The table of docs/families.md is
written between its markers when all families run.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import slimwright
from benchmarks.common import Row, exit_code, publish, scratch
from slimwright.checkpoint import Checkpoint
from slimwright.errors import InputError
from slimwright.job.request import FitOptions
from slimwright.job.running import measure_running
from slimwright.model.discover import discover
from slimwright.model.shorten import shortened
from slimwright.model.surgery import Droppable
from slimwright.plan import CALIBRATED_METHOD, method_on
from slimwright.sizes import parse_bytes
from slimwright.zoo import bundled_path
from tests.families import FAMILIES, cached
from tests.runtime import dropping

BUNDLED = "bundled"
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


FORMS = ("int4:g64", "int2:g64+lowrank:r16:int4:g64", "int3:g64", "lowrank:r64:int4:g64", "int8:g64", "keep")
"""Of the given plan, one group after another."""
SEARCHES: dict[str, dict[str, Any]] = {
    "searched, --size 2.2bit": {"size": "2.2bit"},
    "searched, --keep kl:0.4": {"keep": ("kl:0.4",)},
    "searched, --memory": {"memory": "", "context": 512, "batch": 4},
    "searched, --size 2.2bit --cache": {"size": "2.2bit", "cache": "cache/kivi,bits=4"},
}
CALIBRATION_TOKENS = 8192
WEIGHTS_BYTES = 2_500_000
"""What the memory leaves to the weights beside what the given plan's result takes for everything else."""


def combined() -> list[Row]:
    """The bundled model: a given plan, and what searches find."""
    source = str(bundled_path())
    groups = discover(Checkpoint.open(source)).choice_groups()
    plan = {
        "assignments": {
            name: {"grid": form, "method": method_on(form, CALIBRATED_METHOD)}
            for name, form in zip(groups, FORMS * len(groups))
        },
        "edits": [{"drop": "model.layers.1.self_attn"}, {"drop": "model.layers.3.mlp"}, {"drop": "model.layers.2"}],
    }
    rows = []
    with scratch("drops") as folder:
        (folder / "plan.yaml").write_text(yaml.safe_dump(plan))
        given: dict[str, Any] = {"plan": str(folder / "plan.yaml")}
        for number, (name, options) in enumerate({"given": given, **SEARCHES}.items()):
            out = folder / str(number)
            options = options if "plan" in options else {**options, "allow": ("drop",)}
            if "memory" in options:
                like = FitOptions(source, context=options["context"], batch=options["batch"])
                beside = measure_running(folder / "0", like, folder, low_memory=True)
                options["memory"] = f"{beside.anonymous + WEIGHTS_BYTES}B"
            report = slimwright.fit(source, str(out), calibration_tokens=CALIBRATION_TOKENS, quiet=True, **options)
            assigned = yaml.safe_load((out / "plan.yaml").read_text())
            problems = _alike(out, folder / f"{number}-again", packed_cache="cache" in options)
            running, memory = report.data.get("running"), options.get("memory")
            if running and not 0.93 * parse_bytes(memory, "") <= running["total"] <= parse_bytes(memory, ""):
                problems.append(f"it runs in {running['total']} bytes")
            rows.append(
                {
                    "family": f"bundled, {name}",
                    "attention": ", ".join(edit["drop"] for edit in assigned.get("edits", ())),
                    "forms": len({own["grid"] for own in assigned["assignments"].values()}),
                    "lowrank": sum("lowrank" in own["grid"] for own in assigned["assignments"].values()),
                    "bits": report["size"]["bits_per_weight"],
                    "kl": report["quality"]["kl"]["value"],
                    "problems": "; ".join(problems),
                    "ok": report["verified"]["ok"] and not problems,
                }
            )
            print(rows[-1], flush=True)
    return rows


@torch.no_grad()
def _alike(directory: Path, again: Path, packed_cache: bool) -> list[str]:
    """What differs between the ways to run a result, and between it and what it is saved as."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids, length = torch.arange(10, 42)[None], {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    problems = []
    if not packed_cache:  # which rounds keys and values
        uncached = model.generate(ids, **length, use_cache=False)
        for how in ("dynamic", "static"):
            if not torch.equal(model.generate(ids, **length, cache_implementation=how), uncached):
                problems.append(f"generates otherwise with a {how} cache")
    found = torch.compile(model, fullgraph=True, backend="eager")(ids).logits
    if not torch.allclose(found, model(ids).logits, atol=1e-4):
        problems.append("compiled, it gives something else")
    model.save_pretrained(again)
    before, after = (load_file(folder / "model.safetensors") for folder in (directory, again))
    if before.keys() != after.keys() or any(not torch.equal(tensor, after[name]) for name, tensor in before.items()):
        problems.append("saved again, it is another model")
    return problems


def main() -> int:
    started, names = time.time(), sys.argv[1:] or [*FAMILIES, BUNDLED]
    rows = [check(name) for name in names if name != BUNDLED]
    if len(rows) == len(FAMILIES):
        _write_document(rows)
    rows += combined() if BUNDLED in names else []
    columns = {
        name: name for name in ("family", "attention", "mlp", "blocks", "lowrank", "bits", "kl", "problems", "ok")
    }  # fmt: skip
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
