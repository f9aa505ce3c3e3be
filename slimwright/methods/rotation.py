"""Rotating a model's residual stream, exactly, so that no channel is an outlier (card: rotate, steps 1 to 4 offline).

Norms' gains move into the linears that read them; then every reader of the residual stream is multiplied by an
orthogonal ``R`` on its input side and every writer on its output side. An RMS norm without a gain turns with its input,
so the function stays. Optionally each layer's values are turned as well, per head, between v and o.

Works tensor by tensor, so that a model of any size can be rotated as it is read.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slimwright.errors import InputError
from slimwright.methods.folding import bias_of
from slimwright.methods.orthogonal import orthogonal
from slimwright.methods.registry import ModelFold
from slimwright.model.structure import Structure

_READERS = {"q", "k", "v", "qkv", "gate", "up", "gate_up"}
_WRITERS = {"o", "down"}


@dataclass(frozen=True)
class Turn:
    """What happens to one tensor: (out, in), or a bias (out,).

    Attributes:
        gain: disk name of the norm whose gain multiplies the columns.
        reads, writes: the columns, the rows are turned by the residual stream's rotation.
        value_rows, value_columns: so by the value rotation of the layer of this number, per head.
        transposed: stored as (in, out).
    """

    gain: str | None = None
    reads: bool = False
    writes: bool = False
    value_rows: int | None = None
    value_columns: int | None = None
    transposed: bool = False


class Rotation:
    """The rotation of one model.

    Args:
        structure: of the model.
        shapes: of all tensors on disk.
        gains: the tensors of all norms in ``structure.rms_norms``, by disk name.
        mode: ``hadamard`` or ``random`` (:func:`slimwright.methods.orthogonal.orthogonal`).
        values: rotate the values too, where a v → o fold is known with its head size.
        seed: of the signs or the whole matrices.

    Attributes:
        turns: what happens to each tensor that changes, by disk name.
        matrix: (hidden, hidden) float64, the residual stream's.
        embedding: disk name.
        fused: disk names of the norms whose gains move into their readers.
        untied: disk name of the head if it gets a tensor of its own: the final norm's gain is not uniform, and the
            embedding cannot take it. Its bytes are the embedding's.

    Raises:
        InputError: the model has something that does not turn (another norm, a second stack, experts, ...), named.
    """

    def __init__(
        self,
        structure: Structure,
        shapes: Mapping[str, tuple[int, ...]],
        gains: Mapping[str, Tensor],
        *,
        mode: str = "hadamard",
        values: bool = True,
        seed: int = 0,
    ) -> None:
        self.structure, self._gains = structure, gains
        self._mode, self._seed = mode, seed
        parts = _parts(structure, shapes)
        self.matrix = orthogonal(parts.hidden, mode=mode, seed=seed)
        self.untied: str | None = None
        self.embedding = parts.embedding
        self.turns: dict[str, Turn] = {parts.embedding: Turn(reads=True)}
        for norm, readers in parts.readers.items():
            for name in readers:
                self.turns[name] = Turn(gain=norm, reads=True, transposed=structure.sites[name].transposed)
        for name in parts.writers:
            self.turns[name] = Turn(writes=True, transposed=structure.sites[name].transposed)
            bias = bias_of(structure, name)
            if bias is not None:
                self.turns[bias] = Turn(writes=True)
        self.fused = set(parts.readers)
        final = gains[parts.final_norm].double() + structure.rms_norms[parts.final_norm]
        # A head tied to the embedding turns with it, and a uniform gain may stay where it is.
        if not parts.tied or not torch.equal(final, final[:1].expand_as(final)):
            self.untied = parts.head if parts.tied else None
            self.turns[parts.head] = Turn(gain=parts.final_norm, reads=True)
            self.fused.add(parts.final_norm)
        self._head_dims: list[int] = []
        if values:
            self._turn_values()

    def _turn_values(self) -> None:
        for fold in self.structure.folds:
            if fold.kind != "v_o" or fold.head_dim == 1:
                continue
            layer = len(self._head_dims)
            self._head_dims.append(fold.head_dim)
            bias = bias_of(self.structure, fold.producer)
            for name in (fold.producer, bias) if bias is not None else (fold.producer,):
                self.turns[name] = replace(self.turns.get(name, Turn()), value_rows=layer)
            for name in fold.consumers:
                self.turns[name] = replace(self.turns[name], value_columns=layer)

    def value_matrix(self, layer: int) -> Tensor:
        """(head_dim, head_dim) float64."""
        return orthogonal(self._head_dims[layer], mode=self._mode, seed=self._seed + 1 + layer)

    def source(self, name: str) -> str:
        """The tensor that :meth:`turned` wants for ``name``: itself, or the embedding for a head that is untied."""
        return self.embedding if name == self.untied else name

    def turned(self, name: str, tensor: Tensor) -> Tensor:
        """A whole tensor after the rotation, in float64: computed so, and to be rounded once.

        Args:
            name: on disk, of any tensor of the model, or :attr:`untied`.
            tensor: what :meth:`source` names, as stored.
        """
        if name in self.fused:  # the gain is in the readers now
            return torch.full(tensor.shape, 1 - self.structure.rms_norms[name], dtype=torch.float64)
        turn = self.turns.get(name)
        if turn is None:
            return tensor
        if tensor.ndim == 2 and turn.transposed:
            return self.turned_rows(name, tensor.t()).t()
        return self.turned_rows(name, tensor)

    def turned_rows(self, name: str, weight: Tensor, *, columns_only: bool = False) -> Tensor:
        """A weight (out, in) that is turned, or a bias (out,), in float64.

        Args:
            weight: a range of its rows will do where :attr:`turns` says that no rows are turned, or with
                ``columns_only``: then the turn of the rows is left to do.
        """
        turn, w = self.turns[name], weight.double()
        if turn.gain is not None:
            w = w * (self._gains[turn.gain].double() + self.structure.rms_norms[turn.gain])
        if turn.reads:
            w = w @ self.matrix
        if turn.value_columns is not None:
            matrix = self.value_matrix(turn.value_columns)
            w = (w.unflatten(1, (-1, matrix.shape[0])) @ matrix).flatten(1)
        if columns_only:
            return w
        if turn.value_rows is not None:
            matrix = self.value_matrix(turn.value_rows)
            w = torch.einsum("hd...,de->he...", w.unflatten(0, (-1, matrix.shape[0])), matrix).flatten(0, 1)
        if turn.writes:
            w = self.matrix.t() @ w
        return w


class RotationFold(ModelFold):
    """A fold that turns a model's residual stream."""

    @abstractmethod
    def rotation(
        self, structure: Structure, shapes: Mapping[str, tuple[int, ...]], gains: Mapping[str, Tensor], seed: int
    ) -> Rotation:
        """What to do to each tensor; the arguments are :class:`Rotation`'s.

        Raises:
            InputError: the model cannot be rotated.
        """


def rotate(
    tensors: Mapping[str, Tensor], structure: Structure, *, mode: str = "hadamard", values: bool = True, seed: int = 0
) -> dict[str, Tensor]:
    """All of a model's tensors, by disk name, after :class:`Rotation`: those that change in float64. A head that had to
    be untied is added.

    Raises:
        InputError: the model cannot be rotated.
    """
    rotation = Rotation(
        structure, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, tensors,
        mode=mode, values=values, seed=seed,
    )  # fmt: skip
    names = [*tensors, *([rotation.untied] if rotation.untied is not None else [])]
    return {name: rotation.turned(name, tensors[rotation.source(name)]) for name in names}


@dataclass(frozen=True)
class _Parts:
    """The residual stream of a model: its size, what reads it through which norm, what writes it."""

    hidden: int
    embedding: str
    readers: dict[str, tuple[str, ...]]
    writers: tuple[str, ...]
    final_norm: str
    head: str
    tied: bool


def _parts(structure: Structure, shapes: Mapping[str, tuple[int, ...]]) -> _Parts:
    def refuse(why: str) -> InputError:
        return InputError(f"This {structure.family} model cannot be rotated: {why}.")

    if not structure.observed or len(structure.stacks) != 1 or any(b.runs != 1 for b in structure.stacks[0].blocks):
        raise refuse("it is not one observed stack of blocks, each run once")
    blocks = tuple(block.module + "." for block in structure.stacks[0].blocks)
    embeddings = [name for name, role in structure.roles.items() if role == "embed" and len(shapes[name]) == 2]
    if len(embeddings) != 1:
        raise refuse(f"it has {len(embeddings)} embeddings, not one")
    (embedding,) = embeddings
    hidden = shapes[embedding][1]
    norms = [name for name, role in structure.roles.items() if role == "norm" and shapes[name] == (hidden,)]
    inside = {name for name in norms if structure.to_module[name].startswith(blocks)}
    readers = {
        fold.producer: fold.consumers for fold in structure.folds if fold.kind == "norm" and fold.producer in inside
    }
    for name in norms:
        if name not in structure.rms_norms:
            raise refuse(f"'{name}' belongs to a norm that is not an RMS norm alone")
        if name in inside and name not in readers:
            raise refuse(f"'{name}' belongs to a norm that is not just in front of linears")
    final = [name for name in norms if name not in inside]
    if len(final) != 1:
        raise refuse(f"it has {len(final)} norms after its blocks, not one")
    read = {name for names in readers.values() for name in names}
    writers = []
    heads = [name for name, role in structure.roles.items() if role == "head" and name in structure.sites]
    for name, site in structure.sites.items():
        if name == embedding or name in heads:
            continue
        if site.kind == "experts" or site.block is None or site.role not in _READERS | _WRITERS:
            raise refuse(f"what '{name}' does to the residual stream is not known")
        if site.role in _WRITERS and site.rows == hidden and name not in read:
            writers.append(name)
        elif not (site.role in _READERS and site.columns == hidden and name in read):
            raise refuse(f"'{name}' does not read the residual stream through a norm")
    biases = {bias_of(structure, name) for name in structure.sites}
    for name in structure.kept:
        if hidden in shapes[name] and name not in readers and name not in final and name not in biases:
            raise refuse(f"what '{name}' does to the residual stream is not known")
    tied = [name for name, owner in structure.ties.items() if owner == embedding]
    if len(heads) + len(tied) != 1:
        raise refuse("it has no head that reads its last norm")
    return _Parts(hidden, embedding, readers, tuple(writers), final[0], [*heads, *tied][0], bool(tied))
