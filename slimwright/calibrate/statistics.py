"""Statistics of sites' inputs, accumulated over a walk's batches (DESIGN §5)."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from slimwright.calibrate.site_statistics import Apart, SiteStatistics
from slimwright.calibrate.walk import Batch
from slimwright.errors import InputError
from slimwright.kernels.gram import add_gram as add_gram_compiled
from slimwright.kernels.gram import gram_available
from slimwright.model.structure import Site
from slimwright.runtime.streamed import WeightSource
from slimwright.weights.activations import magnitude_counts

STRIPS = 4
"""Column strips in which a Gram's lower triangle is computed: 5/8 of the products of the whole."""

SUMMED_TOKENS = 1024
"""Tokens that are summed up at once: copies of more would take memory and leave the cache."""

EXPERT_TOKENS = 64
"""Tokens below which an expert is solved without data."""


APART_SHARE, APART_TOKENS = 1 / 6, 4096
"""What is kept apart: so much of the data, of large data so many tokens; at most half as much more."""


def apart_documents(batches: Sequence[Batch], within: int) -> frozenset[str]:
    """Names of the documents that are kept apart to judge solvers on, drawn by hash; none where no document is small
    enough to be one of them.

    Args:
        within: they are among the first so many tokens, which the reverse walk reads too.
    """
    lengths: dict[str, int] = {}
    seen, early = 0, set[str]()
    for batch in batches:
        first = next(iter(batch.inputs.values()))
        whole = first.shape[1] if first.ndim == 2 else 1
        pieces = batch.pieces or tuple(((name, whole),) for name in batch.documents)
        for row in pieces:
            for name, tokens in row:
                lengths[name] = lengths.get(name, 0) + tokens
            if seen < within:
                early.update(name for name, _ in row)
            seen += whole
    wanted = min(APART_SHARE * sum(lengths.values()), APART_TOKENS)
    chosen, size = list[str](), 0
    for name in sorted(early, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if size < wanted and size + lengths[name] <= 1.5 * wanted:
            chosen.append(name)
            size += lengths[name]
    return frozenset(chosen)


def inputs_of(batch: Batch, x: Tensor, documents: Collection[str]) -> Tensor:
    """(tokens, in), of the inputs ``x`` (..., in) those that count and are of some documents: none where ``x`` is not
    the batch's tokens one by one."""
    rows = batch.by_rows(x)
    chosen = None if rows is None else chosen_tokens(batch, rows, documents)
    return x.new_empty(0, x.shape[-1]) if rows is None or chosen is None else rows[chosen]


def chosen_tokens(batch: Batch, rows: Tensor, documents: Collection[str]) -> Tensor | None:
    """(rows, tokens) bool, of ``rows`` (rows, tokens, n) which tokens count and are of some documents; None where the
    documents are not known token by token."""
    chosen = batch.tokens_of(documents)
    if len(chosen) != rows.shape[0] or chosen.shape[1] not in (1, rows.shape[1]):
        return None
    mask = batch.masks.get(tuple(rows.shape[:2]))
    chosen = chosen.expand(rows.shape[:2])
    return chosen if mask is None else chosen & mask


def bf16_is_fast() -> bool:
    """Whether this CPU multiplies bfloat16 natively."""
    found = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(found is not None and found())


def _has_tiles() -> bool:
    """Whether this CPU multiplies matrix tiles (AMX): torch's products are the fastest then."""
    found = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(found is not None and found())


def _by_kernel(x: Tensor, total: Tensor) -> bool:
    """Whether the compiled kernel sums these inputs up: it is the fastest where there are no tiles."""
    return not _has_tiles() and gram_available(x, total)


@contextmanager
def _products_in_bf16(wanted: bool) -> Iterator[None]:
    """Let float32 products multiply in bfloat16 and add in float32: exact where the factors are bfloat16 values."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    if wanted:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def add_gram(total: Tensor, x: Tensor) -> None:
    """Add ``xᵀ x`` to the lower triangle of ``total`` (what else is touched is overwritten when the sum is read).

    Args:
        total: (in, in) float32.
        x: (tokens, in) of any float dtype. The sums are float32 whatever that is; bfloat16 factors are exact.
    """
    x = x.contiguous()
    if _by_kernel(x, total):
        add_gram_compiled(total, x, torch.zeros(3, x.shape[1]))
        return
    tiles, columns = _has_tiles(), x.shape[1]
    step = columns if columns < 512 else -(-columns // STRIPS)
    for part in x.split(SUMMED_TOKENS):
        factor = part.float()
        with _products_in_bf16(tiles and x.dtype == torch.bfloat16):
            for start in range(0, columns, step):
                stop = min(start + step, columns)
                total[start:stop, :stop].addmm_(factor[:, start:stop].t(), factor[:, :stop])


def _symmetric(lower: Tensor) -> Tensor:
    """A matrix whose lower triangle is given, in its memory; what else it holds is overwritten, strip by strip."""
    step = 1024
    for start in range(0, lower.shape[0], step):
        rows = slice(start, start + step)
        corner = lower[rows, rows].tril()
        lower[rows, rows] = corner + corner.tril(-1).t()
        lower[rows, start + step :] = lower[start + step :, rows].t()
    return lower


class InputSums:
    """Sums over the inputs of a site: tokens, Gram, magnitudes. Sites that are fed the same tensor share one.

    Args:
        columns: inputs of the site.
        keep: keep the inputs and make the Gram when it is asked for: of experts, each of which sees few tokens.
        gram: whether there is to be a Gram.
        counted: whether magnitudes are to be counted.

    Attributes:
        magnitudes: how many magnitudes lie where (:func:`magnitude_counts`); None where they are not counted.
    """

    def __init__(self, columns: int, keep: bool = False, gram: bool = True, counted: bool = False) -> None:
        self.tokens = 0
        self.magnitudes: Tensor | None = magnitude_counts(torch.zeros(0)) if counted else None
        self._weight = 0.0
        self._gram = gram
        self._sum: Tensor | None = None if keep or not gram else torch.zeros(columns, columns)
        self._kept: list[Tensor] = []
        self._moments = torch.zeros(3, columns)
        self._absmax, self._abssum, self._sum_of_inputs = self._moments
        self._columns = columns
        self._apart: list[Tensor] = []

    def keep_apart(self, x: Tensor) -> None:
        """Keep inputs (tokens, in) that were added, to judge on."""
        if x.shape[0]:
            self._apart.append(x.detach())

    def keep_last_apart(self) -> None:
        """Keep the last of the inputs, where all are kept: what routing picked has no rows to tell documents by."""
        if self._kept:
            together = torch.cat(self._kept)
            self._apart = [together[-max(1, min(int(APART_SHARE * len(together)), APART_TOKENS)) :]]

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Add inputs (tokens, in), which count in the Gram and the mean by their weights (tokens,); those that weigh
        nothing count nowhere."""
        if weights is not None:
            x, weights = x[weights > 0].float(), weights[weights > 0].float()
        if not x.shape[0]:
            return
        self.tokens += x.shape[0]
        x = x.detach().contiguous()
        if weights is None and self.magnitudes is None and self._sum is not None and _by_kernel(x, self._sum):
            self._weight += x.shape[0]
            add_gram_compiled(self._sum, x, self._moments)
            return
        for part in x.split(SUMMED_TOKENS):
            size = part.abs()
            torch.maximum(self._absmax, size.amax(0).float(), out=self._absmax)
            self._abssum += size.sum(0, dtype=torch.float32)
            if self.magnitudes is not None:
                self.magnitudes += magnitude_counts(size)
            if weights is None:
                self._sum_of_inputs += part.sum(0, dtype=torch.float32)
        if weights is None:
            self._weight += x.shape[0]
        else:
            self._weight += float(weights.sum(dtype=torch.float64))
            self._sum_of_inputs += weights @ x
            x = x * weights.sqrt()[:, None]
        if not self._gram:
            return
        if self._sum is None:
            self._kept.append(x.clone())
        else:
            add_gram(self._sum, x)

    @property
    def finite(self) -> bool:
        """Whether no input was NaN or Inf."""
        return bool(torch.isfinite(self._absmax).all())

    def gram_sum(self) -> Tensor:
        """(in, in) float32, the sum of ``x xᵀ``: made of the inputs where they are kept, else handed over, once."""
        total, self._sum = self._sum, None
        if total is None:
            total = torch.zeros(self._columns, self._columns)
            if self._kept:
                add_gram(total, torch.cat(self._kept))
        return _symmetric(total)

    def statistics(self) -> SiteStatistics:
        """What solvers are given; without a Gram where no token was seen, or nothing but zeros, which is told by the
        tokens. Asked for once: the sum becomes the mean."""
        if not self.tokens or not self._absmax.any():
            return SiteStatistics(self.tokens)
        gram = self.gram_sum().div_(self._weight) if self._gram else None
        apart = None
        if self._apart and gram is not None:
            inputs = torch.cat(self._apart)
            apart = Apart(inputs, inputs.shape[0] / self._weight)
        self._apart = []
        return SiteStatistics(
            self.tokens, gram, absmax=self._absmax, absmean=self._abssum / self.tokens,
            mean=self._sum_of_inputs / self._weight, apart=apart,
        )  # fmt: skip


class Collector:
    """Watches the inputs of sites while units run.

    Args:
        sources: of the model, by disk name.
        sites: those to watch; of a Gram group one is watched for all.
        grams: whether Grams are wanted.
        magnitudes: whether the inputs' magnitudes are to be counted (:meth:`magnitudes`).
        apart: documents whose inputs are kept beside, to judge solvers on; of experts, which do not know documents, the
            last inputs are, if there are any.
    """

    def __init__(
        self,
        sources: Mapping[str, WeightSource],
        sites: Sequence[Site],
        grams: bool = True,
        magnitudes: bool = False,
        apart: Collection[str] = (),
    ) -> None:
        self._sources = sources
        self._grams, self._counted, self._apart = grams, magnitudes, apart
        self._leaders: dict[str, Site] = {}
        for site in sites:
            self._leaders.setdefault(_key(site), site)
        self._sums: dict[tuple[str, int], InputSums] = {}
        self._found: dict[str, SiteStatistics] = {}
        self._layers: dict[tuple[str, int, str], Tensor] = {}
        self._batch = Batch({})
        self._weights: Tensor | None = None
        self._expected: Counter[str] = Counter()
        self._left: Counter[str] = Counter()

    @contextmanager
    def watching(self, batch: Batch, weights: Tensor | None = None, whole: bool = True) -> Iterator[None]:
        """Count what the sites are fed within, as part of this batch, its tokens by their weights (samples, tokens).

        Args:
            whole: let what runs within run to its end; else it is left when every site has been fed as often as in the
                first batch, which spares the products behind the last of them. Where there are experts, which are fed
                now more and now less often, it always runs to its end.
        """
        self._batch, self._weights = batch, weights
        self._layers.clear()
        experts = any(site.kind == "experts" for site in self._leaders.values())
        self._left = Counter() if whole or experts else self._expected.copy()
        fed: Counter[str] = Counter()

        def watch(key: str, site: Site, x: Tensor, expert: int) -> None:
            fed[key] += 1
            self._add(key, site, x, expert)
            if key in self._left:
                self._left[key] -= 1
                if not +self._left:
                    raise _AllFedError

        for key, site in self._leaders.items():
            self._sources[site.name].watch = lambda x, expert, key=key, site=site: watch(key, site, x, expert)
        try:
            yield
            self._expected = fed if len(fed) == len(self._leaders) else Counter()
        except _AllFedError:
            pass
        finally:
            for site in self._leaders.values():
                self._sources[site.name].watch = None

    def _add(self, key: str, site: Site, x: Tensor, expert: int) -> None:
        sums = self._sums.get((key, expert))
        if sums is None:
            sums = self._sums[key, expert] = InputSums(
                site.columns, site.kind == "experts", self._grams, self._counted
            )  # fmt: skip
        weights = self._weights
        if weights is None:
            sums.add(self._batch.counted(x))
            if self._apart and site.kind != "experts":
                sums.keep_apart(inputs_of(self._batch, x, self._apart))
        elif x.shape[:-1] in (weights.shape, (weights.numel(),)):
            sums.add(x.reshape(-1, x.shape[-1]), weights.reshape(-1))
        else:
            raise InputError(
                f"The inputs of '{site.name}' are not the batch's tokens one by one, so they cannot be weighed: use a "
                "solver that counts all tokens alike."
            )
        if not sums.finite:
            raise not_finite(site, self._batch, x)

    def magnitudes(self, site: Site) -> Tensor | None:
        """The counts of its inputs' magnitudes; None where no token was seen. Asked for before the statistics are."""
        sums = self._sums.get((_key(site), 0))
        return None if sums is None or not sums.tokens else sums.magnitudes

    def statistics(self, site: Site) -> list[SiteStatistics]:
        """One for each of the site's matrices: several where it is a tensor of fused experts.

        Experts that saw fewer tokens than twice their inputs have their Gram filled up to that many with the layer's;
        those under :data:`EXPERT_TOKENS` are without data.
        """
        key = _key(site)
        if site.kind != "experts":
            if key not in self._found:
                sums = self._sums.pop((key, 0), None)
                self._found[key] = SiteStatistics.none() if sums is None else sums.statistics()
            return [self._found[key]]
        layer = self._layer(site)
        count = site.shape[0] if len(site.shape) == 3 else 1
        found = []
        for expert in range(count):
            sums = self._sums.get((key, expert))
            if sums is None or sums.tokens < EXPERT_TOKENS:
                found.append(SiteStatistics.none())
                continue
            if self._apart:
                sums.keep_last_apart()
            own = sums.statistics()
            lacking = 2 * site.columns - own.tokens
            if lacking > 0 and own.gram is not None:
                gram = (own.gram * own.tokens + layer * lacking) / (own.tokens + lacking)
                part = own.apart
                if part is not None:
                    part = Apart(part.inputs, part.share * own.tokens / (own.tokens + lacking))
                own = dataclasses.replace(own, gram=gram, apart=part, _factors={})
            found.append(own)
        return found

    def _layer(self, site: Site) -> Tensor:
        """The mean Gram over the inputs of all experts of the site's layer and kind."""
        kind = _kind(self._leaders[_key(site)])
        if kind not in self._layers:
            alike = [sums for (key, _), sums in self._sums.items() if _kind(self._leaders[key]) == kind]
            total = torch.zeros(site.columns, site.columns)
            for sums in alike:
                total += sums.gram_sum()
            self._layers[kind] = total / max(1, sum(sums.tokens for sums in alike))
        return self._layers[kind]


def not_finite(site: Site, batch: Batch, x: Tensor) -> InputError:
    """What to raise where the inputs ``x`` of a site hold NaN or Inf in tokens that count."""
    return InputError(
        f"The inputs of '{site.name}'{f' in {site.block}' if site.block else ''} hold NaN or Inf on {batch.named(x)}: "
        "leave that sample out, repair the model, or fit without data (--data none)."
    )


class _AllFedError(Exception):
    """Every site has been fed: what still runs is of no use to its watcher."""


def _kind(site: Site) -> tuple[str, int, str]:
    """What the experts of a layer that are fed alike have in common."""
    return site.module, site.columns, site.role


def _key(site: Site) -> str:
    return site.gram_group or site.name
