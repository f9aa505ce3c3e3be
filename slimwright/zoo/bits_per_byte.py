"""Bits per byte of a causal LM on documents, and what `xz -9e` needs for the same bytes.

`python -m slimwright.zoo.bits_per_byte MODEL_DIR` prints both for the held-out part of the standard library.
"""

import argparse
import json
import lzma
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from slimwright.evaluate.language import windows
from slimwright.zoo.text import Document, standard_library

WINDOWS_AT_ONCE = 4
UNSCORED = -100


@torch.inference_mode()
def bits_per_byte(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]) -> float:
    """Code length of the documents under the model, in bits per UTF-8 byte: every token and the end of each document.

    A document is preceded by the end-of-text token and followed by it. Windows are as long as the model's positions and
    step by half of that, so each token but those of a document's first window sees at least half a window before it.
    """
    windows = list(_windows(tokenizer, documents, model.config.max_position_embeddings))
    nats = 0.0
    for start in range(0, len(windows), WINDOWS_AT_ONCE):
        inputs, targets = _stack(windows[start : start + WINDOWS_AT_ONCE], model.device)
        logits = model(inputs, use_cache=False).logits.float()
        nats += cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=UNSCORED, reduction="sum").item()
    return nats / math.log(2) / sum(document.bytes for document in documents)


def xz_bits_per_byte(documents: Sequence[Document]) -> float:
    """What `xz -9e` needs for the documents as one file, container included, in bits per byte."""
    data = b"".join(document.text.encode() for document in documents)
    return 8 * len(lzma.compress(data, format=lzma.FORMAT_XZ, preset=9 | lzma.PRESET_EXTREME)) / len(data)


def _windows(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document], length: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Inputs and targets of every window, each up to `length` tokens; targets seen before are marked unscored."""
    end = tokenizer.eos_token_id
    for document in documents:
        tokens = [end, *tokenizer.encode(document.text, add_special_tokens=False, verbose=False), end]
        for first, last, new in windows(len(tokens), length):
            yield tokens[first:last], [UNSCORED] * (new - first) + tokens[new + 1 : last + 1]


def _stack(windows: Sequence[tuple[list[int], list[int]]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Windows as inputs and targets, both int64 (windows, longest), padded on the right where causality hides it."""
    longest = max(len(inputs) for inputs, _ in windows)
    inputs = torch.zeros(len(windows), longest, dtype=torch.long)
    targets = torch.full((len(windows), longest), UNSCORED)
    for row, (window_inputs, window_targets) in enumerate(windows):
        inputs[row, : len(window_inputs)] = torch.tensor(window_inputs)
        targets[row, : len(window_targets)] = torch.tensor(window_targets)
    return inputs.to(device), targets.to(device)


def main() -> None:
    """Print one JSON object: the model's and xz's bits per byte on held-out text, the bytes and the seconds."""
    parser = argparse.ArgumentParser(description="Bits per byte of a causal LM on held-out standard-library text.")
    parser.add_argument("model", type=Path, help="directory of a causal LM with its tokenizer")
    directory = parser.parse_args().model
    documents = standard_library("heldout")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    began = time.perf_counter()
    measured = bits_per_byte(model, AutoTokenizer.from_pretrained(directory), documents)
    print(
        json.dumps(
            {
                "bits_per_byte": round(measured, 4),
                "xz_bits_per_byte": round(xz_bits_per_byte(documents), 4),
                "documents": len(documents),
                "bytes": sum(document.bytes for document in documents),
                "seconds": round(time.perf_counter() - began, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
