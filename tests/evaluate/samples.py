"""Tiny models with tokenizers, for the tests of what runs models on text."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tests.families import make

SENTENCE = "the a cat dog sat ran on under mat tree and then slept barked red blue of in house garden"
WORDS = SENTENCE.split()
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_tokenizer(reverse: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte; with ``reverse`` the same bytes under other ids."""
    specials = ["<pad>", "<s>", "</s>"]
    alphabet = ALPHABET[::-1] if reverse else ALPHABET
    vocabulary = {token: index for index, token in enumerate([*specials, *alphabet])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, between [CLS] and [SEP]."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*specials, *WORDS])}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


@torch.no_grad()
def perturbed(model: PreTrainedModel, noise: float, seed: int = 1) -> PreTrainedModel:
    """The same model with noise on every weight, in place."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter += noise * torch.randn(parameter.shape, generator=generator)
    return model


def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | None, directory: Path) -> Path:
    """A model directory."""
    model.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    return directory


def causal(directory: Path, noise: float = 0.0, reverse: bool = False) -> Path:
    """A tiny Llama of 128 positions that reads bytes."""
    return write(perturbed(make("llama"), noise), byte_tokenizer(reverse), directory)


def bert(labels: int = 0, hidden: int = 32, noise: float = 0.0) -> PreTrainedModel:
    """A tiny BERT that reads :data:`WORDS`, with or without a classifier."""
    config = BertConfig(
        vocab_size=len(WORDS) + 4, hidden_size=hidden, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    if labels:
        config.num_labels = labels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = BertForSequenceClassification(config) if labels else BertModel(config)
    return perturbed(made, noise).eval()


def sentences(count: int, seed: int = 0) -> list[str]:
    """Different sentences of :data:`WORDS`."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(WORDS), (count, 9), generator=generator).tolist()
    return [f"{' '.join(WORDS[i] for i in row)} {WORDS[number % len(WORDS)]}" for number, row in enumerate(rows)]


def lines(file: Path, rows: list[dict[str, object]]) -> Path:
    """A .jsonl file."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def beir(folder: Path) -> Path:
    """A retrieval task: the query is the second half of its document."""
    (folder / "qrels").mkdir(parents=True)
    texts = sentences(30)
    lines(folder / "corpus.jsonl", [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(texts)])
    halves = [" ".join(text.split()[5:]) for text in texts[:12]]
    lines(folder / "queries.jsonl", [{"_id": f"q{i}", "text": half} for i, half in enumerate(halves)])
    rows = "".join(f"q{i}\td{i}\t1\n" for i in range(12))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + rows)
    return folder
