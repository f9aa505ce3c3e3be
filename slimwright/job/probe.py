"""The probe: what every option of every group would cost the model's output, from one reverse and one forward walk over
the original model.

An option's loss is half the mean of ``gradient² * change²`` over a site's outputs, summed over its rows: ``sum_r g_r
(Δ_r H Δ_rᵀ) / 2`` nats of KL per token, with g the sensitivity of each output and H the Gram of the inputs. Rounding
on the option's grid gives Δ; what the solver is expected to gain over rounding is a factor: what its feedback, made of
all but some documents, leaves on those. Of a dropped output projection what is taken away is known token by token, and
so is its product with the gradients: half the mean of its square, with nothing taken for independent but the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from slimwright.calibrate.sensitivity import REVERSE_TOKENS, ReverseWalk, Sensitivity, moved_by_batch
from slimwright.calibrate.statistics import EXPERT_TOKENS
from slimwright.calibrate.walk import Batch, Unit
from slimwright.checkpoint import Checkpoint
from slimwright.errors import InputError
from slimwright.job.build import Calibration
from slimwright.job.evaluator import outputs_a_token, small_batches
from slimwright.job.gains import expected_gains, tried_gain
from slimwright.job.low_rank import form_of, low_rank_losses
from slimwright.job.options import chosen_rows, evenly_spaced, matrix_of, score_casts
from slimwright.job.parallel import in_order
from slimwright.job.reuse import Reuse
from slimwright.job.walked import WalkedModel
from slimwright.job.weights import survey, without_data
from slimwright.methods import SiteStatistics
from slimwright.model.structure import Site, Structure
from slimwright.plan import KEEP, Assignment
from slimwright.search.options import Option

SCORED_PRODUCTS = 5e10
"""Multiply-adds of one option over the whole model: larger models are scored on a share of every matrix's rows."""

LEAST_ROWS = 16
"""Rows of a matrix that are scored at least."""

REVERSE_LOGITS = 1 << 23
"""Logits of one of its batches at most."""

REVERSE_BATCHES = 8
"""Batches that they are cut into where they have as many rows; from how these differ an error is told."""

TRIED_MATRICES = 4
"""Experts of a site on which coarse grids are tried."""

KEPT = Assignment(grid=KEEP)

Losses = list[float | None]


class Probe:
    """Scores options with data.

    Args:
        table: options by group, with their costs.
        done: losses by group that an earlier run found.
        record: called with each group's losses.
        reuse: sensitivities that earlier jobs found.
        zeroed: sites that are zero where a group's choice is to be dropped.

    Attributes:
        by_batch: of groups, by how much each batch of the reverse walk moves their losses, as a part of these; of those
            that it reached, once it has run in this job or is found.
    """

    def __init__(
        self,
        source: Checkpoint,
        structure: Structure,
        calibration: Calibration,
        table: Mapping[str, list[Option]],
        done: Mapping[str, Losses],
        record: Callable[[str, Losses], None],
        reuse: Reuse,
        zeroed: Collection[str] = (),
    ) -> None:
        self.source = source
        self.structure = structure
        self.calibration = calibration
        self.table = table
        self.losses: dict[str, Losses] = dict(done)
        self.record = record
        self.reuse = reuse
        self.zeroed = zeroed
        self.groups = structure.choice_groups()
        self.walked = WalkedModel(source, structure, calibration)
        products = sum(site.numel * site.columns for site in structure.sites.values())
        self.share = min(1.0, SCORED_PRODUCTS / max(1, products))
        self._parts: dict[str, dict[str, list[float]]] = {}
        self.by_batch: dict[str, list[float]] = {}

    def run(self) -> dict[str, Losses]:
        """Losses of every option by group; None for one that cannot hold the values.

        Raises:
            InputError: NaN or Inf in the source, named with the tensor.
        """
        open_groups = [group for group in self.table if group not in self.losses]
        for group in [group for group in open_groups if len(self.table[group]) == 1]:
            self._settle(group, [0.0])
        if not any(group in self.groups for group in open_groups if group not in self.losses):
            self._spread(self.reuse.sensitivities())
            self._casts({})
            return self.losses
        walked = self.walked
        sensitivities = self._sensitivities()
        self._spread(sensitivities)
        for name, source in walked.sources.items():
            if source.site.kind == "embedding":
                self._score([source.site], {name: [SiteStatistics.none()]}, sensitivities, lookup=True)
        for sites, collector in walked.collected(self._open, judged=True):
            self._score(sites, {site.name: collector.statistics(site) for site in sites}, sensitivities)
        self._settle_rest(sensitivities)
        return self.losses

    # -- walks -----------------------------------------------------------------------------------------------------

    def _open(self, unit: Unit) -> list[Site]:
        """A unit's sites that are still to be scored."""
        return [site for site in unit.sites if site.choice_group not in self.losses]

    def _sensitivities(self) -> Mapping[str, list[Sensitivity]]:
        """What the reverse walk finds, or found in an earlier job."""
        found = self.reuse.sensitivities()
        if not found or any(own.removed is None and own.share for name in self.zeroed for own in found.get(name, ())):
            walked, how = self.walked, self.calibration
            found = ReverseWalk(
                walked.model, self.structure, walked.sources, self._few(), walked.hold, walked.release,
                cap=how.hidden_cap, scratch=how.scratch, apart=walked.apart, removable=self.zeroed,
            ).run()  # fmt: skip
            self.reuse.keep_sensitivities(found)
        return found

    def _few(self) -> list[Batch]:
        """Batches for the reverse walk: of fewer rows and fewer tokens."""
        samples, width = self.calibration.samples, outputs_a_token(self.structure)
        logits = min(REVERSE_LOGITS, width * min(REVERSE_TOKENS, samples.tokens) // REVERSE_BATCHES)
        return list(small_batches(samples.batches, width, tokens=REVERSE_TOKENS, logits=logits))

    def _spread(self, sensitivities: Mapping[str, list[Sensitivity]]) -> None:
        for group, sites in self.groups.items():
            own = moved_by_batch([one for site in sites for one in sensitivities.get(site.name, ())])
            if own:
                self.by_batch[group] = own

    # -- losses ----------------------------------------------------------------------------------------------------

    def _score(
        self,
        sites: Sequence[Site],
        found: Mapping[str, list[SiteStatistics]],
        sensitivities: Mapping[str, list[Sensitivity]],
        lookup: bool = False,
    ) -> None:
        """Add these sites' losses to their groups'; a group with all its parts is settled.

        Args:
            lookup: of embeddings, the rows looked up; else the products.
        """
        work = [
            (site, statistics, own)
            for site in sites
            if site.choice_group not in self.losses
            for own in [[s for s in sensitivities.get(site.name, ()) if (s.inputs is not None) == lookup]]
            for statistics in [found[site.name]]
            if own
        ]
        prepared = []
        for site, statistics, own in work:
            directions = own[0].directions if len(statistics) == 1 else None
            gains = expected_gains(self._rounded(site), [] if lookup else statistics, directions)
            prepared.append((site, statistics, own, gains))

        def losses(item: tuple[Site, list[SiteStatistics], list[Sensitivity], list[float]]) -> list[float]:
            return self._site_losses(*item)

        for item, values in in_order(losses, prepared):
            site = item[0]
            parts = self._parts.setdefault(site.choice_group, {})
            parts[site.name + (" (looked up)" if lookup else "")] = values
        for group in {site.choice_group for site in sites if site.choice_group not in self.losses}:
            members = self.groups[group]
            wanted = sum(
                sum((s.inputs is not None) == kind for s in sensitivities.get(site.name, ())) > 0
                for site in members
                for kind in (True, False)
            )
            if wanted and len(self._parts.get(group, {})) >= wanted:
                self._settle(group, self._sum(group))

    def _sum(self, group: str) -> Losses:
        totals = [math.fsum(values) for values in zip(*self._parts.pop(group).values(), strict=True)]
        return [total if math.isfinite(total) else None for total in totals]

    def _rounded(self, site: Site) -> list[Assignment]:
        """A site's choices as they are scored by rounding: what has another form stands for itself, at no gain."""
        choices = [option.choice for option in self.table[site.choice_group]]
        return [choice if form_of(choice) is None else KEPT for choice in choices]

    def _site_losses(
        self, site: Site, statistics: list[SiteStatistics], own: list[Sensitivity], gains: Sequence[float]
    ) -> list[float]:
        """Loss of every choice for one site, in nats per token.

        Args:
            gains: of every choice, what its solver leaves of plain rounding's error.
        """
        choices = [option.choice for option in self.table[site.choice_group]]
        losses = [0.0] * len(choices)
        tried: dict[int, list[float]] = {}
        matrices = len(statistics)
        trials = set(evenly_spaced(matrices, TRIED_MATRICES).tolist())
        out = site.rows // matrices
        layer = _mean_gram(statistics)
        known = [s for s in own if s.share > 0]
        for matrix, stats in enumerate(statistics):
            sensitivity = own[matrix] if matrix < len(own) else own[0]
            gram, outputs, share = stats.gram, sensitivity.of_errors, sensitivity.share
            if sensitivity.inputs is None and gram is None:
                # Too few tokens reached this expert here; more may elsewhere, so it is taken for a rare average one.
                if layer is None or not known:
                    continue
                gram = layer
                outputs = torch.stack([s.of_errors for s in known]).mean(0)
                share = max(share, EXPERT_TOKENS / max(1, self.calibration.samples.tokens))
            rows = self._rows(out)
            weight = chosen_rows(self.source, site, matrix * out + rows)
            if not torch.isfinite(weight).all():
                raise InputError(
                    f"The tensor '{site.name}' of {self.source.path} holds NaN or Inf: repair or replace it."
                )
            for index, choice in enumerate(choices):
                if choice.kept or form_of(choice) is not None:
                    continue
                if not choice.solved and site.name in self.zeroed and sensitivity.removed is not None:
                    losses[index] += float(sensitivity.removed) * share / 2
                    continue
                change = self._change(site, weight, choice)
                if sensitivity.inputs is not None:
                    often = sensitivity.inputs[rows]
                    error = ((change.square() @ outputs) * often).sum() / often.sum()
                    losses[index] += float(error) * share / 2
                else:
                    assert gram is not None
                    error = ((change @ gram) * change).sum(1).clamp_(min=0)
                    losses[index] += float((error * outputs[rows]).sum()) * share * out / len(rows) / 2
                    told = stats, sensitivity.directions, outputs[rows]
                    if matrix in trials and (gain := tried_gain(choice, weight, change, *told)) is not None:
                        tried.setdefault(index, []).append(gain)
        gained = {index: sum(found) / len(found) for index, found in tried.items()}
        losses = [loss * gained.get(index, gains[index]) for index, loss in enumerate(losses)]
        if any(form_of(choice) is not None for choice in choices):  # never of embeddings or experts
            solver, one = next(choice.solver() for choice in choices if choice.solved), own[0]
            read, each = partial(matrix_of, self.source, site), one.of_errors * one.share / 2
            low_rank = low_rank_losses(
                choices, losses, solver, site.weight_shape, read, statistics[0], each, one.directions
            )
            losses = [low_rank.get(index, loss) for index, loss in enumerate(losses)]
        return losses

    def _rows(self, out: int) -> Tensor:
        """Evenly spaced rows of a matrix that are scored."""
        return evenly_spaced(out, max(LEAST_ROWS, int(out * self.share)))

    def _change(self, site: Site, weight: Tensor, choice: Assignment) -> Tensor:
        """What rounding on the choice's grid, or being dropped, does to some rows."""
        if not choice.solved:
            return -weight if site.name in self.zeroed else torch.zeros_like(weight)
        solver = without_data(choice.solver())
        stats = SiteStatistics(survey=survey(self.source, site, solver.form))
        return solver.solve(weight, stats).dense() - weight

    # -- groups ----------------------------------------------------------------------------------------------------

    def _settle(self, group: str, losses: Losses) -> None:
        self.losses[group] = losses
        self.record(group, losses)

    def _settle_rest(self, sensitivities: Mapping[str, list[Sensitivity]]) -> None:
        """Groups that the walks did not reach whole get what they have; then tensors that are only cast."""
        for group, options in self.table.items():
            if group in self.losses or group not in self.groups:
                continue
            self._settle(group, self._sum(group) if group in self._parts else [0.0] * len(options))
        self._casts(sensitivities)

    def _casts(self, sensitivities: Mapping[str, list[Sensitivity]]) -> None:
        """16-bit casts of other tensors, whose loss is their relative error, brought to nats by what the same relative
        error costs the median group."""
        rates = []
        for group, sites in self.groups.items():
            for option, loss in zip(self.table[group], self.losses.get(group, []), strict=False):
                if not option.choice.kept and loss and "int8" in option.choice.grid:
                    numel = sum(site.numel for site in sites)
                    rates.append(loss / (numel * 1e-5))
                    break
        rate = sorted(rates)[len(rates) // 2] if rates else 1.0
        for name in self.structure.castable:
            if name in self.table and name not in self.losses:
                found = score_casts(self.source, name, [option.choice for option in self.table[name]])
                self._settle(name, [None if loss is None else loss * rate for loss in found])


def _mean_gram(statistics: Sequence[SiteStatistics]) -> Tensor | None:
    known = [stats for stats in statistics if stats.gram is not None]
    if not known:
        return None
    total = sum(stats.tokens for stats in known)
    mean = torch.zeros_like(known[0].gram)  # type: ignore[arg-type]
    for stats in known:
        mean += stats.gram * (stats.tokens / total)  # type: ignore[operator]
    return mean
