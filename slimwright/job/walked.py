"""The source's model for walks: its weights stream from where they stand, as they are or as they were written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimwright.calibrate.block_statistics import BlockCosine, BlockSimilarity, BlockStatistic
from slimwright.calibrate.replay import Replay, runs_apart
from slimwright.calibrate.sensitivity import REVERSE_TOKENS
from slimwright.calibrate.statistics import Collector, apart_documents, bf16_is_fast
from slimwright.calibrate.walk import Step, Walk, walk_units
from slimwright.calibrate.walk import Unit as WalkUnit
from slimwright.checkpoint import Checkpoint
from slimwright.errors import InputError
from slimwright.job.build import Calibration
from slimwright.job.open import model_of
from slimwright.job.parallel import in_order
from slimwright.job.source import PlainSource, ZeroSource, edited_tensors
from slimwright.job.weights import TILE_ELEMENTS, site_rows, site_tiles
from slimwright.model.structure import Site, Structure
from slimwright.runtime.streamed import WeightSource, load_streamed
from slimwright.weights import Form, decode_component, decode_rows, disk_shapes

SMALL_MODEL = 32_000_000
"""Parameters up to which walks compute in float32 whatever the model is stored in."""


def walk_dtype(source: Checkpoint, structure: Structure) -> torch.dtype:
    """bfloat16 for models of some size stored in it where the CPU multiplies it natively, else float32."""
    stored = {source.tensors[name].dtype for name in structure.sites}
    wide = structure.parameters > SMALL_MODEL
    return torch.bfloat16 if wide and stored == {torch.bfloat16} and bf16_is_fast() else torch.float32


class WrittenSource(WeightSource):
    """A site as it lies in the files written so far, decoded by reference code."""

    def __init__(self, written: Checkpoint, site: Site, grid: Form) -> None:
        super().__init__(site)
        self._written = written
        self._grid = grid

    def rows(self, rows: slice) -> Tensor:
        if self._grid.plain:
            return site_rows(self._written, self.site, rows).float()
        return decode_rows(self._grid, self.parts(), self.site.weight_shape, rows)

    def parts(self) -> dict[str, Tensor]:
        """The tensors that stand for it, by suffix."""
        return {s: self._written.read(self.site.name + s) for s in disk_shapes(self._grid, self.site.weight_shape)}

    def matrices(self, rows: slice) -> list[Tensor]:
        """(rows, columns) float32 of each matrix that stands for these rows: one on a grid; factors apart."""
        if self._grid.plain:
            return [self.rows(rows)]
        shape, parts = self.site.weight_shape, self.parts()
        return [decode_component(c, parts, c.rows_for(rows, shape[-2])) for c in self._grid.components(shape)]


class WalkSource(WeightSource):
    """A site as it stands: the source's weight until it is solved, then what was written."""

    def __init__(self, current: WeightSource) -> None:
        super().__init__(current.site)
        self.current = current

    def rows(self, rows: slice) -> Tensor:
        return self.current.rows(rows)

    def gather(self, index: Tensor) -> Tensor:
        return self.current.gather(index)

    def hold(self, dtype: torch.dtype) -> None:
        """Keep the whole matrix in memory, made in tiles by the worker threads; a plain weight of that dtype is the
        mapped file itself."""
        if isinstance(self.current, PlainSource):
            mapped = self.current.stored()
            if mapped is not None and mapped.dtype == dtype:
                self.held = mapped
                return
        site = self.site
        held = torch.empty(site.rows, site.columns, dtype=dtype)
        grid = self.current._grid if isinstance(self.current, WrittenSource) else None

        def fill(rows: slice) -> None:
            held[rows] = self.current.rows(rows).to(dtype)

        for _ in in_order(fill, site_tiles(site, grid, TILE_ELEMENTS)):
            pass
        self.held = held

    def release(self) -> None:
        """Let go of it."""
        self.held = None


class WalkedModel:
    """The source's model for walks: every site streams from a :class:`WalkSource`, and is held while its unit runs.

    Attributes:
        sources: by disk name.
    """

    def __init__(self, source: Checkpoint, structure: Structure, calibration: Calibration) -> None:
        self.sources = {name: WalkSource(PlainSource(source, site)) for name, site in structure.sites.items()}
        self._dropped = {name: ZeroSource(site) for name, site in structure.dropped.items()}
        self._dtype = walk_dtype(source, structure)
        self._source, self._structure, self._calibration = source, structure, calibration

    @cached_property
    def model(self) -> PreTrainedModel:
        """Loaded at first use."""
        cls, config = model_of(self._source, self._calibration.trust_remote_code)
        return load_streamed(
            cls,
            self._source.model_path,
            config,
            {**self._dropped, **self.sources},
            edited_tensors(self._source, self._structure),
            self._dtype,
        )

    @cached_property
    def apart(self) -> frozenset[str]:
        """Names of the documents on which solvers are judged."""
        return apart_documents(self._calibration.samples.batches, REVERSE_TOKENS)

    def runs_apart(self) -> bool:
        """Whether the model's blocks can be run one by one (:func:`slimwright.calibrate.replay.runs_apart`)."""
        first = self._calibration.samples.batches[0]
        return runs_apart(self.model, self._structure, first)

    def walk(self) -> Walk | Replay:
        """Over the calibration's batches."""
        how = self._calibration
        if not how.apart:
            return Replay(self.model, self._structure, how.samples.batches)
        return Walk(self.model, self._structure, how.samples.batches, how.hidden_cap, how.scratch)

    def collected(
        self,
        sites_of: Callable[[WalkUnit], Sequence[Site]],
        grams: bool = True,
        magnitudes: bool = False,
        judged: bool = False,
    ) -> Iterator[tuple[Sequence[Site], Collector]]:
        """Walk over the model as it stands, collecting the inputs of each unit's wanted sites; they come after the
        unit's last run. Nothing is run that no wanted site needs.

        Args:
            grams: whether their Grams are wanted.
            magnitudes: whether counts of their magnitudes are.
            judged: whether those of some documents are kept apart, to judge solvers on.
        """
        units = walk_units(self._structure).values()
        wanted = {unit.module: sites for unit in units if (sites := sites_of(unit))}
        left = set(wanted)
        apart = self.apart if judged else ()
        collectors = {m: Collector(self.sources, sites, grams, magnitudes, apart) for m, sites in wanted.items()}
        for step in self.walk() if left else ():
            unit = step.unit
            collector = collectors.get(unit.module)
            if collector is not None and step.final:
                left.discard(unit.module)
            over = not left
            if unit.block or not over:  # else its inputs say all
                self.hold(unit)
            for index in step.indices:
                with collector.watching(step.batch(index)) if collector is not None else nullcontext():
                    if over or not self._calibration.apart:
                        step.show(index)
                    else:
                        step.advance(index, step.output(index))
            self.release(unit)
            if collector is not None and step.final:
                yield wanted[unit.module], collectors.pop(unit.module)
            if over:
                break

    def observe(self, *statistics: BlockStatistic) -> None:
        """Walk once over the model as it stands, and show every block's run on every batch to these statistics.

        Raises:
            InputError: the model's blocks cannot be run apart.
        """
        left = {path for path, unit in walk_units(self._structure).items() if unit.block}
        for step in self.walk():
            if not isinstance(step, Step):
                raise InputError("The blocks of this model cannot be run apart, so what each does cannot be observed.")
            self.hold(step.unit)
            for index in step.indices if step.unit.block else ():
                with ExitStack() as watching:
                    told = [watching.enter_context(s.watching(step, index, self.model)) for s in statistics]
                    output = step.output(index)
                for tell in told:
                    tell(output)
                step.advance(index, output)
            self.release(step.unit)
            left -= {step.unit.module} if step.final else set()
            if not left:
                break

    def block_cosines(self) -> dict[str, BlockSimilarity]:
        """How little each block and each sublayer in it changes its tokens, by module path of the block.

        Raises:
            InputError: the model's blocks cannot be run apart.
        """
        statistic = BlockCosine()
        self.observe(statistic)
        return statistic.result()

    def hold(self, unit: WalkUnit) -> None:
        """Have the weights of a unit's sites in memory, but not those of a head tied to an embedding."""
        for site in unit.sites:
            if site.kind != "embedding":
                self.sources[site.name].hold(self._dtype)

    def release(self, unit: WalkUnit) -> None:
        """Let go of them."""
        for site in unit.sites:
            self.sources[site.name].release()
