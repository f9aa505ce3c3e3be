"""The registry of methods, their knobs, and the bases they subclass (DESIGN §5).

A method is one frozen dataclass in one file. Its knobs are fields made by :func:`knob`, which carries the range; a bad
value is refused when the method is made. ``slimwright.method("quantize/rtn", grid=...)`` makes one by name.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import pkgutil
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from slimwright.calibrate.site_statistics import SiteStatistics
from slimwright.errors import InputError, did_you_mean
from slimwright.weights import Compressed, Form, Grid, parse_grid

M = TypeVar("M", bound="type[Method]")
Made = TypeVar("Made", bound="Method")
_METHODS: dict[str, type[Method]] = {}
_PACKAGE = "slimwright.methods"


def knob(
    default: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[Any, ...] | None = None,
    help: str = "",
    per_model: bool = False,
) -> Any:
    """A dataclass field with a range (inclusive) or a set of choices, checked when the method is made.

    A value must have the default's type; text is converted, so that knobs can come from a command line. With
    ``default=None`` the value may be None or of the type of ``low`` or of the choices, one of which must be given.
    A knob ``per_model`` also takes a sequence with one value a model (in text: ``0.3:0.7``), kept as a tuple.

    Where the common name of a knob is a word of Python, the field has an underscore behind it (``lambda_``), which
    nobody outside the class need write.
    """
    if default is None and low is None and not choices:
        raise TypeError("A knob whose default is None needs low or choices, which say its type.")
    rule = {"low": low, "high": high, "choices": choices, "help": help, "per_model": per_model}
    return dataclasses.field(default=default, metadata=rule)


def _checked(name: str, field: dataclasses.Field[Any], value: Any) -> Any:
    rule = field.metadata
    default: Any = field.default
    where = f"{name}: knob '{knob_name(field)}'"
    if rule.get("per_model"):
        if isinstance(value, str) and ":" in value:
            value = value.split(":")
        if isinstance(value, (list, tuple)) and value:
            single = dataclasses.field(default=default, metadata={**rule, "per_model": False})
            single.name = field.name
            return tuple(_checked(name, single, item) for item in value)
    if isinstance(default, Grid):
        if isinstance(value, str):
            return parse_grid(value)
        if not isinstance(value, Grid):
            raise InputError(f"{where} takes a grid such as int4:g128, not {value!r}.")
        return value
    if default is None and (value is None or (isinstance(value, str) and value.lower() == "none")):
        return None
    # A knob that may be None has the type of its lower end or of its choices.
    kind: Any = type(default) if default is not None else type(next(iter(rule["choices"] or ()), rule["low"]))
    wanted = "a number" if kind is float else "a whole number" if kind is int else kind.__name__
    if isinstance(value, str) and kind is not str:  # from a command line
        try:
            value = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
        except (KeyError, ValueError, TypeError):
            raise InputError(f"{where} takes {wanted}, not {value!r}.") from None
    if kind is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise InputError(f"{where} takes {wanted}, not {value!r}.")
    if rule["choices"] is not None and value not in rule["choices"]:
        hint = did_you_mean(str(value), map(str, rule["choices"]), 0.4)
        raise InputError(f"{where} takes one of {', '.join(map(str, rule['choices']))}, not {value!r}{hint}")
    low, high = rule["low"], rule["high"]
    if (low is not None and value < low) or (high is not None and value > high):
        low, high = "-inf" if low is None else low, "inf" if high is None else high
        raise InputError(f"{where} is {value!r}; it must lie in [{low}, {high}].")
    return value


def knob_name(field: dataclasses.Field[Any]) -> str:
    """The name that users write: the field's, without the underscore that tells it from a word of Python."""
    return field.name.rstrip("_")


class Method(ABC):
    """Base of all methods: frozen dataclasses whose fields are knobs."""

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    family: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]] = ()
    """Statistics that must be there, by name (``gram``); empty: works without data."""
    of_form: ClassVar[tuple[str, ...]] = ()
    """Knobs beside grids that belong to the form of the result, and so are not in the method's spec."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            object.__setattr__(self, field.name, _checked(self.name, field, getattr(self, field.name)))

    def check_statistics(self, stats: SiteStatistics, columns: int) -> None:
        """Refuse statistics that lack what the method needs, or are of another number of inputs."""
        for need in self.needs:
            statistic = getattr(stats, need)
            if statistic is None:
                raise InputError(f"{self.name} needs the statistic '{need}': give data.")
            if statistic.shape[-1] != columns:
                seen = statistic.shape[-1]
                raise InputError(f"{self.name}: the {need} is of {seen} inputs, the weight has {columns}.")

    @property
    def spec(self) -> str:
        """The method in writing: its name and the knobs that differ from their defaults, those of the form left out."""
        words = [self.name]
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if not isinstance(value, Grid) and value != field.default and field.name not in self.of_form:
                text = ":".join(map(str, value)) if isinstance(value, tuple) else value
                words.append(f"{knob_name(field)}={text}")
        return ",".join(words)

    @classmethod
    def per_model_knobs(cls) -> tuple[str, ...]:
        """Fields that take one value a model."""
        return tuple(field.name for field in dataclasses.fields(cls) if field.metadata.get("per_model"))  # type: ignore[arg-type]


class WeightSolver(Method):
    """Puts one weight on a grid, or into another form. Subclasses are frozen dataclasses with a ``grid`` knob."""

    family = "quantize"
    grid: Grid
    row_independent: ClassVar[bool] = True
    """Whether solving a tile of rows gives the rows of solving the whole matrix (given ``stats.survey``)."""
    before: ClassVar[tuple[str, ...]] = ()
    """Specs of the folds that belong to the method: what is done to a model first unless the user says otherwise."""

    @property
    def form(self) -> Form:
        """The form of what :meth:`solve` returns."""
        return self.grid

    @classmethod
    def knobs_for(cls, form: Form) -> dict[str, Any] | None:
        """The knobs with which it gives a form, or None if it cannot."""
        return {"grid": form} if isinstance(form, Grid) else None

    @abstractmethod
    def solve(self, weight: Tensor, stats: SiteStatistics) -> Compressed:
        """Compress ``weight`` (out, in), any float dtype, computing in float32.

        Raises:
            InputError: the grid cannot hold this shape, a statistic in ``needs`` is missing, or NaN or Inf.
        """

    def for_role(self, role: str) -> WeightSolver:
        """The solver for a site of this role, for methods that treat some of them differently."""
        return self

    @property
    def weighting(self) -> Any:
        """How tokens count in its Grams (:class:`slimwright.methods.token_weights.TokenWeighting`); None: all alike."""
        return None

    def expected_gain(self, stats: SiteStatistics, directions: Tensor | None = None) -> float:
        """The error expected of this solver, relative to plain rounding's on the same grid and data: where the
        statistics keep anything apart, solved without it.

        Args:
            directions: (n, in) what errors of the weight are multiplied with to tell their cost, of what is apart, if
                anything is; None: the inputs.
        """
        return 1.0

    def solve_apart(self, weight: Tensor, stats: SiteStatistics) -> Compressed | None:
        """:meth:`solve` for some rows (n, in) of a weight, without what the statistics keep apart, to be judged on it;
        None of a solver whose :meth:`expected_gain` says all there is to say."""
        return None

    def prepare(self, stats: SiteStatistics) -> None:
        """Compute what solving any rows with these statistics needs, so that it is done once, on all threads."""
        return

    def checked(self, weight: Tensor, stats: SiteStatistics) -> tuple[Tensor, Any]:
        """The weight in float32 and the grid's survey, after the checks that every solver makes."""
        weight = self.checked_weight(weight, stats)
        return weight, self.grid.survey(weight) if stats.survey is None else stats.survey

    def checked_weight(self, weight: Tensor, stats: SiteStatistics) -> Tensor:
        """The weight in float32, after these checks."""
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
            raise InputError(f"{self.name} takes a tensor of floats, not {kind}.")
        if weight.ndim != 2 or not weight.numel():
            raise InputError(f"{self.name} takes a weight (out, in), not one of shape {tuple(weight.shape)}.")
        reason = self.form.misfit(tuple(weight.shape))
        if reason:
            what = "The grid" if isinstance(self.form, Grid) else "The form"
            raise InputError(f"{what} {self.form} cannot hold a weight of {tuple(weight.shape)}: {reason}.")
        self.check_statistics(stats, weight.shape[1])
        weight = weight.detach().float()
        low, high = weight.aminmax()  # NaN and Inf come through: one pass instead of isfinite's three
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise InputError("The weight holds NaN or Inf.")
        return weight


SITES = {"all": ("norm", "v_o", "up_down"), "norms": ("norm",)}
"""Fold groups that a fold may be confined to: all, or only norms with the linears behind them."""


class ModelFold(Method):
    """Changes a model's weights but not its function, before they are put on grids: a :class:`GroupFold`, or a
    :class:`slimwright.methods.rotation.RotationFold`."""

    family = "fold"


class GroupFold(ModelFold):
    """Moves a scale from a producer to its consumers, which changes what a solver loses but not the function.
    :mod:`slimwright.methods.folding` has what folds share and what applies them to a model."""

    sites: str
    """A knob of every fold: :data:`SITES`."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of fold groups (:class:`slimwright.model.structure.FoldGroup`) that it works on."""
        return SITES[self.sites]

    def candidates(self) -> tuple[GroupFold, ...]:
        """Variants of which a whole model takes the one that loses least over all its groups (:func:`slimwright.methods
        .folding.chosen`); most folds have no choice to make there."""
        return (self,)

    @property
    def trials(self) -> int:
        """How often a model's weights are rounded to find its scales."""
        return len(self.candidates()) if len(self.candidates()) > 1 else 0

    @abstractmethod
    def scales(
        self, weights: Sequence[Tensor], stats: SiteStatistics, solver: WeightSolver, channels: Tensor | None = None
    ) -> Tensor:
        """The factors for the consumers' columns; the producer is divided by them.

        Args:
            weights: all consumers, (out, in) each, any float dtype.
            stats: of their common input.
            solver: what will put the consumers on a grid.
            channels: (in,) int64, which channel of the producer each input reads; None is each its own.

        Returns:
            (in,) float32, positive, equal for inputs of one channel.

        Raises:
            InputError: shapes that do not fit, a statistic in ``needs`` is missing, or NaN or Inf.
        """

    def checked(self, weights: Sequence[Tensor], stats: SiteStatistics, channels: Tensor | None) -> list[Tensor]:
        """The weights in float32, after the checks that every fold makes."""
        if not weights or any(weight.ndim != 2 or not weight.is_floating_point() for weight in weights):
            raise InputError(f"{self.name} takes one or more float weights (out, in).")
        columns = weights[0].shape[1]
        if any(weight.shape[1] != columns for weight in weights):
            raise InputError(f"{self.name}: the weights do not have the same inputs.")
        if channels is not None and channels.shape != (columns,):
            raise InputError(
                f"{self.name}: channels are given for {channels.numel()} inputs, the weights have {columns}."
            )
        found = [weight.detach().float() for weight in weights]
        if not all(torch.isfinite(weight).all() for weight in found):
            raise InputError("The weight holds NaN or Inf.")
        self.check_statistics(stats, columns)
        return found


def register(name: str, *, paper: str) -> Callable[[M], M]:
    """Class decorator: makes a method known under ``name`` (``family/method``)."""

    def decorate(cls: M) -> M:
        cls.name, cls.paper = name, paper
        _METHODS[name] = cls
        return cls

    return decorate


@functools.cache
def _load_all() -> None:
    import slimwright.methods as package

    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)


def _load(name: str) -> None:
    """Import the file that a method is named after, if there is one: importing all files takes ten times as long."""
    module = f"{_PACKAGE}.{name.replace('/', '.')}"
    if not re.fullmatch(r"[a-z0-9_]+/[a-z0-9_]+", name):
        return
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not str(error.name).startswith(_PACKAGE):
            raise


def methods() -> dict[str, type[Method]]:
    """All registered methods by name."""
    _load_all()
    return dict(sorted(_METHODS.items()))


def method_class(name: str) -> type[Method]:
    """The class registered as ``name``.

    Raises:
        InputError: unknown, with the nearest name.
    """
    if name not in _METHODS:
        _load(name)
    known = _METHODS if name in _METHODS else methods()
    if name not in known:
        raise InputError(f"Unknown method '{name}'{did_you_mean(name, known)} Known: {', '.join(known)}.")
    return known[name]


def method(name: str, **knobs: Any) -> Any:
    """Make a method by name, e.g. ``method("quantize/rtn", grid=Int(4, group=128))``.

    Raises:
        InputError: unknown method or knob (with the nearest name), or a knob out of its range.
    """
    return with_knobs(method_class(name), knobs)


def with_knobs(cls: type[Made], knobs: Mapping[str, Any]) -> Made:
    """A method of a class from its knobs by the names that users write.

    Raises:
        InputError: an unknown knob (with the nearest name), or one out of its range.
    """
    fields = {knob_name(field): field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    known = list(fields)
    fields |= {name: name for name in fields.values()}  # lambda_ is how Python can write lambda
    for given in knobs:
        if given not in fields:
            has = f" It has: {', '.join(known)}." if known else " It has none."
            raise InputError(f"{cls.name} has no knob '{given}'{did_you_mean(given, known)}{has}")
    return cls(**{fields[given]: value for given, value in knobs.items()})


def solver_for(spec: str, form: Form) -> WeightSolver:
    """The solver that a spec writes, for a form.

    Raises:
        InputError: as :func:`parse_method`, it is no solver, or one that does not give this form.
    """
    cls = method_class(spec.partition(",")[0].strip())
    if not issubclass(cls, WeightSolver):
        raise InputError(f"'{spec}' is not a method that puts weights on a grid.")
    knobs = cls.knobs_for(form)
    if knobs is None:
        raise InputError(f"{cls.name} does not give {form}: `slimwright methods {cls.name}` says what it does.")
    solver: WeightSolver = parse_method(spec, **knobs)
    return solver


def parse_method(spec: str, **knobs: Any) -> Any:
    """Read ``quantize/rtn,clip=mse`` (what :attr:`Method.spec` writes) and make the method."""
    name, given = split_spec(spec)
    if twice := [key for key in given if key in knobs]:
        raise InputError(f"'{spec}': the knob '{twice[0]}' is given twice.")
    return method(name, **knobs, **given)


def split_spec(spec: str) -> tuple[str, dict[str, str]]:
    """The name and the knobs of ``name,knob=value,...``.

    Raises:
        InputError: a part that is no ``knob=value``, or a knob that is given twice.
    """
    name, *words = spec.split(",")
    knobs: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise InputError(f"'{spec}': '{word}' is not of the form knob=value.")
        if key.strip() in knobs:
            raise InputError(f"'{spec}': the knob '{key.strip()}' is given twice.")
        knobs[key.strip()] = value.strip()
    return name.strip(), knobs
