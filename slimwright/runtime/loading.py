"""``slimwright.load``: a result of ours as the model object that its config.json names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slimwright.checkpoint import Checkpoint
from slimwright.errors import InputError
from slimwright.model.skeleton import skeleton
from slimwright.runtime.generate import Generation


def load(directory: str | Path, **kwargs: Any) -> Any:
    """Load a compressed model in its own class.

    Plain ``from_pretrained`` does the same once slimwright is imported; here the class is found, the files are checked
    before transformers sees them, and a model that slimwright did not write is refused.

    Args:
        directory: what ``fit`` wrote, or a sentence-transformers directory around it.
        kwargs: as for ``from_pretrained`` (``dtype``, ``device_map``, ``trust_remote_code``, ...); for a
            sentence-transformers directory they go to its transformer.

    Returns:
        The transformers model of the checkpoint's architecture in evaluation mode, or a ``SentenceTransformer``.

    Raises:
        InputError: not a model of ours, or its files are damaged, missing or do not belong together.
    """
    checkpoint = Checkpoint.open(directory)
    packed = (checkpoint.quantization or {}).get("quant_method") == "slimwright"
    plain_result = checkpoint.quantization is None and (checkpoint.path / "plan.yaml").exists()  # nothing was packed
    if not packed and not plain_result:
        raise InputError(
            f"'{directory}' was not written by slimwright: load it with from_pretrained, or compress it with "
            "`slimwright fit`."
        )
    return loaded(checkpoint, **kwargs)


def loaded(checkpoint: Checkpoint, **kwargs: Any) -> Any:
    """As :func:`load`, of any checkpoint that transformers reads: what a result is compared with is loaded alike."""
    trusted = bool(kwargs.get("trust_remote_code"))
    if (checkpoint.path / "modules.json").exists():
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise InputError(
                f"'{checkpoint.path}' is a sentence-transformers directory: "
                "`pip install sentence-transformers` to load it."
            ) from error
        kwargs.pop("trust_remote_code", None)
        return SentenceTransformer(str(checkpoint.path), model_kwargs=kwargs, trust_remote_code=trusted)
    model_class = type(skeleton(checkpoint.config, checkpoint.model_path, checkpoint.tensors, trusted))
    model = model_class.from_pretrained(checkpoint.model_path, **kwargs)
    if model.can_generate() and not isinstance(model.generate, Generation):  # nothing was packed
        model.generate = Generation(model)  # type: ignore[assignment]
    return model
