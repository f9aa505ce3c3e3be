"""A step of a model as one call of the kernels (kernels/packed_step.cpp), for decoders that are built as most are.

A block of such a model is a norm, attention with rotary positions, a norm and a gated MLP with SiLU, all products
packed. What a model is made of is seen in its modules; that it computes with them what the kernels do is not believed
but compared, layer by layer, on a few tokens before the first text. Every other model runs its own forward, module by
module.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimwright.kernels import attend, packed
from slimwright.kernels.packed import Matrix
from slimwright.kernels.step import PROJECTIONS, Block, Product, Step
from slimwright.runtime import compute
from slimwright.runtime.kv_cache import KvLayer
from slimwright.runtime.modules import PackedLinear, TiedHead
from slimwright.weights import Grid

_LAYER = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MLP = {"gate_proj", "up_proj", "down_proj"}


class Fused:
    """New tokens through a model, given its caches: of one text or many, in any numbers.

    Args:
        model: that :func:`why_not` has nothing against.
        how: what each layer's attention is asked for (:meth:`KvLayer.attend`).
        only: of the model's layers, without the last norm and the head; None is all, with them.
    """

    def __init__(self, model: Any, how: Sequence[dict[str, Any]], only: int | None = None) -> None:
        decoder, library = model.get_decoder(), packed.library()
        assert library is not None
        chosen = slice(None) if only is None else slice(only, only + 1)
        own, dtype = list(decoder.layers)[chosen], model.dtype
        gains = [_gains(layer) for layer in own]
        self.embed, self.rotary, self.dtype = model.get_input_embeddings(), decoder.rotary_emb, dtype
        self.how = list(how)[chosen]
        self.heads = [layer.self_attn.q_proj.out_features // layer.self_attn.head_dim for layer in own]
        self.none = [_no_states(layer.self_attn, dtype) for layer in own]
        final = None if only is not None else _gain(decoder.norm)
        epsilons = (_epsilon(decoder.norm), _epsilon(getattr(decoder.layers[0].self_attn, "q_norm", decoder.norm)))

        @functools.cache
        def step(rows: int) -> Step:
            blocks = [_block(layer, own_gains, dtype, rows) for layer, own_gains in zip(own, gains)]
            return Step(library, blocks, dtype, epsilons, final)

        @functools.cache
        def head(rows: int) -> Product | None:
            return None if only is not None else _product(model.get_output_embeddings(), dtype, rows)

        self._step, self._head = step, head

    def __call__(
        self, tokens: Tensor, positions: Tensor, caches: Sequence[Sequence[KvLayer]], start: Tensor | None = None,
        counts: Sequence[int] | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits float32, (rows, vocabulary), or of the last token of each cache, (caches, vocabulary).

        Args:
            tokens: (rows, 1).
            positions: (rows, 1).
            caches: the layers of the cache of all rows, or of each text's own; a layer of them may be empty yet.
            start: (rows,) first token of each row that is no padding, or None; of a cache of all rows.
            counts: how many rows are tokens of each text; None: all texts are in one cache, a row is one token of one.
        """
        hidden = self.embed(tokens)[:, 0]
        return self.through(hidden, positions, caches, start, counts)[1]  # type: ignore[return-value]

    def through(
        self, hidden: Tensor, positions: Tensor, caches: Sequence[Sequence[KvLayer]], start: Tensor | None = None,
        counts: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """States (rows, width) after the layers in float32, where the step ends there, and logits."""
        cosine, sine = (part[:, 0].float().contiguous() for part in self.rotary(hidden[:, None], positions))
        new = counts or [1]
        for layers, count in zip(caches, new):
            for layer, heads, none, how in zip(layers, self.heads, self.none, self.how):
                if not layer.is_initialized:
                    layer.lazy_initialization(*none)
                layer.prepare_step(count, heads, start, **how)
        hidden = hidden.to(dtype=torch.float32, copy=True, memory_format=torch.contiguous_format)
        native = [[layer.native for layer in same] for same in zip(*caches)]
        step, head = self._step(_alike(len(hidden))), self._head(_alike(len(counts or hidden)))
        logits = step(hidden, cosine, sine, native, counts, head)  # type: ignore[arg-type]
        for layers, count in zip(caches, new):
            for layer in layers:
                layer.length += count
        return hidden, logits


def _alike(rows: int) -> int:
    """The fewest rows that are multiplied by the arithmetic of so many (:func:`slimwright.runtime.compute.arithmetic`),
    as long as they are not multiplied in tiles."""
    return min(rows, 4)


def _no_states(attention: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values of no tokens of one text."""
    heads = attention.k_proj.out_features // attention.head_dim
    widths = (attention.head_dim, attention.v_proj.out_features // heads)
    keys, values = (torch.empty(1, heads, 0, width, dtype=dtype) for width in widths)
    return keys, values


def _plain(module: nn.Module) -> bool:
    """Whether calling a module is its forward and nothing else."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _epsilon(norm: nn.Module) -> float:
    found = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return float(found) if isinstance(found, float) else -1.0


def _gain(norm: nn.Module) -> Tensor:
    weight = norm.weight
    assert isinstance(weight, Tensor)
    return weight.detach().float().contiguous()


def _matrix(module: Any) -> Matrix | None:
    return module.source.kernel("weight") if isinstance(module, TiedHead) else module.kernel("weight")


def _product(module: Any, dtype: torch.dtype, batch: int) -> Product:
    matrix = _matrix(module)
    assert matrix is not None
    digits = compute.step_arithmetic(matrix, dtype, batch)
    assert digits is not None
    owner = module.source if isinstance(module, TiedHead) else module
    if owner.input_digits == 1 and digits in (2, 3):
        digits = 1
    return Product(matrix, None if module.bias is None else module.bias.detach().float().contiguous(), digits)


def _gains(layer: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    heads = [getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm")]
    q, k = (None if norm is None else _gain(norm) for norm in heads)
    return _gain(layer.input_layernorm), _gain(layer.post_attention_layernorm), q, k


def _block(layer: Any, gains: Any, dtype: torch.dtype, rows: int) -> Block:
    modules = {name: getattr(layer.self_attn, f"{name}_proj") for name in ("q", "k", "v", "o")}
    modules |= {name: getattr(layer.mlp, f"{name}_proj") for name in ("gate", "up", "down")}
    return Block({name: _product(modules[name], dtype, rows) for name in PROJECTIONS}, gains)


def _unlike(model: Any, batch: int) -> str:
    """What of a model's modules is not as the kernels have it; empty where all is."""
    library = packed.library()
    decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else None
    if library is None or attend.library() is None:
        return packed.why_not() or attend.why_not()
    if model.dtype not in packed.DTYPES:
        return f"activations are {str(model.dtype).removeprefix('torch.')}"
    if not all(hasattr(decoder, name) for name in ("layers", "norm", "rotary_emb")):
        return f"{type(model).__name__} is not layers between an embedding and a norm"
    layers = list(decoder.layers)
    if not layers or not all(_plain(module) for module in model.modules()):
        return "a module is hooked"
    norms: dict[Any, str] = {}
    for layer in layers:
        attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
        if _children(layer) != _LAYER or attention is None or mlp is None:
            return f"{type(layer).__name__} is built otherwise"
        extra = _children(attention) - _ATTENTION
        if extra not in (set(), {"q_norm", "k_norm"}) or _children(attention) - extra != _ATTENTION:
            return f"{type(attention).__name__} is built otherwise"
        if _children(mlp) - {"act_fn"} != _MLP or not hasattr(attention, "head_dim"):
            return f"{type(mlp).__name__} is built otherwise"
        for module in (*(getattr(attention, name) for name in _ATTENTION), *(getattr(mlp, name) for name in _MLP)):
            if not isinstance(module, PackedLinear) or module.activations is not None:
                return "a product is not packed, or rounds its inputs"
            if not isinstance(module.packed["weight"].grid, Grid):
                return "a weight has low-rank factors"
            matrix = module.kernel("weight")
            if matrix is None or compute.step_arithmetic(matrix, model.dtype, batch) is None:
                return f"batches of {batch} are multiplied in panels" if matrix else "the kernels do not read a grid"
        norms |= {norm: "width" for norm in (layer.input_layernorm, layer.post_attention_layernorm)}
        norms |= {getattr(attention, name): "head" for name in sorted(extra)}
    norms[decoder.norm] = "width"
    for kind in ("width", "head"):
        if len({_epsilon(norm) for norm, own in norms.items() if own == kind}) > 1:
            return "norms differ in their epsilon"
    if any(not isinstance(getattr(norm, "weight", None), Tensor) or norm.weight.ndim != 1 for norm in norms):
        return "a norm has another kind of gain"
    head = model.get_output_embeddings()
    if not isinstance(head, PackedLinear | TiedHead) or getattr(head, "activations", None) is not None:
        return "the head is not packed"
    matrix = _matrix(head)
    if matrix is None or compute.step_arithmetic(matrix, model.dtype, batch) is None:
        return f"batches of {batch} are multiplied in panels" if matrix else "the kernels do not read a grid"
    return ""


def why_not(model: Any, batch: int) -> str:
    """Why the model's tokens are not decoded in one call; empty where they are.

    What :func:`compare` found holds as long as the model has the same modules.
    """
    found = _unlike(model, batch)
    if found:
        return found
    compared = model.__dict__.get("_slimwright_compared")
    if compared is None or compared[0] != _identity(model):
        return "the model was changed since it was compared"
    return compared[1]


def overview() -> str:
    """How tokens are decoded on this machine, in a few words."""
    without = packed.why_not() or attend.why_not()
    if without:
        return f"module by module ({without})"
    return "one call a step; module by module with low-rank factors, experts, hooks, adapters, other architectures"


def asked(model: Any) -> list[dict[str, Any]]:
    """What each layer's attention was asked for when the model was compared."""
    return model.__dict__["_slimwright_compared"][2]


def _identity(model: Any) -> list[int]:
    return [id(module) for module in model.modules()]


@torch.no_grad()
def compare(model: Any, run: Any, caches: Any, how: list[dict[str, Any]], tokens: Tensor, positions: Tensor,
            start: Tensor) -> None:  # fmt: skip
    """Compare a step with the model's own forward, and remember with the model what came out.

    Args:
        run: runs the model's own forward over the tokens and gives logits (batch, vocabulary).
        caches: the cache as it was before that, with all layers' tokens in it.
        how: what each layer's attention is asked for; filled by ``run``.
        tokens, positions: (batch, 1).
        start: (batch,).
    """
    model.__dict__["_slimwright_compared"] = (_identity(model), "the comparison did not end", how)
    reason = _unlike(model, tokens.shape[0])
    if not reason:
        reason = _difference(model, run, caches, how, tokens, positions, start)
    model.__dict__["_slimwright_compared"] = (_identity(model), reason, how)


def _difference(model: Any, run: Any, caches: Any, how: list[dict[str, Any]], tokens: Tensor, positions: Tensor,
                start: Tensor) -> str:  # fmt: skip
    decoder, states = model.get_decoder(), []

    def record(_: nn.Module, inputs: Any, output: Any) -> None:
        states.append((inputs, output))

    hooks = [layer.register_forward_hook(record) for layer in decoder.layers]
    try:
        logits = run().float()
    finally:
        for hook in hooks:
            hook.remove()
    if len(states) != len(decoder.layers) or any(not inputs or not isinstance(out, Tensor) for inputs, out in states):
        return "layers are called in another way"
    if any(layer.native is None for layer in caches.layers if isinstance(layer, KvLayer)) or len(how) != len(states):
        return "attention is not the kernels'"
    if any(one.get("sinks") is not None for one in how):
        return "attention has sinks"
    if not torch.equal(model.get_input_embeddings()(tokens), states[0][0][0]):
        return "embeddings are changed before the first layer"
    share, rest = (1e-4, 1e-6) if model.dtype == torch.float32 else (0.05, 2**-7)
    for index, (inputs, output) in enumerate(states):
        own = [copy.deepcopy(caches.layers[index])]
        one = Fused(model, how, only=index)
        before, after = inputs[0][:, 0].float(), output.reshape(inputs[0].shape)[:, 0].float()
        got, _ = one.through(inputs[0][:, 0], positions, [own], start)
        bound = share * (after - before).abs().max() + rest * after.abs().max()
        if not bool((got - after).abs().max() <= bound):
            return f"{type(decoder.layers[index]).__name__} computes otherwise"
    got = Fused(model, how)(tokens, positions, [copy.deepcopy(caches).layers], start)
    bound = share * logits.abs().max()
    return "" if bool((got - logits).abs().max() <= bound) else "the head computes otherwise"
