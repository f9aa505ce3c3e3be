"""The data of a job: whether it calibrates, on what, and the batches that the walks run on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from slimwright.calibrate.data import GENERIC, Document, documents, fingerprint, split
from slimwright.calibrate.tokens import RANDOM, reads_text, samples
from slimwright.checkpoint import Checkpoint
from slimwright.errors import InputError
from slimwright.job.build import Calibration
from slimwright.job.held_out import load_tokenizer
from slimwright.job.request import FitOptions
from slimwright.methods import GroupFold, Method, parse_method
from slimwright.model.skeleton import skeleton
from slimwright.model.structure import Structure
from slimwright.plan import CALIBRATED_METHOD, Plan

TOKEN_PARAMETERS = 3e12
"""Tokens times parameters that calibration takes by default, between the two numbers below."""

LEAST_TOKENS, MOST_TOKENS = 16384, 65536


def with_data(asked: FitOptions, source: Checkpoint, structure: Structure) -> tuple[FitOptions, list[Document]]:
    """The request with its open choices made (method, data, tokens), and the documents for the solvers.

    A job calibrates unless it was asked not to (``--data none``, or a method that needs no data and no data given), or
    the model reads no text and nothing forces it to.

    Raises:
        InputError: the data cannot be used: not there, empty, unreadable, or the model reads no text.
    """
    if asked.eval_data is not None:
        documents(asked.eval_data)  # refused now rather than after the work
    methods: list[Method] = [parse_method(asked.method)] if asked.method is not None else []
    if asked.plan is not None:
        plan = Plan.load(Path(asked.plan))
        methods += [
            assignment.solver()
            for group, assignment in plan.assignments.items()
            if assignment.method and not assignment.kept and group not in structure.castable
        ]
    methods += [fold for edit in asked.edits() if isinstance(fold := edit.fold(), GroupFold)]
    needs = any(method.needs for method in methods) or asked.needs_scales()
    if asked.data == "none":
        if needs:
            raise InputError("The plan's methods need data: give --data, or leave it out for generic text.")
        return asked, []
    if asked.data is None and methods and not needs:
        return replace(asked, data="none"), []
    model = skeleton(source.config, source.model_path, source.tensors, asked.trust_remote_code)
    usable = load_tokenizer(source) is not None and reads_text(model)
    if not usable and asked.data is not None:
        raise InputError(
            f"--data {asked.data} cannot be used: the model of {asked.model} reads no text, or has no tokenizer that "
            "loads; use --data none."
        )
    if not usable and not needs:
        return replace(asked, data="none"), []
    found = documents(asked.data or GENERIC) if usable else []
    if asked.data not in (None, GENERIC):
        found, _ = split(found)
    tokens = asked.calibration_tokens or int(
        min(MOST_TOKENS, max(LEAST_TOKENS, TOKEN_PARAMETERS / max(1, structure.parameters)))
    )
    data = asked.data or (GENERIC if usable else RANDOM)
    resolved = replace(
        asked, data=data, data_digest=fingerprint(found), method=asked.method or CALIBRATED_METHOD,
        calibration_tokens=tokens,
    )  # fmt: skip
    return resolved, found


def calibrate(
    asked: FitOptions,
    source: Checkpoint,
    structure: Structure,
    found: Sequence[Document],
    cap: int,
    scratch: Path,
    log: Callable[[str], None],
) -> tuple[Calibration, dict[str, Any]]:
    """The batches of a job, and what the report says of them.

    Args:
        asked: with its choices made.
        cap: bytes that the job may use; a quarter is for hidden states.
        scratch: directory for hidden states beyond that.
        log: told of the first sample.
    """
    assert asked.calibration_tokens is not None
    model = skeleton(source.config, source.model_path, source.tensors, asked.trust_remote_code)
    made = samples(
        model, load_tokenizer(source) if asked.data != RANDOM else None, found, tokens=asked.calibration_tokens,
        length=asked.calibration_length, seed=asked.seed,
        experts=any(site.kind == "experts" for site in structure.sites.values()),
    )  # fmt: skip
    log(f"Calibrating on {made.tokens} tokens of {made.kind} (SHA-256 {made.digest[:16]}).")
    if made.example:
        log(f"The first sample begins {made.example['token_ids']}: {made.example['text']!r}")
    facts = {"data": asked.data, "kind": made.kind, "tokens": made.tokens, "sha256": made.digest}
    return Calibration(made, cap // 4, scratch, asked.trust_remote_code, log), facts


def notes_on(facts: dict[str, Any]) -> list[str]:
    """What a user should know of the data that was used without being asked for."""
    if facts["data"] == RANDOM:
        return ["Calibrated on random inputs: the model reads no text that could be given."]
    if facts["data"] == GENERIC:
        return ["Calibrated on generic text, the running Python's standard library: give --data for your own."]
    return []
