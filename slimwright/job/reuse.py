"""What a probe found, kept for other jobs on the same model and data: another size need not walk again.

The key holds everything that decides the values, the code and the machine's arithmetic included, so that a job ends
with the same bytes whether it finds something or not.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from slimwright.calibrate.block_statistics import BlockSimilarity, RouterCounts, RouterRecord
from slimwright.calibrate.sensitivity import Sensitivity
from slimwright.calibrate.store import StatisticsStore
from slimwright.checkpoint import Checkpoint, environment_key, fingerprint, job_key
from slimwright.directories import cache_directory
from slimwright.job.build import Calibration
from slimwright.job.cache import STATISTICS
from slimwright.job.edits import original
from slimwright.job.walked import WalkedModel
from slimwright.plan import Edit
from slimwright.search.options import Option

PARTS = ("inputs", "of_weights", "batches", "directions", "removed")
"""Tensors that a sensitivity may lack, in the order of its fields."""


def edits_key(edits: Sequence[Edit], scales: Sequence[Path]) -> str:
    """SHA-256 (hex) of the edits of a model and of the files with their scales."""
    digest = hashlib.sha256()
    for edit in edits:
        digest.update(edit.model_dump_json().encode() + b"\n")
    for path in scales:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


class Reuse:
    """Sensitivities and losses of one model on one data set, in the store of the cache.

    Args:
        source: the model.
        calibration: its batches.
        cap: bytes of the store; 0: nothing is kept, nor found.
        model: as the user calls it, for the list of the cache.
        edits: what was done to the model before, and with which scales (:func:`edits_key`).
    """

    def __init__(self, source: Checkpoint, calibration: Calibration, cap: int, model: str, edits: str) -> None:
        self._source = original(source)
        self._edits = edits
        self._calibration = calibration
        self._store = StatisticsStore(cache_directory() / STATISTICS, cap) if cap else None
        samples = calibration.samples
        self._about = f"{model} on {samples.tokens} tokens of {samples.kind} ({samples.digest[:12]})"

    def losses(self, table: Mapping[str, list[Option]]) -> dict[str, list[float | None]]:
        """Losses by group of those whose every choice was scored before."""
        kept = self._get("losses")
        found = {group: kept.get(_choices(group, options)) for group, options in table.items()}
        return {
            group: [None if math.isnan(loss) else loss for loss in losses.tolist()]  # NaN: it cannot be chosen
            for group, losses in found.items()
            if losses is not None and losses.shape == (len(table[group]),)
        }

    def keep_losses(self, table: Mapping[str, list[Option]], losses: Mapping[str, Sequence[float | None]]) -> None:
        """Keep the losses of every choice of these groups, beside those that are kept already."""
        new = {
            _choices(group, table[group]): torch.tensor(
                [math.nan if loss is None else loss for loss in own], dtype=torch.float64
            )
            for group, own in losses.items()
        }
        kept = self._get("losses")
        if new.keys() - kept.keys():
            self._put("losses", kept | new, "losses of options")

    def sensitivities(self) -> dict[str, list[Sensitivity]]:
        """What :meth:`keep_sensitivities` was given; empty where nothing is kept."""
        found: dict[str, list[Sensitivity]] = {}
        kept = self._get("sensitivities")
        for name in sorted((name for name in kept if name.startswith("outputs:")), key=_matrix):
            site = name.partition(":")[2].partition(":")[2]
            rest = name.removeprefix("outputs")
            found.setdefault(site, []).append(
                Sensitivity(
                    kept[name],
                    float(kept["share" + rest]),
                    *(kept.get(part + rest) for part in PARTS),
                )
            )
        return found

    def keep_sensitivities(self, found: Mapping[str, list[Sensitivity]]) -> None:
        """Keep what the reverse walk found."""
        tensors: dict[str, Tensor] = {}
        for site, matrices in found.items():
            for index, own in enumerate(matrices):
                tensors[f"outputs:{index}:{site}"] = own.outputs
                tensors[f"share:{index}:{site}"] = torch.tensor(own.share, dtype=torch.float64)
                for part in PARTS:
                    if (tensor := getattr(own, part)) is not None:
                        tensors[f"{part}:{index}:{site}"] = tensor
        self._put("sensitivities", tensors, "sensitivities")

    def block_cosines(self, walked: WalkedModel) -> dict[str, BlockSimilarity]:
        """How little each block and sublayer of the model changes its tokens, by module path of the block: walked for,
        unless an earlier job has.

        Raises:
            InputError: the model's blocks cannot be run apart.
        """
        kept = self._get("cosines")
        if not kept:
            for place, (block, own) in enumerate(walked.block_cosines().items()):
                for sublayer, cosine in {"": own.block, **own.sublayers}.items():
                    kept[f"{block}:{sublayer}"] = torch.tensor([place, own.tokens, cosine], dtype=torch.float64)
            self._put("cosines", kept, "cosines of blocks")
        found: dict[str, BlockSimilarity] = {}
        for name in sorted((name for name in kept if name.endswith(":")), key=lambda name: float(kept[name][0])):
            inside = {n.partition(":")[2]: float(kept[n][2]) for n in sorted(kept) if n.startswith(name) and n != name}
            found[name[:-1]] = BlockSimilarity(float(kept[name][2]), inside, int(kept[name][1]))
        return found

    def router_record(self, walked: WalkedModel) -> dict[str, RouterCounts]:
        """What each layer's router does with the data, by module path of the experts: walked for, unless an earlier job
        has.

        Raises:
            InputError: the model's blocks cannot be run apart.
        """
        kept = self._get("routers")
        if not kept:
            statistic = RouterRecord()
            walked.observe(statistic)
            for path, own in statistic.result().items():
                kept |= {f"tokens:{path}": torch.tensor(own.tokens), f"counts:{path}": own.counts}
                kept |= {f"mass:{path}": own.mass, f"coactivation:{path}": own.coactivation}
            self._put("routers", kept, "what routers chose")
        paths = [name.partition(":")[2] for name in kept if name.startswith("counts:")]
        return {
            path: RouterCounts(
                int(kept[f"tokens:{path}"]), *(kept[f"{part}:{path}"] for part in ("counts", "mass", "coactivation"))
            )
            for path in sorted(paths)
        }

    # -- the store -------------------------------------------------------------------------------------------------

    @cached_property
    def _key(self) -> str:
        source, how = self._source, self._calibration
        code = hashlib.sha256()
        for file in sorted(source.model_path.glob("*.py")) if how.trust_remote_code else []:
            code.update(file.read_bytes())
        return job_key(
            model=fingerprint(source), config=json.dumps(source.config, sort_keys=True), remote_code=code.hexdigest(),
            data=how.samples.digest, edits=self._edits, environment=environment_key(),
        )  # fmt: skip

    def _get(self, kind: str) -> dict[str, Tensor]:
        return {} if self._store is None else self._store.get(f"{kind}-{self._key[:32]}")

    def _put(self, kind: str, tensors: Mapping[str, Tensor], what: str) -> None:
        if self._store is None:
            return
        try:
            self._store.put(f"{kind}-{self._key[:32]}", tensors, f"{what}: {self._about}")
        except OSError as error:
            self._calibration.log(
                f"What the walks found is not kept: {self._store.directory} cannot be written ({error.strerror})."
            )


def _choices(group: str, options: Sequence[Option]) -> str:
    """A name for a group with its choices, in their order."""
    text = "\n".join(option.choice.model_dump_json(exclude={"reason"}) for option in options)
    return f"{hashlib.sha256(text.encode()).hexdigest()[:16]}:{group}"


def _matrix(name: str) -> int:
    return int(name.split(":", 2)[1])
