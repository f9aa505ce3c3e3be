"""A result as one GGUF file: ggml's blocks as the plan has them, the tokenizer and the metadata beside."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimwright.checkpoint import Checkpoint, TensorEntry
from slimwright.errors import InputError, SlimwrightError
from slimwright.formats.gguf import GGUF, metadata, permuted_rows, rope_factors, tensor_name, vocabulary
from slimwright.job.exports.written import Result, Written
from slimwright.job.open import DequantizedCheckpoint, derived
from slimwright.model.structure import Structure

FILE = "model.gguf"
_LIMIT = 64 << 20
_TYPES: Mapping[torch.dtype, str] = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def gguf_profile(source: Checkpoint, structure: Structure) -> GGUF:
    """The profile of a model.

    Raises:
        InputError: a family, a tensor, a tokenizer or a rotary embedding that is not written, or no package gguf.
    """
    return GGUF(structure.family, _names(source, structure), _head_bytes(source))


def _names(source: Checkpoint, structure: Structure) -> dict[str, str]:
    metadata(source.config)
    found = {}
    for name in source.tensors:
        if name not in structure.ties and (short := tensor_name(structure.family, name)) is not None:
            found[name] = short
    return found


def write_gguf(
    result: Result, directory: Path, out: Path, max_shard_bytes: int, trust_remote_code: bool = False
) -> Written:
    """Write ``model.gguf`` and prove it.

    Args:
        directory: where it goes; ``out``: what the directory will be called.

    Raises:
        InputError: the plan or the model is not legal there; SlimwrightError: the file does not hold what was meant.
    """
    checkpoint, structure = result.checkpoint, result.structure
    profile = GGUF(structure.family, _names(checkpoint, structure))
    profile.check(result.plan(), list(structure.sites.values()), result.rounded)
    path = directory / FILE
    writer = _writer(checkpoint, path)
    total = 0
    entries = {name: _entry(result, profile, name) for name in profile.names}
    for entry, kind in entries.values():
        dtype = np.dtype(np.uint8 if kind.startswith(("Q", "BF")) else entry_dtype(kind))
        shape = (*entry.shape[:-1], entry.shape[-1] * 2) if kind == "BF16" else entry.shape
        writer.add_tensor_info(entry.name, shape, dtype, entry.nbytes, _type(kind))
        total += entry.nbytes
    factors = rope_factors(checkpoint.config)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", tuple(factors.shape), np.dtype(np.float32), 4 * len(factors))
        total += 4 * len(factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for done, (name, (entry, kind)) in enumerate(entries.items()):
        result.step(done, len(entries))
        writer.write_tensor_data(_bytes(result, name, entry, kind))
    if factors is not None:
        writer.write_tensor_data(factors.numpy())
    writer.close()
    compared = _read_back(result, profile, path)
    load = (
        f"from llama_cpp import Llama  # or: llama-cli -m {str(out / FILE)!r}; no slimwright\n"
        f"model = Llama(model_path={str(out / FILE)!r})"
    )
    how = {"how": "read back from disk with the gguf package", "weights_compared": compared}
    return Written((path,), total, load, "GGUF, ggml's blocks of the compressed result", how | _elsewhere(path))


def entry_dtype(kind: str) -> type:
    """numpy's type of a plain tensor."""
    return np.float16 if kind == "F16" else np.float32


def _type(kind: str) -> Any:
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType[kind]


def _entry(result: Result, profile: GGUF, name: str) -> tuple[TensorEntry, str]:
    """What a tensor becomes, and ggml's name of its type."""
    site = result.structure.sites.get(name)
    if name in result.grids:
        assert site is not None
        (entry,) = profile.entries(site, result.grids[name])
        return entry, result.grids[name].spec.upper()
    info = result.checkpoint.tensors[name]
    shape = info.shape if site is None or not site.transposed else site.weight_shape
    kept = profile.kept(TensorEntry(name, info.dtype, shape))
    assert kept is not None
    return kept, _TYPES[kept.dtype]


def _bytes(result: Result, name: str, entry: TensorEntry, kind: str) -> np.ndarray:
    """A tensor's data as it goes into the file."""
    checkpoint = result.checkpoint
    site = result.structure.sites.get(name)
    as_it_is = entry.dtype == checkpoint.tensors[name].dtype and not (site is not None and site.transposed)
    if name in result.grids:
        data = _payload(result, name)
    elif as_it_is and not derived(checkpoint, name):
        data = checkpoint.read(name)  # a view of the file: it may be large
    else:
        data = torch.cat([rows.to(entry.dtype) for rows in result.dense(name)]).reshape(entry.shape)
    order = permuted_rows(name, data.shape[0], checkpoint.config)
    data = data if order is None else data[order]
    data = data.contiguous()
    return (data.view(torch.uint8) if kind == "BF16" else data).numpy()


def _payload(result: Result, name: str) -> Tensor:
    """Blocks of a packed weight, (rows, bytes) uint8."""
    assert isinstance(result.checkpoint, DequantizedCheckpoint)
    return result.checkpoint.parts(name)[""].squeeze(-1)


def _writer(source: Checkpoint, path: Path | None) -> Any:
    """The container with everything but tensors."""
    if importlib.util.find_spec("gguf") is None:
        raise InputError("GGUF files are written with the package gguf: pip install gguf.")
    from gguf import GGUFWriter

    family = str(source.config.get("model_type"))
    writer = GGUFWriter(path, family)
    writer.add_name((source.config.get("architectures") or [family])[0])
    writer.add_quantization_version(2)
    values = metadata(source.config)
    file = source.model_path / "tokenizer.json"
    if file.is_file():
        if file.stat().st_size > _LIMIT:
            raise InputError(f"{file} is larger than {_LIMIT >> 20} MB: that is no tokenizer.")
        try:
            tokenizer = json.loads(file.read_text(encoding="utf-8"))
            values |= vocabulary(tokenizer, int(source.config["vocab_size"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{file} cannot be read as a tokenizer: repair it.") from None
        values |= _special(source)
    elif any((source.model_path / other).exists() for other in ("tokenizer.model", "vocab.txt", "spiece.model")):
        raise InputError(f"{source.model_path} has no tokenizer.json, from which alone a gguf's vocabulary is made.")
    else:
        values["tokenizer.ggml.model"] = ("string", "none")
    for key, (kind, value) in values.items():
        getattr(writer, f"add_{kind}")(key, value)
    return writer


def _special(source: Checkpoint) -> dict[str, tuple[str, Any]]:
    """Ids of special tokens, and the chat template."""
    found: dict[str, tuple[str, Any]] = {}
    for role in ("bos", "eos"):
        given = source.config.get(f"{role}_token_id")
        given = given[0] if isinstance(given, list) and given else given
        if isinstance(given, int) and given >= 0:
            found[f"tokenizer.ggml.{role}_token_id"] = ("uint32", given)
    template = source.model_path / "chat_template.jinja"
    text = template.read_text(encoding="utf-8") if template.is_file() else None
    if text is None and (source.model_path / "tokenizer_config.json").is_file():
        said = json.loads((source.model_path / "tokenizer_config.json").read_text(encoding="utf-8"))
        text = said.get("chat_template") if isinstance(said, dict) else None
    if isinstance(text, str):
        found["tokenizer.chat_template"] = ("string", text)
    return found


def _head_bytes(source: Checkpoint) -> int:
    """Bytes of the container without tensors and their entries; those of rotary factors included."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / FILE
        writer = _writer(source, path)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        factors = rope_factors(source.config)
        return path.stat().st_size + (0 if factors is None else 4 * len(factors) + 128)


def _read_back(result: Result, profile: GGUF, path: Path) -> int:
    """Compare every tensor of the file with what it should be; how many there are."""
    from gguf import GGUFReader

    written = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    for name, short in profile.names.items():
        entry, kind = _entry(result, profile, name)
        tensor = written.get(short)
        if tensor is None or tensor.tensor_type.name != kind or tensor.n_bytes != entry.nbytes:
            raise SlimwrightError(f"'{short}' was not written as it was meant: this is a defect of slimwright.")
        meant = _bytes(result, name, entry, kind).reshape(-1).view(np.uint8)
        if not np.array_equal(np.ascontiguousarray(tensor.data).reshape(-1).view(np.uint8), meant):
            raise SlimwrightError(f"'{short}' was not written as it was meant: this is a defect of slimwright.")
    return len(profile.names)


def _elsewhere(path: Path) -> dict[str, Any]:
    """Load it in llama.cpp where that is installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        return {"program": "none: llama-cpp-python is not installed here"}
    import llama_cpp

    try:
        model = llama_cpp.Llama(model_path=str(path), n_ctx=64, verbose=False, logits_all=True)
        model.eval([1, 2, 3])
    except (ValueError, RuntimeError) as error:
        raise SlimwrightError(f"llama.cpp does not load what was written: {error}") from None
    return {"program": f"llama.cpp (llama-cpp-python {llama_cpp.__version__}): loads and computes"}
