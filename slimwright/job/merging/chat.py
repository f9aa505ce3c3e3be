"""The chat template of a merge."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from slimwright.checkpoint.files import exists, read_bytes, read_json_object, write_bytes_atomic, write_json_atomic
from slimwright.errors import InputError
from slimwright.job.merging.targets import Inputs

TEMPLATE_FILE = "chat_template.jinja"
_MAX_BYTES = 8 << 20
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def chosen_template(asked: str, inputs: Inputs) -> str | None:
    """The text of a template: ``auto`` (the most frequent of the inputs', or None), ``chatml``, or the text itself.

    Raises:
        InputError: a name that is not known.
    """
    if asked == "auto":
        found = [template for given in inputs.values() if (template := _template(given.checkpoint.model_path))]
        return Counter(found).most_common(1)[0][0] if found else None
    if asked == "chatml":
        return _CHATML
    if "{" not in asked:
        raise InputError(f"The chat template '{asked}' is not known: give auto, chatml, or the template's own text.")
    return asked


def write_template(template: str, directory: Path) -> None:
    """Put a template into a result, where it is the only one."""
    write_bytes_atomic(directory / TEMPLATE_FILE, template.encode())
    path = directory / "tokenizer_config.json"
    if exists(path):
        settings = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(settings, dict) and settings.pop("chat_template", None) is not None:
            write_json_atomic(path, settings)


def _template(directory: Path) -> str | None:
    if exists(directory / TEMPLATE_FILE):
        return read_bytes(directory, directory / TEMPLATE_FILE, _MAX_BYTES).decode("utf-8", "replace").strip()
    if not exists(directory / "tokenizer_config.json"):
        return None
    template = read_json_object(directory, directory / "tokenizer_config.json", _MAX_BYTES).get("chat_template")
    return template.strip() if isinstance(template, str) else None
