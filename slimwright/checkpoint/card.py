"""README.md of a result: the model card, with what the hub reads in its front matter."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from slimwright.checkpoint.files import exists, read_bytes
from slimwright.errors import InputError

MAX_CARD_BYTES = 8 << 20
MAX_FRONT_MATTER = 1 << 20
_MAX_DEPTH = 50
_CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_card_metadata(directory: Path) -> dict[str, Any]:
    """The front matter of a directory's README.md; empty if there is none, or none that can be read.

    Aliases are not accepted (they can blow up), nor nesting deeper than 50, nor more than 1 MB.
    """
    path = directory / "README.md"
    if not exists(path):
        return {}
    try:
        text = read_bytes(directory, path, MAX_CARD_BYTES).decode("utf-8-sig")
    except (InputError, UnicodeDecodeError):
        return {}
    match = re.match(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|\Z)", text, re.DOTALL)
    if match is None or len(match[1]) > MAX_FRONT_MATTER:
        return {}
    depth = 0
    try:
        for event in yaml.parse(match[1], Loader=_Loader):
            if isinstance(event, yaml.AliasEvent):
                return {}
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            if depth > _MAX_DEPTH:
                return {}
        value = yaml.load(match[1], Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, OverflowError):
        return {}
    return {key: item for key, item in value.items() if isinstance(key, str)} if isinstance(value, dict) else {}


def model_card(
    name: str,
    *,
    facts: Sequence[tuple[str, str]],
    load: str,
    base_models: Sequence[str] = (),
    relation: str = "quantized",
    source_metadata: Mapping[str, Any] | None = None,
    licence_files: Sequence[str] = (),
    library_name: str = "transformers",
    tags: Sequence[str] = (),
    warnings: Sequence[str] = (),
) -> str:
    """The text of README.md.

    `base_models` are hub ids; anything else (a local path) is not written down. `relation` is the hub's
    base_model_relation (quantized, merge, finetune, adapter). Licence, language and task are carried over from
    `source_metadata` (`read_card_metadata` of the source). `facts` are the rows of a table, `load` the Python lines
    that load the model. A missing licence is warned of, and `licence_files` are named.
    """
    source = source_metadata or {}
    front: dict[str, Any] = {}
    bases = [base.partition("@")[0] for base in base_models if _HUB_ID.fullmatch(base.partition("@")[0])]
    if bases:
        front["base_model"] = bases[0] if len(bases) == 1 else bases
        front["base_model_relation"] = relation
    for key in _CARRIED:
        if _carried(source.get(key)):
            front[key] = source[key]
    front["library_name"] = library_name
    front["tags"] = list(dict.fromkeys(["slimwright", *tags]))
    notes = list(warnings)
    if "license" not in front and not licence_files:
        notes.append("No licence was found with the base model: find out what it allows before you share this one.")
    of = f" of {', '.join(f'[{base}](https://huggingface.co/{base})' for base in bases)}" if bases else ""
    made = {"quantized": "A smaller version", "merge": "A merge", "adapter": "An adapter"}.get(relation, "A version")
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        "",
        f"# {_cell(name)}",
        "",
    ]
    lines += [f"{made}{of}, made with slimwright.", ""]
    if facts:
        lines += ["| | |", "|---|---|", *(f"| {_cell(key)} | {_cell(value)} |" for key, value in facts), ""]
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", load)), default=0))
    lines += ["## Use", "", f"{fence}python", load.rstrip(), fence, ""]
    if licence_files:
        lines += ["## Licence", "", "The base model's terms apply: " + ", ".join(map(_cell, licence_files)) + ".", ""]
    if notes:
        lines += ["## Warnings", "", *(f"- {_cell(note)}" for note in notes), ""]
    return "\n".join(lines)


def _carried(value: object) -> bool:
    """Whether a front matter value is worth carrying over: a short text, or a short list of them."""
    if isinstance(value, str):
        return 0 < len(value) <= 500
    return (
        isinstance(value, list) and 0 < len(value) <= 500 and all(isinstance(v, str) and len(v) <= 100 for v in value)
    )


def _cell(text: str) -> str:
    """Text as one line of Markdown that cannot end its table cell."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
