"""``measure``: models side by side on the same data, with paired intervals; each in a process of its own."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slimwright.calibrate.feeding import load_processor
from slimwright.checkpoint import write_bytes_atomic, write_json_atomic
from slimwright.errors import InputError, SlimwrightError
from slimwright.evaluate.harness import require_harness
from slimwright.evaluate.subject import KINDS, Subject, load_tokenizer, open_subject
from slimwright.job.compare import Measured, compare, score, speed_range
from slimwright.job.measuring import Spec
from slimwright.job.open import located
from slimwright.job.progress import Reporter
from slimwright.job.result import versions
from slimwright.job.sources import read_source
from slimwright.report.measure import render_measurement
from slimwright.sizes import parse_bytes

MEASURE_VERSION = 1
DTYPES = ("float32", "bfloat16", "float16", "auto")


@dataclass(frozen=True)
class MeasureOptions:
    """What ``measure`` can be asked, beside the models.

    Attributes:
        reference: what the others are compared with; None: the first model.
        data: sources by name, or ``NAME=SRC`` or ``SRC`` lines; none: the held-out part of the standard library.
        tasks: of lm-evaluation-harness, by name or YAML file.
        task_limit: documents of each task; None: all.
        text: how much text of each source is measured on, at most.
        repeats: fresh processes per model in which speed, load time and memory are taken; 0: none.
        dtype: that the models compute in.
        out: directory for measure.json and measure.html.
        seed: of the intervals' draws.
    """

    reference: str | None = None
    data: Mapping[str, str] | Sequence[str] = ()
    tasks: Sequence[str] = ()
    task_limit: int | None = None
    text: str = "64kB"
    repeats: int = 3
    dtype: str = "float32"
    out: str | None = None
    seed: int = 0
    trust_remote_code: bool = False
    quiet: bool = False


@dataclass(frozen=True)
class MeasureReport:
    """What was found: ``data`` is measure.json, ``out`` the directory it is in, if one was asked for."""

    data: dict[str, Any]
    out: Path | None

    def __getitem__(self, key: str) -> Any:
        return self.data[key]


def measure(*models: str, **options: Any) -> MeasureReport:
    """Measure models side by side.

    Args:
        models: directories, sentence-transformers directories, hub ids or zoo:NAME, all of one kind.
        options: fields of :class:`MeasureOptions`.

    Raises:
        InputError: something about the input cannot work.
        SlimwrightError: a measuring process died.
    """
    known = {field.name for field in dataclasses.fields(MeasureOptions)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise InputError(f"measure has no option '{unknown[0]}'; it has: {', '.join(sorted(known))}.")
    return _Measurement(tuple(map(str, models)), MeasureOptions(**options)).run()


class _Measurement:
    """One run of ``measure``."""

    def __init__(self, models: tuple[str, ...], asked: MeasureOptions) -> None:
        self.asked = asked
        self.notes: list[str] = []
        _check(models, asked)
        self.out = None if asked.out is None else _empty(Path(asked.out))
        first = models[0] if asked.reference is None else str(asked.reference)
        places = map(located, (first, *models))
        paths = list(dict.fromkeys(os.path.normpath(p) if os.path.isdir(p) else p for p in places))
        subjects = [open_subject(path, asked.trust_remote_code) for path in paths]
        self.subjects = dict(zip(_names(paths), subjects))
        self.reference = next(iter(self.subjects))
        kinds = {subject.kind for subject in subjects}
        if len(kinds) > 1:
            others = next(s for s in subjects if s.kind != subjects[0].kind)
            raise InputError(
                f"'{others.path}' is {KINDS[others.kind]} but '{subjects[0].path}' is {KINDS[subjects[0].kind]}: "
                "measure models of one kind at a time."
            )
        self.kind = kinds.pop()
        self._same_classes()
        if asked.tasks:
            if self.kind != "causal":
                raise InputError(f"--tasks needs causal language models, but '{first}' is {KINDS[self.kind]}.")
            require_harness()
        sources = _named(asked.data or ["stdlib"])

        def reader() -> Any:
            if self.kind == "vision":
                return load_processor(subjects[0].directory, frozenset({"image"}))
            return load_tokenizer(subjects[0])

        self._decoded = tempfile.TemporaryDirectory(prefix="slimwright-images-")  # until the measurement is dropped
        classes = {name: index for index, name in enumerate(subjects[0].classes)}
        nbytes, folder = parse_bytes(asked.text, "--text"), Path(self._decoded.name)
        self.sources = [
            read_source(name, source, self.kind, nbytes, classes, reader, folder) for name, source in sources.items()
        ]
        if self.kind != "vision":
            for subject in subjects:
                if not subject.sentence_transformer:
                    load_tokenizer(subject)  # one that does not load is better known before work starts
        self.context = min(subject.positions for subject in subjects)

    def _same_classes(self) -> None:
        classes = self.subjects[self.reference].classes
        for subject in self.subjects.values():
            if subject.classes != classes:
                raise InputError(
                    f"'{subject.path}' has other classes ({', '.join(subject.classes)[:100]}) than "
                    f"'{self.subjects[self.reference].path}' ({', '.join(classes)[:100]}): they cannot be compared."
                )

    def run(self) -> MeasureReport:
        asked, count = self.asked, len(self.subjects)
        sizes = {"quality": count, "speed": count * asked.repeats, "tasks": count * len(asked.tasks)}
        phases = {name: float(size) for name, size in sizes.items() if size}
        with (
            Reporter(phases, None, quiet=asked.quiet) as reporter,
            tempfile.TemporaryDirectory(prefix="slimwright-measure-") as scratch,
        ):
            self.scratch = Path(scratch)
            measured: dict[str, Measured] = {}
            reference: dict[str, Any] | None = None
            for name, found in self._each("quality", reporter):
                measured[name] = Measured.of(self.kind, self.sources, found, reference)
                reference = found if reference is None else reference
                self.notes += [f"{name}: {note}" for note in measured[name].notes]
            speeds: dict[str, list[dict[str, float]]] = {name: [] for name in self.subjects}
            for turn in range(asked.repeats):
                for name, found in self._each("speed", reporter, turn, asked.repeats):
                    speeds[name].append(found["speed"])
            if asked.tasks:
                for name, found in self._each("tasks", reporter):
                    measured[name].add_tasks(found["tables"])
        data = self._report(measured, speeds)
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            write_json_atomic(self.out / "measure.json", data)
            write_bytes_atomic(self.out / "measure.html", render_measurement(data).encode())
        return MeasureReport(data, self.out)

    def _each(
        self, mode: Any, reporter: Reporter, turn: int = 0, turns: int = 1
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Run one process for each model, one after another; yield what it found."""
        if turn == 0:
            reporter.begin(mode)
        sources = tuple(source.data() for source in self.sources)
        for index, (name, subject) in enumerate(self.subjects.items()):
            spec = Spec(
                mode, subject.path, str(self.scratch / f"{mode}-{index}"),
                None if name == self.reference else self.subjects[self.reference].path, sources, self.asked.dtype,
                self.context, torch.get_num_threads(), self.asked.seed, tuple(self.asked.tasks), self.asked.task_limit,
                self.asked.trust_remote_code,
            )  # fmt: skip
            yield name, run_process(spec)
            reporter.step(turn * len(self.subjects) + index + 1, turns * len(self.subjects))

    def _report(self, measured: dict[str, Measured], speeds: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
        seed = self.asked.seed
        return {
            "format_version": MEASURE_VERSION,
            "kind": self.kind,
            "reference": self.reference,
            "models": [
                {
                    **_facts(name, subject),
                    "quality": score(measured[name], seed),
                    "speed": speed_range(speeds[name]),
                }
                for name, subject in self.subjects.items()
            ],
            "differences": compare(measured, seed),
            "data": [source.facts() for source in self.sources],
            "settings": {
                "dtype": self.asked.dtype,
                "threads": torch.get_num_threads(),
                "context": self.context,
                "repeats": self.asked.repeats,
                "seed": seed,
                "tasks": list(self.asked.tasks),
                "task_limit": self.asked.task_limit,
            },
            "versions": versions(),
            "notes": list(dict.fromkeys(self.notes)),
        }


def run_process(spec: Spec) -> dict[str, Any]:
    """Run a spec in a fresh process; its result, with the path of its tensors under ``tensors``.

    Raises:
        InputError: what the process says is wrong with the input.
        SlimwrightError: it died.
    """
    path = Path(f"{spec.result}.json")
    path.write_text(json.dumps(spec.to_json()))
    Path(spec.result).unlink(missing_ok=True)
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see cli.py
    with open(f"{spec.result}.log", "w+", encoding="utf-8", errors="replace") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "slimwright.job.measuring", str(path)], stdout=log, stderr=log, env=environment
        )
        try:
            child.wait()
        except BaseException:
            child.kill()
            child.wait()
            raise
        if child.returncode != 0 or not Path(spec.result).exists():
            log.seek(0)
            last = (log.read().strip().splitlines() or ["no message"])[-1]
            raise SlimwrightError(f"The process that measured '{spec.model}' failed (exit {child.returncode}): {last}")
    return read_result(spec)


def read_result(spec: Spec) -> dict[str, Any]:
    """What a process wrote; InputError or SlimwrightError if it wrote an error."""
    found: dict[str, Any] = json.loads(Path(spec.result).read_text())
    if "error" in found:
        raise (InputError if found["input"] else SlimwrightError)(f"'{spec.model}': {found['error']}")
    return {**found, "tensors": f"{spec.result}.safetensors"}


def _check(models: Sequence[str], asked: MeasureOptions) -> None:
    if not models:
        raise InputError("Name at least one model to measure.")
    if asked.dtype not in DTYPES:
        raise InputError(f"--dtype '{asked.dtype}' is none of {', '.join(DTYPES)}.")
    if isinstance(asked.repeats, bool) or not isinstance(asked.repeats, int) or asked.repeats < 0:
        raise InputError(f"--repeats {asked.repeats} must be 0 or more.")
    if asked.task_limit is not None and asked.task_limit < 2:
        raise InputError(f"--task-limit {asked.task_limit} must be at least 2.")


def _empty(out: Path) -> Path:
    """The directory to write to, if that can be: it is empty, or can be made."""
    there = next(path for path in (out.absolute(), *out.absolute().parents) if os.path.lexists(path))
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(f"--out {out} cannot be written: {there} is no directory, or it is read-only.")
    if there == out.absolute() and any(out.iterdir()):
        raise InputError(f"--out {out} exists and is not empty: name another directory or remove it.")
    return out


def _named(data: Mapping[str, str] | Sequence[str]) -> dict[str, str]:
    """Sources by name; ``NAME=SRC``, or SRC named by its last part."""
    if isinstance(data, Mapping):
        return {str(name): str(source) for name, source in data.items()}
    found: dict[str, str] = {}
    for line in [data] if isinstance(data, str) else data:
        name, equals, source = line.partition("=")
        if not equals or "/" in name or not name:
            name, source = Path(line).stem or line, line
        if not source:
            raise InputError(f"--data '{line}' names no source: write NAME=SRC.")
        if name in found:
            raise InputError(f"Two sources are named '{name}': write --data NAME=SRC with different names.")
        found[name] = source
    return found


def _names(paths: Sequence[str]) -> list[str]:
    """The shortest endings of the paths that tell them apart."""
    parts = [Path(path).parts if Path(path).parts else (path,) for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return list(paths)


def _facts(name: str, subject: Subject) -> dict[str, Any]:
    return {
        "name": name,
        "path": subject.path,
        "architecture": subject.model_class.__name__,
        "parameters": subject.parameters,
        "bytes": subject.nbytes,
        "bits_per_weight": 8 * subject.nbytes / subject.parameters,
    }
