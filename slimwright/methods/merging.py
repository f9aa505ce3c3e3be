"""The contract of merge methods: several models in, one out, tile by tile (DESIGN §5).

A method sees :class:`Tile` s: the same elements of one tensor in every model, in float32. It says how much of a tensor
it must see at once (:attr:`MergeMethod.extent`), and what it must know of more than a tile goes through *surveys*:
:meth:`MergeMethod.survey` returns tensors that add up over tiles (sums, dot products, histograms), and
:meth:`MergeMethod.settle` makes a small *state* of their sum. An engine can so stream models that never fit, and
:meth:`MergeMethod.merge` on plain tensors is the same code with one tile.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, overload

import torch
from torch import Tensor

from slimwright.errors import InputError
from slimwright.methods.registry import Method

if TYPE_CHECKING:
    from slimwright.methods.blending import Blend

BLOCK = 1 << 18
"""Elements. A tile of an element-wise method begins at a multiple of it, and ends at one or at the tensor's end."""

State = dict[str, Any]
"""What the surveys found: JSON values, so that a journal can keep it."""
Sums = dict[str, Any]
"""What adds up over tiles with ``+=``: float64 or int64 tensors, or elements picked out."""


@dataclass(frozen=True)
class MergeSite:
    """Which tensor is merged.

    Attributes:
        name: its name on disk.
        shape: the shape of the whole tensor.
        block: index of the transformer block it lies in; None outside blocks.
        blocks: how many blocks its stack has; 0 outside blocks.
    """

    name: str
    shape: tuple[int, ...]
    block: int | None = None
    blocks: int = 0

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)

    @property
    def columns(self) -> int:
        """Elements of a row: the last dimension; a vector or scalar is one row."""
        return self.shape[-1] if self.shape else 1


@dataclass(frozen=True, eq=False)
class Tile:
    """The same elements of one tensor in every model.

    Attributes:
        site: the tensor that it is a part of.
        start: index of its first element in the flattened tensor.
        tensors: one a model, float32 (float64 where an input is), all of one shape: flat where the method works
            element-wise, (rows, columns) where it needs rows, the tensor's own where it needs it whole.
        base: the same elements of the base model, or None.
        seed: of everything random.
    """

    site: MergeSite
    start: int
    tensors: tuple[Tensor, ...]
    base: Tensor | None = None
    seed: int = 0

    def deltas(self) -> Sequence[Tensor]:
        """The task vectors: each model minus the base (the model itself where there is no base). New tensors."""
        if self.base is None:
            return [tensor.clone() for tensor in self.tensors]
        return [tensor - self.base for tensor in self.tensors]

    def vectors(self) -> Sequence[Tensor]:
        """The base, if there is one, and the models; not to be written into."""
        return self.tensors if self.base is None else (self.base, *self.tensors)


class StoredTile(Tile):
    """A flat tile as it lies on the disk, in its own dtypes; floats are made when they are first asked for.

    Compiled kernels read what is stored; everything else sees a :class:`Tile`.

    Args:
        stored: one a model, flat.
        stored_base: or None.
        refuse: raises for the model of that number (the base last), which holds NaN or Inf.
    """

    def __init__(
        self, site: MergeSite, start: int, stored: tuple[Tensor, ...], stored_base: Tensor | None, seed: int,
        refuse: Callable[[int], None],
    ) -> None:  # fmt: skip
        self.__dict__.update(site=site, start=start, seed=seed, stored=stored, stored_base=stored_base, refuse=refuse)

    stored: tuple[Tensor, ...]
    stored_base: Tensor | None
    refuse: Callable[[int], None]

    @property
    def numel(self) -> int:
        """Elements of the tile."""
        return self.stored[0].numel()

    def _floats(self, place: int, tensor: Tensor) -> Tensor:
        given = self.stored if self.stored_base is None else (*self.stored, self.stored_base)
        wide = torch.float64 if any(t.dtype == torch.float64 for t in given) else torch.float32
        private = tensor.to(wide)
        if private.data_ptr() == tensor.data_ptr() and place < len(self.stored):
            private = tensor.clone()
        if not math.isfinite(float(private.sum())) and not torch.isfinite(private).all():
            self.refuse(place)
        return private

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(self._floats(place, tensor) for place, tensor in enumerate(self.stored))

    @cached_property
    def base(self) -> Tensor | None:  # type: ignore[override]
        return None if self.stored_base is None else self._floats(len(self.stored), self.stored_base)

    def deltas(self) -> Sequence[Tensor]:
        return StoredVectors(super().deltas, self.stored, self.stored_base)

    def vectors(self) -> Sequence[Tensor]:
        given = self.stored if self.stored_base is None else (self.stored_base, *self.stored)
        return StoredVectors(lambda: list(super(StoredTile, self).vectors()), given, None)


class StoredVectors(Sequence[Tensor]):
    """Vectors of a stored tile: a sequence of float tensors that are made when the first is looked at.

    Attributes:
        stored: what they are made of.
        minus: what is subtracted from each, as stored, or None.
    """

    def __init__(self, make: Callable[[], Sequence[Tensor]], stored: tuple[Tensor, ...], minus: Tensor | None) -> None:
        self._make, self.stored, self.minus = make, stored, minus

    @property
    def given(self) -> tuple[Tensor, ...]:
        """All that is stored."""
        return self.stored if self.minus is None else (*self.stored, self.minus)

    @cached_property
    def _made(self) -> Sequence[Tensor]:
        return self._make()

    def __len__(self) -> int:
        return len(self.stored)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        return self._made[index]


class MergeMethod(Method):
    """Base of all merge methods: frozen dataclasses. A subclass implements :meth:`combine`; one that must know more
    than a tile also :attr:`rounds`, :meth:`survey` and :meth:`settle`."""

    family = "merge"
    base_model: ClassVar[Literal["required", "optional", "unused"]] = "required"
    fewest: ClassVar[int] = 1
    """Models beside the base that it needs at least."""
    most: ClassVar[int | None] = None
    """Models beside the base that it takes at most; None: any number."""

    @property
    def extent(self) -> Literal["element", "row", "tensor"]:
        """The smallest piece that it merges by itself: any elements, rows (along the last dimension), or whole
        tensors."""
        return "element"

    @property
    def scope(self) -> Literal["tensor", "model"]:
        """What a survey adds up over: each tensor by itself, or all tensors in the sorted order of their names."""
        return "tensor"

    @property
    def rounds(self) -> int:
        """How many surveys it makes at most, each of which reads everything once more."""
        return 0

    def begin(self, models: int, sites: Mapping[str, MergeSite]) -> State:
        """The state before anything is read. ``state["done"]`` true, here or later, ends the surveys early.

        Args:
            models: how many there are beside the base.
            sites: by name: one tensor where the scope is "tensor", else all, in sorted order.
        """
        return {}

    def survey(self, tile: Tile, state: State) -> Sums:
        """What this tile adds to the statistics of the current round; ``state`` is what earlier rounds settled."""
        raise NotImplementedError

    def settle(self, sums: Mapping[str, Sums], state: State) -> State:
        """The state after a round. ``sums`` are by name of the tensor, as the sites of :meth:`begin`."""
        raise NotImplementedError

    @abstractmethod
    def combine(self, tile: Tile, state: State) -> Tensor:
        """The merged elements of a tile, in its dtype and shape. May write into ``tile.tensors``, not into the base."""

    def blend(self, models: int, base: bool, state: State) -> Blend | None:
        """What :meth:`combine` does in the form that a compiled loop runs, to the same bytes; None where it has none.

        The proof of a merge computes what the loop wrote again with :meth:`combine`.
        """
        return None

    # -- on plain tensors ------------------------------------------------------------------------------------------

    def prepare(
        self,
        models: Sequence[Mapping[str, Tensor]],
        stats: object = None,
        base: Mapping[str, Tensor] | None = None,
        seed: int = 0,
    ) -> State:
        """Run the surveys over whole models held in memory; gives the ``state`` for :meth:`merge`.

        Args:
            models: tensors by name, one mapping a model.
            stats: statistics of calibration; unused by methods that need no data.
            base: the base model's tensors.
            seed: of everything random.

        Returns:
            One state by name of the tensor.
        """
        names = sorted(models[0])
        tiles = {
            name: self._whole_tile([model[name] for model in models], base[name] if base else None, name, seed)
            for name in names
        }
        if self.scope == "model":
            settled = self._surveyed(tiles)
            return {name: settled for name in names}
        return {name: self._surveyed({name: tile}) for name, tile in tiles.items()}

    def merge(
        self,
        tensors: Sequence[Tensor],
        base: Tensor | None = None,
        site: str | MergeSite | None = None,
        state: State | None = None,
        seed: int = 0,
    ) -> Tensor:
        """Merge one tensor of several models.

        Args:
            tensors: one a model, of one shape, floats.
            base: the base model's.
            site: the tensor's name (random masks depend on it), or all that is known of it.
            state: what :meth:`prepare` gave for all tensors; by default this tensor is surveyed alone.
            seed: of everything random.

        Returns:
            The merged tensor in the dtype of the base (of the first tensor where there is none).

        Raises:
            InputError: too few or too many tensors, no base where one is needed, shapes that differ, no floats, NaN
                or Inf.
        """
        name = site.name if isinstance(site, MergeSite) else site or "tensor"
        tile = self._whole_tile(tensors, base, name, seed, site if isinstance(site, MergeSite) else None)
        if state is None:
            state = self._surveyed({name: tile})
        elif name in state:
            state = state[name]
        merged = self.combine(_private(tile), state or {})
        like = tensors[0] if base is None else base
        return merged.reshape(tile.site.shape).to(like.dtype)

    def _whole_tile(
        self, tensors: Sequence[Tensor], base: Tensor | None, name: str, seed: int, site: MergeSite | None = None
    ) -> Tile:
        """A tile of a whole tensor, after the checks."""
        self.check_inputs(len(tensors), base is not None)
        given = [*tensors] if base is None else [*tensors, base]
        for tensor in given:
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise InputError(f"{self.name} takes tensors of floats, not {kind} ('{name}').")
            if tensor.shape != given[0].shape:
                raise InputError(
                    f"{self.name}: the shapes of '{name}' differ: {tuple(given[0].shape)} and {tuple(tensor.shape)}."
                )
            if not torch.isfinite(tensor).all():
                raise InputError(f"{self.name}: '{name}' holds NaN or Inf.")
        dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in given) else torch.float32
        site = site or MergeSite(name, tuple(given[0].shape))
        shaped = [self.shaped(tensor.to(dtype), site) for tensor in given]
        count = len(tensors)
        return Tile(site, 0, tuple(shaped[:count]), shaped[count] if base is not None else None, seed)

    def shaped(self, elements: Tensor, site: MergeSite) -> Tensor:
        """Elements of a tensor in the form that the method takes: flat, as rows, or whole."""
        if self.extent == "element":
            return elements.reshape(-1)
        return elements.reshape(-1, max(1, site.columns)) if self.extent == "row" else elements.reshape(site.shape)

    def check_inputs(self, models: int, base: bool) -> None:
        """Refuse a number of models, or a base, that the method cannot work with.

        Raises:
            InputError: with the number that it needs.
        """
        if base and self.base_model == "unused":
            raise InputError(f"{self.name} takes no base model: leave it out, or list it among the models.")
        if not base and self.base_model == "required":
            raise InputError(f"{self.name} needs a base model.")
        if models < self.fewest or (self.most is not None and models > self.most):
            wanted = (
                f"{self.fewest}" if self.most == self.fewest
                else f"at least {self.fewest}" if self.most is None else f"{self.fewest} to {self.most}"
            )  # fmt: skip
            beside = " beside the base" if base else ""
            raise InputError(f"{self.name} takes {wanted} models{beside}, not {models}.")
        for field in self.per_model_knobs():
            value = getattr(self, field)
            if isinstance(value, tuple) and len(value) != models:
                raise InputError(f"{self.name}: '{field}' has {len(value)} values for {models} models.")

    def each(self, knob: str, models: int) -> tuple[float, ...]:
        """The values of a per-model knob, one a model."""
        value = getattr(self, knob)
        return value if isinstance(value, tuple) else (value,) * models

    def _surveyed(self, tiles: Mapping[str, Tile]) -> State:
        models = len(next(iter(tiles.values())).tensors)
        state = self.begin(models, {name: tile.site for name, tile in tiles.items()})
        for _ in range(self.rounds):
            if state.get("done"):
                break
            state = self.settle({name: self.survey(_private(tile), state) for name, tile in tiles.items()}, state)
        return state


def _private(tile: Tile) -> Tile:
    """A tile whose tensors may be written into."""
    return Tile(tile.site, tile.start, tuple(tensor.clone() for tensor in tile.tensors), tile.base, tile.seed)


def add_sums(total: Sums, more: Sums) -> Sums:
    """Two tiles' statistics added up; ``total`` may be empty and is written into."""
    if not total:
        return dict(more)
    for key, tensor in more.items():
        total[key] += tensor
    return total
