"""A user's own metric: a command that gets a model's directory and prints a number last."""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from slimwright.errors import InputError, MetricError


def words(text: str) -> list[str]:
    """A command in writing, as a shell splits it.

    Raises:
        InputError: its quotes do not match, or it is empty.
    """
    try:
        found = shlex.split(text)
    except ValueError as error:
        raise InputError(f"The metric '{text}' is no command ({error}): quote it as in a shell.") from None
    if not found:
        raise InputError(f"The metric '{text}' is no command: it is empty.")
    return found


def measured(command: Sequence[str], model: Path, seconds: float | None = None) -> float:
    """The last number that a command prints about a model's directory.

    Args:
        seconds: after which it is stopped; None: never.

    Raises:
        InputError: it cannot be run. MetricError: it fails, takes longer, or prints no number last.
    """
    written = shlex.join(command)
    try:  # a session of its own, so that what it starts can be stopped with it
        child = subprocess.Popen(
            [*command, str(model)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
    except (OSError, ValueError) as error:  # a ValueError of a character that no command has
        why = getattr(error, "strerror", None) or error
        raise InputError(f"The metric {command[0]!r} cannot be run ({why}): name a command.") from error
    with child:
        try:
            printed, said = child.communicate(timeout=seconds)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise MetricError(
                    f"The metric '{written}' was stopped after {seconds:.0f} s: make it faster."
                ) from None
            if isinstance(error, UnicodeDecodeError):
                raise MetricError(f"The metric '{written}' gave no number for {model}: it prints no text.") from None
            raise
    last = (printed.strip().splitlines() or [""])[-1].split()
    try:
        value = float(last[-1])
    except (IndexError, ValueError):
        value = math.nan
    if child.returncode != 0 or not math.isfinite(value):
        why = (said.strip().splitlines() or ["no message"])[-1][:200]
        raise MetricError(f"The metric '{written}' gave no number for {model} (exit {child.returncode}: {why}).")
    return value
