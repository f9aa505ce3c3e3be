"""An encoder as one ONNX graph in float32, through torch's exporter: weights decoded, none of them packed."""

from __future__ import annotations

import importlib.util
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimwright.errors import InputError, SlimwrightError
from slimwright.job.exports.dense import write_dense
from slimwright.job.exports.written import Result, Written
from slimwright.job.open import model_of

FILE = "model.onnx"
INPUTS = ("input_ids", "attention_mask")
TOLERANCE = 1e-4
"""Largest difference of an output, relative to the largest, in float32."""


class _Outputs(nn.Module):
    """A model whose outputs are the first of its own: hidden states or logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(batch, tokens) int64 twice → what the model gives first."""
        found: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
        return found


def write_onnx(
    result: Result, directory: Path, out: Path, max_shard_bytes: int, trust_remote_code: bool = False
) -> Written:
    """Write ``model.onnx`` and compare it with the model on a batch of another shape.

    Args:
        directory: where it goes; ``out``: what the directory will be called.

    Raises:
        InputError: no encoder of text, inputs that are rounded, or a package is missing; SlimwrightError: torch's
            exporter does not take the model, or the graph gives something else.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"ONNX is written by torch's exporter, which needs {missing[0]}: pip install {missing[0]}.")
    model_class, config = model_of(result.checkpoint, trust_remote_code)
    if model_class.can_generate() or config.is_encoder_decoder or not hasattr(config, "vocab_size"):
        raise InputError(f"{model_class.__name__} is no encoder of text: only those are written as onnx.")
    if result.rounded:
        raise InputError("The plan rounds what enters linear layers, which is not written as onnx: fit without it.")
    path = directory / FILE
    with tempfile.TemporaryDirectory() as scratch:
        write_dense(result, Path(scratch), out, max_shard_bytes)
        model = _Outputs(model_class.from_pretrained(scratch, dtype=torch.float32).eval())
    batch = torch.export.Dim("batch", min=1, max=4096)
    tokens = torch.export.Dim("tokens", min=2, max=int(getattr(config, "max_position_embeddings", 512)))
    shapes: dict[str, Any] = {name: {0: batch, 1: tokens} for name in INPUTS}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model, (), str(path), kwargs=_inputs(config.vocab_size, 2, 16), input_names=list(INPUTS),
                output_names=["output"], dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False,
            )  # fmt: skip
    except Exception as error:  # whatever the exporter raises, of many kinds, it does not take the model
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SlimwrightError(f"torch's exporter does not take {model_class.__name__}: {first}") from error
    proof = _compared(model, path, config.vocab_size)
    load = f"import onnxruntime\nsession = onnxruntime.InferenceSession({str(out / FILE)!r})"
    size = path.stat().st_size
    note = "An ONNX file holds the decoded weights in float32: the plan's bits are not in it."
    return Written((path,), size, load, "ONNX, decoded from the compressed result", proof, (note,))


def _inputs(vocabulary: int, batch: int, tokens: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    mask = torch.ones(batch, tokens, dtype=torch.int64)
    mask[-1, tokens // 2 :] = 0
    return {"input_ids": torch.randint(0, vocabulary, (batch, tokens), generator=generator), "attention_mask": mask}


def _compared(model: nn.Module, path: Path, vocabulary: int) -> dict[str, Any]:
    """Run it in onnxruntime where that is installed."""
    if importlib.util.find_spec("onnxruntime") is None:
        return {"how": "not loaded again", "program": "none: onnxruntime is not installed here"}
    import onnxruntime

    inputs = _inputs(vocabulary, 3, 9)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    there = torch.from_numpy(session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0])
    with torch.no_grad():
        here = model(**inputs)
    rows = inputs["attention_mask"].bool()
    error = float((there - here)[rows].abs().max() / here[rows].abs().max())
    if not error <= TOLERANCE:
        raise SlimwrightError(f"The ONNX graph's outputs differ by {error:.2g} of the largest.")
    return {
        "how": "run on a batch of another shape", "program": f"onnxruntime {onnxruntime.__version__}",
        "logits_error": error,
    }  # fmt: skip
