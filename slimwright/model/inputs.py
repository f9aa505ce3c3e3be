"""Random inputs for any transformers model: to observe it (meta device), to verify it, to test it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from slimwright.errors import InputError

_SPECIAL_ENDINGS = ("_token_id", "_token_ids", "_token_index")


def dummy_inputs(
    model: PreTrainedModel | PretrainedConfig,
    batch: int = 2,
    length: int = 16,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Keyword arguments of one forward, the same for the same arguments, whatever the device.

    Args:
        model: the model; its config alone does if ``architectures`` names a class of transformers.
        batch: sequences, images or clips.
        length: text tokens of each (cut to the model's longest); where the text holds an image, its tokens come first
            and are not counted.
        seed: of the random values.
        device: where the tensors go; on ``meta`` they have shapes only.

    Returns:
        ``input_ids`` (batch, length) int64, no special token among them (but image tokens where there are images);
        ``decoder_input_ids`` likewise for encoder-decoders; ``pixel_values`` (batch, channels, height, width),
        ``input_features`` (batch, mel bins, frames), ``input_values`` (batch, samples) in the model's dtype: each
        where the model takes it.

    Raises:
        InputError: an input that the model requires cannot be made from its config; it names it.
    """
    config, model_class = _config_and_class(model)
    accepted = inspect.signature(model_class.forward).parameters
    main = model_class.main_input_name
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None) if _is_model(model) else None
    generator = torch.Generator().manual_seed(seed)
    text = config.get_text_config(decoder=False) if config.is_encoder_decoder else config.get_text_config()

    def features(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype or config.dtype or torch.float32)

    inputs: dict[str, Tensor] = {}
    if "input_ids" in accepted:
        inputs["input_ids"] = _tokens(config, text, batch, length, generator)
    if "pixel_values" in accepted and (vision := _vision_config(config, main)) is not None:
        inputs["pixel_values"] = features(batch, *_image_shape(vision, model_class))
    if "input_features" in accepted:
        inputs["input_features"] = features(batch, *_audio_shape(config, model_class))
    if "input_values" in accepted:
        inputs["input_values"] = features(batch, 4000)
    if config.is_encoder_decoder and "decoder_input_ids" in accepted:
        decoder = config.get_text_config(decoder=True)
        inputs["decoder_input_ids"] = _tokens(config, decoder, batch, length, generator)
    image_token = _first(config, "image_token_id", "image_token_index")
    if "pixel_values" in inputs and "input_ids" in inputs and image_token is not None:
        count = image_tokens(model, model_class, config, inputs["pixel_values"])
        images = torch.full((batch, count), image_token, dtype=torch.int64)
        inputs["input_ids"] = torch.cat([images, inputs["input_ids"]], dim=1)
    if main not in inputs:
        raise InputError(f"Cannot make the input '{main}' of {model_class.__name__}: it is none of the known kinds.")
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _is_model(model: Any) -> bool:
    return isinstance(model, nn.Module)


def _config_and_class(model: PreTrainedModel | PretrainedConfig) -> tuple[PretrainedConfig, type[PreTrainedModel]]:
    if isinstance(model, nn.Module):
        return model.config, type(model)
    name = (getattr(model, "architectures", None) or [None])[0]
    model_class = getattr(transformers, name or "", None)
    if model_class is None:
        raise InputError(f"Cannot make inputs for the architecture {name!r}: transformers has no such class.")
    return model, model_class


def _configs(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """The config and all configs inside it."""
    yield config
    for name in getattr(config, "sub_configs", {}):
        if isinstance(inner := getattr(config, name, None), PretrainedConfig):
            yield from _configs(inner)


def _first(config: PretrainedConfig, *names: str) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _tokens(
    config: PretrainedConfig, text: PretrainedConfig, batch: int, length: int, generator: torch.Generator
) -> Tensor:
    """Random ids (batch, length) that mean nothing special."""
    vocabulary = getattr(text, "vocab_size", None)
    if not isinstance(vocabulary, int) or vocabulary < 1:
        raise InputError(f"Cannot make input_ids: the {text.model_type} config has no vocab_size.")
    allowed = torch.ones(vocabulary, dtype=torch.bool)
    for inner in _configs(config):
        for name, value in inner.to_dict().items():
            if name.endswith(_SPECIAL_ENDINGS):
                for token in value if isinstance(value, (list, tuple)) else [value]:
                    if isinstance(token, int) and 0 <= token < vocabulary:
                        allowed[token] = False
    ids = allowed.nonzero()[:, 0]
    if not len(ids):
        raise InputError(f"Cannot make input_ids: all {vocabulary} tokens of the vocabulary are special.")
    longest = _first(text, "max_target_positions", "max_position_embeddings", "n_positions", "max_seq_len")
    if isinstance(longest, int) and longest > 0:
        # RoBERTa counts positions from the padding id + 1.
        length = max(1, min(length, longest - 2))
    return ids[torch.randint(len(ids), (batch, length), generator=generator)]


def _vision_config(config: PretrainedConfig, main: str) -> PretrainedConfig | None:
    """The config that says the image's shape; None if the model has no image part that we can feed."""
    vision = getattr(config, "vision_config", None)
    if isinstance(vision, PretrainedConfig):
        return vision if _first(vision, "image_size") is not None else None
    return config if main == "pixel_values" or _first(config, "image_size") is not None else None


def _image_shape(vision: PretrainedConfig, model_class: type[PreTrainedModel]) -> tuple[int, int, int]:
    size = _first(vision, "image_size", "img_size")
    height, width = (size, size) if isinstance(size, int) else tuple(size or (0, 0))[-2:]
    if min(height, width) < 1:
        raise InputError(f"Cannot make pixel_values for {model_class.__name__}: its config has no image_size.")
    return _first(vision, "num_channels", "in_channels", "in_chans") or 3, height, width


def _audio_shape(config: PretrainedConfig, model_class: type[PreTrainedModel]) -> tuple[int, int]:
    """(mel bins, frames): Whisper's two convolutions halve the frames."""
    audio = getattr(config, "audio_config", None) or getattr(config, "encoder_config", None) or config
    bins, positions = getattr(audio, "num_mel_bins", None), getattr(audio, "max_source_positions", None)
    if not isinstance(bins, int) or not isinstance(positions, int):
        raise InputError(
            f"Cannot make input_features for {model_class.__name__}: its config has no num_mel_bins and "
            "max_source_positions."
        )
    return bins, 2 * positions


def image_tokens(
    model: PreTrainedModel | PretrainedConfig,
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    pixel_values: Tensor,
) -> int:
    """How many image tokens one image becomes: the vision tower runs on one image, without data where it can."""
    if not isinstance(model, nn.Module):
        with torch.device("meta"):
            model = model_class(config)
    place = next(model.parameters()).device
    get_image_features: Any = getattr(model, "get_image_features", None)
    if get_image_features is None:
        raise InputError(f"Cannot count the image tokens of {model_class.__name__}: it has no get_image_features.")
    with torch.no_grad():
        found = get_image_features(pixel_values=pixel_values[:1].to(place))
    found = getattr(found, "pooler_output", found)
    found = found[0] if isinstance(found, (list, tuple)) or found.ndim == 3 else found
    return int(found.shape[0])
