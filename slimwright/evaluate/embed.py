"""Embeddings of texts as the model's own pipeline makes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from slimwright.errors import NotBuiltError
from slimwright.evaluate.cosine import mean_pool
from slimwright.evaluate.retrieval import SIMILARITIES

BATCH = 32


@torch.inference_mode()
def embed(
    model: Any, tokenizer: Any, texts: Sequence[str], of: Literal["query", "document"] = "document", longest: int = 512
) -> Tensor:
    """One vector a text.

    Args:
        model: a ``SentenceTransformer``, which pools, normalizes and prompts as its directory says; or a transformers
            encoder, whose last hidden states are averaged over the tokens that count.
        tokenizer: of a transformers encoder.
        texts: any number.
        of: which of a model's prompts is used, where it has any.
        longest: tokens after which a text is cut, for a transformers encoder.

    Returns:
        (texts, features) float32 on the CPU.
    """
    if hasattr(model, "encode_query"):
        encode = model.encode_query if of == "query" else model.encode_document
        return encode(list(texts), batch_size=BATCH, convert_to_tensor=True, show_progress_bar=False).float().cpu()
    order = sorted(range(len(texts)), key=lambda index: (len(texts[index]), index))  # alike lengths: little padding
    made: list[Tensor] = [torch.empty(0)] * len(texts)
    pads = tokenizer.pad_token_id is not None
    batch = BATCH if pads else 1
    for first in range(0, len(order), batch):
        chosen = order[first : first + batch]
        inputs = tokenizer(
            [texts[index] for index in chosen], padding=pads, truncation=True, max_length=longest, return_tensors="pt"
        ).to(model.device)
        hidden = model(**inputs).last_hidden_state
        pooled = mean_pool(hidden, inputs["attention_mask"]).float().cpu()
        for index, vector in zip(chosen, pooled):
            made[index] = vector
    return torch.stack(made)


def similarity_of(model: Any) -> str:
    """How the model's vectors are compared: ``cosine`` or ``dot``.

    Raises:
        NotBuiltError: another way.
    """
    name = str(getattr(model, "similarity_fn_name", None) or "cosine")
    if name not in SIMILARITIES:
        raise NotBuiltError(f"Encoders compared by {name} similarity are not built in this version: cosine or dot.")
    return name
