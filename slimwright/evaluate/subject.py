"""What is measured: a model with its tokenizer, what kind it is, and how it is loaded."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import PreTrainedModel

from slimwright.checkpoint import Checkpoint
from slimwright.errors import InputError, NotBuiltError
from slimwright.model.skeleton import skeleton

Kind = Literal["causal", "masked", "seq2seq", "encoder", "classifier", "vision"]
KINDS: dict[str, str] = {
    "causal": "a causal language model",
    "masked": "a masked language model",
    "seq2seq": "an encoder-decoder language model",
    "encoder": "an encoder",
    "classifier": "a classifier of text",
    "vision": "a classifier of images",
}

MOST_POSITIONS = 1024
"""Tokens of context that are used where the model has more."""


@dataclass(frozen=True)
class Subject:
    """A model as it lies on disk.

    Attributes:
        path: as the user named it.
        root: its directory (of a hub id, the snapshot); ``directory``: that of config.json.
        kind: what it does, of :data:`KINDS`.
        model_class: its class in transformers.
        sentence_transformer: whether it is a sentence-transformers directory.
        parameters: unique ones; ``nbytes``: of the weight files.
        positions: tokens of context, at most :data:`MOST_POSITIONS`.
        classes: names of the labels, in order; empty if it is no classifier.
        trust_remote_code: whether its own code may run.
    """

    path: str
    root: Path
    directory: Path
    kind: Kind
    model_class: type[PreTrainedModel]
    sentence_transformer: bool
    parameters: int
    nbytes: int
    positions: int
    classes: tuple[str, ...]
    trust_remote_code: bool


def open_subject(path: str, trust_remote_code: bool = False) -> Subject:
    """Look at a model without loading its weights.

    Raises:
        InputError: not a model, damaged, or of an unknown family.
        NotBuiltError: of a kind that is not measured.
    """
    checkpoint = Checkpoint.open(path)
    model = skeleton(checkpoint.config, checkpoint.model_path, checkpoint.tensors, trust_remote_code)
    config: Any = model.config
    sentence_transformer = (checkpoint.path / "modules.json").is_file()
    kind: Kind = "encoder" if sentence_transformer else _kind(model)
    labels = config.id2label if kind in ("classifier", "vision") else {}
    if labels and (len(labels) < 2 or config.problem_type in ("regression", "multi_label_classification")):
        what = "one output" if len(labels) < 2 else f"problem_type '{config.problem_type}'"
        raise NotBuiltError(f"'{path}' has {what}: only classifiers that choose one of several classes are measured.")
    return Subject(
        str(path), checkpoint.path, checkpoint.model_path, kind, type(model), sentence_transformer,
        sum(parameter.numel() for parameter in model.parameters()), checkpoint.total_bytes,
        _positions(config, checkpoint.model_path), tuple(str(labels[key]) for key in sorted(labels)), trust_remote_code,
    )  # fmt: skip


def _kind(model: PreTrainedModel) -> Kind:
    name = type(model).__name__
    if name.endswith("ForSequenceClassification"):
        return "classifier"
    if "ForImageClassification" in name:
        return "vision"
    if model.main_input_name == "input_ids" and model.config.is_encoder_decoder and model.can_generate():
        return "seq2seq"
    if model.main_input_name == "input_ids" and not model.config.is_encoder_decoder:
        if model.can_generate():
            return "causal"
        if name.endswith("ForMaskedLM"):
            return "masked"
        head = any(part in name for part in ("For", "LMHead", "PreTraining"))
        if not head and "pixel_values" not in inspect.signature(model.forward).parameters:
            return "encoder"
    raise NotBuiltError(f"{name} is not measured in this version, which measures {', '.join(KINDS.values())}.")


def _positions(config: Any, directory: Path) -> int:
    text = config.get_text_config()
    found = [getattr(text, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
    stated = [value for value in found if isinstance(value, int) and value > 0]
    try:
        length = json.loads((directory / "tokenizer_config.json").read_text()).get("model_max_length")
    except (OSError, ValueError, AttributeError):
        length = None
    if isinstance(length, int) and length > 0:
        stated.append(length)
    # RoBERTa counts positions from the padding id + 1 and states two more than a text may have.
    reserved = 2 if text.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer") else 0
    return max(2, min([MOST_POSITIONS, *stated]) - reserved)


def load_tokenizer(subject: Subject) -> Any:
    """Its tokenizer.

    Raises:
        InputError: it has none that loads.
    """
    try:
        return transformers.AutoTokenizer.from_pretrained(
            subject.directory, trust_remote_code=subject.trust_remote_code
        )
    except Exception as error:  # any tokenizer library may fail in its own way
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
        raise InputError(
            f"The tokenizer of '{subject.path}' does not load ({reason}): put its tokenizer.json beside config.json."
        ) from error


def load_model(subject: Subject, dtype: str) -> Any:
    """The transformers model in evaluation mode, or the ``SentenceTransformer``.

    Args:
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto`` (as stored).

    Raises:
        InputError: sentence-transformers is needed and not installed.
    """
    number: Any = dtype if dtype == "auto" else getattr(torch, dtype)
    if not subject.sentence_transformer:
        settings: dict[str, Any] = {"trust_remote_code": True} if subject.trust_remote_code else {}
        return subject.model_class.from_pretrained(subject.directory, dtype=number, **settings).eval()
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise InputError(
            f"'{subject.path}' is a sentence-transformers directory: `pip install sentence-transformers` to load it."
        ) from error
    return SentenceTransformer(
        str(subject.root), device="cpu", model_kwargs={"dtype": number}, trust_remote_code=subject.trust_remote_code
    ).eval()
