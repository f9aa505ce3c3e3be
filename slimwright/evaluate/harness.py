"""Tasks of lm-evaluation-harness (EleutherAI, the package `lm-eval`), where it is installed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from slimwright.errors import InputError
from slimwright.evaluate.table import Table

PACKAGE = "lm_eval"


def require_harness() -> None:
    """InputError, with the command that installs it, if the package is not there."""
    if find_spec(PACKAGE) is None:
        raise InputError("--tasks needs lm-evaluation-harness: install it with `pip install lm-eval`.")


def run_tasks(model: Any, tokenizer: Any, tasks: Sequence[str], limit: int | None, seed: int) -> dict[str, Table]:
    """Run tasks on a causal model.

    Args:
        model: a causal language model of transformers.
        tokenizer: its own.
        tasks: names of tasks, or YAML files that define one.
        limit: documents of each task; None: all.
        seed: of the few-shot examples.

    Returns:
        By task, one row per document with a column per metric.

    Raises:
        InputError: the package is missing, or a task is not known or has no data here.
    """
    require_harness()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    files = [Path(task).resolve() for task in tasks if task.endswith((".yaml", ".yml"))]
    try:
        manager = TaskManager(include_path=[str(folder) for folder in sorted({file.parent for file in files})] or None)
        found = simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer), tasks=[_name(task) for task in tasks], task_manager=manager,
            limit=limit, log_samples=True, bootstrap_iters=0, random_seed=seed, numpy_random_seed=seed,
            torch_random_seed=seed, fewshot_random_seed=seed,
        )  # fmt: skip
    except (KeyError, ValueError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300].rstrip(".")
        raise InputError(f"The tasks {', '.join(tasks)} cannot be run here: {reason}.") from error
    return tables_of(found["samples"])


def tables_of(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Table]:
    """The harness's logged samples as tables: one row per document, one column per metric (``acc``; of a filter other
    than none ``exact_match,FILTER``, as the harness names them). Metrics that are no number per document are left out.

    Raises:
        InputError: a task has none that is.
    """
    made = {}
    for task, rows in samples.items():
        columns: dict[str, dict[str, float]] = {}
        for row in rows:
            chosen = str(row.get("filter") or "none")
            for metric in row["metrics"]:
                value = row.get(metric)
                if isinstance(value, (bool, int, float)):
                    name = metric if chosen == "none" else f"{metric},{chosen}"
                    columns.setdefault(name, {})[str(row["doc_id"])] = float(value)
        if not columns:
            raise InputError(f"The task '{task}' has no metric that is a number for each document.")
        names = list(next(iter(columns.values())))
        whole = {name: values for name, values in columns.items() if values.keys() == set(names)}
        made[task] = Table.of(names, **{n: [values[name] for name in names] for n, values in whole.items()})
    return made


def _name(task: str) -> str:
    """The name of a task; of a YAML file, what it says under ``task:``."""
    if not task.endswith((".yaml", ".yml")):
        return task
    try:
        found = re.search(r"^task:\s*[\"']?([^\s\"'#]+)", Path(task).read_text(), re.MULTILINE)
    except (OSError, UnicodeDecodeError):
        raise InputError(f"The task file {task} is not there or is not text.") from None
    if not found:
        raise InputError(f"The task file {task} has no line `task: NAME`.")
    return found[1]
