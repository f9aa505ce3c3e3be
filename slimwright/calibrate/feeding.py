"""Models that read images or sounds: what each is fed, and their batches from documents.

Nothing is padded that need not be: samples whose inputs have equal shapes share a batch, any other has one of its own.
What a processor pads all the same (Whisper's thirty seconds, a text of fixed length) does not count.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from slimwright.calibrate.data import Document, whole_text
from slimwright.calibrate.media import read_image, read_sound, require_pillow
from slimwright.calibrate.walk import Batch
from slimwright.errors import InputError
from slimwright.model.inputs import dummy_inputs, image_tokens

TEXT = frozenset({"text"})
_NAMES = {"text": "text", "image": "an image", "audio": "sound"}
_TAKES = {
    frozenset({"image"}): "a folder of images, or rows with 'image'",
    frozenset(
        {"image", "text"}
    ): "rows with 'image' and 'text' (or 'messages'), or a folder of x.png with x.txt beside",
    frozenset({"audio"}): "a folder of .wav files, or rows with 'audio'",
    frozenset({"audio", "text"}): "rows with 'audio' and 'text', or a folder of x.wav with x.txt beside",
}
_PIXELS = 16 * 16  # of a patch, where the config does not say
LONGEST_SOUND = 30.0
"""Seconds of sound that a model without a length of its own is fed at once."""


def fed(model: Any) -> frozenset[str]:
    """What the model reads: of ``text``, ``image`` and ``audio``; an encoder of sounds with a decoder reads both."""
    probe = dummy_inputs(model, batch=1, length=8)
    found = {"text"} if "input_ids" in probe or "decoder_input_ids" in probe else set[str]()
    found |= {"image"} if "pixel_values" in probe else set[str]()
    found |= {"audio"} if "input_features" in probe or "input_values" in probe else set[str]()
    return frozenset(found)


def usable(found: Sequence[Document], kinds: frozenset[str], source: str, model: str) -> list[Document]:
    """The documents that hold all that the model reads.

    Args:
        kinds: see :func:`fed`.
        source, model: names for the error.

    Raises:
        InputError: none does; the sentence says what does.
    """
    has = {
        "text": lambda document: bool(document.text.strip() or document.messages),
        "image": lambda document: document.image is not None,
        "audio": lambda document: document.audio is not None,
    }
    chosen = [document for document in found if all(has[kind](document) for kind in kinds)]
    if not chosen:
        wanted = " and ".join(_NAMES[kind] for kind in sorted(kinds))
        gives = _TAKES.get(kinds, "text files, or rows with 'text'")
        raise InputError(f"No document of the data {source} holds {wanted}, which {model} reads: give {gives}.")
    return chosen


def load_processor(directory: Path, kinds: frozenset[str]) -> Any:
    """What turns images and sounds (and text beside them) into the model's inputs.

    Raises:
        InputError: the model has none that loads, or a package that it needs is not installed.
    """
    if "image" in kinds:
        require_pillow()
    auto: Any = transformers.AutoProcessor
    if kinds == {"image"}:
        auto = transformers.AutoImageProcessor
    elif kinds == {"audio"}:
        auto = transformers.AutoFeatureExtractor
    try:
        made = auto.from_pretrained(directory)
    except Exception as error:  # any processor may fail in its own way
        raise InputError(
            f"The processor of {directory} does not load ({_reason(error)}): put its preprocessor_config.json beside "
            "config.json."
        ) from None
    parts = {"image": "image_processor", "audio": "feature_extractor", "text": "tokenizer"}
    missing = [parts[kind] for kind in sorted(kinds) if len(kinds) > 1 and getattr(made, parts[kind], None) is None]
    if missing:
        raise InputError(
            f"The model {directory} has no {missing[0].replace('_', ' ')} beside config.json: put it there."
        )
    return made


@dataclass(frozen=True)
class Row:
    """One sample.

    Attributes:
        inputs: keyword arguments of a forward of one row.
        tokens: how many positions count.
        name: of the document.
        masks: of positions that count, (1, length), one for each sequence that has others.
        outputs: (1, length) positions whose output counts; None: all.
        example: for the log.
    """

    inputs: dict[str, Tensor]
    tokens: int
    name: str
    masks: tuple[Tensor, ...] = ()
    outputs: Tensor | None = None
    example: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shapes(self) -> tuple[Any, ...]:
        """Rows of equal shapes can share a batch."""
        return tuple((name, tuple(tensor.shape[1:])) for name, tensor in sorted(self.inputs.items()))


class Feed:
    """Makes rows of documents for one model.

    Args:
        model: of transformers; on the meta device it does.
        processor: see :func:`load_processor`.
        length: text tokens of a row at most.
    """

    def __init__(self, model: Any, processor: Any, length: int) -> None:
        self.kinds = fed(model)
        self._model, self._processor, self._length = model, processor, length
        self._accepted = inspect.signature(type(model).forward).parameters
        self._image_token = next(
            (
                value
                for name in ("image_token_id", "image_token_index")
                if isinstance(value := getattr(model.config, name, None), int)
            ),
            None,
        )
        vision = getattr(model.config, "vision_config", model.config)
        self._mode = "L" if getattr(vision, "num_channels", 3) == 1 else "RGB"
        self._image_tokens: dict[torch.Size, int] = {}
        self._tried: set[tuple[Any, ...]] = set()

    def row(self, document: Document) -> Row:
        """One document's.

        Raises:
            InputError: its image or sound cannot be read, or the model cannot take what its processor makes of it.
        """
        if "audio" in self.kinds:
            made = self._sound(document)
        elif "text" in self.kinds:
            made = self._image_and_text(document)
        else:
            made = self._image(document)
        if made.shapes not in self._tried:
            self._tried.add(made.shapes)
            self._try(made)
        return made

    def _try(self, row: Row) -> None:
        """Run the model without data, where it is without data and needs none to know its shapes: before work starts, a
        processor that was made for another model is found out."""
        if next(self._model.parameters()).device.type != "meta" or self._image_token is not None:
            return
        try:
            with torch.no_grad():  # without masks, whose values transformers looks at
                self._model(**{n: t.to("meta") for n, t in row.inputs.items() if n != "attention_mask"})
        except Exception as error:  # whatever the model checks
            raise InputError(
                f"The model does not take what its processor makes of {row.name} ({_reason(error)})."
            ) from None

    # -- kinds -----------------------------------------------------------------------------------------------------

    def _image(self, document: Document) -> Row:
        inputs = self._taken(self._processor(images=[read_image(document, self._mode)], return_tensors="pt"))
        return Row(inputs, self._patches(inputs), document.name)

    def _image_and_text(self, document: Document) -> Row:
        tokenizer = self._processor.tokenizer
        image, text = read_image(document, self._mode), self._prompt(document)
        settings: dict[str, Any] = {"return_tensors": "pt"}
        if self._image_token is None:  # two towers: the text's end token must survive the cut
            settings |= {"truncation": True, "max_length": self._length}
        try:
            inputs = self._taken(self._processor(images=[image], text=[text], **settings))
        except Exception as error:  # a placeholder too many, a template that does not fit, ...
            raise InputError(f"The processor does not take {document.name} ({_reason(error)}).") from None
        ids = inputs["input_ids"]
        if int(ids.max()) >= self._model.config.get_text_config().vocab_size:
            raise InputError(f"The tokenizer gives the id {int(ids.max())}, but the model has fewer embeddings.")
        mask = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        example = {"token_ids": ids[0, :32].tolist(), "text": tokenizer.decode(ids[0, :32])}
        if self._image_token is None:
            masks = () if mask.all() else (mask,)
            return Row(inputs, int(mask.sum()) + self._patches(inputs), document.name, masks, example=example)
        images = ids == self._image_token
        pixels = inputs["pixel_values"]
        if pixels.shape not in self._image_tokens:
            self._image_tokens[pixels.shape] = image_tokens(self._model, type(self._model), self._model.config, pixels)
        expected = self._image_tokens[pixels.shape]
        if int(images.sum()) != expected:
            raise InputError(
                f"The processor writes {int(images.sum())} image tokens into {document.name}, but the model makes "
                f"{expected} of an image: they do not fit."
            )
        limit = self._limit(expected + self._length)
        if int(images[:, :limit].sum()) < expected:
            raise InputError(f"The image of {document.name} takes {expected} tokens, more than a sequence of {limit}.")
        cut = {name: t[:, :limit] if t.shape == ids.shape else t for name, t in inputs.items()}
        mask, images = mask[:, :limit], images[:, :limit]
        return Row(
            cut, int(mask.sum()), document.name, () if mask.all() else (mask,), mask & ~images, example=example
        )  # fmt: skip

    def _sound(self, document: Document) -> Row:
        extractor = getattr(self._processor, "feature_extractor", self._processor)
        rate = int(extractor.sampling_rate)
        wave = read_sound(document, rate)
        most = int(getattr(extractor, "n_samples", 0) or LONGEST_SOUND * rate)
        if len(wave) > most:
            raise InputError(
                f"The sound of {document.name} takes {len(wave) / rate:.1f} seconds, more than the {most / rate:.0f} "
                "that the model is fed at once: cut it."
            )
        spectra = "input_features" in self._accepted
        made = extractor(wave, sampling_rate=rate, return_tensors="pt", return_attention_mask=spectra)
        inputs = self._taken(made)
        if not spectra:
            lengths = getattr(self._model, "_get_feat_extract_output_lengths", None)
            positions = int(lengths(torch.tensor(len(wave)))) if lengths else len(wave) // 320
            return Row({"input_values": inputs["input_values"]}, max(1, positions), document.name)
        frames = made["attention_mask"].bool()[:, ::2]  # the second convolution steps by two
        if not frames.any():
            raise InputError(f"The sound of {document.name} is shorter than one frame.")
        masks = () if frames.all() else (frames,)
        inputs.pop("attention_mask", None)  # of the frames: Whisper reads silence where there is no sound
        if "text" not in self.kinds:
            return Row(inputs, int(frames.sum()), document.name, masks)
        ids = self._transcript(document)
        if ids.shape == frames.shape:  # masks go by length
            ids = ids[:, :-1]
        example = {"token_ids": ids[0, :32].tolist(), "text": self._processor.tokenizer.decode(ids[0, :32])}
        inputs["decoder_input_ids"] = ids
        return Row(
            inputs, int(frames.sum()) + ids.numel(), document.name, masks, torch.ones_like(ids).bool(), example=example
        )  # fmt: skip

    # -- parts -----------------------------------------------------------------------------------------------------

    def _taken(self, made: Mapping[str, Any]) -> dict[str, Tensor]:
        """What the model's forward accepts, labels left out."""
        return {
            name: value
            for name, value in made.items()
            if name in self._accepted and name != "labels" and isinstance(value, Tensor)
        }

    def _limit(self, asked: int) -> int:
        """Positions of a sequence, at most what the model has."""
        positions = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        return min(asked, positions) if isinstance(positions, int) and positions > 0 else asked

    def _patches(self, inputs: Mapping[str, Tensor]) -> int:
        """Pieces that the image is cut into."""
        vision = getattr(self._model.config, "vision_config", self._model.config)
        size = getattr(vision, "patch_size", None)
        pixels = size * size if isinstance(size, int) else _PIXELS
        height, width = inputs["pixel_values"].shape[-2:]
        return max(1, height * width // pixels)

    def _prompt(self, document: Document) -> str:
        """The text, the image's placeholder in it where the model wants one."""
        token = getattr(self._processor, "image_token", None) if self._image_token is not None else None
        messages = list(document.messages)
        if document.pair is not None and getattr(self._processor, "chat_template", None) and token is not None:
            messages = [{"role": "user", "content": document.text}, {"role": "assistant", "content": document.pair}]
        if not messages:
            text = whole_text(document, self._processor.tokenizer)
            return text if token is None or token in text else f"{token}\n{text}"
        if not getattr(self._processor, "chat_template", None):
            raise InputError(f"{document.name} holds messages, but the model's processor has no chat template.")
        spoken = [{**message, "content": _parts(message["content"])} for message in messages]
        if not any(part.get("type") == "image" for message in spoken for part in message["content"]):
            first = next((message for message in spoken if message["role"] == "user"), spoken[0])
            first["content"] = [{"type": "image"}, *first["content"]]
        return str(self._processor.apply_chat_template(spoken, tokenize=False))

    def _transcript(self, document: Document) -> Tensor:
        """What the decoder reads, (1, length): its first token, and the text but for its end."""
        config = self._model.config
        ids = list(self._processor.tokenizer(whole_text(document, self._processor.tokenizer))["input_ids"])
        start = getattr(config, "decoder_start_token_id", None)
        if start is not None and (not ids or ids[0] != start):
            ids = [start, *ids]
        vocabulary = config.get_text_config().vocab_size
        if max(ids) >= vocabulary:
            raise InputError(f"The tokenizer gives the id {max(ids)}, but the model has {vocabulary} embeddings.")
        most = getattr(config, "max_target_positions", None) or self._length
        return torch.tensor([ids[: max(1, min(len(ids) - 1, self._length, most))]])


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")


def _parts(content: Any) -> list[dict[str, Any]]:
    """A message's content as a list of parts."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [dict(part) if isinstance(part, Mapping) else {"type": "text", "text": str(part)} for part in content]


def ordered(found: Sequence[Document], seed: int) -> list[Document]:
    """The order in which documents are taken."""
    order = list(found)
    random.Random(seed).shuffle(order)
    return order


def batches_of(rows: Sequence[Row], batch_tokens: int) -> list[Batch]:
    """Rows of equal shapes joined, up to ``batch_tokens`` counted positions, in the order of each shape's first row."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(row.shapes, []).append(row)
    made = []
    for members in groups.values():
        step = max(1, batch_tokens // max(row.tokens for row in members))
        made += [_joined(members[first : first + step]) for first in range(0, len(members), step)]
    return made


def _joined(rows: Sequence[Row]) -> Batch:
    inputs = {name: torch.cat([row.inputs[name] for row in rows]) for name in rows[0].inputs}
    lengths = {mask.shape[1] for row in rows for mask in row.masks}
    masks: dict[tuple[int, ...], Tensor] = {}
    for length in lengths:
        whole = torch.ones(1, length, dtype=torch.bool)
        parts = [next((mask for mask in row.masks if mask.shape[1] == length), whole) for row in rows]
        masks[(len(rows), length)] = torch.cat(parts)
    outputs = None if rows[0].outputs is None else torch.cat([row.outputs for row in rows if row.outputs is not None])
    return Batch(inputs, masks, tuple(row.name for row in rows), outputs)
