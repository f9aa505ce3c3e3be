"""Tokenizers trained on the standard library's text, that text as one stream of tokens, and windows cut from it."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from slimwright.zoo.text import Document
from slimwright.zoo.training import SEED

VOCABULARY = 3072


def train_tokenizer(
    documents: Sequence[Document], special_tokens: Sequence[str], vocabulary: int = VOCABULARY
) -> Tokenizer:
    """A byte-level BPE of `vocabulary` tokens, split by GPT-2's rule; every byte is a token, so any text round-trips.

    The special tokens have the first ids, in their order.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the tokenizer's files; its class goes by the name that transformers 4 and other readers know as well."""
    tokenizer.save_pretrained(out)
    file = out / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    file.write_text(json.dumps(config, indent=2) + "\n")


def packed(tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document], separator: int) -> Tensor:
    """All documents in a random but fixed order, the separator's id before each: int64 (tokens,)."""
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(SEED)).tolist()
    stream: list[int] = []
    for index in order:
        stream.append(separator)
        stream += tokenizer.encode(documents[index].text, add_special_tokens=False, verbose=False)
    return torch.tensor(stream)


def windows(tokens: Tensor, rows: int, length: int, step: int) -> Tensor:
    """Windows of a stream, cut at random places that depend on the step alone: int64 (rows, length)."""
    generator = torch.Generator().manual_seed(SEED + step)
    starts = torch.randint(len(tokens) - length + 1, (rows,), generator=generator)
    return tokens[starts[:, None] + torch.arange(length)]


def consecutive_windows(tokens: Tensor, length: int) -> Tensor:
    """A stream cut into windows end to end, what is left over at its end dropped: int64 (windows, length)."""
    return tokens[: len(tokens) // length * length].view(-1, length)
