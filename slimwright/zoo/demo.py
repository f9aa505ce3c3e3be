"""``make demo``: the main job on the bundled language model and on a real encoder, with a table and two reports."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported; see cli.py

from rich.console import Console

from slimwright.checkpoint import Checkpoint
from slimwright.errors import InputError, SlimwrightError
from slimwright.job.fit import FitReport, fit
from slimwright.report import terminal_table
from slimwright.zoo import bundled_path, minilm_path

DIRECTORY = Path("demo")
TOKENS = 8192
"""To calibrate on: an eighth of what fit would take, so that the demo stays short."""


def main() -> int:
    """Fit both models to a quarter of their bytes; print what came of it."""
    console = Console()
    models = {"bundled-lm": bundled_path()}
    try:
        models["all-MiniLM-L6-v2"] = minilm_path()
    except InputError as error:
        console.print(f"Only the bundled model is fitted: {error}", highlight=False)
    reports: list[FitReport] = []
    for name, path in models.items():
        quarter = Checkpoint.open(path).total_bytes // 4
        out = DIRECTORY / name
        if out.exists():
            shutil.rmtree(out)
        command = f"slimwright fit {name} --size {quarter / 1e6:.2f}MB --calibration-tokens {TOKENS} --out {out}"
        console.print(f"[bold]{command}[/bold]", highlight=False, soft_wrap=True)
        reports.append(fit(str(path), str(out), size=str(quarter), calibration_tokens=TOKENS))
    for report in reports:
        console.print(terminal_table(report.data))
    for report in reports:
        assert report.out is not None
        console.print(f"Report: {report.out / 'report.html'}", highlight=False, soft_wrap=True)
    console.print(
        f"Load the last one with:\n{reports[-1]['how_to_load']}", highlight=False, markup=False, soft_wrap=True
    )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SlimwrightError as failure:
        print(f"slimwright: {failure}", file=sys.stderr)
        sys.exit(failure.exit_code)
