"""The zoo, trained or found in the cache: what each model reached, in how many seconds, and what rounding it costs.

    python -m benchmarks.zoo [NAME ...]

A model counts as good if its training took at most what two cores do in five minutes, and three bits cost it something
(what cannot lose measures nothing); a fine-tune if it is better than the bundled LM on the held-out text of its topic.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch

import slimwright
from benchmarks.common import Row, exit_code, publish, scratch
from slimwright.zoo.recipes import RECIPES
from slimwright.zoo.trained import record, trained

GRIDS = ("int4:g64", "int3:g64", "int2:g64")
MOST = 2 * 300.0  # processor seconds: two cores for five minutes, whatever else the machine does meanwhile


def row_of(name: str) -> Row:
    """Train a model or find it, and measure it again after rounding to each grid."""
    directory = trained(name)
    facts = record(directory)
    row: Row = {
        key: facts.get(key)
        for key in ("name", "metric", "parameters", "steps", "seconds", "processor_seconds", "before", "value")
    }
    sign = -1 if facts["higher_is_better"] else 1
    objective = RECIPES[name].objective()
    with scratch(f"zoo-{name}") as folder:
        for grid in GRIDS:
            out = folder / grid.replace(":", "-")
            slimwright.fit(str(directory), str(out), grid=grid, method="quantize/rtn", data="none")
            row[grid] = objective.figure(slimwright.load(out, dtype=torch.float32))
    gained = "before" not in facts or sign * (facts["before"] - facts["value"]) > 0
    row["ok"] = facts["processor_seconds"] <= MOST and gained and sign * (row["int3:g64"] - facts["value"]) > 0
    return row


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("names", nargs="*", help="of the models; all if none is named")
    started = time.time()
    rows = [row_of(name) for name in arguments.parse_args().names or RECIPES]
    columns = {
        "name": "model", "metric": "figure", "parameters": "parameters", "steps": "steps", "seconds": "s",
        "processor_seconds": "cpu s",
        "before": "before", "value": "trained", **{grid: grid for grid in GRIDS}, "ok": "ok",
    }  # fmt: skip
    return exit_code(publish("zoo", rows, columns, started))


if __name__ == "__main__":
    sys.exit(main())
