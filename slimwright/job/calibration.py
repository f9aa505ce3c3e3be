"""The data of a job: whether it calibrates, on what, and the batches that the walks run on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from slimwright.calibrate.data import GENERIC, Document, fingerprint, split
from slimwright.calibrate.feeding import TEXT, Feed, fed, load_processor, ordered
from slimwright.calibrate.tokens import RANDOM, samples, sequence_length
from slimwright.checkpoint import Checkpoint
from slimwright.errors import InputError
from slimwright.evaluate.accuracy import class_indices, labels_of
from slimwright.job.build import Calibration
from slimwright.job.held_out import given_documents, load_reader
from slimwright.job.request import FitOptions
from slimwright.methods import Method, parse_method
from slimwright.model.skeleton import skeleton
from slimwright.model.structure import Structure
from slimwright.plan import CALIBRATED_METHOD, group_folds

TOKEN_PARAMETERS = 3e12
"""Tokens times parameters that calibration takes by default, between the two numbers below."""

LEAST_TOKENS, MOST_TOKENS = 16384, 65536

LOOKED_AT = 1000
"""Images or sounds kept for evaluation that are decoded before work starts: more than are measured on."""


def with_data(
    asked: FitOptions, source: Checkpoint, structure: Structure, note: Callable[[str], None]
) -> tuple[FitOptions, list[Document]]:
    """The request with its open choices made (method, data, tokens), and the documents for the solvers.

    A job calibrates unless it was asked not to (``--data none``, or a method that needs no data and no data given), or
    there is no data of what the model reads and nothing forces it to.

    Args:
        note: told what a user should know of the data.

    Raises:
        InputError: the data cannot be used: not there, empty, unreadable, or not what the model reads.
    """
    model = skeleton(source.config, source.model_path, source.tensors, asked.trust_remote_code)
    kept: list[Document] = []
    if asked.eval_data is not None:  # refused now rather than after the work
        reader = _reader(asked, source, model, "eval_data")
        kept = given_documents(asked.eval_data, model, note)
        _check_kept(asked.eval_data, model, reader, kept, asked)
    methods: list[Method] = [parse_method(asked.method)] if asked.method is not None else []
    if asked.given_plan is not None:
        methods += [
            assignment.solver()
            for group, assignment in asked.given_plan.assignments.items()
            if assignment.method and not assignment.kept and group not in structure.castable
        ]
    methods += [fold for _, fold in group_folds(asked.edits())]
    needs = any(method.needs for method in methods) or asked.needs_scales()
    if asked.data == "none":
        if needs:
            raise InputError("The plan's methods need data: give --data, or leave it out for generic text.")
        return asked, []
    if asked.data is None and methods and not needs:
        return replace(asked, data="none"), []
    given = asked.data not in (None, GENERIC)
    reader = _reader(asked, source, model, "data") if asked.data else load_reader(source, model)
    usable = reader is not None and (asked.data is not None or fed(model) == TEXT)
    if not usable and not needs:
        return replace(asked, data="none"), []
    found = given_documents(asked.data or GENERIC, model, note) if usable else []
    if given:
        found, tenth = split(found)
        if not kept:
            _check_kept(str(asked.data), model, reader, tenth, asked)
    tokens = asked.calibration_tokens or int(
        min(MOST_TOKENS, max(LEAST_TOKENS, TOKEN_PARAMETERS / max(1, structure.parameters)))
    )
    data = asked.data or (GENERIC if usable else RANDOM)
    resolved = replace(
        asked, data=data, data_digest=fingerprint(found), method=asked.method or CALIBRATED_METHOD,
        calibration_tokens=tokens,
    )  # fmt: skip
    return resolved, found


def _reader(asked: FitOptions, source: Checkpoint, model: Any, option: str) -> Any:
    """What turns data into the model's inputs.

    Raises:
        InputError: it has none that loads.
    """
    if fed(model) != TEXT:
        return load_processor(source.model_path, fed(model))
    reader = load_reader(source, model)
    if reader is None:
        raise InputError(
            f"--{option.replace('_', '-')} {getattr(asked, option)} cannot be used: the model of {asked.model} has no "
            "tokenizer that loads; use --data none."
        )
    return reader


def _check_kept(data: str, model: Any, reader: Any, kept: Sequence[Document], asked: FitOptions) -> None:
    """Refuse now what evaluation would find after the work: labels that are no classes, images that cannot be read."""
    classes = class_indices(model)
    if classes:
        labels_of(data, kept, classes)
    if (classes or fed(model) != TEXT) and len({document.digest for document in kept}) < 2:
        raise InputError(
            f"The data {data} leaves one sample for evaluation, and an interval needs two: give more samples."
        )
    if fed(model) != TEXT:
        feed = Feed(model, reader, sequence_length(model.config, asked.calibration_length))
        for document in ordered(kept, asked.seed)[:LOOKED_AT]:
            feed.row(document)


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
        model, load_reader(source, model) if asked.data != RANDOM else None, found, tokens=asked.calibration_tokens,
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
        return ["Calibrated on random inputs: there is no generic data of what the model reads; give --data."]
    if facts["data"] == GENERIC:
        return ["Calibrated on generic text, the running Python's standard library: give --data for your own."]
    return []
