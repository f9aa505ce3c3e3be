"""``fit --target``: the search restricted to what another program loads, and the result written in its form.

A job with a target runs in two steps under one claim: the fit itself, whose result lies in the scratch directory,
proved as always; then the export of that result, proved again, which is what appears under the output's name. Both
continue where an earlier run stopped.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from slimwright.checkpoint import Checkpoint, claim, copy_side_files, job_key, source_state, write_bytes_atomic
from slimwright.checkpoint.fingerprint import files_hash
from slimwright.errors import InputError
from slimwright.formats.compressed_tensors import CompressedTensors
from slimwright.formats.target import PlainTensors, TargetProfile
from slimwright.job.aim import Aim
from slimwright.job.export import WRITERS
from slimwright.job.exports.gguf import gguf_profile
from slimwright.job.exports.written import Result
from slimwright.job.open import open_source
from slimwright.job.request import AUTO, FINISHED, FitOptions, FitReport, finished_report
from slimwright.job.result import write_papers
from slimwright.model.discover import discover
from slimwright.model.structure import Structure
from slimwright.plan import Plan
from slimwright.search import Allocation, Option, search, smallest_cost
from slimwright.weights.activations import Activations

WORTH = 1.05
"""How much more loss may be predicted of a plan that others load than of the best one, for ``auto`` to take it."""

FORMS = ("compressed-tensors", "gguf")
"""Targets whose files are made from a result of ours."""

_SCRATCH = "fitted"


def aim_at(target: str, source: Checkpoint, structure: Structure, activations: str | None) -> Aim | None:
    """What a job with a target aims at; None where it is free (``auto``, and our own format).

    Raises:
        InputError: the model, or a rounding of activations, cannot be written there.
    """
    rounding = None if activations is None else Activations.parse(activations)
    profile: TargetProfile
    if target == "compressed-tensors":
        profile = CompressedTensors()
    elif target == "gguf":
        if rounding is not None:
            raise InputError("--activations is not for gguf: llama.cpp rounds inputs in its own way.")
        profile = gguf_profile(source, structure)
    elif target == "safetensors":
        return Aim(PlainTensors())
    else:
        return None
    aim = Aim(profile, rounding)
    if not any(aim.grids(sites) for sites in structure.choice_groups().values()):
        raise InputError(f"No weight of this {structure.family} model can be packed as {target}: use another target.")
    return aim


def aims_of_auto(
    source: Checkpoint, structure: Structure, activations: str | None, note: Callable[[str], None]
) -> list[Aim]:
    """The targets that ``auto`` considers, in order of preference."""
    found = []
    for target in FORMS:
        if target == "gguf" and importlib.util.find_spec("gguf") is None:
            note("--target auto leaves gguf out: the package gguf is not installed.")
            continue
        try:
            aim = aim_at(target, source, structure, activations)
        except InputError as error:
            note(f"--target auto leaves {target} out: {error}")
            continue
        assert aim is not None
        found.append(aim)
    return found


@dataclass(frozen=True)
class TargetOptions:
    """What a target allows of the options of a free search: cost there by the option's key, and bytes of the rest."""

    aim: Aim
    costs: Mapping[str, int]
    rest: int

    def restricted(self, table: Mapping[str, Sequence[Option]]) -> dict[str, list[Option]]:
        """The options that are legal there, with their costs there."""
        return {
            scope: [dataclasses.replace(o, cost=self.costs[o.key]) for o in options if o.key in self.costs]
            for scope, options in table.items()
        }


def chosen(
    free: Allocation,
    table: Mapping[str, list[Option]],
    budget: int,
    alternatives: Sequence[TargetOptions],
    solver: str,
    note: Callable[[str], None],
) -> tuple[Allocation, str]:
    """The best allocation in a form that others load, where it loses at most 5 % more than ``free``; else that.

    Args:
        free: the best of all.

    Returns:
        The allocation and the target's name, ``slimwright`` where it is in no form of others.
    """
    for other in alternatives:
        name, legal = other.aim.profile.name, other.restricted(table)
        if not all(legal.values()) or smallest_cost(legal) + other.rest > budget:
            note(f"--target auto: no plan that is legal as {name} fits the budget.")
            continue
        found = search(legal, budget - other.rest, solver=solver)
        if found.loss <= WORTH * free.loss:
            return found, name
        note(
            f"--target auto: the best plan that is legal as {name} is predicted to lose {found.loss / free.loss:.2f} "
            "times as much as the best of all, so it was not taken."
        )
    return free, "slimwright"


def fit_for_target(asked: FitOptions, run: Callable[[FitOptions], FitReport]) -> FitReport:
    """Run a job whose result is to be written in the form of another program.

    Args:
        run: the job, which writes our own format.
    """
    assert asked.out is not None
    source = open_source(asked.model)
    with claim(asked.out, job_key(source=source_state(source), recipe=asked.recipe(), target=asked.target)) as held:
        if held.status == "finished":
            return finished_report(held.out)
        inner = held.scratch / _SCRATCH
        try:
            report = run(dataclasses.replace(asked, out=str(inner), published_as=str(held.out)))
            made = open_source(str(inner))
            plan = Plan.load(inner / "plan.yaml")
            data = json.loads(json.dumps(report.data).replace(str(inner), str(held.out)))
            data["notes"] = [note for note in data["notes"] if not note.endswith(FINISHED)]
            if plan.target not in FORMS:
                _move(inner, held.partial)
                for name in ("README.md", "report.json", "report.html"):
                    text = (held.partial / name).read_text(encoding="utf-8").replace(str(inner), str(held.out))
                    write_bytes_atomic(held.partial / name, text.encode())
                held.publish()
                return FitReport(data, held.out)
            result = Result.of(made, discover(made, trust_remote_code=asked.trust_remote_code))
            directory = held.partial / made.model_path.relative_to(made.path)
            directory.mkdir(parents=True, exist_ok=True)
            writer = WRITERS[plan.target]
            written = writer(result, directory, held.out, asked.max_shard_bytes, asked.trust_remote_code)
        except InputError:
            if held.status == "new":
                shutil.rmtree(held.partial)
            raise
        copied = copy_side_files(made, held.partial)
        for name in ("plan.yaml", "events.jsonl"):
            shutil.copyfile(inner / name, held.partial / name)
        data |= {
            "target": {"name": plan.target, **dict(written.proof)},
            "size": {
                **data["size"], "after": written.nbytes, "tensors": written.tensor_bytes,
                "bits_per_weight": 8 * written.nbytes / data["model"]["parameters"],
            },
            "hash": files_hash(written.files),
            "how_to_load": written.how_to_load,
            "notes": [*data["notes"], *written.notes],
        }  # fmt: skip
        data.pop("kernels", None)
        write_papers(held, data, source, copied.copied, held.out.name)
        held.publish()
        return FitReport(data, held.out)


def _move(made: Path, partial: Path) -> None:
    """A finished result becomes the contents of another claim's directory."""
    for path in sorted(made.iterdir()):
        if path.name != "job.json":
            os.replace(path, partial / path.name)


def wants_target(asked: FitOptions) -> bool:
    """Whether a job's result is, or may be, written in the form of another program."""
    return asked.target in (AUTO, *FORMS) and not asked.dry_run
