"""Models of the zoo: trained when first asked for, kept in the cache, the same ever after.

A model's directory is a complete transformers checkpoint, and `.zoo.json` beside it: what was measured, in how many
seconds, with what. Its name in the cache ends in a hash of the recipe and of the code and the text that training
depends on, so that another version of either trains anew.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from slimwright.checkpoint import claim, job_key, write_bytes_atomic, write_json_atomic
from slimwright.checkpoint.files import read_json_object
from slimwright.checkpoint.publish import Claim, InUseError
from slimwright.errors import InputError, SlimwrightError, did_you_mean
from slimwright.job.cache import cache_directory
from slimwright.zoo import bundled_path
from slimwright.zoo.recipes import RECIPES, Recipe
from slimwright.zoo.training import SEED, Progress, bfloat16_products, environment, train

RECORD = ".zoo.json"  # hidden, so that no result made of the model inherits its figure
DECIDING_CODE = ("objectives.py", "recipes.py", "text.py", "tokens.py", "training.py")
SAVE_EVERY = 50
FREE_BYTES = 300_000_000  # what a training writes at most: its state twice, and the model


def trained(name: str, steps: int | None = None) -> Path:
    """The directory of a model of the zoo, which is trained if it is not in the cache.

    While another process trains it, this one waits. `steps` is for tests: a run so short that nothing is learned.

    Raises:
        InputError: an unknown name (with the nearest one), a cache that cannot be written, scikit-learn missing.
        SlimwrightError: the disk is full.
    """
    recipe = _recipe(name)
    steps = steps or recipe.schedule.steps
    key = _key(name, steps)
    out = cache_directory() / f"zoo-{name}-{key[:12]}"
    if (out / RECORD).is_file():
        return out
    _check_writable(out.parent)
    with _claimed(out, key, name) as held:
        if held.status != "finished":
            try:
                _train_into(held, name, recipe, steps)
                held.publish()
            except OSError as error:
                raise SlimwrightError(
                    f"{held.partial} cannot be written ({error.strerror}): free space, then ask again to resume."
                ) from error
    return out


def record(directory: Path) -> dict[str, Any]:
    """What `.zoo.json` says of a trained model: name, metric, value (and `before`, of a fine-tune), seconds, ..."""
    return read_json_object(directory, directory / RECORD, 1 << 20)


def cached(name: str) -> Path | None:
    """The directory of a model if it has been trained, else None."""
    key = _key(name, _recipe(name).schedule.steps)
    out = cache_directory() / f"zoo-{name}-{key[:12]}"
    return out if (out / RECORD).is_file() else None


def _recipe(name: str) -> Recipe:
    if name not in RECIPES:
        raise InputError(f"The zoo has no model '{name}'; it has {', '.join(RECIPES)}{did_you_mean(name, RECIPES)}")
    return RECIPES[name]


def _key(name: str, steps: int) -> str:
    code = hashlib.sha256(b"".join((Path(__file__).parent / file).read_bytes() for file in DECIDING_CODE)).hexdigest()
    start = None
    if RECIPES[name].fine_tune:
        start = hashlib.sha256((bundled_path() / "model.safetensors").read_bytes()).hexdigest()
    return job_key(zoo=name, steps=steps, code=code, start=start, text=platform.python_version())


def _check_writable(cache: Path) -> None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(cache).free
    except OSError as error:
        raise InputError(
            f"The cache {cache} cannot be made ({error.strerror}): set SLIMWRIGHT_CACHE to another directory."
        ) from error
    if not os.access(cache, os.W_OK | os.X_OK):
        raise InputError(f"The cache {cache} is not writable: set SLIMWRIGHT_CACHE to another directory.")
    if free < FREE_BYTES:
        raise InputError(
            f"The disk of the cache {cache} has {free / 1e6:.0f} MB free, and training needs {FREE_BYTES / 1e6:.0f}: "
            "free space, or set SLIMWRIGHT_CACHE to another directory."
        )


def _claimed(out: Path, key: str, name: str) -> Claim:
    """The claim of a model's directory, once no other process holds it."""
    told = False
    while True:
        try:
            return claim(out, key)
        except InUseError:
            if not told:
                print(f"{name}: another process is training it; waiting.", file=sys.stderr, flush=True)
                told = True
            time.sleep(0.5)


def _train_into(held: Claim, name: str, recipe: Recipe, steps: int) -> None:
    """Train, and write the whole checkpoint into the partial directory."""
    say = _Line(name)
    say("reading the text")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        objective = recipe.objective()
        model = recipe.model()
        objective.start(model)
    before = objective.figure(model.eval()) if recipe.fine_tune else None

    def loss(batch: Any) -> torch.Tensor:
        with bfloat16_products():
            return objective.loss(model, batch)

    progress = train(
        model,
        objective.batch,
        loss,
        recipe.schedule.of(steps),
        state_file=held.scratch / "training.pt",
        save_every=SAVE_EVERY,
        after_step=_teller(say, steps),
    )
    say("measuring on held-out data")
    nn.Module.to(model, recipe.dtype)
    model.save_pretrained(held.partial)
    objective.save(held.partial)
    written = type(model).from_pretrained(
        held.partial, dtype=torch.float32
    )  # with exact positions, which are not stored
    value = objective.figure(written.eval())
    facts = {
        "name": name,
        "description": recipe.description,
        "metric": objective.metric,
        "higher_is_better": objective.higher_is_better,
        "value": value,
        **({} if before is None else {"before": before}),
        "parameters": model.num_parameters(),
        "steps": steps,
        "seconds": round(progress.seconds, 1),
        "processor_seconds": round(progress.processor_seconds, 1),
        **environment(),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    write_bytes_atomic(held.partial / "README.md", _card(facts, model).encode())
    write_json_atomic(held.partial / RECORD, facts)
    say(f"{objective.metric} {value:.4f}, trained in {progress.seconds:.0f} s")
    say.end()


class _Line:
    """What is going on, on stderr: one line that changes on a terminal, elsewhere a line each time."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.changes = sys.stderr.isatty()

    def __call__(self, text: str) -> None:
        start, end = ("\r\x1b[K", "") if self.changes else ("", "\n")
        print(f"{start}{self._name}: {text}", end=end, file=sys.stderr, flush=True)

    def end(self) -> None:
        if self.changes:
            print(file=sys.stderr, flush=True)


def _teller(say: _Line, steps: int) -> Callable[[Progress, float], None]:
    """Says after a step how far training is and how long the rest takes: every step on a terminal, else every tenth
    of them."""

    def tell(progress: Progress, loss: float) -> None:
        if say.changes or progress.step * 10 // steps != (progress.step - 1) * 10 // steps:
            left = progress.seconds / progress.step * (steps - progress.step)
            say(f"step {progress.step} of {steps}, loss {loss:.3f}, about {left:.0f} s left")

    return tell


def _card(facts: dict[str, Any], model: PreTrainedModel) -> str:
    """The model card. Everything in the zoo is trained on this machine, so its card says on what and how far."""
    if facts["name"] == "vit":
        source = "scikit-learn's digits (UCI, Optical Recognition of Handwritten Digits, CC BY 4.0), a tenth held out"
    else:
        source = (
            f"the source and help topics of CPython {facts['python']}'s standard library (PSF License Agreement); "
            "a tenth of the documents is held out"
        )
    before = f" ({facts['before']:.4f} before)" if "before" in facts else ""
    return f"""---
license: apache-2.0
library_name: transformers
---
# {facts["name"]}, of Slimwright's zoo

{facts["description"]}. {type(model).__name__}, {facts["parameters"]:,} parameters, trained on this machine by
`python -m slimwright.zoo {facts["name"]}` to be compressed and measured, not to be used.

- **Data:** {source}.
- **Figure:** {facts["metric"]} {facts["value"]:.4f}{before}, after {facts["steps"]} steps in {facts["seconds"]:.0f} s.
"""
