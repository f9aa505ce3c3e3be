"""The data of ``measure``: texts, labelled texts, retrieval tasks, labelled images."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from slimwright.calibrate.data import Document, documents, fingerprint
from slimwright.calibrate.feeding import usable
from slimwright.calibrate.media import read_image
from slimwright.errors import InputError, NotBuiltError
from slimwright.evaluate.accuracy import labels_of
from slimwright.evaluate.documents import STANDARD_LIBRARY, by_name, read_texts, sample
from slimwright.evaluate.retrieval import RetrievalTask, is_task, read_task, standard_library_task, task_of_pairs
from slimwright.evaluate.subject import Kind
from slimwright.job.measuring import Data

MOST_IMAGES = 1024


@dataclass(frozen=True)
class Source:
    """One source of data.

    Attributes:
        name: as in the report; ``source``: as the user gave it.
        texts: what is read; for a retrieval task its documents; of images that were decoded their documents.
        task: the retrieval task, or None.
        labels: (samples,) int64 indices of classes, or None.
        images: the file that holds what a classifier of images is fed.
    """

    name: str
    source: str
    texts: tuple[Document, ...] = ()
    task: RetrievalTask | None = None
    labels: Tensor | None = None
    images: Path | None = None

    def data(self) -> Data:
        """What a measuring process gets."""
        texts = tuple((document.name, document.text) for document in self.texts)
        queries = tuple(self.task.queries.values()) if self.task else ()
        return Data(self.name, texts, queries, str(self.images.resolve()) if self.images else None)

    @property
    def names(self) -> list[str]:
        """Of the rows: documents, or images by number."""
        if self.images is None or self.texts:
            return [document.name for document in self.texts]
        assert self.labels is not None
        return [str(index) for index in range(len(self.labels))]

    def facts(self) -> dict[str, Any]:
        """For the report."""
        found: dict[str, Any] = {"name": self.name, "source": self.source, "documents": len(self.names)}
        if self.images is not None:
            if self.texts:
                return {**found, "hash": fingerprint(self.texts)}
            return {**found, "hash": hashlib.sha256(self.images.read_bytes()).hexdigest()}
        size = sum(len(document.text.encode(errors="replace")) for document in self.texts)
        queries = {"queries": len(self.task.queries)} if self.task else {}
        return {**found, **queries, "bytes": size, "hash": fingerprint(self.texts)}


def read_source(
    name: str,
    source: str,
    kind: Kind,
    nbytes: int,
    classes: Mapping[str, int],
    reader: Callable[[], Any],
    scratch: Path,
) -> Source:
    """Read a source for models of a kind.

    Args:
        name: as in the report.
        source: ``stdlib`` or see :func:`slimwright.calibrate.data.documents`; for encoders also a folder in BEIR's
            layout, and ``stdlib`` and pairs are retrieval tasks; for classifiers of images also a safetensors file with
            ``pixel_values`` (images, channels, height, width) as the model takes them, and ``labels`` (images,).
        kind: of the models.
        nbytes: of text that are taken, about; of retrieval tasks all is.
        classes: indices of the classifiers' classes by name.
        reader: gives the reference's tokenizer, or its processor of images.
        scratch: directory for decoded images.

    Raises:
        InputError: what is there does not serve.
    """
    if kind == "vision":
        if Path(source).suffix == ".safetensors":
            return _pixels(name, source, len(set(classes.values())))
        return _images(name, source, classes, reader, scratch / f"{name}.safetensors")
    if kind == "encoder" and (source == STANDARD_LIBRARY or is_task(source)):
        return _retrieval(name, source, standard_library_task() if source == STANDARD_LIBRARY else read_task(source))
    found = read_texts(source, reader)
    pairs = [document for document in found if document.pair is not None]
    if kind == "encoder" and len(pairs) == len(found):
        return _retrieval(name, source, task_of_pairs(found))
    if kind == "classifier" and pairs:
        raise NotBuiltError(f"The data '{source}' holds pairs: classifiers of pairs are not measured in this version.")
    texts = tuple(sample(found, nbytes))
    if len(texts) < 2 and kind in ("encoder", "classifier"):
        raise InputError(f"The data '{source}' holds one text, but intervals need at least two.")
    return Source(name, source, texts, labels=labels_of(source, texts, classes) if kind == "classifier" else None)


def _retrieval(name: str, source: str, task: RetrievalTask) -> Source:
    if len(task.queries) < 2:
        raise InputError(f"The data '{source}' holds one query, but intervals need at least two.")
    return Source(name, source, tuple(Document(identifier, text) for identifier, text in task.documents.items()), task)


def _images(name: str, source: str, classes: Mapping[str, int], reader: Callable[[], Any], file: Path) -> Source:
    """Images of documents, as the reference's processor makes them for all models."""
    if source == STANDARD_LIBRARY:
        raise InputError("Classifiers of images need --data: a folder of images, rows with 'image', or .safetensors.")
    found = usable(documents(source), frozenset({"image"}), source, "a classifier of images")
    found = sorted(found, key=by_name)[:MOST_IMAGES]
    if len(found) < 2:
        raise InputError(f"The data '{source}' holds one image, but intervals need at least two.")
    labels, processor = labels_of(source, found, classes), reader()
    made = [processor(images=[read_image(image)], return_tensors="pt")["pixel_values"] for image in found]
    if len({pixels.shape for pixels in made}) > 1:
        raise InputError(f"The processor makes images of several sizes of '{source}': resize them to one.")
    save_file({"pixel_values": torch.cat(made)}, file)
    return Source(name, source, tuple(found), labels=labels, images=file)


def _pixels(name: str, source: str, classes: int) -> Source:
    path = Path(source).expanduser()
    if not path.is_file():
        raise InputError(f"The data {source} does not exist.")
    try:
        found = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read as safetensors: {error}.") from None
    pixels, labels = found.get("pixel_values"), found.get("labels")
    if pixels is None or labels is None or pixels.ndim != 4 or labels.shape != pixels.shape[:1] or len(labels) < 2:
        raise InputError(f"{path} must hold `pixel_values` (images, channels, height, width) and `labels` (images,).")
    if labels.is_floating_point() or int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise InputError(f"The `labels` of {path} are no indices of the model's {classes} classes.")
    return Source(name, source, labels=labels.long(), images=path)
