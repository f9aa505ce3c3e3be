"""One model measured in a process of its own, so that its memory and its speed are its own.

Run as ``python -m slimwright.job.measuring SPEC.json``. It writes what it found to the file that the spec names: tables
and figures as JSON, vectors and logits as safetensors beside it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import psutil
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from slimwright.calibrate.data import Document
from slimwright.errors import InputError, SlimwrightError
from slimwright.evaluate.embed import embed, similarity_of
from slimwright.evaluate.harness import run_tasks
from slimwright.evaluate.language import Encoded, LanguageKind, encode, language_table, tokens_digest
from slimwright.evaluate.speed import OUTPUTS, PROMPT, generation_speed, sample_speed
from slimwright.evaluate.subject import Kind, Subject, load_model, load_tokenizer, open_subject
from slimwright.job.memory import MemoryWatch

IMAGES_AT_ONCE = 32
SPEED_TEXTS = 32
SPEED_CHARACTERS = 512


@dataclass(frozen=True)
class Data:
    """What models are measured on, of one source.

    Attributes:
        name: as in the report.
        texts: (name, text) pairs; for a retrieval task its documents.
        queries: texts of a retrieval task.
        images: a safetensors file with ``pixel_values``.
    """

    name: str
    texts: tuple[tuple[str, str], ...] = ()
    queries: tuple[str, ...] = ()
    images: str | None = None


@dataclass(frozen=True)
class Spec:
    """What one process does.

    Attributes:
        mode: the distance from the reference, the speed, or tasks of lm-evaluation-harness.
        model: as the user named it; ``reference`` likewise, None for the reference itself.
        result: file that gets the outcome as JSON; tensors go to ``result + ".safetensors"``.
        data: sources.
        dtype: that the model computes in.
        context: tokens of a window.
        threads: torch threads.
        tasks: names or YAML files; ``limit``: documents of each.
    """

    mode: Literal["quality", "speed", "tasks"]
    model: str
    result: str
    reference: str | None = None
    data: tuple[Data, ...] = ()
    dtype: str = "float32"
    context: int = 1024
    threads: int = 1
    seed: int = 0
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    trust_remote_code: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Spec:
        data = tuple(
            Data(d["name"], tuple((name, text) for name, text in d["texts"]), tuple(d["queries"]), d["images"])
            for d in found["data"]
        )
        return cls(**{**found, "data": data, "tasks": tuple(found["tasks"])})


def run(spec: Spec) -> dict[str, Any]:
    """Measure; returns what goes into the result file.

    Raises:
        InputError: the model or its tokenizer does not work.
    """
    torch.set_num_threads(spec.threads)
    torch.manual_seed(spec.seed)
    subject = open_subject(spec.model, spec.trust_remote_code)
    if spec.mode == "speed":
        return _speed(spec, subject)
    model = load_model(subject, spec.dtype)
    if spec.mode == "tasks":
        found = run_tasks(model, load_tokenizer(subject), spec.tasks, spec.limit, spec.seed)
        return {"tables": {task: table.to_json() for task, table in found.items()}}
    if subject.kind in ("causal", "masked", "seq2seq"):
        return _language(spec, subject, model)
    tensors: dict[str, Tensor] = {}
    tokenizer = None if subject.sentence_transformer or subject.kind == "vision" else load_tokenizer(subject)
    for data in spec.data:
        texts = [text for _, text in data.texts]
        if subject.kind == "encoder":
            tensors[f"{data.name}/texts"] = embed(model, tokenizer, texts, "document", subject.positions)
            if data.queries:
                tensors[f"{data.name}/queries"] = embed(model, tokenizer, data.queries, "query", subject.positions)
        elif subject.kind == "classifier":
            tensors[f"{data.name}/logits"] = _classify(model, tokenizer, texts, subject.positions)
        else:
            assert data.images is not None
            tensors[f"{data.name}/logits"] = _classify_images(model, load_file(data.images)["pixel_values"])
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, f"{spec.result}.safetensors")
    return {"similarity": similarity_of(model)} if subject.kind == "encoder" else {}


# -- quality -------------------------------------------------------------------------------------------------------


def _language(spec: Spec, subject: Subject, model: Any) -> dict[str, Any]:
    """Tables of every source, and the digest of the tokens they are over. What the reference reads as other tokens is
    measured without it."""
    kind = language_kind(subject.kind)
    tokenizer = load_tokenizer(subject)
    encoded = {data.name: _encoded(tokenizer, data, kind) for data in spec.data}
    digests = {name: tokens_digest(found) for name, found in encoded.items()}
    reference, alike = None, set()
    if spec.reference is not None:
        other = open_subject(spec.reference, spec.trust_remote_code)
        its_tokenizer = load_tokenizer(other)
        theirs = {data.name: tokens_digest(_encoded(its_tokenizer, data, kind)) for data in spec.data}
        alike = {name for name, digest in digests.items() if theirs[name] == digest}
        reference = load_model(other, spec.dtype) if alike else None
    tables = {}
    for name, found in encoded.items():
        against = reference if name in alike else None
        if kind != "masked" or against is not None:
            tables[name] = language_table(kind, model, found, spec.context, against, len(tokenizer)).to_json()
    return {"tables": tables, "digests": digests}


def language_kind(kind: Kind) -> LanguageKind:
    assert kind in ("causal", "masked", "seq2seq")
    return cast(LanguageKind, kind)


def _encoded(tokenizer: Any, data: Data, kind: LanguageKind) -> list[Encoded]:
    return encode(tokenizer, [Document(name, text) for name, text in data.texts], kind)


@torch.inference_mode()
def _classify(model: Any, tokenizer: Any, texts: Sequence[str], longest: int) -> Tensor:
    """(texts, classes) float32 logits. One text at a time: the padding of a batch must not touch the figures."""
    rows = []
    for text in texts:
        inputs = tokenizer(text, truncation=True, max_length=longest, return_tensors="pt").to(model.device)
        rows.append(model(**inputs).logits[0].float().cpu())
    return torch.stack(rows)


@torch.inference_mode()
def _classify_images(model: Any, images: Tensor) -> Tensor:
    """(images, classes) float32 logits."""
    rows = [model(pixel_values=part.to(model.device, model.dtype)).logits for part in images.split(IMAGES_AT_ONCE)]
    return torch.cat(rows).float().cpu()


# -- speed and memory ----------------------------------------------------------------------------------------------


def _speed(spec: Spec, subject: Subject) -> dict[str, Any]:
    """Load time, speed, and memory above what the process had before it loaded the model."""
    before = _resident()
    with MemoryWatch(None) as watch:
        started = time.perf_counter()
        tokenizer = None if subject.kind == "vision" or subject.sentence_transformer else load_tokenizer(subject)
        model = load_model(subject, spec.dtype)
        found: dict[str, Any] = {"load_seconds": time.perf_counter() - started}
        found |= _rates(spec, subject, model, tokenizer)
    peak = max(watch.peak, _resident(peak=True) - before)
    return {"speed": {**found, "peak_memory_bytes": float(peak), "anonymous_memory_bytes": float(watch.peak)}}


def _rates(spec: Spec, subject: Subject, model: Any, tokenizer: Any) -> dict[str, float]:
    data = spec.data[0]
    texts = [text[:SPEED_CHARACTERS] for _, text in data.texts[:SPEED_TEXTS]]
    if subject.kind in ("causal", "seq2seq"):
        ids = torch.cat([found.ids for found in _encoded(tokenizer, data, language_kind(subject.kind))])
        positions = min(spec.context, subject.positions)
        # Positions hold the prompt and what comes after it; a model of few has short prompts and short answers.
        outputs = OUTPUTS if positions >= 2 * OUTPUTS[-1] else (1, max(2, positions // 4))
        length = min(PROMPT, positions - outputs[-1])
        return generation_speed(model, ids.repeat(-(-length // len(ids)))[:length], outputs)
    if subject.kind == "vision":
        assert data.images is not None
        images = load_file(data.images)["pixel_values"][:IMAGES_AT_ONCE]
        return sample_speed(lambda: _classify_images(model, images), len(images), "images")
    if subject.kind == "classifier":
        return sample_speed(lambda: _classify(model, tokenizer, texts, subject.positions), len(texts), "texts")
    if subject.kind == "encoder":
        return sample_speed(lambda: embed(model, tokenizer, texts, "document", subject.positions), len(texts), "texts")
    rows = [torch.tensor(tokenizer(text)["input_ids"][: subject.positions])[None] for text in texts]
    return sample_speed(lambda: [model(input_ids=row) for row in rows], len(texts), "texts")


def _resident(peak: bool = False) -> int:
    """Bytes of this process in memory, mapped files included; with ``peak`` the most that it has had."""
    try:
        status = Path("/proc/self/status").read_text()
        field = "VmHWM:" if peak else "VmRSS:"
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field))
    except (OSError, StopIteration):
        return int(psutil.Process().memory_info().rss)


def main(argv: list[str]) -> int:
    """Run a spec file; an error that a user can mend goes into the result as a sentence."""
    spec = Spec.from_json(json.loads(Path(argv[1]).read_text()))
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        found = run(spec)
    except SlimwrightError as error:
        found = {"error": str(error), "input": isinstance(error, InputError)}
    Path(spec.result).write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
