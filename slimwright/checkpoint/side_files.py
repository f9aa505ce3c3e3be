"""Everything beside the weights that makes a model usable, copied byte for byte."""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from slimwright.checkpoint.files import regular, shown
from slimwright.checkpoint.publish import JOB_FILE
from slimwright.checkpoint.reader import INDEX_FILE, PICKLES, SINGLE_FILE, Checkpoint, sentence_modules
from slimwright.errors import InputError, SlimwrightError

MAX_FILE_BYTES = 256 << 20
MAX_FILES = 2_000
MAX_DEPTH = 5

# Written anew for every result, so never taken from the source.
_REWRITTEN = {JOB_FILE, "plan.yaml", "export.json", "report.json", "report.html", "events.jsonl"}
_OTHER_WEIGHTS = (
    *PICKLES, ".safetensors", ".safetensors.index.json", ".bin.index.json", ".h5", ".msgpack", ".onnx", ".onnx_data",
    ".gguf", ".ggml", ".ot", ".tflite", ".mlmodel", ".mlpackage", ".pb", ".npz", ".npy", ".engine", ".nemo", ".pte",
)  # fmt: skip
_OTHER_FOLDERS = re.compile(r"onnx|openvino|original|gguf|coreml|tflite|tensorrt|runs|logs|checkpoint-\d+|__pycache__")
_DOCUMENTS = (
    ".md", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".bmp", ".pdf", ".mp4", ".mp3", ".wav", ".ipynb", ".html",
    ".zip", ".tar", ".gz", ".log",
)  # fmt: skip
_CODE = "code (--trust-remote-code copies it)"
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
    Left out, each with its reason: the model's own weights, index and config.json (the caller writes them), other
    weight formats, README.md (a new card is written), pictures, hidden files, links to directories, files of more than
    256 MB, and Python files unless `trust_remote_code`.

    InputError for a link that is broken or leads out of the directory, a file that is none (a pipe), more than 2,000
    files, or a sentence-transformers module whose only weights are a pickle. SlimwrightError if a copy cannot be
    written.
    """
    root = source.path
    model = source.model_path.relative_to(root)
    own_weights = {file.relative_to(root) for file in source.files} | {model / INDEX_FILE}
    modules: set[Path] = set()
    if os.path.lexists(root / "modules.json"):
        modules = {folder for folder, _ in sentence_modules(root)} - {model}
    copied: list[str] = []
    skipped: list[tuple[str, str]] = []
    for name in _walk(root, skipped):
        reason = "weights, written anew" if name in own_weights else _why_not(root, name, model, modules)
        if reason == _CODE and trust_remote_code:
            reason = None
        if reason is None:
            _copy(regular(root, root / name)[0], destination / name)
            copied.append(name.as_posix())
        else:
            skipped.append((shown(name.as_posix()), reason))
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
            elif not name.isprintable():
                reason = "its name is not plain text"
            elif os.path.islink(os.path.join(folder, name)):
                reason = "a link to a directory"
            elif len(here.parts) + 1 > MAX_DEPTH:
                reason = "nested too deep"
            elif _OTHER_FOLDERS.fullmatch(name):
                reason = "another format of the weights, or logs"
            if reason is None:
                entered.append(name)
            else:
                skipped.append((shown((here / name).as_posix()) + "/", reason))
        names[:] = entered
        seen += len(names) + len(files)
        if seen > MAX_FILES:
            raise InputError(f"{shown(root)} holds more than {MAX_FILES:,} files: name a directory of one model only.")
        found += [here / name for name in files]
    return sorted(found)


def _why_not(root: Path, name: Path, model: Path, modules: set[Path]) -> str | None:
    """Why a file that is not of the model's own weights is not copied; None if it is."""
    lower = name.name.lower()
    if lower.startswith("."):
        return "hidden"
    if not lower.isprintable():
        return "its name is not plain text"
    if name.parent in modules:
        if lower == SINGLE_FILE:
            return None
        if lower.endswith(PICKLES) and not (root / name.parent / SINGLE_FILE).exists():
            raise InputError(
                f"{shown(root / name)} is a pickle, the only weights of its module: save the model again with "
                "sentence-transformers, which writes safetensors."
            )
    if name == model / "config.json" or (name.parent == Path() and lower in _REWRITTEN):
        return "written anew"
    if lower.startswith("adapter_"):
        return "an adapter, which would be loaded on top"
    if lower.endswith(_OTHER_WEIGHTS):
        return "other weights"
    if lower.endswith(".py"):
        return _CODE
    if lower.startswith("readme"):
        return "a new model card is written"
    if lower.endswith(_DOCUMENTS) and not LICENCE.fullmatch(lower):
        return "documentation"
    if regular(root, root / name)[1].st_size > MAX_FILE_BYTES:
        return f"larger than {MAX_FILE_BYTES >> 20} MB"
    return None


def _copy(source: Path, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    except OSError as error:
        raise SlimwrightError(f"{shown(source)} cannot be copied to {shown(target)} ({error.strerror}).") from error
