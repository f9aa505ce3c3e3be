"""What a model is made of: stacks, blocks, sites, groups, ties (DESIGN §5, RUNTIME §2-3).

Two name spaces: *disk names* are the checkpoint's tensor names, *module names* those of the transformers model. Plans,
ledgers and files use disk names; :class:`Structure` carries the map.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["linear", "conv1d", "embedding", "experts"]

ROLES = (
    "embed",
    "q",
    "k",
    "v",
    "kv",
    "qkv",
    "o",
    "gate",
    "up",
    "gate_up",
    "down",
    "experts",
    "router",
    "norm",
    "head",
    "other",
)


@dataclass(frozen=True)
class Site:
    """One compressible weight: one tensor on disk.

    Attributes:
        name: disk name of the tensor, e.g. ``model.layers.0.self_attn.q_proj.weight``.
        module: module path of the owner in the transformers model, without the parameter's name.
        parameter: the owner's attribute that holds it: ``weight``, or ``gate_up_proj`` of fused experts.
        role: one of :data:`ROLES`; experts' matrices have gate, up, gate_up or down here and kind ``experts``.
        kind: how the owner uses it.
        shape: as stored on disk: (out, in); (in, out) if ``transposed``; (experts, out, in) or (experts, in, out) if
            fused experts are stored as one tensor.
        transposed: whether the two last dimensions on disk are (in, out).
        block: module path of the block that holds it; None outside blocks.
        expert: for experts stored one tensor each while the module fuses them: (index of the expert, which of the
            tensors concatenated into the module's parameter, how many are); None otherwise.
        gram_group: name shared by the sites that are fed the same input tensor.
        choice_group: name shared by the sites that must have the same grid because runtimes fuse them.
        dtype_read: whether the model's code asks for this weight's dtype (to cast its input, as T5 does): a packed
            weight must answer with the dtype it computes in, not that of its payload.
    """

    name: str
    module: str
    parameter: str
    role: str
    kind: Kind
    shape: tuple[int, ...]
    transposed: bool = False
    block: str | None = None
    expert: tuple[int, int, int] | None = None
    gram_group: str = ""
    choice_group: str = ""
    dtype_read: bool = False

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(out, in) or (experts, out, in): the shape of the compressed weight."""
        return (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.transposed else self.shape

    @property
    def rows(self) -> int:
        """Rows of the logical matrix, experts stacked."""
        return math.prod(self.weight_shape[:-1])

    @property
    def columns(self) -> int:
        """Inputs."""
        return self.weight_shape[-1]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Block:
    """One transformer layer: module path, class name, index in its stack, how often one forward runs it (ALBERT)."""

    module: str
    class_name: str
    index: int
    runs: int = 1


@dataclass(frozen=True)
class Stack:
    """A sequence of blocks: encoder, decoder, vision, ...; ``module`` is the path of the module list."""

    module: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class FoldGroup:
    """Neighbours between which a scale (or rotation) can be moved without changing the function.

    ``producer`` is a norm's gain or a linear's output; ``consumers`` are sites fed by it; ``kind`` is ``norm``, ``v_o``
    (with GQA: ``repeat`` query heads share one key/value head) or ``up_down``. All are disk names. The producer's bias,
    where it has one, is scaled with it. The gain of a norm is its weight + ``offset`` (1 for Gemma's, else 0). Channel
    ``c`` of v is read by the ``repeat`` columns ``(c // head_dim * repeat + i) * head_dim + c % head_dim`` of o.
    ``head_dim`` is 1 where it is not known.
    """

    kind: str
    producer: str
    consumers: tuple[str, ...]
    repeat: int = 1
    offset: float = 0.0
    head_dim: int = 1


@dataclass(frozen=True)
class Structure:
    """A model's structure.

    Attributes:
        family: ``model_type`` of the config.
        architecture: the transformers class that was built.
        stacks: in forward order.
        sites: by disk name, in checkpoint order.
        kept: every other disk tensor: name → why it is not a site (``norm``, ``bias``, ``functional use``, ...).
        roles: role of every disk tensor, sites and kept alike.
        ties: disk or module name of a tied weight → disk name of the weight it is tied to (tied ones own no bytes).
        folds: fold groups.
        to_module: disk name → module-space name of the parameter it ends in.
        parameters: unique parameters (ties counted once).
        observed: whether a forward on the meta device confirmed uses and groups; if not, ``note`` says why.
        note: remarks for the user.
        bytes: bytes on disk of every tensor, by disk name.
        castable: disk names of the kept tensors that a plan may store in 16 bits: wide floats of some size that are
            neither routers nor norms.
        dropped: sites that an edit dropped, which are no longer among ``sites``: their weight counts as zero.
        dropped_tensors: disk names of all tensors that an edit dropped, sites and others.
        prefixes: disk prefix of a block → the prefix that it is written under, where blocks before it were dropped.
        rms_norms: disk names of the gains of norms that divide by the root mean square and do nothing else → the offset
            that the model adds to the gain.
    """

    family: str
    architecture: str
    stacks: tuple[Stack, ...]
    sites: dict[str, Site]
    kept: dict[str, str]
    roles: dict[str, str]
    ties: dict[str, str]
    folds: tuple[FoldGroup, ...]
    to_module: dict[str, str]
    parameters: int
    observed: bool = True
    note: str = ""
    bytes: dict[str, int] = field(default_factory=dict)
    castable: tuple[str, ...] = ()
    rms_norms: dict[str, float] = field(default_factory=dict)
    dropped: dict[str, Site] = field(default_factory=dict)
    prefixes: dict[str, str] = field(default_factory=dict)

    dropped_tensors: frozenset[str] = frozenset()

    def written_name(self, name: str) -> str:
        """The disk name that a tensor of the source has in what is written."""
        new = next(((old, to) for old, to in self.prefixes.items() if name.startswith(old)), None)
        return name if new is None else new[1] + name.removeprefix(new[0])

    def choice_groups(self) -> dict[str, tuple[Site, ...]]:
        """Sites by choice group, in checkpoint order."""
        groups: dict[str, list[Site]] = {}
        for site in self.sites.values():
            groups.setdefault(site.choice_group, []).append(site)
        return {name: tuple(sites) for name, sites in groups.items()}

    def gram_groups(self) -> dict[str, tuple[Site, ...]]:
        """Sites by Gram group, in checkpoint order."""
        groups: dict[str, list[Site]] = {}
        for site in self.sites.values():
            groups.setdefault(site.gram_group, []).append(site)
        return {name: tuple(sites) for name, sites in groups.items()}
