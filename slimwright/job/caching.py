"""The plan's ``cache``: which layers keep packed keys and values; what that costs, and the proof of it."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

from slimwright.checkpoint import Checkpoint
from slimwright.errors import InputError, did_you_mean
from slimwright.job.edits import dropped_view
from slimwright.job.open import model_of
from slimwright.methods import parse_method
from slimwright.methods.caching import CachePolicy
from slimwright.model.structure import Structure
from slimwright.plan import KEEP
from slimwright.runtime.decode import NotSupportedError, decoded, own_cache
from slimwright.runtime.kv_cache import KvLayer, attention_layers, kv_cache, refusal
from slimwright.runtime.kv_format import KvFormat
from slimwright.runtime.kv_simulate import simulated, why_not

EVERYWHERE = "*"
TOLERANCE = 1e-4


def parse_policy(spec: str) -> CachePolicy:
    """The policy of a spec such as ``cache/kivi,bits=2``.

    Raises:
        InputError: unknown, a wrong knob, or no cache policy.
    """
    policy = parse_method(spec)
    if not isinstance(policy, CachePolicy):
        raise InputError(
            f"'{spec}' is not a method that packs the cache; `slimwright methods` lists those (cache/...)."
        )
    return policy


def cache_formats(
    assignments: Mapping[str, str], source: Checkpoint, structure: Structure, trusted: bool = False
) -> dict[int, KvFormat]:
    """Format by layer of a plan's ``cache``.

    Args:
        assignments: pattern of blocks (``*``, ``model.layers.3``, ``model.layers.1?``) → policy, or ``keep``; the most
            specific pattern wins. ``*`` leaves out the layers that cannot be packed.

    Raises:
        InputError: a pattern names no layer, or one that cannot be packed; no layer can; a wrong policy.
    """
    if not assignments:
        return {}
    config = model_of(source, trusted)[1]
    packable = attention_layers(config)
    if 0 not in packable.values():
        raise InputError(refusal(config))
    layers = layer_names(config, structure)
    ordered = sorted(assignments.items(), key=lambda item: (sum(mark not in "*?[" for mark in item[0]), item[0]))
    chosen: dict[int, KvFormat] = {}
    for pattern, spec in ordered:
        named = [i for name, i in layers.items() if fnmatch.fnmatchcase(name, pattern)]
        if not named:
            hint = did_you_mean(pattern, layers)
            raise InputError(f"The plan's cache names '{pattern}', which is no layer of this model{hint}")
        format = None if spec == KEEP else parse_policy(spec).format()
        for index in named:
            if format is None:
                chosen.pop(index, None)
            elif packable.get(index) == 0:
                chosen[index] = format
            elif pattern != EVERYWHERE:
                raise InputError(refusal(config, index))
    return chosen


def layer_names(config: PretrainedConfig, structure: Structure) -> dict[str, int]:
    """Index in the cache by the block's module path."""
    count = len(DynamicCache(config=config).layers)
    stacks = [stack for stack in structure.stacks if len(stack.blocks) == count]
    if not stacks:
        return {str(index): index for index in range(count)}
    return {block.module: block.index for block in stacks[-1].blocks}


def written_formats(
    formats: Mapping[int, KvFormat], source: Checkpoint, structure: Structure, trusted: bool = False
) -> dict[int, KvFormat]:
    """Format by layer of the result: layers whose attention was dropped keep nothing, those after dropped blocks have
    other numbers."""
    view = dropped_view(source)
    if view is None or not formats:
        return dict(formats)
    gone = {drop.block for drop in view.blocks()}
    silent = {drop.block for drop in view.sublayers() if drop.attention}
    layers = {index: name for name, index in layer_names(model_of(source, trusted)[1], structure).items()}
    kept = [index for index, name in layers.items() if name not in gone]
    return {new: formats[i] for new, i in enumerate(kept) if i in formats and layers[i] not in silent}


def cache_facts(model: Any, formats: Mapping[int, KvFormat]) -> dict[str, Any]:
    """The report's part: how layers are kept, and bytes of one row of tokens, packed and not.

    Args:
        model: with the packed cache; it runs one token to see the shapes.
    """
    length = min(getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 4096, 1 << 17)
    cache, plain = kv_cache(model.config, {}, ours=True), 0
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
    packed = 0
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, KvLayer) or not layer.is_initialized:  # a dropped attention keeps nothing
            continue
        tokens = min(length, layer.sliding or length)
        whole = tokens * layer.heads * (layer.key_dim + layer.value_dim) * 2
        plain += whole
        format = formats.get(index)
        packed += format.nbytes(length, 1, layer.heads, layer.key_dim, layer.value_dim, 2) if format else whole
    policies: dict[str, list[int]] = {}
    for index, format in sorted(formats.items()):
        policies.setdefault(format.spec, []).append(index)
    return {"layers": policies, "tokens": length, "bytes": packed, "bytes_16bit": plain}


@torch.no_grad()
def check_cache(model: Any, formats: Mapping[int, KvFormat], ids: Tensor) -> str:
    """What is wrong with the cache of a model that was loaded from its files; empty if nothing is.

    The model must know the planned formats; what a layer stores must be what torch code makes of the keys and values
    that transformers' own cache holds; and a token whose attention reads the cache packed must give the logits that it
    gives with the cache unpacked.

    Args:
        model: in float32.
        ids: (1, tokens) int64, repeated or cut to fill the cache's windows twice, as far as the model has positions.
    """
    if getattr(model.generate, "formats", None) != dict(formats):
        return "the reloaded model packs its cache otherwise than planned"
    window = max(format.window for format in formats.values())
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 2 * window + 5
    length = min(2 * window + 5, most)
    ids = ids.repeat(1, -(-length // ids.shape[1]))[:, :length]
    exact = own_cache(model)
    model(input_ids=ids[:, :-1], past_key_values=exact, use_cache=True)
    caches = [kv_cache(model.config, formats, ours=ours) for ours in (True, False)]
    for cache in caches:
        model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)
    for index, format in formats.items():
        layer, raw = caches[0].layers[index], exact.layers[index]
        assert isinstance(layer, KvLayer) and isinstance(raw, DynamicLayer)
        raw_keys, raw_values = raw.keys, raw.values
        assert raw_keys is not None and raw_values is not None
        keys, values = layer.dense()
        count = format.packed_keys(keys.shape[2])
        expected = torch.cat([format.round_keys(raw_keys[:, :, :count]), raw_keys[:, :, count:].float()], 2)
        count = format.packed_values(keys.shape[2])
        other = torch.cat([format.round_values(raw_values[:, :, :count]), raw_values[:, :, count:].float()], 2)
        if not torch.equal(keys.float(), expected) or not torch.equal(values.float(), other):
            return f"layer {index} does not cache what {format.spec} makes of its keys and values"
        if layer.nbytes != format.nbytes(
            layer.length, 1, layer.heads, layer.key_dim, layer.value_dim, keys.element_size()
        ):
            return f"the cache of layer {index} takes other bytes than counted"
    last, positions = ids[:, -1:], torch.tensor([[ids.shape[1] - 1]])
    reference = model(input_ids=last, past_key_values=caches[1], use_cache=True).logits[:, -1]
    try:
        got = decoded(model, caches[0], last, positions)
    except NotSupportedError:
        return ""  # such a model is always run with the cache unpacked
    error = float((got - reference).abs().max() / reference.abs().max())
    if not error <= TOLERANCE:
        return f"attention over the packed cache differs from that over the unpacked one by {error:.2e} relative"
    return ""


@torch.no_grad()
def outputs_with_cache(model: Any, formats: Mapping[int, KvFormat], inputs: Mapping[str, Tensor]) -> Tensor | None:
    """Logits of a text as the packed cache gives them token by token; None where the model cannot be measured so."""
    if why_not(model):
        return None
    with simulated(model, formats) as seen:
        logits = model(**inputs, use_cache=False, return_dict=True).logits.float()
    return logits if set(formats) <= seen else None


__all__ = [
    "cache_facts",
    "cache_formats",
    "check_cache",
    "layer_names",
    "outputs_with_cache",
    "parse_policy",
    "written_formats",
]
