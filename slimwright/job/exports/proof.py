"""Loading what was written in the other program, in a process of its own, and comparing logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from slimwright.errors import SlimwrightError
from slimwright.job.exports.written import Result
from slimwright.job.open import model_of

TOLERANCE = 1e-4
"""Largest difference of a logit relative to the largest, in float32, where both programs compute alike."""

TOKENS = (2, 24)


def run_elsewhere(
    result: Result, directory: Path, program: str, exact: bool = True, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Run a program that loads the directory and saves its logits; compare them with those of the dense model.

    Args:
        program: Python code; gets a JSON file with ``directory``, ``class``, ``tokens`` and ``result``; prints what it
            is.
        exact: whether both programs compute alike, so that a difference is a failure (not where inputs are rounded).

    Raises:
        SlimwrightError: it cannot load the files, or its logits differ.
    """
    model_class, config = model_of(result.checkpoint, trust_remote_code)
    text = config.get_text_config()
    vocabulary = getattr(text, "vocab_size", None)
    if not model_class.__module__.startswith("transformers.") or not vocabulary or text.is_encoder_decoder:
        return {"program": "none: the model's inputs are no plain tokens"}
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocabulary, TOKENS, generator=generator)
    model = model_class.from_pretrained(result.checkpoint.model_path, dtype=torch.float32).eval()
    with torch.inference_mode():
        here = model(input_ids=tokens).logits
    del model
    with tempfile.TemporaryDirectory() as scratch:
        found = Path(scratch) / "logits.pt"
        spec = {
            "directory": str(directory), "class": model_class.__name__, "tokens": tokens.tolist(),
            "result": str(found),
        }  # fmt: skip
        (Path(scratch) / "spec.json").write_text(json.dumps(spec))
        (Path(scratch) / "load.py").write_text(program)
        done = subprocess.run(
            [sys.executable, "load.py", "spec.json"],
            cwd=scratch, capture_output=True, text=True, check=False, env={**os.environ, "TOKENIZERS_PARALLELISM": "0"},
        )  # fmt: skip
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise SlimwrightError(f"The other program does not load what was written: {last}")
        there = torch.load(found)
    error = float((there - here).abs().max() / here.abs().max())
    if exact and not error <= TOLERANCE:
        raise SlimwrightError(f"The other program's logits differ by {error:.2g} of the largest.")
    return {"program": done.stdout.strip().splitlines()[-1], "logits_error": error}
