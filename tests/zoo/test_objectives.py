"""What the zoo's models learn: batches checked token by token, figures with models whose answers are known."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from slimwright.zoo import objectives
from slimwright.zoo.objectives import UNSCORED, Digits, MaskedTokens, NextToken, SpanCorruption, top_level
from slimwright.zoo.recipes import TOPICS
from slimwright.zoo.text import Document, Part, standard_library
from slimwright.zoo.tokens import packed

WINDOW = 64


@pytest.fixture
def little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three documents in every part instead of the library, whose tokenizers take a while to train."""

    def few(part: Part) -> list[Document]:
        documents = [document for document in standard_library(part) if 4000 < document.bytes < 30000]
        return documents[:3]

    monkeypatch.setattr(objectives, "standard_library", few)


@pytest.mark.usefixtures("little_text")
def test_taken_spans_put_back_give_the_text() -> None:
    task = SpanCorruption(WINDOW)
    first = 2  # ids of the sentinels begin after padding and end
    text = torch.arange(100, 100 + 6 * WINDOW).view(6, WINDOW)
    inputs, targets = task.corrupted(text, torch.Generator().manual_seed(1))
    taken = round(0.3 * WINDOW)
    spans = round(taken / 5)
    assert inputs.shape == (6, WINDOW - taken + spans + 1) and targets.shape == (6, taken + spans + 1)
    assert len({tuple((row >= 100).tolist()) for row in inputs}) > 1  # each row has spans of its own
    for row, given, asked in zip(text.tolist(), inputs.tolist(), targets.tolist()):
        assert given[-1] == asked[-1] == task.END
        marks = [token for token in given if first <= token < 100]
        assert marks == [token for token in asked if first <= token < 100] == list(range(first, first + spans))
        pieces: dict[int, list[int]] = {}
        for token in asked[:-1]:
            if token < 100:
                pieces[token] = []
            else:
                pieces[max(pieces)].append(token)
        assert all(pieces.values())
        rebuilt = [part for token in given[:-1] for part in pieces.get(token, [token])]
        assert rebuilt == row


@pytest.mark.usefixtures("little_text")
def test_span_lengths_have_every_composition() -> None:
    """All six ways to write 5 as a sum of three positive numbers come up, about equally often."""
    generator = torch.Generator().manual_seed(0)
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(600):
        parts = tuple(objectives._composition(5, 3, generator))
        assert sum(parts) == 5 and min(parts) >= 1
        counts[parts] = counts.get(parts, 0) + 1
    assert len(counts) == math.comb(4, 2) and min(counts.values()) > 60


@pytest.mark.usefixtures("little_text")
def test_a_model_without_preference_loses_the_logarithm_of_its_classes() -> None:
    class Even:
        def __call__(self, input_ids: Tensor, labels: Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=torch.zeros(*labels.shape, 50))

    task = SpanCorruption(WINDOW)
    task.corrupted = lambda rows, generator: (rows, rows.clamp(max=49))  # type: ignore[method-assign]
    assert task.figure(Even()) == pytest.approx(math.log(50))  # type: ignore[arg-type]


@pytest.mark.usefixtures("little_text")
def test_masked_batches() -> None:
    task = MaskedTokens(WINDOW)
    asked = masked = replaced = 0
    for step in range(1000, 1030):
        inputs, targets = task.batch(step)
        assert inputs.shape == targets.shape == (1024 // WINDOW, WINDOW)
        assert (inputs[:, 0] == task.CLS).all() and (inputs[:, -1] == task.SEP).all()
        scored = targets != UNSCORED
        assert (scored.sum(1) == round(0.25 * WINDOW)).all() and (targets[scored] >= len(task.special)).all()
        changed = scored & (inputs != targets)
        asked += int(scored.sum())
        masked += int((inputs[scored] == task.MASK).sum())
        replaced += int(changed.sum()) - int((inputs[scored] == task.MASK).sum())
        assert not (inputs[~scored] == task.MASK).any()
        assert (inputs[changed] >= task.MASK).all()
    assert masked / asked == pytest.approx(0.8, abs=0.02) and replaced / asked == pytest.approx(0.1, abs=0.02)
    again = task.batch(1029)
    assert torch.equal(again[0], inputs) and torch.equal(again[1], targets)


@pytest.mark.usefixtures("little_text")
def test_windows_are_twice_as_long_every_140_steps_up_to_the_whole() -> None:
    task = MaskedTokens(128)
    for step, window in ((0, 8), (139, 8), (140, 16), (280, 32), (559, 64), (560, 128), (5000, 128)):
        inputs, targets = task.batch(step)
        assert inputs.shape == targets.shape == (1024 // window, window)
        assert ((targets != UNSCORED).sum(1) == round(0.25 * window)).all()


@pytest.mark.usefixtures("little_text")
def test_an_untrained_bert_knows_how_often_each_token_comes() -> None:
    task = MaskedTokens(WINDOW)
    output = torch.nn.Linear(4, 512)
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=512), get_output_embeddings=lambda: output)
    task.start(model)  # type: ignore[arg-type]
    counts = torch.bincount(task._tokens, minlength=512).double() + 1
    assert torch.allclose(output.bias.double().softmax(0), counts / counts.sum(), rtol=1e-4)


@pytest.mark.usefixtures("little_text")
def test_masked_accuracy_of_a_model_of_one_word_is_that_words_share_of_the_masks() -> None:
    task = MaskedTokens(WINDOW)
    seen: list[Tensor] = []
    tokens = packed(task._tokenizer, objectives.standard_library("heldout")[::4], task.SEP)
    word = int(tokens[tokens >= len(task.special)].mode().values)

    class OneWord:
        def __call__(self, inputs: Tensor) -> SimpleNamespace:
            seen.append(inputs)
            return SimpleNamespace(logits=torch.zeros(*inputs.shape, 512).index_fill_(-1, torch.tensor(word), 1))

    figure = task.figure(OneWord())  # type: ignore[arg-type]
    inputs = torch.cat(seen)
    length = WINDOW - 2
    text = torch.stack([tokens[start : start + length] for start in range(0, len(tokens) - length + 1, length)])
    hidden = inputs[:, 1:-1] == task.MASK
    assert torch.equal(inputs[:, 1:-1].where(~hidden, 0), text.where(~hidden, 0))
    assert (hidden.sum(1) == round(0.15 * WINDOW)).all()
    assert figure == pytest.approx((text[hidden] == word).double().mean().item()) and figure > 0.005


def test_only_a_topics_packages_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    text = [Document("json/decoder.py", "a"), Document("json.py", "b"), Document("xml/dom/x.py", "c")]
    monkeypatch.setattr(objectives, "standard_library", lambda part: text)
    task = NextToken(WINDOW, {"json"})
    assert task._tokenizer.decode(task._tokens) == "<|endoftext|>a"
    assert len(NextToken(WINDOW)._tokens) == 6


def test_next_token_batches_are_one_token_apart(little_text: None) -> None:
    inputs, targets = NextToken(WINDOW).batch(3)
    assert inputs.shape == (4096 // WINDOW, WINDOW) and torch.equal(inputs[:, 1:], targets[:, :-1])


def test_topics_are_disjoint_and_each_has_text_of_its_own() -> None:
    names = [name for topic in TOPICS.values() for name in topic]
    assert len(names) == len(set(names))
    for part, least in (("train", 500_000), ("heldout", 50_000)):
        documents = standard_library(part)  # type: ignore[arg-type]
        assert {top_level(document.path) for document in documents} >= {"idlelib", "asyncio", "help", ""}
        for topic, packages in TOPICS.items():
            assert sum(document.bytes for document in documents if top_level(document.path) in packages) > least, topic


def test_digits_are_split_once_and_shown_as_the_processor_shows_them() -> None:
    pytest.importorskip("sklearn")
    task = Digits()
    parts = [task._parts[part] for part in ("train", "calibrate", "heldout")]
    assert sum(len(images) for images, _ in parts) == 1797
    assert all(130 < len(images) < 230 for images, _ in parts[1:])
    images, labels = parts[2]
    assert sorted(set(labels.tolist())) == list(range(10))
    pixels = task._pixels(images)
    assert pixels.shape == (len(images), 3, 8, 8)
    grey = (images / 16 * 255) / 255  # what a picture of 0..255 holds, then the processor's arithmetic
    assert torch.allclose(pixels[:, 1], (grey - 0.5) / 0.5)


def test_training_digits_are_shifted_by_at_most_a_pixel() -> None:
    pytest.importorskip("sklearn")
    task = Digits()
    images, labels = task._parts["train"]
    pixels, targets = task.batch(5)
    shown = ((pixels[:, 0] + 1) / 2 * 16).round()
    moved = 0
    for image, label in zip(shown[:24], targets[:24]):
        found = set()
        for down in (-1, 0, 1):
            for right in (-1, 0, 1):
                shifted = torch.zeros_like(images)
                shifted[:, max(down, 0) : 8 + min(down, 0), max(right, 0) : 8 + min(right, 0)] = images[
                    :, max(-down, 0) : 8 + min(-down, 0), max(-right, 0) : 8 + min(-right, 0)
                ]
                same = (shifted == image).flatten(1).all(1)
                found |= {(down, right) for index in same.nonzero().flatten() if labels[index] == label}
        assert found
        moved += (0, 0) not in found
    assert moved > 10
