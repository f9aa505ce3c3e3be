"""What a server serves: a model from a directory, its tokenizer, and the adapters that are loaded."""

from __future__ import annotations

import asyncio
import copy
import functools
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from slimwright.checkpoint import Checkpoint, Lineage
from slimwright.errors import InputError, NotBuiltError
from slimwright.evaluate.subject import Subject, load_model, load_tokenizer, open_subject
from slimwright.job.merging.papers import lineage_of
from slimwright.report.words import printable
from slimwright.serving.adapters import ServedAdapter, open_adapter
from slimwright.serving.batch import positions
from slimwright.serving.embeddings import Embedder
from slimwright.serving.engine import Engine
from slimwright.serving.failures import HttpError
from slimwright.serving.metrics import Metrics

_NO_LIMIT = 1 << 20
_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class Served:
    """A loaded model.

    Attributes:
        name: by which requests call it.
        subject: as it lies on disk.
        tokenizer: for prompts; the engine has a copy.
        context: tokens of prompt and answer together; of an encoder, of a text.
        vocabulary: token ids are below it.
        engine: of a causal language model; None for an encoder.
        embedder: of an encoder; None for a causal language model.
        metrics: of all.
        created: seconds since 1970.
        adapters: by name.
    """

    name: str
    subject: Subject
    tokenizer: Any
    context: int
    vocabulary: int
    engine: Engine | None
    embedder: Embedder | None
    metrics: Metrics
    created: int = field(default_factory=lambda: int(time.time()))
    adapters: dict[str, ServedAdapter] = field(default_factory=dict)
    _loading: asyncio.Lock = field(default_factory=asyncio.Lock)

    @functools.cached_property
    def lineage(self) -> Lineage:
        return lineage_of(Checkpoint.open(self.subject.path))

    def adapter(self, model: str) -> ServedAdapter | None:
        """Of the name that a request gives; None for the model itself.

        Raises:
            HttpError: 404, there is no such model.
        """
        if model == self.name:
            return None
        found = self.adapters.get(model)
        if found is None:
            known = ", ".join([self.name, *self.adapters])
            raise HttpError(
                404, f"There is no model '{model[:100]}' here; there are: {known}.", "model", "model_not_found"
            )
        return found

    def add_adapter(self, name: str, path: str) -> ServedAdapter:
        """Load an adapter; blocks until the engine has taken it in.

        Raises:
            InputError: the name is taken, or the adapter is damaged or of another base.
            NotBuiltError: of a kind that is not served.
        """
        engine = self.texts()
        if name == self.name or name in self.adapters:
            raise InputError(f"There is a model '{name}' already: give the adapter another name, or unload it first.")
        found = open_adapter(name, path, engine.batcher.model, self.lineage)
        engine.call(functools.partial(engine.batcher.applied.check, found)).result()
        self.adapters[name] = found
        return found

    async def load_adapter(self, name: str, path: str) -> ServedAdapter:
        """:meth:`add_adapter` beside what runs, one at a time."""
        async with self._loading:
            return await asyncio.to_thread(self.add_adapter, name, path)

    def texts(self) -> Engine:
        """
        Raises:
            HttpError: 400, the model is an encoder.
        """
        if self.engine is None:
            raise HttpError(
                400, f"'{self.name}' is an encoder: it makes embeddings (/v1/embeddings), no text.", "model"
            )
        return self.engine

    def encoder(self) -> Embedder:
        """
        Raises:
            HttpError: 400, the model is no encoder.
        """
        if self.embedder is None:
            raise HttpError(
                400, f"'{self.name}' is no encoder: it makes text (/v1/completions), no embeddings.", "model"
            )
        return self.embedder

    def stop(self, seconds: float | None = None) -> None:
        """Finish what runs."""
        if self.engine is not None:
            self.engine.stop(seconds)
        if self.embedder is not None:
            self.embedder.stop()


def load_served(
    directory: str, *, slots: int = 16, queue: int = 256, context: int | None = None, dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Served:  # fmt: skip
    """Load a model for serving; the engine's thread runs then.

    Args:
        directory: of a causal language model or an encoder, ours or any that transformers loads.
        slots: texts that run at once.
        queue: that may wait.
        context: tokens of prompt and answer, at most; None: as many as the model has positions.
        dtype: of what is not packed, and of activations: float32, bfloat16, float16 or auto (as stored).

    Raises:
        InputError: no model, damaged, or without tokenizer; a context or dtype that it cannot have.
        NotBuiltError: of a kind that is not served.
    """
    if dtype not in _DTYPES:
        raise InputError(f"--dtype '{dtype}' is none of {', '.join(_DTYPES)}.")
    subject = open_subject(directory, trust_remote_code)
    if subject.kind not in ("causal", "encoder"):
        raise NotBuiltError(
            f"'{directory}' is of a kind that is not served in this version ({subject.kind}): causal language models "
            "and encoders are."
        )
    name = printable(Path(subject.path).resolve().name or "model", 100)
    metrics = Metrics()
    model = load_model(subject, dtype)
    if subject.kind == "encoder":
        tokenizer = model.tokenizer if subject.sentence_transformer else load_tokenizer(subject)
        longest = (model.max_seq_length if subject.sentence_transformer else None) or subject.positions
        longest = _within(context, longest)
        embedder = Embedder(model, tokenizer, longest, queue, metrics)
        return Served(
            name, subject, copy.deepcopy(tokenizer), longest, len(tokenizer), None, embedder, metrics
        )  # fmt: skip
    tokenizer = load_tokenizer(subject)
    tokenizer("a")  # what its file says of padding and cutting is set aside now, before threads share it
    engine = Engine(
        model, copy.deepcopy(tokenizer), slots=slots, queue=queue, ends=_ends(model, tokenizer), metrics=metrics,
        memory=psutil.virtual_memory().available // 2,
    )  # fmt: skip
    length = min(_within(context, positions(model.config) or _NO_LIMIT), engine.most_tokens)
    engine.start()
    vocabulary = model.get_input_embeddings().num_embeddings
    return Served(name, subject, tokenizer, length, vocabulary, engine, None, metrics)


def _within(context: int | None, positions: int) -> int:
    """The context asked for, or all that the model has.

    Raises:
        InputError: it has fewer.
    """
    if context is not None and context > positions:
        raise InputError(f"--context is {context}, but the model takes {positions} tokens: give that or fewer.")
    return context or positions


def _ends(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text."""
    told = getattr(model.generation_config, "eos_token_id", None)
    told = [told] if isinstance(told, int) else list(told or [])
    return frozenset([*told, *([tokenizer.eos_token_id] if isinstance(tokenizer.eos_token_id, int) else [])])


def read_report(directory: Path) -> tuple[dict[str, Any], str]:
    """``report.json`` and ``report.html`` of a result; empty where there are none."""
    data: dict[str, Any] = {}
    page = ""
    try:
        loaded = json.loads((directory / "report.json").read_text(encoding="utf-8"))
        data = loaded if isinstance(loaded, dict) else {}
        page = (directory / "report.html").read_text(encoding="utf-8")
    except (OSError, ValueError):
        pass
    return data, page
