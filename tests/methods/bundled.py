"""The bundled model as tensors by disk name: statistics, solving all its linears at once, loss on held-out text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from slimwright.checkpoint import Checkpoint
from slimwright.methods import SiteStatistics, WeightSolver
from slimwright.methods.folding import apply_fold
from slimwright.methods.token_weights import TokenWeighting, attention_concentration
from slimwright.model.discover import discover
from slimwright.model.structure import Site, Structure
from slimwright.zoo import bundled_path
from slimwright.zoo.text import Part, standard_library

WINDOWS, LENGTH = 8, 256
Tensors = dict[str, Tensor]


@cache
def structure() -> Structure:
    return discover(Checkpoint.open(bundled_path()))


@cache
def original() -> Tensors:
    checkpoint = Checkpoint.open(bundled_path())
    return {name: checkpoint.read(name).float() for name in structure().roles}


def sites() -> list[Site]:
    return [site for site in structure().sites.values() if site.block is not None]


@cache
def tokens(part: Part, seed: int = 0, windows: int = WINDOWS) -> Tensor:
    """(windows, LENGTH) token ids from documents drawn by the seed."""
    tokenizer = AutoTokenizer.from_pretrained(bundled_path())
    documents = standard_library(part)
    chosen = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    found = []
    for index in chosen:
        ids = tokenizer(documents[index].text[:4000])["input_ids"]
        if len(ids) >= LENGTH:
            found.append(ids[:LENGTH])
        if len(found) == windows:
            break
    return torch.tensor(found)


def model(tensors: Tensors) -> LlamaForCausalLM:
    """The bundled model with these tensors, by disk name; a head that has become its own is untied."""
    found = AutoModelForCausalLM.from_pretrained(
        bundled_path(), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    state = found.state_dict()
    for name, tensor in tensors.items():
        if name in structure().to_module:
            state[structure().to_module[name]].copy_(tensor)
        else:
            found.get_output_embeddings().weight = torch.nn.Parameter(tensor.float())
    return found


@torch.no_grad()
def loss(tensors: Tensors, rounded: Callable[[Tensor], Tensor] | None = None, windows: int = WINDOWS) -> float:
    """Nats per held-out token; ``rounded``: what is done to the inputs of every linear in a block."""
    network, ids = model(tensors), tokens("heldout", windows=windows)
    if rounded is not None:
        for site in sites():
            network.get_submodule(site.module).register_forward_pre_hook(lambda _, given: (rounded(given[0]),))
    logits = network(ids).logits[:, :-1]
    return float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


@contextmanager
def inputs_of(network: LlamaForCausalLM) -> Iterator[dict[str, Tensor]]:
    """What the leaders of the Gram groups are fed: (samples, tokens, in) by group."""
    seen: dict[str, Tensor] = {}
    leaders = {site.gram_group: site for site in reversed(sites())}
    hooks = [
        network.get_submodule(site.module).register_forward_pre_hook(
            lambda _, given, group=group: seen.__setitem__(group, given[0])
        )
        for group, site in leaders.items()
    ]
    yield seen
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def statistics(
    tensors: Tensors, seed: int = 0, weighting: TokenWeighting | None = None, windows: int = WINDOWS
) -> dict[str, SiteStatistics]:
    """By Gram group; with ``weighting`` tokens count by the attention that they receive in the same block."""
    network = model(tensors)
    with inputs_of(network) as seen:
        attentions = network(tokens("calibrate", seed, windows), output_attentions=weighting is not None).attentions
    found = {}
    for site in sites():
        if site.gram_group not in found:
            x, weights = seen[site.gram_group], None
            if weighting is not None:
                block = next(b for b in structure().stacks[0].blocks if b.module == site.block)
                weights = weighting.weights.of(attention_concentration(attentions[block.index])).flatten()
            found[site.gram_group] = SiteStatistics.from_inputs(x.flatten(0, 1), weights)
    return found


def solved(tensors: Tensors, solver: WeightSolver, stats: dict[str, SiteStatistics]) -> Tensors:
    """All linears of the blocks on the solver's grid."""
    return tensors | {
        site.name: solver.solve(tensors[site.name].float(), stats[site.gram_group]).dense() for site in sites()
    }


@cache
def with_outliers() -> Tensors:
    """The same function with six channels of every norm 25 times as large and the linears' columns as much smaller."""
    tensors, generator = dict(original()), torch.Generator().manual_seed(0)
    for fold in structure().folds:
        if fold.kind == "norm":
            scale = torch.ones(256)
            scale[torch.randperm(256, generator=generator)[:6]] = 1 / 25
            tensors |= apply_fold(tensors, structure(), fold, scale)
    return tensors
