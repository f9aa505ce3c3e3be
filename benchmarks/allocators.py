"""Allocators beside each other: what a loss estimate and a solver of budgets choose, and what it costs.

    python -m benchmarks.allocators [PART ...] [--models bundled] [--plans 30] [--workers 4] [--tokens 16384]

PART is ``table`` (every allocator at 3.25 bits), ``plans`` (predicted against measured KL over random plans) or
``grids`` (mixed precision against one grid at equal bytes); all if none is named. Every KL is of a model that was
really built, by the plan's own solver on the calibration's documents, and is measured on held-out text.
"""

from __future__ import annotations

import argparse
import json
import pickle
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from benchmarks.calibrated import path_of
from benchmarks.common import Row, exit_code, publish, scratch
from slimwright.checkpoint import Checkpoint, CheckpointWriter, Journal, entry_cost, overhead_bound, write_config_atomic
from slimwright.evaluate.bootstrap import interval, paired_interval
from slimwright.evaluate.divergence import compare_logits
from slimwright.job.build import build
from slimwright.job.calibration import calibrate, with_data
from slimwright.job.evaluator import Evaluator
from slimwright.job.held_out import held_out
from slimwright.job.losses import Probed, Scored, Scoring, loss_estimate
from slimwright.job.open import model_of, open_source
from slimwright.job.options import option_costs
from slimwright.job.probe import Probe
from slimwright.job.request import FitOptions
from slimwright.job.reuse import Reuse
from slimwright.job.source import plain_sources
from slimwright.job.units import keep_all, layout_of, plan_units
from slimwright.job.walked import WalkedModel, WrittenSource
from slimwright.model.discover import discover
from slimwright.plan import Assignment, Plan, parse_size
from slimwright.runtime.streamed import load_streamed
from slimwright.search import Option, prune_dominated, search

BITS = "3.25bit"
GRIDS = ("int3:g64", "int3:g128")
ALLOCATORS = (
    ("dp", "sensitivity"),
    ("milp", "sensitivity"),
    ("rate-distortion", "sensitivity"),
    ("closed-form", "sensitivity"),
    ("dp", "weight-error"),
    ("dp", "zd"),
    ("dp", "lim"),
    ("dp", "measured"),
    ("milp", "pairs"),
    ("evolutionary", "sensitivity"),
    ("evolutionary,start=uniform", "weight-error"),
)
HELD_OUT_TOKENS = 12_000
ALL_SIZES = (2.4, 6.0)
"""Bits of the random plans of mixed sizes, from the smallest to the largest."""


CHOSEN_SIZES = ("2.6bit", BITS, "4.25bit")
"""At which the chosen plan is measured too."""


class Subject:
    """A model with its options, the calibration's data, and the held-out text with the original's logits."""

    def __init__(self, name: str, tokens: int, folder: Path) -> None:
        self.path, self.folder = path_of(name), folder
        self.asked = FitOptions(model=str(self.path), size=BITS, calibration_tokens=tokens, statistics_cache="off")
        self.source = open_source(str(self.path))
        self.structure = discover(self.source)
        self.asked, found = with_data(self.asked, self.source, self.structure, lambda sentence: None)
        self.calibration, _ = calibrate(
            self.asked, self.source, self.structure, found, 4 << 30, folder, lambda sentence: None
        )  # fmt: skip
        budget = self.bytes_of(BITS)
        self.options = option_costs(self.source, self.structure, {}, self.asked.solver, budget)
        kept = plan_units(self.source, self.structure, keep_all(self.structure, ""))
        rest = [unit for unit in kept if unit.site is None and unit.name not in self.structure.castable]
        self.rest = sum(entry_cost(entry, budget) for unit in rest for entry in unit.entries)
        self.rest += overhead_bound(budget, self.asked.max_shard_bytes)
        cls, config = model_of(self.source, False)
        original = load_streamed(cls, self.source.model_path, config, plain_sources(self.source, self.structure))
        _, self.held = held_out(
            self.source, original, data="", eval_data="", tokens=HELD_OUT_TOKENS, batch_tokens=1024, seed=0
        )  # fmt: skip
        with torch.no_grad():
            self.logits = [original(**batch.inputs).logits.float() for batch in self.held]
        self._made = 0

    def bytes_of(self, size: str) -> int:
        return parse_size(size, self.structure.parameters)

    def evaluator(self) -> Evaluator:
        return Evaluator(self.source, self.structure, self.calibration, 2 << 30)

    def score(self, loss: str, evaluator: Evaluator) -> Scored:
        """The table of an estimate."""

        def probed() -> Probed:
            reuse = Reuse(self.source, self.calibration, 0, str(self.path), "")
            probe = Probe(self.source, self.structure, self.calibration, self.options, {}, lambda *_: None, reuse)
            return Probed(probe.run(), probe.by_batch)

        budget = self.bytes_of(BITS) - self.rest
        return loss_estimate(loss).score(
            Scoring(
                self.source, self.structure, self.options, budget, {}, lambda *_: None, self.calibration, probed,
                lambda: evaluator,
            )
        )  # fmt: skip

    def built(self, choices: Mapping[str, Assignment]) -> tuple[list[float], list[float], int]:
        """KL sums and tokens of each held-out document, and the bytes of the weight files, of a model that is built."""
        castable = set(self.structure.castable)
        plan = Plan(assignments={n: c for n, c in choices.items() if not (n in castable and c.kept)})
        units = plan_units(self.source, self.structure, plan)
        layout = layout_of(units, self.structure, self.asked.max_shard_bytes)
        out = self.folder / f"built-{self._made}"
        self._made += 1
        out.mkdir()
        write_config_atomic(out / "config.json", dict(self.source.config))
        with Journal.open(out / "journal", "key") as journal, CheckpointWriter(out, layout) as writer:
            build(self.source, self.structure, units, writer, journal, lambda *_: None, self.calibration)
        written, walked = Checkpoint.open(out), WalkedModel(self.source, self.structure, self.calibration)
        for name, assignment in plan.by_site(self.structure).items():
            if not assignment.kept:
                site = self.structure.sites[name]
                walked.sources[name].current = WrittenSource(written, site, assignment.parsed_grid())
            walked.sources[name].hold(torch.float32)
        sums, tokens = [], []
        with torch.no_grad():
            for batch, before in zip(self.held, self.logits, strict=True):
                after = walked.model(**batch.inputs).logits.float()
                for row in range(len(before)):
                    found = compare_logits(before[row, :-1], after[row, :-1])["kl"]
                    sums.append(float(found.sum()))
                    tokens.append(float(len(found)))
        return sums, tokens, layout.total_bytes


def assignments(choices: Mapping[str, Option]) -> dict[str, Assignment]:
    return {name: option.choice for name, option in choices.items()}


def random_plan(
    table: Mapping[str, list[Option]], budget: int, slack: float, rng: np.random.Generator
) -> dict[str, Option]:
    """Random options of the fronts, exchanged at random until their bytes lie within ``slack`` below the budget."""
    fronts = [prune_dominated(options) for options in table.values()]
    places = [int(rng.integers(len(front))) for front in fronts]
    for _ in range(1_000_000):
        total = sum(front[place].cost for front, place in zip(fronts, places, strict=True))
        if (1 - slack) * budget <= total <= budget:
            return {front[0].scope: front[place] for front, place in zip(fronts, places, strict=True)}
        scope = int(rng.integers(len(fronts)))
        place = int(rng.integers(len(fronts[scope])))
        if (place - places[scope]) * (-1 if total > budget else 1) > 0:
            places[scope] = place
    raise RuntimeError("No random plan meets the size.")


def measured(
    name: str, tokens: int, plans: Sequence[Mapping[str, Assignment]], workers: int, folder: Path
) -> list[Any]:
    """What :meth:`Subject.built` finds for each plan, in processes of their own."""
    file = folder / f"plans-{time.monotonic_ns()}.pickle"
    file.write_bytes(pickle.dumps((name, tokens, list(plans))))
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.allocators", "--worker", f"{file}:{index}:{workers}"],
            stdout=subprocess.PIPE, text=True,
        )
        for index in range(workers)
    ]  # fmt: skip
    found: dict[int, Any] = {}
    for child in children:
        output, _ = child.communicate()
        for line in output.splitlines():
            place, *result = json.loads(line)
            found[place] = result
    return [found.get(place) for place in range(len(plans))]


def work(spec: str) -> int:
    """A worker of :func:`measured`."""
    file, index, workers = spec.rsplit(":", 2)
    name, tokens, plans = pickle.loads(Path(file).read_bytes())
    with scratch("allocators") as folder:
        subject = Subject(name, tokens, folder)
        for place in range(int(index), len(plans), int(workers)):
            print(json.dumps([place, *subject.built(plans[place])]), flush=True)
    return 0


# -- parts -------------------------------------------------------------------------------------------------------------


def table_rows(name: str, options: argparse.Namespace, folder: Path) -> list[Row]:
    """Every allocator: what it needs, what it predicts, what is built of it."""
    subject = Subject(name, options.tokens, folder)
    scored: dict[str, tuple[Scored, Evaluator, float]] = {}
    rows: list[Row] = []
    plans = []
    for solver, loss in ALLOCATORS:
        started = time.perf_counter()
        if loss not in scored:
            evaluator = subject.evaluator()
            table = subject.score(loss, evaluator)
            scored[loss] = table, evaluator, time.perf_counter() - started
        table, evaluator, seconds = scored[loss]
        before, started = evaluator.evaluations, time.perf_counter()

        def evaluate(choices: Mapping[str, Option], tokens: int, draw: int, evaluator: Evaluator = evaluator) -> float:
            return evaluator(assignments(choices), tokens, draw).loss

        chosen = search(table.table, subject.bytes_of(BITS) - subject.rest, solver, table.pairs, evaluate)
        seconds += time.perf_counter() - started
        evaluates = solver.startswith("evolutionary") or loss_estimate(loss).measures
        used = evaluator.evaluations if evaluates else before
        rows.append(
            {
                "part": "table", "model": name, "search": solver, "loss": loss, "evaluations": used,
                "seconds": seconds, "predicted": chosen.loss if loss_estimate(loss).nats else None,
            }
        )  # fmt: skip
        plans.append(assignments(chosen.choices))
        print(json.dumps(rows[-1]), flush=True)
    for row, found in zip(rows, measured(name, options.tokens, plans, options.workers, folder), strict=True):
        if found is not None:
            row |= _kl(found)
            row["bits"] = 8 * found[2] / subject.structure.parameters
            row["ratio"] = row["kl"] / row["predicted"] if row["predicted"] else None
    first = rows[0]
    first["ok"] = 0.5 <= first.get("ratio", 0.0) <= 2
    return rows


def plan_rows(name: str, options: argparse.Namespace, folder: Path) -> list[Row]:
    """Predicted against measured KL: of plans of mixed sizes, and of plans near 3.25 bits."""
    subject = Subject(name, options.tokens, folder)
    table = subject.score("sensitivity", subject.evaluator()).table
    rng = np.random.default_rng(0)
    low, high = ALL_SIZES
    sizes = [f"{low + (high - low) * place / max(1, options.plans - 1)}bit" for place in range(options.plans)]
    kinds = {"mixed sizes": (sizes, 0.02, 0.9), "near 3.25 bit": ([BITS] * options.plans, 0.01, 0.7)}
    drawn = {
        kind: [random_plan(table, subject.bytes_of(size) - subject.rest, slack, rng) for size in wanted]
        for kind, (wanted, slack, _) in kinds.items()
    }
    drawn |= {
        f"chosen, {size}": [search(table, subject.bytes_of(size) - subject.rest).choices] for size in CHOSEN_SIZES
    }
    plans = [assignments(plan) for members in drawn.values() for plan in members]
    found = measured(name, options.tokens, plans, options.workers, folder)
    rows: list[Row] = []
    for kind, members in drawn.items():
        own, found = found[: len(members)], found[len(members) :]
        pairs = [
            (sum(option.loss for option in plan.values()), _kl(result)["kl"])
            for plan, result in zip(members, own, strict=True)
            if result is not None
        ]
        predicted, kl = np.array(pairs).T
        ratio = kl / predicted
        row = {
            "part": "plans", "model": name, "plans": kind, "count": len(pairs), "ratio": float(np.median(ratio)),
            "least": float(ratio.min()), "most": float(ratio.max()), "pairs": pairs,
        }  # fmt: skip
        if kind in kinds:
            rank = float(spearmanr(predicted, kl)[0])
            row |= {"rank": rank, "ok": rank >= kinds[kind][2]}
        else:
            row |= {"kl": float(kl[0]), "predicted": float(predicted[0]), "ok": bool(0.5 <= ratio[0] <= 2)}
        rows.append(row)
        print(json.dumps(rows[-1]), flush=True)
    return rows


def grid_rows(name: str, options: argparse.Namespace, folder: Path) -> list[Row]:
    """One grid everywhere, and the default search at just its bytes."""
    subject = Subject(name, options.tokens, folder)
    table = subject.score("sensitivity", subject.evaluator()).table
    groups = subject.structure.choice_groups()
    plans = []
    for grid in GRIDS:
        one = {group: Assignment(grid=grid, method=subject.asked.solver) for group in groups}
        units = plan_units(subject.source, subject.structure, Plan(assignments=one))
        nbytes = layout_of(units, subject.structure, subject.asked.max_shard_bytes).total_bytes
        plans += [one, assignments(search(table, nbytes - subject.rest).choices)]
    found = measured(name, options.tokens, plans, options.workers, folder)
    rows: list[Row] = []
    for place, grid in enumerate(GRIDS):
        single, mixed = found[2 * place], found[2 * place + 1]
        change = paired_interval((single[0], single[1]), (mixed[0], mixed[1]))
        row = {"part": "grids", "model": name, "grid": grid, "single": _kl(single)["kl"]} | _kl(mixed)
        row |= {"bytes": single[2], "mixed_bytes": mixed[2], "bits": 8 * single[2] / subject.structure.parameters}
        row |= {"change": change.value, "change_low": change.low, "change_high": change.high}
        rows.append(row | {"ok": change.high < 0 and mixed[2] <= single[2]})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def _kl(found: Sequence[Any]) -> dict[str, float]:
    estimate = interval(found[0], found[1])
    return {"kl": estimate.value, "low": estimate.low, "high": estimate.high}


PARTS = {"table": table_rows, "plans": plan_rows, "grids": grid_rows}


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("parts", nargs="*", help=", ".join(PARTS))
    arguments.add_argument("--models", nargs="+", default=["bundled", "qwen2"])
    arguments.add_argument("--plans", type=int, default=30, help="random plans of each kind")
    arguments.add_argument("--workers", type=int, default=max(1, torch.get_num_threads()))
    arguments.add_argument("--tokens", type=int, default=16_384, help="to calibrate on")
    arguments.add_argument("--worker", help=argparse.SUPPRESS)
    options = arguments.parse_args()
    torch.set_num_threads(1)
    if options.worker:
        return work(options.worker)
    started = time.time()
    rows: list[Row] = []
    for name in options.models:
        for part in options.parts or PARTS:
            with scratch("allocators") as folder:
                rows += PARTS[part](name, options, folder)
    columns = {
        "model": "model", "search": "search", "loss": "loss", "plans": "plans", "grid": "grid", "kl": "KL",
        "low": "low", "high": "high", "single": "one grid's KL", "predicted": "predicted",
        "ratio": "measured / predicted",
        "rank": "rank correlation", "evaluations": "evaluations", "seconds": "s", "bits": "bits", "ok": "ok",
    }  # fmt: skip
    return exit_code(publish("allocators", rows, columns, started))


if __name__ == "__main__":
    sys.exit(main())
