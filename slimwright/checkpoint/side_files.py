"""Everything beside the weights that makes a model usable, copied byte for byte."""

import os
import re
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

from slimwright.checkpoint.files import inside, shown
from slimwright.checkpoint.publish import JOB_FILE
from slimwright.checkpoint.reader import INDEX_FILE, PICKLES, SINGLE_FILE, Checkpoint, sentence_modules
from slimwright.errors import InputError, SlimwrightError

MAX_FILE_BYTES = 256 << 20
MAX_FILES = 2_000
MAX_DEPTH = 5

# Written anew for every result, so never taken from the source.
_REWRITTEN = {
    JOB_FILE,
    "config.json",
    "plan.yaml",
    "report.json",
    "report.html",
    "events.jsonl",
    "quantize_config.json",
}
_OTHER_WEIGHTS = (
    *PICKLES, ".safetensors", ".safetensors.index.json", ".bin.index.json", ".h5", ".msgpack", ".onnx", ".onnx_data",
    ".gguf", ".ggml", ".ot", ".tflite", ".mlmodel", ".mlpackage", ".pb", ".npz", ".npy", ".engine", ".nemo", ".pte",
)  # fmt: skip
_OTHER_FOLDERS = re.compile(r"onnx|openvino|original|gguf|coreml|tflite|tensorrt|runs|logs|checkpoint-\d+|__pycache__")
_DOCUMENTS = (
    ".md", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".bmp", ".pdf", ".mp4", ".mp3", ".wav", ".ipynb", ".html",
    ".zip", ".tar", ".gz", ".log",
)  # fmt: skip
LICENCE = re.compile(r"(licen[cs]e|notice|copying|use_policy|acceptable_use_policy)\b.*", re.IGNORECASE)


@dataclass(frozen=True)
class SideFiles:
    """What was copied (names relative to the root, in order), and what was not: (name, reason)."""

    copied: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]


def copy_side_files(source: Checkpoint, destination: Path, trust_remote_code: bool = False) -> SideFiles:
    """Copy the files of `source.path` that are not weights into `destination`, keeping sub-folders; nothing is changed.

    Copied is whatever is not known to be useless: tokenizers, chat templates, processors, generation settings,
    vocabularies, licences, modules.json, and the modules of a sentence-transformers directory with *their* weights.
    Left out, each with its reason: the model's own weights, index and config.json (the caller writes them), other weight
    formats, README.md (a new card is written), pictures, hidden files, links to directories, files of more than 256 MB,
    and Python files unless `trust_remote_code`.

    InputError for a link out of the directory, more than 2,000 files, or a sentence-transformers module whose only
    weights are a pickle. SlimwrightError if a copy cannot be written.
    """
    root = source.path
    modules: set[Path] = set()
    if os.path.lexists(root / "modules.json"):
        modules = {folder for folder, _ in sentence_modules(root)} - {source.model_path.relative_to(root)}
    copied: list[str] = []
    skipped: list[tuple[str, str]] = []
    for name in _walk(root, skipped):
        if len(copied) + len(skipped) > MAX_FILES:
            raise InputError(f"{shown(root)} holds more than {MAX_FILES:,} files: name a directory of one model only.")
        reason = _why_not(root, name, source.model_path.relative_to(root), modules, trust_remote_code)
        if reason is None:
            _copy(inside(root, root / name), destination / name)
            copied.append(name.as_posix())
        else:
            skipped.append((name.as_posix(), reason))
    return SideFiles(tuple(copied), tuple(sorted(skipped)))


def _walk(root: Path, skipped: list[tuple[str, str]]) -> list[Path]:
    """Relative names of the files below `root`, in order; folders not entered are added to `skipped`."""
    found: list[Path] = []
    seen = 0
    for folder, names, files in os.walk(root):
        here = Path(folder).relative_to(root)
        entered = []
        for name in sorted(names):
            reason = None
            if name.startswith("."):
                reason = "hidden"
            elif os.path.islink(os.path.join(folder, name)):
                reason = "a link to a directory"
            elif len(here.parts) + 1 > MAX_DEPTH:
                reason = "nested too deep"
            elif _OTHER_FOLDERS.fullmatch(name):
                reason = "another format of the weights, or logs"
            if reason is None:
                entered.append(name)
            else:
                skipped.append(((here / name).as_posix() + "/", reason))
        names[:] = entered
        seen += len(names) + len(files)
        if seen > MAX_FILES:
            raise InputError(f"{shown(root)} holds more than {MAX_FILES:,} files: name a directory of one model only.")
        found += [here / name for name in files]
    return sorted(found)


def _why_not(root: Path, name: Path, model: Path, modules: set[Path], trust_remote_code: bool) -> str | None:
    """Why a file is not copied; None if it is."""
    lower = name.name.lower()
    if lower.startswith("."):
        return "hidden"
    if name.parent in modules and name.parent != model:
        if lower == SINGLE_FILE:
            return None if _small(root, name) else "not a regular file"
        if lower.endswith(PICKLES) and not (root / name.parent / SINGLE_FILE).exists():
            raise InputError(
                f"{shown(root / name)} is a pickle, the only weights of its module: save the model again with "
                "sentence-transformers, which writes safetensors."
            )
    at_model = name.parent in (model, Path())
    if at_model and lower in _REWRITTEN and not (lower == "config.json" and name.parent != model):
        return "written anew"
    if name.parent == model and (lower in (SINGLE_FILE, INDEX_FILE) or re.fullmatch(r"model-.*\.safetensors", lower)):
        return "weights, written anew"
    if lower.startswith("adapter_"):
        return "an adapter, which would be loaded on top"
    if lower.endswith(_OTHER_WEIGHTS):
        return "other weights"
    if lower.endswith(".py") and not trust_remote_code:
        return "code (--trust-remote-code copies it)"
    if lower.startswith("readme"):
        return "a new model card is written"
    if lower.endswith(_DOCUMENTS) and not LICENCE.fullmatch(lower):
        return "documentation"
    if not _small(root, name, MAX_FILE_BYTES):
        return f"not a regular file of at most {MAX_FILE_BYTES >> 20} MB"
    return None


def _small(root: Path, name: Path, limit: int | None = None) -> bool:
    status = inside(root, root / name).stat()
    return stat.S_ISREG(status.st_mode) and (limit is None or status.st_size <= limit)


def _copy(source: Path, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    except OSError as error:
        raise SlimwrightError(f"{shown(source)} cannot be copied to {shown(target)} ({error.strerror}).") from error
