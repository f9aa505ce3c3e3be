"""The reverse walk: how much the model's output changes with each output of each site (DESIGN §1.2).

For a language model the labels are drawn from its own prediction, so that the mean squared gradient of their summed
log-likelihood is the diagonal of the Fisher matrix, and half the mean of ``gradient² * change²`` the second-order KL
divergence per token. Where the model gives no distribution, its output vectors stand for one of unit variance around
their own directions: half the squared change of the normalised vector, which is one minus the cosine.

An error of a weight changes all tokens of a sequence, and costs the square of a sum over them, not a sum of squares:
inputs that have much in common, and gradients that agree, make errors of queries, keys and values cost several times
what independent tokens would. The gradient of a weight over one sequence, ``G = Σ_t g_t x_tᵀ``, holds that. Errors that
are independent of each other cost by its squares (:attr:`Sensitivity.of_weights`); what others cost is told by samples
of its rows (:attr:`Sensitivity.directions`).

The walk is reversed as checkpointed training does: forwards run unit by unit and keep only what enters and leaves a
unit; then the units run again from last to first, each once, with gradients, so that the model never has to fit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimwright.calibrate.statistics import chosen_tokens, not_finite
from slimwright.calibrate.walk import SPILLED_BYTES, Batch, Call, Unit, Walk, mapped_copy, run_forward
from slimwright.errors import InputError, SlimwrightError
from slimwright.model.structure import Site, Structure
from slimwright.runtime.streamed import WeightSource

Hold = Callable[[Unit], None]

REVERSE_TOKENS = 8192
"""Tokens of the reverse walk at most."""

DIRECTIONS = 32
"""Samples of a matrix's gradients."""

GRADIENT_ELEMENTS = 1 << 24
"""Elements of a weight's gradient that are made at once."""

EMBEDDINGS = ("image_embeds", "text_embeds")
"""What models of two towers call their vectors."""


@dataclass(frozen=True)
class Sensitivity:
    """Mean squared gradients at the outputs of one matrix.

    Attributes:
        outputs: (out,) float32, the mean over the tokens that it saw; nats² per squared output.
        share: tokens that it saw for each token of the output: below 1 for experts, above where a block runs often.
        inputs: (rows,) float32, of an embedding the share of tokens that look each row up (then ``outputs`` belongs to
            its columns); None where the matrix is multiplied.
        of_weights: (out,) float32, the mean that belongs to errors of the matrix that are independent of each other:
            the squared length of a row's gradient over each sequence, summed, by the squared inputs, summed (of an
            embedding the squared sum of the gradients at each id of a sequence, by the tokens). Where sequences cannot
            be told apart (experts) each token counts for itself. None where the inputs are not known.
        batches: (batches, 2) float64, what errors of equal size in all weights would cost on all tokens of each batch
            of the data, on any scale, and how many tokens the batch's output has; None where it is not known.
        directions: (:data:`DIRECTIONS`, in) float32, whose outer products have the mean ``Σ_r G_r G_rᵀ``, on any scale,
            with G_r a row's gradient over a sequence: of the documents that are apart, if there are any. None where
            sequences cannot be told apart.
        removed: () float64, the mean over the tokens that it saw of the squared product of the output and its gradient:
            twice what it costs a token if the output, bias included, is taken away. None where it was not asked for.
    """

    outputs: Tensor
    share: float = 1.0
    inputs: Tensor | None = None
    of_weights: Tensor | None = None
    batches: Tensor | None = None
    directions: Tensor | None = None
    removed: Tensor | None = None

    @property
    def of_errors(self) -> Tensor:
        """(out,) the mean that an error of the matrix is to be multiplied with."""
        return self.outputs if self.of_weights is None else self.of_weights


def moved_by_batch(found: Sequence[Sensitivity]) -> list[float]:
    """By how much each batch of the data moves what errors of equal size in the weights of all these matrices cost a
    token, as a part of it; empty where that is not known. The root of their summed squares says how far other data of
    that kind might move it."""
    known = [own.batches for own in found if own.batches is not None]
    if not known:
        return []
    cost, tokens = torch.stack([own[:, 0] for own in known]).sum(0), known[0][:, 1]
    whole = float(cost.sum())
    return (cost / whole - tokens / tokens.sum()).tolist() if whole > 0 else []


class _Squares:
    """Sums of squared gradients of one matrix: at its outputs over its tokens, and of its weights over its sequences.

    Args:
        apart: documents of which :attr:`directions` are; none: of all.
        draws: generator of the signs that mix the outputs of a sequence into a direction.
    """

    def __init__(self, apart: Collection[str], draws: torch.Generator) -> None:
        self.total: Tensor | None = None
        self.tokens = 0
        self._apart, self._draws = apart, draws
        self._of_weights: Tensor | float = 0.0
        self._energy = 0.0
        self._directions: Tensor | None = None
        self._removed: float | None = None
        self.batches: dict[int, float] = {}

    def add(self, gradient: Tensor, batch: Batch, index: int, entered: Tensor | None, sequences: bool = True) -> None:
        """Add a batch's tokens.

        Args:
            gradient: (..., out) at the product.
            index: of the batch.
            entered: (..., in) what was multiplied; None: not known.
            sequences: whether these are the batch's tokens one by one, if they have its shape.
        """
        gradient = gradient.detach()
        squares = batch.counted(gradient).float().square()
        square = self._add(squares)
        if entered is not None and len(inputs := batch.counted(entered)) == len(squares):
            energy = inputs.float().square().sum(1)
            self._energy += float(energy.sum(dtype=torch.float64))
            x = batch.by_rows(entered) if sequences else None
            if x is None and sequences and entered.ndim >= 3:  # windows or crops: each is a sequence
                x = entered.flatten(1, -2)
            square = (energy @ squares).double() if x is None else self._of_sequences(gradient, batch, x)
            self._of_weights = self._of_weights + square
        self._add_to_batch(index, square)

    def add_removed(self, gradient: Tensor, batch: Batch, out: Tensor) -> None:
        """Add what it costs a batch's tokens if the products (..., out) are taken away."""
        products = (batch.counted(gradient.detach()).float() * batch.counted(out).float()).sum(1)
        self._removed = (self._removed or 0.0) + float(products.double().square().sum())

    def add_looked_up(self, gradient: Tensor, batch: Batch, index: int, ids: Tensor) -> None:
        """Add a batch's rows looked up.

        Args:
            gradient: (..., columns) at them.
            ids: (...) which they are.
        """
        gradient = gradient.detach()
        square = self._add(batch.counted(gradient).float().square())
        self._energy = float(self.tokens)
        rows = batch.by_rows(gradient)
        if rows is not None and ids.numel() == rows.shape[0] * rows.shape[1]:
            mask = batch.masks.get(tuple(rows.shape[:2]))
            square = torch.zeros_like(square)
            for row, (own, looked) in enumerate(zip(rows, ids.reshape(rows.shape[:2]), strict=True)):
                own = own.float() if mask is None else own.float() * mask[row][:, None]
                unique, places = looked.unique(return_inverse=True)
                sums = own.new_zeros(len(unique), own.shape[1]).index_add_(0, places, own)
                square += sums.square_().sum(0, dtype=torch.float64)
        self._of_weights = self._of_weights + square
        self._add_to_batch(index, square)

    def _add(self, squares: Tensor) -> Tensor:
        """Add squared gradients (tokens, out) at the outputs; their sum over the tokens."""
        square = squares.sum(0, dtype=torch.float64)
        self.total = square if self.total is None else self.total + square
        self.tokens += len(squares)
        return square

    def _add_to_batch(self, index: int, square: Tensor) -> None:
        self.batches[index] = self.batches.get(index, 0.0) + float(square.sum())

    def _of_sequences(self, gradient: Tensor, batch: Batch, x: Tensor) -> Tensor:
        """(out,) float64, squared lengths of the rows of the weight's gradients over sequences (rows, tokens, in),
        summed; adds to the directions."""
        gradient = gradient.reshape(*x.shape[:2], -1)
        mask = batch.masks.get(tuple(x.shape[:2]))
        if mask is not None:
            gradient = gradient * mask[..., None]
        self._add_directions(gradient, batch, x)
        square = torch.zeros(gradient.shape[-1], dtype=torch.float64)
        for own, inputs in zip(gradient, x, strict=True):
            square += row_energy(own.float(), inputs.float())
        return square

    def _add_directions(self, gradient: Tensor, batch: Batch, x: Tensor) -> None:
        """Mix the gradients (rows, tokens, out) of each sequence's outputs with random signs: of the weight's gradient
        that makes a vector of its inputs (rows, tokens, in)."""
        chosen = chosen_tokens(batch, x, self._apart) if self._apart else None
        for row, (gradients, own) in enumerate(zip(gradient, x, strict=True)):
            if self._apart:
                if chosen is None or not chosen[row].any():
                    continue
                gradients, own = gradients[chosen[row]], own[chosen[row]]
            signs = torch.randint(0, 2, (gradients.shape[1], DIRECTIONS), generator=self._draws).mul_(2).sub_(1).float()
            found = (gradients.float() @ signs).t() @ own.float()
            self._directions = found if self._directions is None else self._directions + found

    @property
    def of_weights(self) -> Tensor | None:
        """(out,) float32; None where no inputs came with the gradients."""
        if not self._energy or not isinstance(self._of_weights, Tensor):
            return None
        return (self._of_weights / self._energy).float()

    @property
    def removed(self) -> Tensor | None:
        """() float64, the mean over tokens; None where it was not asked for."""
        return None if self._removed is None else torch.tensor(self._removed / max(1, self.tokens), dtype=torch.float64)

    @property
    def directions(self) -> Tensor | None:
        """(:data:`DIRECTIONS`, in) float32; None where there are none."""
        return self._directions if self._directions is not None and self._directions.any() else None


def row_energy(gradient: Tensor, x: Tensor) -> Tensor:
    """(out,) float64, the squared lengths of the rows of ``gᵀ x``: of the gradient of a weight over one sequence.

    Args:
        gradient: (tokens, out) float32 at the product.
        x: (tokens, in) float32.
    """
    (tokens, columns), outs = x.shape, gradient.shape[1]
    parts = gradient.split(max(1, GRADIENT_ELEMENTS // max(tokens, columns)), dim=1)
    if tokens * (outs + columns) < outs * columns:
        products = x @ x.t()
        sums = [(products @ part).mul_(part).sum(0, dtype=torch.float64) for part in parts]
        return torch.cat(sums).clamp_(min=0)
    return torch.cat([(part.t() @ x).square_().sum(1, dtype=torch.float64) for part in parts])


@dataclass
class _Record:
    """One unit's run on one batch: what entered it, what left it."""

    index: int
    call: Call
    leaves: list[Tensor]


class ReverseWalk:
    """Sensitivities of every site, by one pass forwards and one backwards.

    Args:
        model: loaded with streamed sites.
        sources: its sites' sources by disk name.
        batches: fewer tokens than for Grams do; every unit's inputs of all batches are kept.
        hold, release: called around a unit's runs, to have its weights in memory.
        seed: of the drawn labels.
        cap: bytes of what leaves the units that may be kept in memory; what is more goes to mapped files.
        scratch: directory of those files; None is the system's.
        apart: documents that say in which directions errors matter, since solvers are judged on these; none: all do.
        removable: disk names of sites whose outputs may be taken away.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        structure: Structure,
        sources: Mapping[str, WeightSource],
        batches: Sequence[Batch],
        hold: Hold,
        release: Hold,
        seed: int = 0,
        cap: int | None = None,
        scratch: Path | None = None,
        apart: Collection[str] = (),
        removable: Collection[str] = (),
    ) -> None:
        self._left = cap
        self._removable = removable
        self._apart = apart
        self._scratch = scratch
        self.model = model
        self.structure = structure
        self.sources = sources
        self.batches = list(batches)
        self.hold = hold
        self.release = release
        self._generator = torch.Generator().manual_seed(seed)
        self._draws = torch.Generator().manual_seed(seed + 1)
        self._squares: dict[tuple[str, int], _Squares] = {}
        self._entered: dict[tuple[str, int], Tensor] = {}
        self._lookups: dict[str, tuple[Tensor, _Squares]] = {}
        self._index = 0  # of the batch that runs
        self._tokens: dict[int, int] = {}
        self.spilled_bytes = 0

    @property
    def tokens(self) -> int:
        """Of the output, in all batches so far."""
        return sum(self._tokens.values())

    def run(self, progress: Callable[[int, int], None] = lambda done, total: None) -> dict[str, list[Sensitivity]]:
        """One for each matrix of each site, by disk name; sites that no gradient reached are left out.

        Raises:
            SlimwrightError: the model's output has nothing to differentiate.
        """
        self._watch(True)
        self.model.requires_grad_(False)
        try:
            records = self._forwards(progress)
            with torch.enable_grad():
                for done, (unit, members) in enumerate(reversed(records)):
                    self.hold(unit)
                    for record in members:
                        self._index = record.index
                        _back_through(record)
                        record.leaves.clear()
                    members.clear()
                    self.release(unit)
                    progress(len(records) + done + 1, 2 * len(records))
        finally:
            self._watch(False)
        return self._found()

    def _forwards(self, progress: Callable[[int, int], None]) -> list[tuple[Unit, list[_Record]]]:
        """Run forwards, keeping what enters and leaves every unit; each ends with the gradient of its output's loss."""
        records: list[tuple[Unit, list[_Record]]] = []
        walk = Walk(self.model, self.structure, self.batches, finish=self._finish, gradients=True)
        total = 2 * len(walk.units)
        for step in walk:
            self.hold(step.unit)
            members = []
            for index in step.indices:
                self._index = index
                call = walk.calls[index]
                assert call is not None
                if not step.unit.block:  # part of what lies between blocks: its graph is kept
                    with torch.enable_grad():
                        step.advance(index, call.output())
                    continue
                with torch.no_grad():
                    output, leaves = self._as_leaves(call.output())
                members.append(_Record(index, call, leaves))
                with torch.enable_grad():
                    step.advance(index, output)
            if step.unit.block:
                self.release(step.unit)
                records.append((step.unit, members))
            progress(min(len(records), total), total)
        return records

    def _as_leaves(self, output: Any) -> tuple[Any, list[Tensor]]:
        """The output with its tensors as leaves of a new graph, and those leaves."""
        leaves: list[Tensor] = []

        def leaf(tensor: Tensor) -> Tensor:
            held = tensor.detach()
            size = held.numel() * held.element_size()
            if self._left is not None and size >= SPILLED_BYTES:
                if size > self._left:
                    held = mapped_copy(held, self._scratch)
                    self.spilled_bytes += size
                else:
                    self._left -= size
            leaves.append(held.requires_grad_(True))
            return leaves[-1]

        return _mapped(output, leaf), leaves

    def _finish(self, index: int, output: Any) -> None:
        """The loss of one forward's output, and its gradient."""
        self._index = index
        logits = output.get("logits") if hasattr(output, "get") else None
        if logits is None or logits.ndim < 2 or logits.shape[-1] < 2:
            logits = None
            found = {k: v for k, v in output.items() if isinstance(v, Tensor) and v.requires_grad and v.ndim >= 2}
            if not found:
                raise SlimwrightError("The model's output has no gradient: calibrate with --data none.")
            towers = [found[name] for name in EMBEDDINGS if name in found]  # of two towers the vectors of both
            loss, tokens = torch.zeros(()), 0
            for vectors in towers or list(found.values())[:1]:
                direction = torch.nn.functional.normalize(self._batch.counted(vectors).float(), dim=-1)
                noise = torch.randn(direction.shape, generator=self._generator)
                loss, tokens = loss + (direction * noise).sum(), direction.shape[0]
        else:
            rows = self._batch.predicted(logits).float()
            if not torch.isfinite(rows).all():
                raise self._first_not_finite() or InputError(
                    f"The model's logits hold NaN or Inf on {self._batch.named(logits)}: leave that sample out, repair "
                    "the model, or fit without data (--data none)."
                )
            chance = torch.softmax(rows.detach(), dim=-1)
            labels = torch.multinomial(chance, 1, generator=self._generator)[:, 0]
            loss, tokens = torch.nn.functional.cross_entropy(rows, labels, reduction="sum"), rows.shape[0]
        self._tokens[index] = tokens
        loss.backward(retain_graph=True)

    def _first_not_finite(self) -> InputError | None:
        """The first site whose inputs hold NaN or Inf in a forward of the current batch; None where it is the output
        alone."""
        batch = self._batch

        def look(site: Site, x: Tensor) -> None:
            if not torch.isfinite(batch.counted(x)).all():
                raise not_finite(site, batch, x)

        sites = [source for source in self.sources.values() if source.site.kind != "embedding"]
        for source in sites:
            source.watch = lambda x, expert, site=source.site: look(site, x)
        try:
            with torch.no_grad():
                run_forward(self.model, batch)
        except InputError as error:
            return error
        finally:
            for source in sites:
                source.watch = None
        return None

    @property
    def _batch(self) -> Batch:
        return self.batches[self._index]

    # -- watching --------------------------------------------------------------------------------------------------

    def _watch(self, on: bool) -> None:
        for name, source in self.sources.items():
            if not on:
                source.watch = source.watch_output = None
            elif source.site.kind == "embedding":
                source.watch_output = lambda out, ids, part, name=name: self._watch_lookup(name, out, ids, part)
            else:
                source.watch_output = lambda out, expert, part, name=name: self._watch_product(name, out, expert, part)
            if on:
                source.watch = lambda x, expert, name=name: self._watch_input(name, x, expert)

    def _watch_input(self, name: str, x: Tensor, expert: int) -> None:
        """What a matrix is multiplied with, just before :meth:`_watch_product` sees the product."""
        if torch.is_grad_enabled():
            self._entered[name, expert] = x.detach()

    def _watch_product(self, name: str, out: Tensor, expert: int, part: slice) -> None:
        index, batch = self._index, self._batch
        squares = self._squares.setdefault((name, expert), _Squares(self._apart, self._draws))
        entered, one = self._entered.pop((name, expert), None), self.sources[name].site.kind != "experts"
        out.register_hook(lambda gradient: squares.add(gradient[..., part], batch, index, entered, one))
        if name in self._removable:
            given = out.detach()[..., part].clone()  # what comes after may change it in place
            out.register_hook(lambda gradient: squares.add_removed(gradient[..., part], batch, given))

    def _watch_lookup(self, name: str, out: Tensor, ids: Any, part: slice) -> None:
        """Of an embedding: its rows looked up (ids a tensor), or the product of a head tied to it (ids a number)."""
        if not isinstance(ids, Tensor):
            self._watch_product(name, out, ids, part)
            return
        if not out.requires_grad:
            return
        rows = self.sources[name].site.rows
        new = torch.zeros(rows, dtype=torch.int64), _Squares((), self._draws)
        counts, squares = self._lookups.setdefault(name, new)
        index, batch = self._index, self._batch
        counted = batch.counted(ids.unsqueeze(-1)) if ids.ndim >= 2 else ids
        counts += torch.bincount(counted.reshape(-1), minlength=rows)
        out.register_hook(lambda gradient: squares.add_looked_up(gradient, batch, index, ids))

    def _found(self) -> dict[str, list[Sensitivity]]:
        found: dict[str, list[Sensitivity]] = {}
        for name, source in self.sources.items():
            site = source.site
            matrices = site.shape[0] if site.kind == "experts" and len(site.shape) == 3 else 1
            if any((name, matrix) in self._squares for matrix in range(matrices)):
                found[name] = [self._of(site, matrix) for matrix in range(matrices)]
            lookup = self._lookups.get(name)
            if lookup is not None and lookup[1].total is not None:
                counts, squares = lookup
                # A row that was never looked up here may be elsewhere: every row is seen once more than it was.
                share = (counts + 1).float() / float(counts.sum() + counts.numel())
                assert squares.total is not None
                mean = (squares.total / max(1, squares.tokens)).float()
                often = squares.tokens / max(1, self.tokens)
                own = Sensitivity(mean, often, share, squares.of_weights, self._by_batch(squares))
                found.setdefault(name, []).append(own)
        return found

    def _of(self, site: Site, matrix: int) -> Sensitivity:
        squares = self._squares.get((site.name, matrix))
        if squares is None or squares.total is None:
            return Sensitivity(torch.zeros(site.weight_shape[-2]), 0.0)
        mean = (squares.total / max(1, squares.tokens)).float()
        return Sensitivity(
            mean,
            squares.tokens / max(1, self.tokens),
            of_weights=squares.of_weights,
            batches=self._by_batch(squares),
            directions=squares.directions,
            removed=squares.removed,
        )

    def _by_batch(self, squares: _Squares) -> Tensor:
        """(batches, 2) float64, the sums of each batch and the tokens of its output."""
        found = [(squares.batches.get(index, 0.0), tokens) for index, tokens in sorted(self._tokens.items())]
        return torch.tensor(found, dtype=torch.float64)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Float tensors in nested tuples, lists and mappings, in order."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nest with every float tensor changed."""
    if isinstance(value, Tensor):
        return change(value) if value.is_floating_point() else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(item, change) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(item, change) for item in value)
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    return value


def _back_through(record: _Record) -> None:
    """Run one unit again with gradients: from its outputs' gradients to those of what entered it."""
    if all(leaf.grad is None for leaf in record.leaves):
        return
    call = record.call
    entered: list[tuple[Tensor, Tensor]] = []
    copies: dict[int, Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.detach().requires_grad_(True)
            entered.append((tensor, copies[id(tensor)]))
        return copies[id(tensor)]

    args, kwargs = _mapped(call.args, copy), _mapped(call.kwargs, copy)
    if not entered:  # the first of a stack without an embedding: let gradients reach its sites all the same
        first = next(_tensors([args, kwargs]))
        held = first.detach().requires_grad_(True)
        args, kwargs = (_mapped(given, lambda tensor: held if tensor is first else tensor) for given in (args, kwargs))
    output = call.again(args, kwargs)
    pairs = zip(_tensors(output), record.leaves, strict=True)
    left = [(out, leaf.grad) for out, leaf in pairs if leaf.grad is not None and out.requires_grad]
    if not left:
        return
    torch.autograd.backward([out for out, _ in left], [grad for _, grad in left])
    reached = [(original, held.grad) for original, held in entered if held.grad is not None]
    if reached:
        # What lies between units may be shared by several of them (an encoder's last norm): keep its graph.
        torch.autograd.backward([original for original, _ in reached], [g for _, g in reached], retain_graph=True)
