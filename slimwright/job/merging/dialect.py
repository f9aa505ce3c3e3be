"""mergekit's merge methods in our terms: which method of ours, with which definitions, defaults and parameters.

A configuration in mergekit's form means what mergekit 0.1.5 does, except that all arithmetic is in float32 and cast
once (mergekit computes some methods in the stored dtype). Our own form means what the papers say; docs/merging.md
lists every difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from slimwright.errors import InputError
from slimwright.job.merging.parameters import nearest

REQUIRED = object()
"""A parameter without a default."""


@dataclass(frozen=True)
class MergekitMethod:
    """One of mergekit's methods.

    Attributes:
        name: mergekit's.
        method: ours.
        parameters: those it takes, with mergekit's defaults.
        per_model: which of them have one value a model.
        fixed: knobs of ours that make our method mergekit's.
        knobs: further knobs from the values of all parameters.
        base_is_input: whether the base is one of the models that are merged (and has its own per-model parameters).
        differs: what mergekit does otherwise than the paper, for the plan.
    """

    name: str
    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    per_model: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    knobs: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda values: {}
    base_is_input: bool = False
    differs: str = ""


NO_OPS = {
    "int8_mask": "it changes mergekit's memory only",
    "residual_weight": "mergekit ignores it too",
    "name": "the result is named by --out",
    "write_model_card": "a model card is always written",
    "copy_tokenizer": "the tokenizer is always copied",
    "safe_serialization": "weights are always written as safetensors",
    "lazy_unpickle": "pickles are not read",
    "low_cpu_memory": "memory is always bounded; --job-memory sets the bound",
    "cuda": "merging is bound by the disk and runs on the CPU",
    "device": "merging is bound by the disk and runs on the CPU",
    "gpu_rich": "merging is bound by the disk and runs on the CPU",
    "multi_gpu": "merging is bound by the disk and runs on the CPU",
    "read_to_gpu": "merging is bound by the disk and runs on the CPU",
    "clone_tensors": "repeated layers are always written as tensors of their own",
    "async_write": "reading, computing and writing always overlap",
    "write_threads": "reading, computing and writing always overlap",
    "num_threads": "OMP_NUM_THREADS sets the threads",
    "lora_merge_cache": "adapters are applied tile by tile, nothing is cached",
    "lora_merge_dtype": "adapters are applied in float32",
    "transformers_cache": "HF_HOME says where the hub's cache is",
    "verbosity": "events.jsonl has the details",
    "quiet": "--json keeps stdout clean",
}
"""mergekit's keys and options that change nothing here, and why."""


def _is_true(value: Any) -> bool:
    """A switch, as YAML or text has it."""
    if isinstance(value, str):
        return value.strip().lower() in ("true", "1", "yes", "on")
    return bool(value)


def _mean_or_sum(values: Mapping[str, Any]) -> dict[str, Any]:
    return {"agg": "mean" if _is_true(values["normalize"]) else "sum", **_l1_or_none(values)}


def _l1_or_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {"rescale": "l1" if _is_true(values["rescale"]) else "none"}


def _arithmetic(normalize: bool, rescale: bool, **more: Any) -> dict[str, Any]:
    return {
        "weight": REQUIRED, "lambda": 1.0, "normalize": normalize, "rescale": rescale, "density": 1.0,
        "int8_mask": False, **more,
    }  # fmt: skip


_L1 = "what is kept is rescaled to the tensor's own sum of magnitudes, not by 1 / density"
_TABLE = (
    MergekitMethod(
        "linear", "merge/linear", {"weight": REQUIRED, "normalize": True}, ("weight",), base_is_input=True,
    ),
    MergekitMethod("slerp", "merge/slerp", {"t": REQUIRED}),
    MergekitMethod("passthrough", "merge/passthrough", {"scale": 1.0}, ("scale",), base_is_input=True),
    MergekitMethod(
        "task_arithmetic", "merge/task_arithmetic", _arithmetic(False, False), ("weight",),
        differs="lambda is 1 by default, not 0.3",
    ),
    MergekitMethod(
        "ties", "merge/ties", _arithmetic(True, False), ("weight", "density"),
        fixed={"granularity": "tensor", "majority": "plus"}, knobs=_mean_or_sum,
        differs="entries are trimmed within each tensor, not over the whole model; density is 1 by default; where the "
        "votes cancel the sign is plus",
    ),
    MergekitMethod(
        "dare_linear", "merge/dare", _arithmetic(False, True), ("weight", "density"), fixed={"consensus": "linear"},
        knobs=_l1_or_none, differs=_L1,
    ),
    MergekitMethod(
        "dare_ties", "merge/dare", _arithmetic(False, True), ("weight", "density"), fixed={"consensus": "ties"},
        knobs=_l1_or_none, differs=_L1 + "; what agrees is summed, not averaged",
    ),
    MergekitMethod(
        "nuslerp", "merge/nuslerp", {"weight": REQUIRED, "nuslerp_row_wise": False, "nuslerp_flatten": True},
        ("weight",),
        knobs=lambda v: {"flatten": _is_true(v["nuslerp_flatten"]), "row_wise": _is_true(v["nuslerp_row_wise"])},
    ),
    MergekitMethod(
        "multislerp", "merge/multislerp", {"weight": REQUIRED, "normalize_weights": True, "eps": 1e-8}, ("weight",),
    ),
    MergekitMethod("karcher", "merge/karcher", {"max_iter": 10, "tol": 1e-5}, base_is_input=True),
    MergekitMethod(
        "della", "merge/della", _arithmetic(True, True, epsilon=0.15), ("weight", "density", "epsilon"),
        fixed={"consensus": "ties"}, knobs=_l1_or_none, differs=_L1,
    ),
    MergekitMethod(
        "della_linear", "merge/della", _arithmetic(False, True, epsilon=0.15), ("weight", "density", "epsilon"),
        fixed={"consensus": "linear"}, knobs=_l1_or_none, differs=_L1,
    ),
    MergekitMethod(
        "breadcrumbs", "merge/breadcrumbs", _arithmetic(False, False, gamma=0.01), ("weight", "density", "gamma"),
        fixed={"consensus": "linear"}, knobs=_l1_or_none, differs="lambda and density are 1 by default",
    ),
    MergekitMethod(
        "breadcrumbs_ties", "merge/breadcrumbs", _arithmetic(False, False, gamma=0.01), ("weight", "density", "gamma"),
        fixed={"consensus": "ties"}, knobs=_l1_or_none, differs="lambda and density are 1 by default",
    ),
    MergekitMethod(
        "model_stock", "merge/model_stock", {"filter_wise": False}, fixed={"clamp": False},
        differs="the ratio is not clamped, so that opposed task vectors extrapolate beyond the base",
    ),
    MergekitMethod("sce", "merge/sce", {"int8_mask": False, "select_topk": 1.0}),
    MergekitMethod("arcee_fusion", "merge/arcee_fusion"),
    MergekitMethod("nearswap", "merge/nearswap", {"t": REQUIRED}),
    MergekitMethod("ram", "merge/ram", {"epsilon": 1e-5}),
    MergekitMethod("ramplus_tl", "merge/ram", {"r": 0.1, "alpha": 0.2, "epsilon": 1e-5}),
)  # fmt: skip

MERGEKIT: dict[str, MergekitMethod] = {method.name: method for method in _TABLE}

_INTO_KNOBS = ("normalize", "rescale", "int8_mask")
"""Parameters that a method's ``knobs`` turns into others, or that say nothing to it."""


def mergekit_method(name: str, where: str) -> MergekitMethod:
    """A method by mergekit's name.

    Raises:
        InputError: unknown, with the nearest.
    """
    if name not in MERGEKIT:
        raise InputError(
            f"{where}: unknown merge_method '{name}'{nearest(name, list(MERGEKIT))} Known: {', '.join(MERGEKIT)}."
        )
    return MERGEKIT[name]


def own_knobs(dialect: MergekitMethod, values: Mapping[str, Any], taken: set[str]) -> dict[str, Any]:
    """Our knobs for mergekit's parameters of one tensor.

    Args:
        dialect: the method.
        values: every parameter's value; of those with one a model, a tuple.
        taken: the knobs that our method has.
    """
    knobs = {**dialect.fixed, **dialect.knobs(values)}
    for name, value in values.items():
        if name in taken and name not in knobs and value is not None:
            knobs[name] = _is_true(value) if name in _INTO_KNOBS else value
    return knobs
