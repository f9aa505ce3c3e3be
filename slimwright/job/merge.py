"""``merge``: combine checkpoints into one. Checks, plan, streamed merging, proof, publishing; killed, it resumes."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimwright.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    Claim,
    Journal,
    Layout,
    Lineage,
    claim,
    copy_side_files,
    environment_key,
    fingerprint,
    job_key,
    plan_layout,
    write_bytes_atomic,
    write_config_atomic,
    write_json_atomic,
)
from slimwright.errors import InputError
from slimwright.formats.peft import WEIGHTS_FILE
from slimwright.job.memory import MemoryWatch, memory_cap
from slimwright.job.merging import extract, papers
from slimwright.job.merging.chat import chosen_template, write_template
from slimwright.job.merging.config import MergeConfig, read_config
from slimwright.job.merging.engine import Engine
from slimwright.job.merging.forecast import MergeForecast, forecast
from slimwright.job.merging.modules import WHOLE, resized_module
from slimwright.job.merging.plan import MergePlan, plan_units
from slimwright.job.merging.proof import first_elements, prove, random_tiles
from slimwright.job.merging.soup import Soup, greedy_soup
from slimwright.job.merging.sources import MergeInput, open_tensors
from slimwright.job.merging.targets import Inputs, like
from slimwright.job.merging.variants import extra_bytes, is_store, prove_variants, write_variants
from slimwright.job.merging.vocabulary import Alignment, align, resized, write_tokenizer
from slimwright.job.progress import Reporter

MAX_SHARD_BYTES = 5_000_000_000
REPORT_VERSION = 1
NOT_VERIFIED = {"ok": None, "how": "not verified, as asked"}


@dataclass(frozen=True)
class MergeReport:
    """The result: ``data`` is report.json, ``out`` the directory (None after a dry run)."""

    data: dict[str, Any]
    out: Path | None

    def __getitem__(self, key: str) -> Any:
        return self.data[key]


@dataclass(frozen=True)
class MergeOptions:
    """What is asked beside the configuration; see :func:`merge`."""

    seed: int | None = None
    verify: bool = True
    dry_run: bool = False
    job_memory: str | None = None
    max_shard_bytes: int | None = None
    trust_remote_code: bool = False
    quiet: bool = False


def merge(config: str | Path | Mapping[str, Any], out: str | Path | None = None, **options: Any) -> MergeReport:
    """Combine checkpoints into one.

    Args:
        config: a YAML file (our form, or mergekit's), or the mapping that it would hold.
        out: directory that the result is written to; it exists only when the result is whole and proven.
        options: ``seed`` (of random masks), ``verify`` (False: without the proof), ``dry_run``, ``job_memory``
            (``2GB``), ``max_shard_bytes``, ``trust_remote_code`` (copies Python files), ``quiet``.

    Raises:
        InputError: something about the input cannot work; nothing was written.
        SlimwrightError: the job failed; what was finished is kept for the next run of the same call.
    """
    known = [field.name for field in dataclasses.fields(MergeOptions)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise InputError(f"merge has no option '{unknown[0]}'; it has: {', '.join(known)}.")
    asked = MergeOptions(**options)
    if out is None and not asked.dry_run:
        raise InputError("Give --out, the directory to write the result to.")
    with MemoryWatch(memory_cap(asked.job_memory)) as watch:
        return _Job(config, None if out is None else Path(out), asked, watch).run()


class _Job:
    """One run of ``merge``."""

    def __init__(
        self, given: str | Path | Mapping[str, Any], out: Path | None, asked: MergeOptions, watch: MemoryWatch
    ) -> None:
        self.given, self.out, self.asked, self.watch = given, out, asked, watch
        self.started = time.monotonic()
        self.config: MergeConfig = read_config(given)
        self.notes: list[str] = []
        self.inputs: Inputs = {}
        self.alignment: Alignment | None = None
        self.template: str | None = None
        self.soup: Soup | None = None
        self.variants: dict[str, Any] | None = None
        self.licence_files: list[str] = []
        self.seed = asked.seed if asked.seed is not None else self.config.seed or 0

    def run(self) -> MergeReport:
        config = self.config
        inputs, plan = self._planned()
        layout = plan_layout(
            [unit.entry for unit in plan.units],
            max_shard_bytes=self.asked.max_shard_bytes or config.out_shard_size or MAX_SHARD_BYTES,
            total_parameters=sum(unit.site.numel for unit in plan.units),
        )
        extra = extra_bytes(plan)
        predicted = forecast(plan, layout.total_bytes + extra, self.asked.verify)
        cap = self.watch.cap or 0
        if cap < predicted.memory_bytes:
            raise InputError(
                f"--job-memory {cap / 1e6:.0f} MB is too little for this merge: it needs about "
                f"{predicted.memory_bytes / 1e6:.0f} MB."
            )
        if self.asked.dry_run:
            return MergeReport(self._report(plan, inputs, layout, predicted, dry_run=True), None)
        assert self.out is not None
        self._check_disk(self.out, layout.total_bytes + extra)
        states = {str(reference): given.state() for reference, given in inputs.items()}
        recipe = {
            "config": config.source,
            "models": list(states),
            "seed": self.seed,
            "shard": [s.nbytes for s in layout.shards],
        }
        with claim(self.out, job_key(inputs=states, recipe=repr(recipe), verb="merge")) as held:
            if held.status == "finished":
                data = json.loads((held.out / "report.json").read_text(encoding="utf-8"))
                data["notes"].append(f"{held.out} is the finished result of this same job.")
                return MergeReport(data, held.out)
            try:
                if config.metric is not None:
                    self._choose_soup(held, states)
                    inputs, plan = self._planned()
                if config.method == "merge/lora_extract":
                    return self._extract(held, plan, inputs, layout, predicted, states)
                return self._work(held, plan, inputs, layout, predicted, states)
            except InputError:  # what was given cannot work, so nothing of it is worth keeping for another try
                if held.status == "new" and not self.watch.exceeded:
                    shutil.rmtree(held.partial)
                raise

    def _planned(self) -> tuple[Inputs, MergePlan]:
        """The models opened, their vocabularies aligned, and what will be written."""
        config = self.config
        inputs: Inputs = {reference: MergeInput(reference) for reference in config.references()}
        self.inputs = inputs
        self._check_out(inputs)
        self.alignment = align(config, inputs)
        self.template = chosen_template(config.chat_template, inputs) if config.chat_template else None
        plan = plan_units(config, inputs, self.alignment.origins if self.alignment else {})
        self.notes = [*config.notes, *(self.alignment.notes if self.alignment else ()), *plan.notes]
        if self.soup is not None:
            chosen = ", ".join(map(str, self.soup.models))
            self.notes.append(f"The greedy soup kept {len(self.soup.models)} of the models: {chosen}.")
        return inputs, plan

    def _choose_soup(self, held: Claim, states: Mapping[str, str]) -> None:
        """Leave of the models those that a greedy soup keeps; scores are kept over crashes."""

        def average(config: dict[str, Any], out: Path) -> object:
            return merge(config, out, verify=False, quiet=True, job_memory=self.asked.job_memory)

        key = job_key(inputs=dict(states), config=repr(self.config.source))
        with Journal.open(held.scratch / "soup-journal", key, reset=True) as journal:
            self.config, self.soup = greedy_soup(self.config, held.scratch / "soup", average, journal)

    # -- checks ----------------------------------------------------------------------------------------------------

    def _check_out(self, inputs: Inputs) -> None:
        """The result must not be one of its own inputs."""
        for given in inputs.values():
            for path in (given.checkpoint.path, *([given.adapter.path] if given.adapter else [])):
                if self.out is not None and path.resolve() == self.out.resolve():
                    raise InputError(f"--out {self.out} is one of the models to merge: choose another directory.")

    def _check_disk(self, out: Path, needed: int) -> None:
        folder = out.absolute().parent
        while not folder.exists():
            folder = folder.parent
        partial = out.absolute().with_name(out.name + ".partial")
        there = sum(f.stat().st_blocks * 512 for f in partial.glob("**/*.safetensors")) if partial.is_dir() else 0
        free = shutil.disk_usage(folder).free
        if free + there < needed:
            raise InputError(
                f"The disk of {folder} has {free / 1e9:.2f} GB free, but the result needs {needed / 1e9:.2f} GB."
            )

    # -- work ------------------------------------------------------------------------------------------------------

    def _work(
        self, held: Claim, plan: MergePlan, inputs: Inputs, layout: Layout, predicted: MergeForecast,
        states: dict[str, str],
    ) -> MergeReport:  # fmt: skip
        leader = inputs[like(self.config)]
        inner = held.partial / leader.checkpoint.model_path.relative_to(leader.checkpoint.path)
        with (
            Journal.open(held.scratch / "journal", self._journal_key(inputs, states), reset=True) as journal,
            Reporter(predicted.phases, held.partial / "events.jsonl", self.asked.quiet) as reporter,
            ThreadPoolExecutor(1, "slimwright-publishing") as aside,
        ):
            prepared = aside.submit(papers.prepare, inputs)
            if held.status == "resumed":
                reporter.log(f"Resuming: {len(journal.done)} finished tensors are kept.")
                if not journal.done:
                    for file in inner.glob("*.safetensors"):
                        file.unlink()
            reporter.begin("merge")
            with CheckpointWriter(inner, layout) as writer:
                if writer.fresh:  # shards made anew hold nothing yet
                    for name in [name for name in journal.done if name.startswith("merge:")]:
                        del journal.done[name]
                done = Engine(plan, writer, journal, self.seed, self._step(reporter)).run()
            proof = None
            self._side_files(held, inner, plan, leader)
            if is_store(plan):
                self.variants = write_variants(plan, held.partial, self._config(plan, leader), done, self.seed)
            if self.asked.verify:
                reporter.begin("verify")
                proof = prove(plan, held.partial, done, self.seed, self._step(reporter)).to_json()
                if self.variants:
                    pieces = [(unit, 0, first_elements(unit)) for unit in plan.units] + random_tiles(plan, self.seed)
                    prove_variants(plan, held.partial, self.variants["names"], done, self.seed, pieces)
            for reference in papers.equal_inputs(plan, done) if len(inputs) > 1 else ():
                self.notes.append(
                    f"The result equals {reference}: the other models have no effect with these parameters."
                )
            parents, render = prepared.result()
            data = self._report(plan, inputs, layout, predicted) | {
                "verified": proof or NOT_VERIFIED,
                "ledger": papers.ledger(plan, done),
                "lineage": self._lineage(Checkpoint.open(held.partial), inputs, parents),
                "how_to_load": papers.how_to_load(
                    held.out / inner.relative_to(held.partial), leader.checkpoint, self.variants
                ),
            }
            self._publish(held, inputs, data, render, "merge")
            reporter.step(1, 1)
        return MergeReport(data, held.out)

    def _extract(
        self, held: Claim, plan: MergePlan, inputs: Inputs, layout: Layout, predicted: MergeForecast,
        states: dict[str, str],
    ) -> MergeReport:  # fmt: skip
        """Write an adapter instead of a model."""
        base = self.config.base
        assert base is not None
        parts = held.scratch / "extracted"
        with (
            Journal.open(held.scratch / "journal", self._journal_key(inputs, states), reset=True) as journal,
            Reporter(predicted.phases, held.partial / "events.jsonl", self.asked.quiet) as reporter,
        ):
            if held.status == "resumed":
                reporter.log(f"Resuming: {len(journal.done)} finished tensors are kept.")
            reporter.begin("merge")
            found = extract.extract_factors(plan, parts, journal, self._step(reporter))
            adapter = extract.write_adapter(plan, found, parts, held.partial, base.path)
            proof = NOT_VERIFIED
            if self.asked.verify:
                reporter.begin("verify")
                proof = extract.prove_adapter(plan, found, held.partial, self.seed, self._step(reporter))
            parents, render = papers.prepare(inputs)
            data = self._report(plan, inputs, layout, predicted) | {
                "adapter": adapter,
                "verified": proof,
                "ledger": extract.adapter_ledger(plan, found),
                "lineage": self._lineage(open_tensors(held.partial / WEIGHTS_FILE), inputs, parents),
                "how_to_load": papers.how_to_adapt(held.out),
            }
            data["size"]["after"], data["size"]["shards"] = adapter["bytes"], 1
            merged = adapter["modules"]
            data["tensors"] = {"merged": merged, "copied": len(adapter["whole"]), "not_read": 0}
            self._publish(held, inputs, data, render, "adapter")
            reporter.step(1, 1)
        return MergeReport(data, held.out)

    def _journal_key(self, inputs: Inputs, states: dict[str, str]) -> str:
        return job_key(
            inputs=states,
            models=[str(reference) for reference in inputs],
            config=repr(self.config.source),
            seed=self.seed,
            environment=environment_key("merge"),
        )

    def _step(self, reporter: Reporter) -> Callable[[int, int], None]:
        def step(done: int, total: int) -> None:
            self.watch.check()
            reporter.step(done, total)

        return step

    def _config(self, plan: MergePlan, leader: MergeInput) -> dict[str, Any]:
        """config.json of the result."""
        config = dict(leader.checkpoint.config)
        for layers in plan.layers:
            if layers.chosen != tuple(range(layers.count)):
                config = resized_module(config, layers.module, list(layers.chosen), layers.count)
        if self.alignment is not None:
            config = resized(config, self.alignment.rows)
        if self.config.dtype:
            config.pop("torch_dtype", None)
            config["dtype"] = self.config.dtype
        return config

    def _side_files(self, held: Claim, inner: Path, plan: MergePlan, leader: MergeInput) -> None:
        """config.json and everything that makes the model usable, from the base (the first model)."""
        write_config_atomic(inner / "config.json", self._config(plan, leader))
        copied = copy_side_files(leader.checkpoint, held.partial, trust_remote_code=self.asked.trust_remote_code)
        target = held.partial / leader.checkpoint.model_path.relative_to(leader.checkpoint.path)
        if self.alignment is not None:
            write_tokenizer(self.alignment, self.inputs, target, lambda file: shutil.copyfile(file, target / file.name))
        if self.template is not None:
            write_template(self.template, target)
        self.licence_files = [name for name in copied.copied if "licen" in name.lower()]

    def _lineage(self, result: Checkpoint, inputs: Inputs, parents: tuple[Lineage, ...]) -> dict[str, Any]:
        edit = {"edit": "merge", "method": self.config.method, "models": [str(reference) for reference in inputs]}
        return Lineage(fingerprint(result), parents, (edit,)).to_json()

    def _publish(
        self, held: Claim, inputs: Inputs, data: dict[str, Any], render: Callable[[Mapping[str, Any], str], str],
        relation: str,
    ) -> None:  # fmt: skip
        """Write what stands beside the weights (``data`` becomes report.json), and give the result its name."""
        metadata, warnings = papers.licence_notes(inputs)
        self.notes += warnings
        data |= {
            "notes": self.notes,
            "versions": papers.versions(),
            "job": {"seconds": time.monotonic() - self.started, "peak_memory_bytes": self.watch.peak},
        }
        text = papers.card(
            held.out.name, self.config, inputs, metadata, self.licence_files, self.notes, data["how_to_load"],
            data["ledger"], relation,
        )  # fmt: skip
        write_bytes_atomic(held.partial / "README.md", text.encode())
        write_bytes_atomic(held.partial / "merge.yaml", papers.recipe_text(self.config, self.seed).encode())
        write_json_atomic(held.partial / "report.json", data)
        write_bytes_atomic(held.partial / "report.html", render(data, held.out.name).encode())
        held.publish()

    def _report(
        self, plan: MergePlan, inputs: Inputs, layout: Layout, predicted: MergeForecast, dry_run: bool = False
    ) -> dict[str, Any]:
        config = self.config
        merged = papers.merged_units(plan)
        specs = list(dict.fromkeys(unit.method.spec for unit in merged if unit.method is not None))
        given = str(self.given) if not isinstance(self.given, Mapping) else "merge.yaml"
        return {
            "format_version": REPORT_VERSION,
            "verb": "merge",
            **({"dry_run": True} if dry_run else {}),
            "method": config.dialect.name if config.dialect else config.method.removeprefix("merge/"),
            "definitions": "mergekit" if config.dialect else "paper",
            "differs_from_the_paper": config.dialect.differs if config.dialect else "",
            "specs": specs,
            "models": [str(reference) for reference in inputs],
            "base": str(config.base) if config.base else None,
            "tensors": {"merged": len(merged), "copied": len(plan.units) - len(merged), "not_read": len(plan.unread)},
            "layers": {layers.module or WHOLE: list(layers.chosen) for layers in plan.layers} or None,
            "size": {
                "before": sum(given.checkpoint.total_bytes for given in inputs.values()),
                "after": layout.total_bytes,
                "shards": len(layout.shards),
            },
            "forecast": predicted.to_json(),
            "seed": self.seed,
            **({"variants": self.variants} if self.variants else {}),
            **({"soup": self.soup.to_json()} if self.soup else {}),
            "reproduce": shlex.join(["slimwright", "merge", given, "--out", str(self.out)]),
            "notes": self.notes,
        }
