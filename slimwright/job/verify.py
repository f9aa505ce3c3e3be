"""Proof: the written model is reloaded from disk and compared with the plan applied to the source (DESIGN §1.1).

Run as ``python -m slimwright.job.verify SPEC.json`` in a fresh process, so that nothing of the job's memory helps it.
Three comparisons: (1) tiles of every written tensor against what plain-tensor code makes of the source; (2) logits of
the model that plain ``from_pretrained`` loads against those of a reference whose weights are recomputed from the source
tile by tile; (3) for the report, not for the verdict: the same model against the source as it is, on held-out text.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from slimwright.checkpoint import Checkpoint
from slimwright.errors import SlimwrightError
from slimwright.heap import trim
from slimwright.job.caching import cache_facts, check_cache, outputs_with_cache
from slimwright.job.edits import WrittenCheckpoint, dropped, folded, rotated
from slimwright.job.gathering import Gathering
from slimwright.job.held_out import HeldOut, held_out, load_tokenizer, retrieval_quality
from slimwright.job.open import model_of, open_source
from slimwright.job.source import (
    ParallelSource,
    edited_tensors,
    plain_sources,
    planned_sources,
    planned_tensors,
)
from slimwright.job.units import plan_units
from slimwright.job.verify_files import compare_files
from slimwright.job.walked import WrittenSource
from slimwright.model.discover import discover
from slimwright.model.structure import Structure
from slimwright.plan import Plan
from slimwright.runtime.kv_format import KvFormat
from slimwright.runtime.streamed import WeightSource, load_streamed
from slimwright.weights import Grid

TOLERANCE = 1e-4
"""Largest difference of an output, relative to the largest output, in float32."""

EDIT_TOLERANCE = 2e-2
"""The same of edits alone, before anything is put on a grid: gains and biases are stored in the source's dtype."""


@dataclass(frozen=True)
class Spec:
    """What to verify.

    Attributes:
        source: the source model, as the user named it.
        written: directory with the written model.
        result: file that gets the outcome as JSON.
        tokens: how many tokens the quality is measured on.
        batch_tokens: tokens of one forward.
        threads: torch threads.
        seed: of random inputs.
        sample: whether to generate a line of text.
        trust_remote_code: run the source's own model code.
        progress: whether to print one JSON object a step on stdout.
        checksums: of what solvers with data returned, by disk name.
        data: the user's data, a tenth of which is for evaluation; empty: held-out generic text.
        eval_data: data for evaluation only, taken instead.
        scales: files with what each fold of the plan found, in order.
        cache: format of the packed keys and values by layer, the layers' numbers as text.
    """

    source: str
    written: str
    result: str
    tokens: int
    batch_tokens: int
    threads: int
    seed: int = 0
    sample: bool = True
    trust_remote_code: bool = False
    progress: bool = False
    checksums: dict[str, str] = field(default_factory=dict)
    data: str = ""
    eval_data: str = ""
    scales: list[str] = field(default_factory=list)
    cache: dict[str, str] = field(default_factory=dict)
    queries: int | None = None


@dataclass
class Outcome:
    """What was found; ``problems`` empty means verified."""

    how: str
    problems: list[str] = field(default_factory=list)
    logits_error: float = 0.0
    edits_error: float | None = None
    """Largest difference that the plan's edits alone make; None where it has none."""
    tensors_compared: int = 0
    inputs: str = ""
    quality: dict[str, Any] = field(default_factory=dict)
    measured_on: dict[str, int] = field(default_factory=dict)
    samples: list[dict[str, str]] = field(default_factory=list)
    cache: dict[str, Any] = field(default_factory=dict)
    evaluations: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(spec: Spec, step: Callable[[int, int], None], how: str) -> Outcome:
    """Run the three comparisons.

    Args:
        step: called with steps done and in all.
        how: what the report says of where this ran.
    """
    torch.set_num_threads(spec.threads)
    outcome = Outcome(how)
    source = open_source(spec.source)
    structure = plain = discover(source, trust_remote_code=spec.trust_remote_code)
    plan = Plan.load(Path(spec.written) / "plan.yaml")
    before = source, plain_sources(source, structure)
    source, structure = rotated(source, structure, plan.edits)
    source, structure = dropped(source, structure, plan.drops, trust_remote_code=spec.trust_remote_code)
    unfolded = dropped(before[0], plain, plan.drops, trust_remote_code=spec.trust_remote_code)
    source = folded(source, structure, plan.edits, [Path(file) for file in spec.scales])
    units = plan_units(source, structure, plan)
    names = [entry.name for unit in units for entry in unit.entries]
    written = WrittenCheckpoint(Checkpoint.open(spec.written), structure, names)
    started = time.monotonic()
    outcome.tensors_compared, problem = compare_files(source, written, structure, units, spec.checksums, step)
    outcome.problems += [problem] if problem else []
    outcome.seconds["tensors"] = time.monotonic() - started
    trim()
    if outcome.ok:
        started = time.monotonic()
        with torch.no_grad():
            _compare_outputs(spec, source, structure, plan, written, before, unfolded, outcome, step)
        outcome.seconds["outputs"] = time.monotonic() - started
    return outcome


# -- outputs -------------------------------------------------------------------------------------------------------


def _compare_outputs(
    spec: Spec,
    source: Checkpoint,
    structure: Structure,
    plan: Plan,
    written: WrittenCheckpoint,
    before: tuple[Checkpoint, Mapping[str, WeightSource]],
    unfolded: tuple[Checkpoint, Structure],
    outcome: Outcome,
    step: Callable[[int, int], None],
) -> None:
    """Judge the reloaded model, and measure its distance from the source ``before`` any edit. ``unfolded`` is the
    source with nothing but what was dropped."""
    cls, config = model_of(source, spec.trust_remote_code)
    packed = cls.from_pretrained(_model_directory(spec.written), dtype=torch.float32).eval()
    # Where activations are rounded, a difference in the last digit may fall on the other side of a step: in float64 the
    # two models differ too little for that.
    exact = torch.float64 if plan.activations else torch.float32
    judged = (
        packed if exact is torch.float32 else cls.from_pretrained(_model_directory(spec.written), dtype=exact).eval()
    )
    tensors = planned_tensors(source, structure, plan) if plan.casts(structure) or plan.edits else None
    planned = planned_sources(source, structure, plan)
    forms = {name: a.parsed_grid() for name, a in plan.by_site(structure).items() if not a.kept}
    for name, form in forms.items():
        # What was solved with data, and factors: they were compared value by value, and cannot be made again in tiles.
        if name in spec.checksums or not isinstance(form, Grid):
            planned[name] = ParallelSource(WrittenSource(written, structure.sites[name], form))
    for name, rounding in plan.roundings(structure).items():
        planned[name].activations = rounding
    reference = load_streamed(cls, source.model_path, config, planned, tensors, exact)
    del tensors
    unedited, sources = before
    original = load_streamed(cls, source.model_path, model_of(unedited, spec.trust_remote_code)[1], sources)
    outcome.inputs, batches = held_out(
        source, packed, data=spec.data, eval_data=spec.eval_data, tokens=spec.tokens, batch_tokens=spec.batch_tokens,
        seed=spec.seed,
    )  # fmt: skip
    quality = Gathering()
    formats = {int(layer): KvFormat.parse(text) for layer, text in spec.cache.items()}
    cached = Gathering() if formats else None
    if formats:
        problem = check_cache(packed, formats, batches[0].inputs["input_ids"][:1])
        if problem:
            outcome.problems.append(problem)
            return
    for index, batch in enumerate(batches):
        got = _outputs(packed, batch.inputs)
        if index == 0:
            inputs = {k: v.to(exact) if v.is_floating_point() else v for k, v in batch.inputs.items()}
            expected = _outputs(reference, inputs)
            _judge(got if judged is packed else _outputs(judged, inputs), expected, outcome)
            outcome.evaluations += 1
            del expected, reference, judged
            if plan.folds and outcome.ok:
                edited = load_streamed(
                    cls, source.model_path, config, plain_sources(source, structure), edited_tensors(source, structure)
                )
                straight = original
                if plan.drops:
                    straight = load_streamed(
                        cls, source.model_path, model_of(unedited, spec.trust_remote_code)[1],
                        plain_sources(*unfolded), edited_tensors(*unfolded),
                    )  # fmt: skip
                _judge_edits(_outputs(edited, batch.inputs), _outputs(straight, batch.inputs), outcome)
                del edited, straight
            trim()
        if not outcome.ok:
            return
        quality.add(batch, _outputs(original, batch.inputs), got)
        if cached is not None:
            logits = outputs_with_cache(packed, formats, batch.inputs)
            if logits is None:
                cached = None
            else:
                cached.add(batch, got, {**got, "logits": logits})
        step(len(batches) + 1 + index, 2 * len(batches))
    outcome.evaluations += 1
    outcome.quality, outcome.measured_on = quality.result(spec.seed)
    if formats:
        outcome.cache = cache_facts(packed, formats)
    if cached is not None:
        outcome.evaluations += 1
        figures, _ = cached.result(spec.seed)
        outcome.quality |= {f"cache: {name}": figures[name] for name in ("kl", "top1_agreement") if name in figures}
    found, on = retrieval_quality(Path(spec.written), original, structure.parameters, spec.seed, spec.queries)
    outcome.quality |= found
    outcome.measured_on |= on
    if spec.sample and hasattr(packed, "generate") and packed.can_generate():
        outcome.samples = _samples(source, batches, original, packed)


def _model_directory(written: str) -> Path:
    return Checkpoint.open(written).model_path


def _outputs(model: torch.nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every float tensor of a forward's output, by name; hidden states and caches left out."""
    result = model(**inputs, return_dict=True)
    skipped = ("past_key_values", "cache_params", "hidden_states", "attentions", "loss")
    return {
        name: value.float()
        for name, value in result.items()
        if isinstance(value, Tensor) and value.is_floating_point() and name not in skipped
    }


def _judge(got: dict[str, Tensor], expected: dict[str, Tensor], outcome: Outcome) -> None:
    """Equal within :data:`TOLERANCE`, all finite."""
    if not got or got.keys() != expected.keys():
        outcome.problems.append(f"the reloaded model gives {sorted(got)}, the reference {sorted(expected)}")
    for name, value in got.items():
        if not torch.isfinite(value).all():
            outcome.problems.append(f"the reloaded model's {name} hold NaN or Inf")
            return
        error = _relative(value, expected[name])
        outcome.logits_error = max(outcome.logits_error, error)
        if not error <= TOLERANCE:
            outcome.problems.append(
                f"the reloaded model's {name} differ from the reference by {error:.2e} relative "
                f"(allowed {TOLERANCE:.0e})"
            )


def _judge_edits(got: dict[str, Tensor], expected: dict[str, Tensor], outcome: Outcome) -> None:
    """The edits alone left the function as it was, but for the rounding of gains and biases to the source's dtype."""
    for name, value in got.items():
        error = _relative(value, expected[name])
        outcome.edits_error = max(outcome.edits_error or 0.0, error)
        if not error <= EDIT_TOLERANCE:
            outcome.problems.append(
                f"the edits before rounding changed the model's {name} by {error:.2e} relative (allowed "
                f"{EDIT_TOLERANCE:.0e})"
            )


def _relative(value: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest magnitude expected."""
    return float((value - expected).abs().max()) / max(float(expected.abs().max()), 1e-30)


SAMPLES, SAMPLE_TOKENS = 3, 32
SAMPLE_PROMPT = 32
"""Tokens of a document that are continued, at most."""
SAMPLED_BELOW = 300_000_000
"""Parameters up to which text is generated: the source's side of it streams every weight for every token."""


def _samples(source: Checkpoint, batches: Sequence[HeldOut], original: Any, packed: Any) -> list[dict[str, str]]:
    """Greedy continuations by the source and by the result of how documents begin that no solver saw."""
    tokenizer = load_tokenizer(source)
    if tokenizer is None or original.config.is_encoder_decoder:
        return []
    vocabulary = min(original.config.get_text_config().vocab_size, len(tokenizer))
    beginnings: dict[tuple[int, ...], None] = {}
    for batch in batches:
        if set(batch.inputs) - {"input_ids", "attention_mask"}:
            continue  # a text with images is not continued without them
        every = batch.inputs["input_ids"]
        mask = torch.ones_like(every) if batch.mask is None else batch.mask
        for row, own in zip(every, mask.bool(), strict=True):
            ids = row[own].tolist()
            if len(ids) >= 4 and max(ids) < vocabulary:
                beginnings[tuple(ids[: min(SAMPLE_PROMPT, len(ids) // 2)])] = None
    chosen = list(beginnings)[:SAMPLES]
    if not chosen:
        return []
    prompts = torch.tensor([ids[: min(map(len, chosen))] for ids in chosen])  # of one length: no padding, one batch
    written = []
    for model in (original, packed):
        out = model.generate(
            input_ids=prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=SAMPLE_TOKENS, do_sample=False,
            pad_token_id=tokenizer.eos_token_id or 0,
        )  # fmt: skip
        written.append([tokenizer.decode(row[prompts.shape[1] :], skip_special_tokens=True) for row in out])
    return [
        {"prompt": tokenizer.decode(prompt), "before": before, "after": after}
        for prompt, before, after in zip(prompts, *written, strict=True)
    ]


def logits_width(structure: Structure) -> int:
    """Columns of the logits: rows of the head, its own or tied to the embedding; 1 for a model without one."""
    owners = {structure.ties.get(name, name) for name, role in structure.roles.items() if role == "head"}
    owners |= set(structure.ties.values())
    return max([structure.sites[name].rows for name in owners if name in structure.sites], default=1)


def spare_bytes(cap: int | None) -> int:
    """What the logits of the models that are compared may take of a job's memory."""
    return max(64 << 20, min((cap or 0) // 4, 1 << 30))


def tokens_for(parameters: int, vocabulary: int, free: int, asked: int | None = None) -> tuple[int, int]:
    """(tokens in all, tokens of one forward) for the quality: fewer for larger models, logits within a share of memory.

    Args:
        parameters: of the model.
        vocabulary: size of the logits.
        free: bytes that the logits of three models may take.
        asked: how many tokens the user wants.
    """
    total = asked or int(min(16384, max(128, 2e11 / max(1, parameters))))
    batch = int(min(4096, max(64, free / (16 * max(1, vocabulary)))))
    return total, min(batch, total)


def main(argv: list[str]) -> int:
    """Run a spec file; exit 0 if the outcome was written, whatever it says."""
    spec = Spec(**json.loads(Path(argv[1]).read_text()))

    def step(done: int, total: int) -> None:
        if spec.progress:
            print(json.dumps({"done": done, "total": total}), flush=True)

    transformers.utils.logging.disable_progress_bar()
    try:
        outcome = verify(spec, step, "fresh process")
    except SlimwrightError as error:
        outcome = Outcome("fresh process", [str(error)])
    Path(spec.result).write_text(json.dumps({**asdict(outcome), "ok": outcome.ok}))
    return 0 if math.isfinite(outcome.logits_error) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv))
