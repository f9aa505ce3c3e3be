"""What the models of the zoo are trained to do, and the held-out figure of each.

An objective holds the data: `batch(step)` is what a training step sees, `loss` the mean loss of a model on it in nats,
`figure` what is reported of the finished model, on held-out data only, and `save` writes what turns text or images
into the model's inputs.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from slimwright.checkpoint import write_json_atomic
from slimwright.errors import InputError
from slimwright.zoo import bundled_path
from slimwright.zoo.bits_per_byte import bits_per_byte
from slimwright.zoo.text import Document, Part, part_of, standard_library
from slimwright.zoo.tokens import consecutive_windows, packed, save_tokenizer, train_tokenizer, windows
from slimwright.zoo.training import SEED

TOKENS_PER_STEP = 4096
HELD_OUT_SHARE = 4  # every fourth held-out document: about 200 kB, which take seconds
UNSCORED = -100  # cross_entropy's own mark

Batch = tuple[Tensor, Tensor]


class Objective(ABC):
    """One kind of training. `metric` names the figure; `higher_is_better` says which way it points."""

    metric: ClassVar[str]
    higher_is_better: ClassVar[bool] = False

    @abstractmethod
    def batch(self, step: int) -> Batch:
        """Inputs and targets of a step, which depend on the step alone."""

    def start(self, model: PreTrainedModel) -> None:  # noqa: B027
        """Tell an untrained model what takes no training to know."""

    @abstractmethod
    def loss(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Mean loss in nats, a scalar with its gradient."""

    @abstractmethod
    def figure(self, model: PreTrainedModel) -> float:
        """The figure on held-out data of a model in float32 that is set to evaluate."""

    @abstractmethod
    def save(self, out: Path) -> None:
        """Write the tokenizer's or the image processor's files into `out`."""


class NextToken(Objective):
    """Causal language modelling with the bundled LM's tokenizer; the figure is bits per byte (see bits_per_byte.py).

    Args:
        window: tokens that the model sees at once.
        packages: names of top-level packages; only their text is trained and evaluated on, and then on all of their
            held-out documents. None: all text, and every fourth held-out document.
    """

    metric = "held-out bits per byte"

    def __init__(self, window: int, packages: Collection[str] | None = None) -> None:
        self._tokenizer = PreTrainedTokenizerFast.from_pretrained(bundled_path())
        self._window = window
        self._packages = packages

    def batch(self, step: int) -> Batch:
        """Both int64 (rows, window); targets are the inputs one token on."""
        cut = windows(self._tokens, TOKENS_PER_STEP // self._window, self._window + 1, step)
        return cut[:, :-1], cut[:, 1:]

    def loss(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Cross-entropy; where a router picks experts, with its load-balancing loss at the config's weight."""
        inputs, targets = batch
        weight = getattr(model.config, "router_aux_loss_coef", None)
        if weight is None:
            return _cross_entropy(model(inputs, use_cache=False).logits, targets)
        output = model(inputs, use_cache=False, output_router_logits=True)
        return _cross_entropy(output.logits, targets) + weight * output.aux_loss

    def figure(self, model: PreTrainedModel) -> float:
        documents = self._documents("heldout")
        share = HELD_OUT_SHARE if self._packages is None else 1
        return bits_per_byte(model, self._tokenizer, documents[::share])

    def save(self, out: Path) -> None:
        self._tokenizer.model_max_length = self._window
        save_tokenizer(self._tokenizer, out)

    @cached_property
    def _tokens(self) -> Tensor:
        return packed(self._tokenizer, self._documents("train"), self._tokenizer.eos_token_id)

    def _documents(self, part: Part) -> list[Document]:
        documents = standard_library(part)
        if self._packages is None:
            return documents
        return [document for document in documents if top_level(document.path) in self._packages]


class MaskedTokens(Objective):
    """BERT's objective (Devlin et al. 2019): of the tokens to be predicted 80 % are masked and 10 % replaced.

    25 % are predicted, not 15 %, for more to learn from a step (Wettig et al. 2023), of a vocabulary of 512. Windows
    begin with 8 tokens and are twice as long every 140 steps: a masked place holds no token of its own, so all it has
    to learn from is the mean over its window as long as attention is even, in which its neighbours would be one in a
    hundred; and which of 8 places are neighbours is learned sooner than which of 128 are. With windows of 128 from the
    start, little but how often each token comes was learned in the time there is. The figure is the share of held-out
    tokens named right, 15 % of each whole window at fixed places, all of them masked.
    """

    metric = "held-out masked accuracy"
    higher_is_better = True
    special = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")
    PAD, CLS, SEP, MASK = range(4)
    predicted = 0.25
    asked = 0.15
    vocabulary = 512
    tokens_per_step = 1024
    first_window = 8
    steps_to_double = 140

    def __init__(self, window: int) -> None:
        self._window = window
        documents = standard_library("train")
        tokenizer = train_tokenizer(documents, self.special, self.vocabulary)
        tokenizer.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", self.CLS), ("[SEP]", self.SEP)],
        )
        self._tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="[PAD]",
            cls_token="[CLS]",
            sep_token="[SEP]",
            mask_token=AddedToken("[MASK]", lstrip=True, special=True),
            model_input_names=["input_ids", "token_type_ids", "attention_mask"],
            model_max_length=window,
            clean_up_tokenization_spaces=False,
        )
        self._tokens = packed(self._tokenizer, documents, self.SEP)

    def batch(self, step: int) -> Batch:
        """Both int64 (rows, window so far); targets outside the predicted places are unscored."""
        window = min(self._window, self.first_window << (step // self.steps_to_double))
        text = self._framed(windows(self._tokens, self.tokens_per_step // window, window - 2, step))
        generator = torch.Generator().manual_seed(SEED + step)
        chosen = self._chosen(text, self.predicted, generator)
        fate = torch.rand(text.shape, generator=generator)
        replaced = torch.randint(len(self.special), len(self._tokenizer), text.shape, generator=generator)
        inputs = text.where(~(chosen & (fate >= 0.2)), torch.tensor(self.MASK))
        inputs = inputs.where(~(chosen & (fate < 0.1)), replaced)
        return inputs, text.where(chosen, UNSCORED)

    def loss(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        inputs, targets = batch
        return _cross_entropy(model(inputs).logits, targets)

    @torch.inference_mode()
    def figure(self, model: PreTrainedModel) -> float:
        documents = standard_library("heldout")[::HELD_OUT_SHARE]
        rows = consecutive_windows(packed(self._tokenizer, documents, self.SEP), self._window - 2)
        text = self._framed(rows)
        chosen = self._chosen(text, self.asked, torch.Generator().manual_seed(SEED))
        right = 0
        for part, where in zip(text.split(16), chosen.split(16)):
            found = model(part.where(~where, self.MASK)).logits.argmax(-1)
            right += int((found == part)[where].sum())
        return right / int(chosen.sum())

    def save(self, out: Path) -> None:
        save_tokenizer(self._tokenizer, out)

    def start(self, model: PreTrainedModel) -> None:
        """The output's bias begins at the logarithm of the tokens' frequencies: steps would take it there slowly."""
        counts = torch.bincount(self._tokens, minlength=model.config.vocab_size) + 1
        logarithms = counts.float().log()
        with torch.no_grad():
            model.get_output_embeddings().bias.copy_(logarithms - logarithms.mean())

    def _framed(self, rows: Tensor) -> Tensor:
        """[CLS] before and [SEP] after each row."""
        return pad(pad(rows, (1, 0), value=self.CLS), (0, 1), value=self.SEP)

    def _chosen(self, text: Tensor, share: float, generator: torch.Generator) -> Tensor:
        """Which places are predicted: the same number in every row, never a special token's unless text has too few."""
        scores = torch.rand(text.shape, generator=generator).where(text >= len(self.special), 2.0)
        order = scores.argsort(dim=1, stable=True)[:, : round(share * text.shape[1])]
        return torch.zeros_like(text, dtype=torch.bool).scatter_(1, order, True)


class SpanCorruption(Objective):
    """T5's objective (Raffel et al. 2020, §3.1.4): some tokens, in spans, are taken out and have to be put back.

    30 % of them, in spans of five on average: twice as much to learn from a step as at the paper's 15 % and three.
    The inputs have one sentinel in place of each span, the targets each sentinel and what stood there; both end with
    the end of the sequence. The figure is the mean loss in nats per target token on held-out windows, spans fixed.
    """

    metric = "held-out loss in nats per target token"
    PAD, END = range(2)
    SENTINELS = 32
    special = ("<pad>", "</s>", *(f"<extra_id_{index}>" for index in range(SENTINELS)))
    taken = 0.3
    mean_span = 5

    def __init__(self, window: int) -> None:
        self._window = window
        documents = standard_library("train")
        tokenizer = train_tokenizer(documents, self.special)
        tokenizer.post_processor = TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", self.END)]
        )
        self._tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="<pad>",
            eos_token="</s>",
            extra_special_tokens=list(self.special[2:]),
            model_max_length=window,
            clean_up_tokenization_spaces=False,
        )
        self._tokens = packed(self._tokenizer, documents, self.END)

    def batch(self, step: int) -> Batch:
        """Corrupted text, int64 (rows, about 0.8 window), and targets, int64 (rows, about 0.4 window)."""
        text = windows(self._tokens, TOKENS_PER_STEP // self._window, self._window, step)
        return self.corrupted(text, torch.Generator().manual_seed(SEED + step))

    def corrupted(self, text: Tensor, generator: torch.Generator) -> Batch:
        """Inputs and targets of windows of text, int64 (rows, window), each row with spans of its own."""
        taken = round(self.taken * self._window)
        spans = round(taken / self.mean_span)
        inputs, targets = [], []
        end = torch.tensor([self.END])
        for row in text:
            gone = _composition(taken, spans, generator)
            kept = _composition(self._window - taken, spans, generator)  # the text begins with a kept piece
            pieces = row.split([length for pair in zip(kept, gone) for length in pair])
            sentinels = torch.arange(2, 2 + spans).split(1)
            inputs.append(torch.cat([*(part for pair in zip(pieces[::2], sentinels) for part in pair), end]))
            targets.append(torch.cat([*(part for pair in zip(sentinels, pieces[1::2]) for part in pair), end]))
        return torch.stack(inputs), torch.stack(targets)

    def loss(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        inputs, targets = batch
        return _cross_entropy(model(input_ids=inputs, labels=targets).logits, targets)

    @torch.inference_mode()
    def figure(self, model: PreTrainedModel) -> float:
        documents = standard_library("heldout")[::HELD_OUT_SHARE]
        rows = consecutive_windows(packed(self._tokenizer, documents, self.END), self._window)
        inputs, targets = self.corrupted(rows, torch.Generator().manual_seed(SEED))
        nats = sum(
            self.loss(model, batch).item() * batch[1].numel() for batch in zip(inputs.split(16), targets.split(16))
        )
        return nats / targets.numel()

    def save(self, out: Path) -> None:
        save_tokenizer(self._tokenizer, out)


class Digits(Objective):
    """Handwritten digits of 8 × 8 pixels, from scikit-learn (UCI, Optical Recognition of Handwritten Digits, test set).

    An image's part is that of the name `digits:INDEX`, as for text. Training images are shifted by up to one pixel.
    """

    metric = "held-out accuracy"
    higher_is_better = True
    SIDE = 8
    DARKEST = 16
    ROWS = 128

    def __init__(self) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise InputError("the digits come with scikit-learn: install it with `pip install scikit-learn`") from error
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32)
        labels = torch.tensor(digits.target, dtype=torch.int64)
        parts = [part_of(f"digits:{index}") for index in range(len(images))]
        chosen = {part: torch.tensor([found == part for found in parts]) for part in set(parts)}
        self._parts: dict[Part, Batch] = {part: (images[where], labels[where]) for part, where in chosen.items()}

    def batch(self, step: int) -> Batch:
        """Pixel values as the processor makes them, float32 (rows, 3, 8, 8), and labels, int64 (rows,)."""
        images, labels = self._parts["train"]
        generator = torch.Generator().manual_seed(SEED + step)
        chosen = torch.randint(len(images), (self.ROWS,), generator=generator)
        down, right = torch.randint(3, (2, self.ROWS), generator=generator)
        shifted = pad(images, (1, 1, 1, 1)).unfold(1, self.SIDE, 1).unfold(2, self.SIDE, 1)
        return self._pixels(shifted[chosen, down, right]), labels[chosen]

    def loss(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        inputs, targets = batch
        return _cross_entropy(model(pixel_values=inputs).logits, targets)

    @torch.inference_mode()
    def figure(self, model: PreTrainedModel) -> float:
        images, labels = self._parts["heldout"]
        found = model(pixel_values=self._pixels(images)).logits.argmax(-1)
        return float((found == labels).double().mean())

    def save(self, out: Path) -> None:
        """The processor's file is written by hand: transformers' own class needs torchvision to be made."""
        half = [0.5, 0.5, 0.5]
        config = {
            "image_processor_type": "ViTImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"height": self.SIDE, "width": self.SIDE},
            "resample": 2,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": half,
            "image_std": half,
        }
        write_json_atomic(out / "preprocessor_config.json", config)

    def _pixels(self, images: Tensor) -> Tensor:
        """Grey values 0..16, (rows, 8, 8), as three channels of -1..1: what the processor makes of 0..255."""
        return (images / self.DARKEST * 2 - 1)[:, None].expand(-1, 3, -1, -1)


def top_level(path: str) -> str:
    """The top-level package of a document's path, `help` for a help topic, "" for a single module."""
    if path.startswith("help:"):
        return "help"
    return path.split("/", maxsplit=1)[0] if "/" in path else ""


def _composition(total: int, parts: int, generator: torch.Generator) -> list[int]:
    """`total` as a sum of `parts` positive numbers, every such sum equally likely."""
    cuts = torch.randperm(total - 1, generator=generator)[: parts - 1].sort().values + 1
    edges = torch.cat([torch.tensor([0]), cuts, torch.tensor([total])])
    return edges.diff().tolist()


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the scored targets, in float32; logits (..., classes), targets (...)."""
    return cross_entropy(logits.float().flatten(0, -2), targets.flatten(), ignore_index=UNSCORED)
