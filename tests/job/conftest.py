"""Jobs on tiny models, in the process of the tests: a fresh verifying process costs seconds, and two tests have one."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from slimwright.checkpoint import faults
from slimwright.job import fit as job_fit
from slimwright.job import verify as verification
from slimwright.job import walk_forecast
from slimwright.job.fit import FitReport, fit
from slimwright.job.work import Work
from slimwright.zoo import bundled_path
from tests.families import cached
from tests.methods.bundled import with_outliers

PLAIN = "quantize/rtn,clip=none"
"""Rounding without the search for a range: these tests are about jobs, not about solvers."""


def verify_here(job: Work, held: Any, spec: verification.Spec, step: Callable[[int, int], None]) -> Any:
    """Stands for ``Work._verify_in_fresh_process``: the same verification, in this process."""
    return verification.verify(spec, step, "this process")


@pytest.fixture(scope="session", autouse=True)
def in_this_process() -> Iterator[None]:
    """Verify in this process, with few tokens; ``fresh_process`` undoes it for one test. The machine's rates are timed
    once for all jobs: a forecast's seconds are of no interest here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job_fit, "measure_rates", functools.cache(job_fit.measure_rates))
        for name in ("_multiply_rate", "_between_products", "_seconds_of_sums"):
            patch.setattr(walk_forecast, name, functools.cache(getattr(walk_forecast, name)))
        patch.setattr(Work, "_verify_in_fresh_process", verify_here)
        patch.setattr(verification, "tokens_for", lambda parameters, words, free, asked=None: (asked or 64, 64))
        yield


FRESH, TOKENS = Work._verify_in_fresh_process, verification.tokens_for


@pytest.fixture
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verify as users do."""
    monkeypatch.setattr(Work, "_verify_in_fresh_process", FRESH)


@pytest.fixture
def as_users_do(fresh_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verify in a fresh process, on as many tokens as users do."""
    monkeypatch.setattr(verification, "tokens_for", TOKENS)


def tiny(name: str = "qwen2") -> str:
    """A tiny checkpoint in bfloat16; never write to it."""
    return str(cached(name, torch.bfloat16))


def fitted(model: str, out: Path, **options: Any) -> FitReport:
    """``fit`` with plain rounding, without a word on stderr, and without what other jobs kept in the user's cache."""
    return fit(model, str(out), **{"method": PLAIN, "quiet": True, "statistics_cache": "off", **options})


def in_forked_child(job: Callable[[], object], **environment: str) -> int:
    """The exit status of a job in a forked child (137: killed by an injected crash)."""
    torch.set_num_threads(1)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.environ.update(environment)
            faults._reached.clear()
            job()
            status = 0
        except BaseException as error:
            os.write(2, repr(error).encode())
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def files(directory: Path) -> dict[str, bytes]:
    """Content of the weight files by name."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*.safetensors"))}


@pytest.fixture(scope="session")
def result(in_this_process: None, tmp_path_factory: pytest.TempPathFactory) -> FitReport:
    """A tiny Qwen2 at 40 %; never write to it."""
    return fitted(tiny(), tmp_path_factory.mktemp("result") / "out", size="40%")


@pytest.fixture(scope="session")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The bundled model with channels that are large in the activations and small in the weights: the same function."""
    from safetensors.torch import save_file

    directory = tmp_path_factory.mktemp("outliers")
    for file in bundled_path().iterdir():
        if file.suffix != ".safetensors":
            (directory / file.name).write_bytes(file.read_bytes())
    save_file(
        {name: tensor.contiguous() for name, tensor in with_outliers().items()},
        directory / "model.safetensors",
        {"format": "pt"},
    )
    return str(directory)
