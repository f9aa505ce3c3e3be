"""A checkpoint as it lies on the disk: headers read and checked at once, weights mapped tile by tile when asked for."""

import mmap
import os
import re
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slimwright.checkpoint.files import exists, inside, plain_name, read_json, read_json_object, regular, shown
from slimwright.checkpoint.header import TensorInfo, read_header
from slimwright.errors import InputError

MAX_CONFIG_BYTES = 8 << 20
MAX_INDEX_BYTES = 64 << 20
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(?:/[A-Za-z0-9][A-Za-z0-9._-]*)?(?:@[A-Za-z0-9][A-Za-z0-9._/-]*)?")
_NOT_FETCHED = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.ot", "*.gguf", "onnx/*", "openvino/*"]
_NOT_FETCHED += ["original/*", "*.onnx*"]


class Checkpoint:
    """A model directory of which only the headers have been read.

    Attributes:
        path: the root that was given (or the hub's snapshot folder).
        model_path: where config.json and the weights are: `path`, or a sub-folder of a sentence-transformers directory.
        config: config.json.
        tensors: TensorInfo by name, in natural order ("layers.2" before "layers.10").
        files: the weight files in natural order.
        total_bytes: their sizes added up.
        hub_id: the id it was resolved from (with its revision), or None for a directory.

    Tensors are views of read-only mappings: no private memory, and **writing into one ends the process**; clone first.
    A file must not be cut short while it is mapped.
    """

    def __init__(
        self,
        path: Path,
        model_path: Path,
        config: dict[str, Any],
        *,
        tensors: dict[str, TensorInfo],
        files: list[Path],
        hub_id: str | None,
    ) -> None:
        self.path = path
        self.model_path = model_path
        self.config = config
        self.tensors = tensors
        self.files = files
        self.hub_id = hub_id
        self._sizes = {file: file.stat().st_size for file in files}
        self.total_bytes = sum(self._sizes.values())
        self._mappings: dict[Path, _Mapping] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """Open a model directory, a sentence-transformers directory or a hub id (`name`, `owner/name`, `...@revision`).

        Weights are `model.safetensors` if it exists, else the shards of `model.safetensors.index.json`. As transformers
        does, every tensor inside a shard belongs to the model, whether the index names it or not; a tensor that the
        index names must be in the shard it names, and no tensor may be in two. Files in the directory that the index
        does not name are not read. InputError for anything missing, damaged, outside the directory or not safetensors.
        """
        try:
            directory = Path(path).expanduser()
        except RuntimeError:  # ~nobody
            directory = Path(path)
        if os.path.isdir(directory):  # unlike Path.is_dir, false for a name that the system refuses
            return _open_directory(directory, None)
        if exists(directory):
            raise InputError(f"{shown(path)} is a file: name the directory that holds it and its config.json.")
        if not _HUB_ID.fullmatch(str(path)):
            raise InputError(f"{shown(path)} does not exist: name a model directory or a hub id (owner/name).")
        return _open_hub(str(path))

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The `quantization_config` of config.json, or of a sub-config such as text_config, or None.

        InputError if there is one that is not an object.
        """
        configs = [self.config, *(value for value in self.config.values() if isinstance(value, dict))]
        for config in configs:
            for key in ("quantization_config", "compression_config"):
                if key in config and config[key] is not None:
                    if not isinstance(config[key], dict):
                        raise InputError(f"{shown(self.model_path)}/config.json: {key} is not an object: repair it.")
                    return dict(config[key])
        return None

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """Rows of tensor `name` along its first dimension (all by default): shape `(rows, *shape[1:])`, its own dtype.

        A scalar has one row, and keeps its shape (). The result maps the file (see the class); only a tile whose bytes
        are not aligned to its dtype is copied. KeyError for an unknown name.
        """
        info = self.tensors[name]
        begin, end, row_bytes = _byte_range(info, rows)
        shape = (end - begin, *info.shape[1:]) if info.shape else ()
        start = info.start + begin * row_bytes
        nbytes = (end - begin) * row_bytes
        if nbytes == 0:
            return torch.empty(shape, dtype=info.dtype)
        flat = torch.from_numpy(self._mapping(info.file).window(start, nbytes))
        if start % info.dtype.itemsize:
            flat = flat.clone()
        return flat.view(info.dtype).view(shape)

    def tiles(self, name: str, max_bytes: int = 64 << 20, multiple: int = 1) -> Iterator[slice]:
        """Slices that cover the rows of tensor `name`, each of at most `max_bytes`, in order.

        Each but the last holds a multiple of `multiple` rows, and at least that many even where they weigh more. A
        scalar is one row. Where one row is too much (a fused expert tensor (experts, out, in)), read the whole tensor,
        which costs nothing, and slice its inner dimensions.
        """
        info = self.tensors[name]
        _, total, row_bytes = _byte_range(info, None)
        step = max(max_bytes // max(row_bytes, 1) // multiple, 1) * multiple
        for begin in range(0, total, step):
            yield slice(begin, min(begin + step, total))

    def advise_done(self, name: str, rows: slice | None = None) -> None:
        """Let go of the pages of these rows: the process's resident size shrinks, and a later read maps them again."""
        info = self.tensors[name]
        begin, end, row_bytes = _byte_range(info, rows)
        if end > begin and row_bytes:
            self._mapping(info.file).release(info.start + begin * row_bytes, (end - begin) * row_bytes)

    def read_pages(self, name: str, pages: Iterable[tuple[int, int]]) -> list[bytes]:
        """Parts of the data of tensor `name`, given as (first byte, bytes), by plain reads (for sampling, without
        mapping)."""
        info = self.tensors[name]
        with open(info.file, "rb", buffering=0) as file:
            return [os.pread(file.fileno(), *_inside(info, offset, nbytes)) for offset, nbytes in pages]

    def _mapping(self, file: Path) -> "_Mapping":
        with self._lock:
            mapping = self._mappings.get(file)
            if mapping is None:
                mapping = self._mappings[file] = _Mapping(file, self._sizes[file])
            return mapping


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """A sort key under which numbers inside names count as numbers; equal only for equal names."""
    words: list[tuple[int, int, str]] = []
    for index, part in enumerate(re.split(r"([0-9]+)", name)):
        digits = part.lstrip("0")
        words.append((1, len(digits), digits) if index % 2 else (0, 0, part))
    return (*words, (2, 0, name))


class _Mapping:
    """One file, mapped shared and read-only."""

    def __init__(self, file: Path, size: int) -> None:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            if os.fstat(descriptor).st_size < size:
                raise InputError(f"{shown(file)} has become shorter since it was opened: start over.")
            self._memory = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)
        self._address = int(np.frombuffer(self._memory, dtype=np.uint8).ctypes.data)

    def window(self, start: int, nbytes: int) -> np.ndarray:
        """The bytes as an array that keeps the mapping alive.

        The array claims to be writable, because torch warns of every array that is not; the pages are read-only.
        """
        return np.asarray(_Window(self._memory, self._address + start, nbytes))

    def release(self, start: int, nbytes: int) -> None:
        page = mmap.PAGESIZE
        begin = start // page * page
        self._memory.madvise(mmap.MADV_DONTNEED, begin, min(start + nbytes, len(self._memory)) - begin)


class _Window:
    """Memory of a mapping as numpy's array interface describes it; holds the mapping."""

    def __init__(self, memory: mmap.mmap, address: int, nbytes: int) -> None:
        self._memory = memory
        self.__array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 3}


def _inside(info: TensorInfo, offset: int, nbytes: int) -> tuple[int, int]:
    """How many bytes to read from which place of the file."""
    if offset < 0 or offset + nbytes > info.nbytes:
        raise ValueError(f"{info.name} has no bytes {offset}..{offset + nbytes}")
    return nbytes, info.start + offset


def _byte_range(info: TensorInfo, rows: slice | None) -> tuple[int, int, int]:
    """First row, row after the last, and bytes per row of a slice of a tensor's first dimension."""
    total = info.shape[0] if info.shape else 1
    row_bytes = info.nbytes // total if total else 0
    if rows is None:
        return 0, total, row_bytes
    begin, end, step = rows.indices(total)
    if step != 1:
        raise ValueError("rows must have step 1")
    return begin, max(begin, end), row_bytes


def _open_hub(identifier: str) -> Checkpoint:
    """Open a hub id from the local cache, or download it. One InputError whatever goes wrong."""
    import huggingface_hub
    from huggingface_hub import errors

    repository, _, revision = identifier.partition("@")

    def snapshot(local: bool) -> Checkpoint:
        folder = huggingface_hub.snapshot_download(
            repository, revision=revision or None, local_files_only=local, ignore_patterns=_NOT_FETCHED
        )
        return _open_directory(Path(folder), identifier)

    incomplete: InputError | None = None
    try:
        try:
            return snapshot(True)
        except InputError as error:  # only a part of it is in the cache, such as the tokenizer
            incomplete = error
        except errors.LocalEntryNotFoundError:
            pass
        return snapshot(False)
    except InputError:
        raise
    except errors.GatedRepoError as error:
        raise InputError(
            f"{identifier} is gated: accept its conditions on the hub and log in (`hf auth login`), then run again."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{repository} has no revision {revision!r}: name a branch, tag or commit.") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{identifier} is no directory here and no model on the hub (or a private one: `hf auth login`)."
        ) from error
    except errors.HFValidationError as error:
        raise InputError(f"{identifier} is no directory here, nor a possible hub id: check the name.") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if incomplete is not None:
            raise incomplete from error
        raise InputError(
            f"{identifier} is no directory here, not in the local hub cache, and the hub cannot be reached: check the "
            "name, or download the model where there is a network."
        ) from error
    except Exception as error:
        raise InputError(
            f"{identifier} could not be fetched from the hub ({type(error).__name__}): try again."
        ) from error


def _open_directory(path: Path, hub_id: str | None) -> Checkpoint:
    model_path = path / _transformer_folder(path)
    if not exists(model_path / "config.json"):
        raise InputError(_no_config(model_path))
    config = read_json_object(path, model_path / "config.json", MAX_CONFIG_BYTES)
    if exists(model_path / SINGLE_FILE):
        tensors = _read_file(path, model_path / SINGLE_FILE)
        files = [model_path / SINGLE_FILE]
    elif exists(model_path / INDEX_FILE):
        tensors, files = _read_shards(path, model_path)
    else:
        raise InputError(_no_weights(model_path))
    if not tensors:
        raise InputError(f"{shown(model_path)} holds no tensors: download it again.")
    ordered = {name: tensors[name] for name in sorted(tensors, key=natural_key)}
    return Checkpoint(path, model_path, config, tensors=ordered, files=files, hub_id=hub_id)


def _transformer_folder(path: Path) -> Path:
    """The sub-folder of the first Transformer module of a sentence-transformers directory; the root otherwise."""
    if not exists(path / "modules.json"):
        return Path()
    for folder, kind in sentence_modules(path):
        if kind.rpartition(".")[2] == "Transformer":
            return folder
    return Path()


def sentence_modules(path: Path) -> list[tuple[Path, str]]:
    """(folder, class) of the modules that a sentence-transformers directory's modules.json lists, in order.

    InputError if the file is malformed or a folder lies outside the directory.
    """
    modules = read_json(path, path / "modules.json", MAX_CONFIG_BYTES)
    found: list[tuple[Path, str]] = []
    for module in modules if isinstance(modules, list) else [None]:
        folder = module.get("path") if isinstance(module, dict) else None
        kind = module.get("type") if isinstance(module, dict) else None
        if not isinstance(folder, str) or not isinstance(kind, str):
            raise InputError(f"{shown(path / 'modules.json')} is no list of modules with path and type: repair it.")
        parts = [part for part in folder.split("/") if part not in ("", ".")]
        if folder.startswith("/") or not all(plain_name(part) for part in parts):
            raise InputError(f"{shown(path / 'modules.json')} names a folder outside the directory: repair it.")
        inside(path, path.joinpath(*parts))
        found.append((Path(*parts), kind))
    return found


def _read_file(root: Path, file: Path) -> dict[str, TensorInfo]:
    real, _ = regular(root, file)
    try:
        descriptor = os.open(real, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise InputError(f"{shown(file)} cannot be read ({error.strerror}): check its permissions.") from error
    try:
        return read_header(descriptor, file)[0]
    finally:
        os.close(descriptor)


def _read_shards(root: Path, model_path: Path) -> tuple[dict[str, TensorInfo], list[Path]]:
    index_file = model_path / INDEX_FILE
    weight_map = read_json_object(root, index_file, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{shown(index_file)} has no weight_map: download it again.")
    for name, shard in weight_map.items():
        if not plain_name(shard):
            raise InputError(
                f"{shown(index_file)} puts tensor {shown(name)!r} into {shown(shard)!r}, which is no plain file name: "
                "repair it."
            )
        if not shard.endswith(".safetensors"):
            raise InputError(
                f"{shown(index_file)} names {shown(shard)!r}, which is not a safetensors file: convert the model first."
            )
    shards = sorted(set(weight_map.values()), key=natural_key)
    missing = [shard for shard in shards if not exists(model_path / shard)]
    if missing:
        raise InputError(
            f"{shown(model_path)} lacks {len(missing)} of its {len(shards)} shards, {missing[0]} first: complete the "
            "download."
        )
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for name, info in _read_file(root, model_path / shard).items():
            if name in tensors:
                raise InputError(
                    f"{shown(model_path)} has tensor {shown(name)!r} both in {tensors[name].file.name} and in {shard}: "
                    "remove one of them."
                )
            tensors[name] = info
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file.name != shard:
            raise InputError(
                f"{shown(model_path / shard)} lacks tensor {shown(name)!r}, which the index puts there: download both."
            )
    return tensors, [model_path / shard for shard in shards]


def _names(path: Path) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except OSError as error:
        raise InputError(f"{shown(path)} cannot be listed ({error.strerror}): check its permissions.") from error


def _no_config(path: Path) -> str:
    names = _names(path)
    gguf = [name for name in names if name.endswith(".gguf")]
    if gguf:
        return f"{shown(path / gguf[0])} is a GGUF file, which cannot be an input: start from the model it was made of."
    if "adapter_config.json" in names:
        return f"{shown(path)} is an adapter, not a model: merge it into its base model first."
    return f"{shown(path)} has no config.json: name the directory of a Hugging Face model."


def _no_weights(path: Path) -> str:
    names = _names(path)
    gguf = [name for name in names if name.endswith(".gguf")]
    pickles = [name for name in names if name.endswith(PICKLES) and name != "training_args.bin"]
    others = [name for name in names if name.endswith(".safetensors")]
    if pickles:
        return (
            f"{shown(path / pickles[0])} is a pickle, which can run code when it is read: if you trust it, convert it "
            "with transformers' `from_pretrained(DIR).save_pretrained(NEW)` of the model's class, and use NEW."
        )
    if others:
        return f"{shown(path)} has {shown(others[0])} but neither {SINGLE_FILE} nor {INDEX_FILE}: complete it."
    if gguf:
        return f"{shown(path / gguf[0])} is a GGUF file, which cannot be an input: start from the model it was made of."
    return f"{shown(path)} has no weights ({SINGLE_FILE} or {INDEX_FILE}): complete the download."
