"""Every solver at 4 and 3 bits in whole jobs: what the result loses on held-out text.

    python -m benchmarks.calibrated [MODEL ...] [--markdown] [--seeds 3]

MODEL is ``bundled``, ``minilm`` or the name of a zoo model (trained when first asked for); all if none is named.
Every weight is put on int4:g64 or int3:g64 (on the real zero point's where a solver needs that) by `fit --grid`,
calibrated on 16,384 tokens (the ViT on those of its digits that are neither for training nor held out; needs pillow and
scikit-learn). The loss is the KL divergence from the source in nats per token (per image), of an encoder without
logits one minus the mean cosine. What a model refuses (a rotation before LayerNorms) has a dash; what needs more
bits than the grid (a rotated tied head) has them in the table of all rows. The bundled model's GPTQ at 3 bits is
repeated with other data (``--seeds``): each must lose at most 0.7 times what rounding loses.
"""

from __future__ import annotations

import argparse
import atexit
import json
import shutil
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import slimwright
from benchmarks.common import Row, exit_code, publish, scratch
from slimwright.errors import InputError
from slimwright.zoo import bundled_path, minilm_path, model
from slimwright.zoo.recipes import RECIPES
from slimwright.zoo.text import part_of, standard_library

GRIDS = ("int4:g64", "int3:g64")
TOKENS = 16384
SOLVERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "rtn, min-max": ("quantize/rtn,clip=none", ()),
    "rtn": ("quantize/rtn", ()),
    "hqq, real zero": ("quantize/hqq", ()),
    "imatrix": ("quantize/imatrix", ()),
    "awq (clip only)": ("quantize/awq", ()),
    "awq": ("quantize/awq", ("fold/awq",)),
    "fold/smoothquant_plus + rtn, min-max": ("quantize/rtn,clip=none", ("fold/smoothquant_plus",)),
    "adaquant": ("quantize/adaquant", ()),
    "gptq of the paper": ("quantize/gptq,clip=none,act_order=false", ()),
    "gptq": ("quantize/gptq", ()),
    "fold/awq + gptq": ("quantize/gptq", ("fold/awq",)),
    "ldlq": ("quantize/ldlq", ()),
    "decoupleq, real zero": ("quantize/decoupleq", ()),
    "fold/rotation + gptq": ("quantize/gptq", ("fold/rotation",)),
    "rsq": ("quantize/rsq", ("fold/rotation",)),
    "rsq, equal weights": ("quantize/rsq,r_min=1", ("fold/rotation",)),
}
"""Method, and what is done to the model before."""

REAL = ("quantize/hqq", "quantize/decoupleq")
MODELS = ("bundled", "minilm", *(name for name, recipe in RECIPES.items() if not recipe.fine_tune))


def path_of(name: str) -> Path:
    """The directory of a model."""
    return bundled_path() if name == "bundled" else minilm_path() if name == "minilm" else model(name)


@cache
def digits() -> Path:
    """The zoo's digits as a user would give them, images and labels: ``calibrate.jsonl`` and ``heldout.jsonl``."""
    from PIL import Image
    from sklearn.datasets import load_digits

    folder = Path(tempfile.mkdtemp(prefix="slimwright-bench-digits-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    found = load_digits()
    lines: dict[str, list[str]] = {"calibrate": [], "heldout": [], "train": []}
    for index, (image, label) in enumerate(zip(found.images, found.target, strict=True)):
        Image.fromarray((image * (255 / 16)).round().astype("uint8")).save(folder / f"{index}.png")
        row = json.dumps({"image": f"{index}.png", "label": int(label)})
        lines[part_of(f"digits:{index}")].append(row)
    for part, rows in lines.items():
        (folder / f"{part}.jsonl").write_text("\n".join(rows))
    return folder


@cache
def heldout_text() -> Path:
    """Held-out text of the standard library as a user would give it, on which an encoder's cosine is measured."""
    folder = Path(tempfile.mkdtemp(prefix="slimwright-bench-text-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    rows = [json.dumps({"text": document.text[:4000]}) for document in standard_library("heldout")]
    (folder / "heldout.jsonl").write_text("\n".join(rows))
    return folder / "heldout.jsonl"


def lost(name: str, grid: str, method: str, folder: Path, **options: Any) -> Row:
    """One job: what its result loses, with the interval, and how long it took."""
    real = ":real" if method.split(",", maxsplit=1)[0] in REAL else ""
    folds = options.pop("folds", ())
    needs_none = method.split(",", maxsplit=1)[0] in ("quantize/rtn", "quantize/hqq") and not folds
    without = {"data": "none"} if needs_none else {}
    if name == "minilm":
        without["eval_data"] = str(heldout_text())
    if name == "vit":
        without = {"data": str(digits() / "calibrate.jsonl"), "eval_data": str(digits() / "heldout.jsonl")}
    started = time.perf_counter()
    report = slimwright.fit(
        str(path_of(name)), str(folder), grid=grid + real, method=method, quiet=True, folds=folds or ("none",),
        **{"calibration_tokens": TOKENS, **without, **options},
    )  # fmt: skip
    quality, data = report["quality"], report["calibration"]
    if "kl" in quality:
        loss, low, high = (quality["kl"][key] for key in ("value", "low", "high"))
    else:
        loss, high, low = (1 - quality["cosine_mean"][key] for key in ("value", "low", "high"))
    return {
        "figure": "KL" if "kl" in quality else "1 - cosine", "loss": loss, "low": low, "high": high,
        "bits": report["size"]["bits_per_weight"], "seconds": time.perf_counter() - started,
        "calibration": data if isinstance(data, str) else data["kind"],
    }  # fmt: skip


def table(names: list[str]) -> list[Row]:
    """One row per model, grid and solver."""
    rows: list[Row] = []
    for name in names:
        for grid in GRIDS:
            for solver, (method, folds) in SOLVERS.items():
                with scratch("calibrated") as folder:
                    try:
                        row = lost(name, grid, method, folder / "out", folds=folds)
                    except InputError as error:
                        row = {"refused": str(error)}
                row = {"model": name, "grid": grid, "solver": solver} | row
                rows.append(row)
                print(json.dumps(row), flush=True)
    return rows


def seeds(count: int, rows: list[Row]) -> list[Row]:
    """GPTQ at 3 bits on the bundled model with the data of several seeds, against rounding."""
    plain = next(r["loss"] for r in rows if (r["model"], r["grid"], r["solver"]) == ("bundled", "int3:g64", "rtn"))
    found = []
    for seed in range(count):
        with scratch("calibrated") as folder:
            row = lost("bundled", "int3:g64", "quantize/gptq", folder / "out", seed=seed)
        row |= {"model": "bundled", "grid": "int3:g64", "solver": f"gptq, seed {seed}", "of_rtn": row["loss"] / plain}
        found.append(row | {"ok": row["of_rtn"] <= 0.7})
        print(json.dumps(found[-1]), flush=True)
    return found


def markdown(rows: list[Row]) -> str:
    """A table per grid: solvers down, models across."""
    lines = []
    models = list(dict.fromkeys(row["model"] for row in rows))
    by = {(row["model"], row["grid"], row["solver"]): row for row in rows}
    for grid in GRIDS:
        lines += [f"`{grid}`:", "", f"| solver | {' | '.join(models)} |", "|---|" + "---|" * len(models)]
        for solver in SOLVERS:
            found = [by.get((name, grid, solver), {"loss": None}) for name in models]
            cells = ["–" if "refused" in row else "" if row["loss"] is None else f"{row['loss']:.3g}" for row in found]
            lines.append(f"| {solver} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("models", nargs="*", help=", ".join(MODELS))
    arguments.add_argument("--markdown", action="store_true", help="print the tables of docs/solvers.md")
    arguments.add_argument("--seeds", type=int, default=3, help="how often GPTQ is repeated on the bundled model")
    options = arguments.parse_args()
    started = time.time()
    rows = table(options.models or list(MODELS))
    if "bundled" in (options.models or MODELS):
        rows += seeds(options.seeds, rows)
    if options.markdown:
        print(markdown(rows))
    columns = {
        "model": "model", "grid": "grid", "solver": "solver", "figure": "figure", "loss": "loss", "low": "low",
        "high": "high", "bits": "bits", "of_rtn": "of rtn's", "calibration": "calibrated on", "seconds": "s",
        "ok": "ok",
    }  # fmt: skip
    return exit_code(publish("calibrated", rows, columns, started))


if __name__ == "__main__":
    sys.exit(main())
